"""What eviction costs on the test bed: every method, budget and protocol, and the variants of a method."""
