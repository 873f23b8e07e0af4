"""Our own kernels for CPU, in C: compiled once on a machine that has a compiler, and everywhere else torch's own do the work."""
