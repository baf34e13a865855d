"""Analyses and rewrites of a captured graph, one per file; each says what it proves or why it refuses."""
