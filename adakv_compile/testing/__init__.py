"""What a project's own tests use: assert that a model is compressed, and snapshot the rewritten graph."""

from __future__ import annotations

from adakv_compile.testing.snapshot import assert_compressed, graph_snapshot

__all__ = ["assert_compressed", "graph_snapshot"]
