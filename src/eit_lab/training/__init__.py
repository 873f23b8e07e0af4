"""Training: the LightningModule, the optimizer, what is watched while it runs, and the run from claim to result."""
