"""The test bed: a small decoder trained on the generators of the evaluation, so that eviction shows."""
