"""Checks of the Triton kernels against float64 and against the portable ops, without pytest.

Each module holds ``CHECKS``, a table of functions of a :class:`~tests.kernels.checks.draw.Draw`. The tests run them in
Triton's interpreter where there is no GPU and natively where there is one; ``python -m benchmarks.gpu`` runs them
natively before it times anything, on machines that have nothing but PyTorch and Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from tests.kernels.checks.draw import Draw

__all__ = ["OPS", "checks_of"]

OPS = ("observe", "select", "compact", "decode_attention", "attend", "extend")


def checks_of(op: str) -> Mapping[str, Callable[[Draw], None]]:
    """Return the checks of an op by name."""
    return import_module(f"tests.kernels.checks.{op}").CHECKS
