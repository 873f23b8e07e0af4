"""Runs on a dashboard: a W&B workspace and report as code, and a local web view that needs no account. No torch."""
