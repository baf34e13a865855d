"""What eviction costs: needles, RULER and LongBench under several methods and budgets, in one resumable run.

Nothing here is imported with the package. :mod:`adakv_compile.cli` runs it as ``adakv eval``.
"""

from __future__ import annotations

from adakv_compile.evaluation.sample import Sample

__all__ = ["Sample"]
