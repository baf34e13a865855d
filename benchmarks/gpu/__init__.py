"""The kernels and the whole path on a GPU: ``python -m benchmarks.gpu``."""
