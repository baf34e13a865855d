"""ATen operators that put tensors side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast

import sympy
import torch
from torch import fx

from adakv_compile.symbolic.expr import Compare, Expr, Iota, Size, Where, add, axes_of, substitute
from adakv_compile.symbolic.read import Handler, Reader, shape_of

__all__ = ["JOINING"]

aten = torch.ops.aten


def _cat(reader: Reader, node: fx.Node) -> Expr | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return _side_by_side(reader, node, dim) if isinstance(dim, int) else None


def _hstack(reader: Reader, node: fx.Node) -> Expr | None:
    return _side_by_side(reader, node, 1) if len(shape_of(node)) > 1 else _side_by_side(reader, node, 0)


def _vstack(reader: Reader, node: fx.Node) -> Expr | None:
    parts = node.args[0]
    if not isinstance(parts, Sequence) or any(len(shape_of(cast("fx.Node", part))) < 2 for part in parts):
        return None
    return _side_by_side(reader, node, 0)


def _side_by_side(reader: Reader, node: fx.Node, dim: int) -> Expr | None:
    parts = node.args[0]
    if not isinstance(parts, Sequence) or not parts:
        return None
    nodes = [cast("fx.Node", part) for part in parts]
    rank = len(shape_of(node))
    if any(len(shape_of(part)) != rank or part.meta["val"].dtype != node.meta["val"].dtype for part in nodes):
        return None
    axis = rank - 1 - dim % rank
    start: sympy.Expr = sympy.Integer(0)
    pieces: list[tuple[sympy.Expr, Expr]] = []
    for part in nodes:
        expr = reader.operand(part)
        if expr is None:
            return None
        # A part of size one doesn't mention the dimension.
        shifted = substitute(expr, {axis: add(Iota(axis), Size(start), -1)}) if axis in axes_of(expr) else expr
        length = reader.sizes.expr(shape_of(part)[dim % rank])
        if length != 0:
            pieces.append((start, shifted))
        start = reader.sizes.canonical(start + length)
    if not pieces:
        return None
    (begin, found), *before = reversed(pieces)
    for earlier, expr in before:
        found = Where(Compare("lt", Iota(axis), Size(begin)), expr, found)
        begin = earlier
    return found


JOINING: Final[Mapping[object, Handler]] = {
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.hstack.default: _hstack,
    aten.vstack.default: _vstack,
}
"""Handlers by operator."""
