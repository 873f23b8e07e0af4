"""Sweeps: each job in a process of its own, with its config frozen at launch."""
