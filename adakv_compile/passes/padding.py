"""Emit a proved padding as what the operators take: ``[B or 1, L]`` booleans, true for real tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import sympy
import torch
from torch import fx

from adakv_compile.passes.masks import PaddingFact
from adakv_compile.passes.nodes import shape_of, static_int

__all__ = ["emit_padding"]

aten = torch.ops.aten
Emit = Callable[[Callable[..., Any], tuple[Any, ...]], fx.Node]

_RELATIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "eq": aten.eq.Scalar,
    "ne": aten.ne.Scalar,
    "lt": aten.lt.Scalar,
    "le": aten.le.Scalar,
    "gt": aten.gt.Scalar,
    "ge": aten.ge.Scalar,
}


def emit_padding(
    fact: PaddingFact, emit: Emit, columns: int | torch.SymInt, start: int | fx.Node | None = None
) -> fx.Node:
    """Add the nodes that compute the padding of ``columns`` mask columns, or of those from ``start`` on.

    Args:
        fact: What was proved.
        emit: Adds a call to the graph and returns it.
        columns: Columns of the mask, the number of keys attended to.
        start: First column wanted, counted from the end if negative: where a sliding cache cuts its keys.

    Raises:
        RuntimeError: The columns lie in the padding tensor at an offset that is no number.
    """
    if fact.holder is not None:
        node = _as_rows(fact.holder, emit, 2)
    else:
        node = _as_rows(fact.node, emit, 2 if fact.has_rows else 1)
        if not (node.meta["val"].dtype is torch.bool and (fact.relation, fact.value) == ("eq", True)):
            node = emit(_RELATIONS[fact.relation], (node, fact.value))
        node = _columns(node, fact.column_offset, columns, emit)
    return node if start is None else emit(aten.slice.Tensor, (node, 1, start))


def _columns(node: fx.Node, offset: sympy.Expr, columns: int | torch.SymInt, emit: Emit) -> fx.Node:
    count, width = static_int(columns), static_int(shape_of(node)[1])
    if offset == 0 and (count is None or width is None or count == width):
        return node
    if not offset.is_Integer or count is None:
        raise RuntimeError(f"the padding is read at the offset {offset} of {shape_of(node)[1]} columns")
    return emit(aten.slice.Tensor, (node, 1, int(offset), int(offset) + count))


def _as_rows(node: fx.Node, emit: Emit, rank: int) -> fx.Node:
    """Drop dimensions of size one, the last ones first, until ``rank`` are left; return ``[B or 1, n]``."""
    while len(shape_of(node)) > rank:
        sizes = shape_of(node)
        dim = next((d for d in reversed(range(len(sizes))) if static_int(sizes[d]) == 1), None)
        if dim is None:
            raise RuntimeError(f"the padding {node.name} has the shape {tuple(sizes)}")
        node = emit(aten.select.int, (node, dim, 0))
    return node if len(shape_of(node)) == 2 else emit(aten.unsqueeze.default, (node, 0))
