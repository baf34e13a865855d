"""Benchmarks, test beds and demonstrations of the eviction backend."""
