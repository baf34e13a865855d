"""Tensors that a model keeps and never changes, of which something can be said: causal masks as buffers, scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import fx

from adakv_compile.symbolic.expr import Expr, Float
from adakv_compile.symbolic.known import describe

__all__ = ["Constants"]

_MOST_ELEMENTS: Final = 2**26


class Constants:
    """Looks at the tensors of a model when somebody asks, and remembers which ones were relied on.

    What was relied on holds for the values that were seen: the caller of the compiled graph must check that they still
    are the same.

    Args:
        kept: Inputs of the graph that are attributes of modules, with their tensors.
    """

    def __init__(self, kept: Mapping[fx.Node, torch.Tensor]) -> None:
        self._kept = kept
        self._seen: dict[fx.Node, Expr | None] = {}

    @property
    def relied_on(self) -> tuple[fx.Node, ...]:
        """The inputs whose values were described to somebody."""
        return tuple(node for node, expr in self._seen.items() if expr is not None)

    def expression(self, node: fx.Node) -> Expr | None:
        """Return the element of an input as a function of its position, if it is known."""
        tensor = self._kept.get(node)
        if tensor is None or tensor.numel() > _MOST_ELEMENTS or tensor.is_inference():
            return None
        if node not in self._seen:
            self._seen[node] = describe(tensor)
        return self._seen[node]

    def number(self, node: fx.Node) -> float | None:
        """Return the value of an input that holds a single floating-point number."""
        tensor = self._kept.get(node)
        if tensor is None or tensor.numel() != 1:
            return None
        expr = self.expression(node)
        return expr.value if isinstance(expr, Float) else None
