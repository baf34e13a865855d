"""Time, memory and compilation of the whole path on a CPU: ``python -m benchmarks.cpu``."""
