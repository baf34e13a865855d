"""Tests of the benchmarks: what of them is no measurement."""
