"""Hyper-parameter search: trials are ordinary runs, Optuna says which come next, everything is on disk."""
