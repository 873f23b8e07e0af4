"""``bench profile``: where a training step's time goes, operator by operator, and the least time that the machine allows it."""
