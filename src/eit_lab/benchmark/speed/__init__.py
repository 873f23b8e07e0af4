"""``bench model``, ``bench step``, ``bench startup``: how fast the model, a training step and the first step are, beside others."""
