"""Training on many GPUs: a model in closed form, a simulation of the same machine, and what of both this machine can check."""
