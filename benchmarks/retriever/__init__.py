"""A small decoder that retrieves facts from long generated documents."""
