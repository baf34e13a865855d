"""Ada-KV's theory, measured: ``python -m benchmarks.theory``."""
