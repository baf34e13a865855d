"""ATen operators that move elements, as substitutions of the position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import sympy
import torch
from torch import fx

from adakv_compile.symbolic.expr import (
    Bool,
    Compare,
    Expr,
    Float,
    Iota,
    Load,
    Size,
    Where,
    add,
    axes_of,
    integer,
    kind_of,
    linear,
    scale,
    substitute,
)
from adakv_compile.symbolic.read import Handler, Reader, choices, shape_of

__all__ = ["MOVEMENT"]

aten = torch.ops.aten


def _source(reader: Reader, node: fx.Node) -> tuple[Expr, fx.Node] | None:
    first = node.args[0]
    if not isinstance(first, fx.Node):
        return None
    expr = reader.operand(first)
    return None if expr is None else (expr, first)


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _dimension(node: fx.Node, position: int, default: int, rank: int) -> int | None:
    dim = _argument(node, position, "dim", default)
    return dim % rank if isinstance(dim, int) and rank else None


def _reshape(reader: Reader, node: fx.Node) -> Expr | None:
    """Read a reshape that only adds and removes dimensions of size one; merging and splitting are not followed."""
    found = _source(reader, node)
    if found is None:
        return None
    expr, source = found
    old, new = _real_axes(source), _real_axes(node)
    if len(old) != len(new):
        return None
    if not all(reader.same(a, b) for (_, a), (_, b) in zip(old, new, strict=True)):
        return None
    return substitute(expr, {axis: Iota(moved) for (axis, _), (moved, _) in zip(old, new, strict=True)})


def _real_axes(node: fx.Node) -> list[tuple[int, int | torch.SymInt]]:
    """Return the dimensions that aren't of size one, from the last."""
    sizes = enumerate(reversed(shape_of(node)))
    return [(axis, size) for axis, size in sizes if not (isinstance(size, int) and size == 1)]


def _expand(reader: Reader, node: fx.Node) -> Expr | None:
    found = _source(reader, node)
    return found[0] if found is not None and reader.broadcasts(found[1], node) else None


def _permute(reader: Reader, node: fx.Node) -> Expr | None:
    found = _source(reader, node)
    if found is None:
        return None
    expr, source = found
    rank = len(shape_of(source))
    order = list(range(rank))
    if node.target is aten.permute.default:
        dims = node.args[1]
        if not isinstance(dims, Sequence) or not all(isinstance(dim, int) for dim in dims):
            return None
        order = [int(dim) % rank for dim in dims]  # pyright: ignore[reportArgumentType]
    elif node.target is aten.transpose.int:
        first, second = _dimension(node, 1, 0, rank), _dimension(node, 2, 1, rank)
        if first is None or second is None:
            return None
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return substitute(expr, {rank - 1 - old: Iota(rank - 1 - new) for new, old in enumerate(order)})


def _start(reader: Reader, value: object, size: int | torch.SymInt) -> sympy.Expr | None:
    """Return where a slice or a selection starts, when the sign of the index is known."""
    start = integer(0) if value is None else reader.operand(value)
    if not isinstance(start, Size):
        return None
    if reader.sizes.at_most(0, start.value):
        return start.value
    from_end = reader.sizes.canonical(reader.sizes.expr(size) + start.value)
    if reader.sizes.at_most(start.value, -1) and reader.sizes.at_most(0, from_end):
        return from_end
    return None


def _slice(reader: Reader, node: fx.Node) -> Expr | None:
    found = _source(reader, node)
    if found is None:
        return None
    expr, source = found
    shape = shape_of(source)
    dim, step = _dimension(node, 1, 0, len(shape)), reader.operand(_argument(node, 4, "step", 1))
    if dim is None or not isinstance(step, Size):
        return None
    start = _start(reader, _argument(node, 2, "start", None), shape[dim])
    if start is None:
        return None
    axis = len(shape) - 1 - dim
    return substitute(expr, {axis: add(Size(start), scale(Iota(axis), step.value))})


def _select(reader: Reader, node: fx.Node) -> Expr | None:
    found = _source(reader, node)
    if found is None:
        return None
    expr, source = found
    shape = shape_of(source)
    dim = _dimension(node, 1, 0, len(shape))
    start = None if dim is None else _start(reader, node.args[2], shape[dim])
    if dim is None or start is None:
        return None
    axis = len(shape) - 1 - dim
    outer: dict[int, Expr] = {old: Iota(old - 1) for old in range(axis + 1, len(shape))}
    return substitute(expr, {**outer, axis: Size(start)})


def _repeat(reader: Reader, node: fx.Node) -> Expr | None:
    """Read a repetition along dimensions of size one, which is an expansion."""
    found = _source(reader, node)
    return found[0] if found is not None and reader.broadcasts(found[1], node) else None


def _triangle(reader: Reader, node: fx.Node) -> Expr | None:
    found = _source(reader, node)
    if found is None:
        return None
    expr, _ = found
    diagonal = reader.operand(_argument(node, 1, "diagonal", 0))
    if not isinstance(diagonal, Size):
        return None
    zero = {"bool": Bool(False), "int": integer(0), "float": Float(0.0)}[kind_of(expr)]
    relation = "le" if node.target is aten.tril.default else "ge"
    return Where(Compare(relation, Iota(0), add(Iota(1), diagonal)), expr, zero)


def _gather(reader: Reader, node: fx.Node) -> Expr | None:
    """Read ``source[i, j, ...]`` with tensors of positions that are provably not negative."""
    found = _source(reader, node)
    indices = node.args[1]
    if found is None or not isinstance(indices, Sequence):
        return None
    expr, source = found
    shape, result = shape_of(source), shape_of(node)
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        return None
    tensors = [index for index in indices if isinstance(index, fx.Node)]
    if len(tensors) != len(given):
        return None
    broadcast_rank = max(len(shape_of(index)) for index in tensors)
    # The broadcast positions take the place of the indexed dimensions.
    behind = len(shape) - 1 - given[-1]
    if len(result) != given[0] + broadcast_rank + behind:
        return None
    moved = {axis: Iota(axis + behind) for axis in range(broadcast_rank)}
    positions: dict[int, Expr] = {}
    for dim in range(len(shape)):
        axis = len(shape) - 1 - dim
        if dim < given[0]:
            positions[axis] = Iota(len(result) - 1 - dim)
        elif dim <= given[-1]:
            index = tensors[dim - given[0]]
            position = reader.operand(index)
            if position is None or choices(position) > 1 or index.meta["val"].dtype not in (torch.int32, torch.int64):
                return None
            position = reader.simplify(substitute(position, moved))
            if not _is_never_negative(reader, position, result):
                return None
            positions[axis] = position
    return substitute(expr, positions)


def _index_select(reader: Reader, node: fx.Node) -> Expr | None:
    found = _source(reader, node)
    if found is None:
        return None
    expr, source = found
    dim, index = _dimension(node, 1, 0, len(shape_of(source))), node.args[2]
    position = reader.operand(index)
    if (
        dim is None
        or position is None
        or choices(position) > 1
        or not isinstance(index, fx.Node)
        or len(shape_of(index)) != 1
    ):
        return None
    axis = len(shape_of(source)) - 1 - dim
    position = substitute(position, {0: Iota(axis)})
    # A negative position is an error here, not one from the end.
    return substitute(expr, {axis: position})


def _is_never_negative(reader: Reader, expr: Expr, shape: Sequence[int | torch.SymInt]) -> bool:
    """Tell whether a position is provably at least zero everywhere in a tensor of a shape."""
    terms, lowest = linear(expr)
    for term, factor in terms.items():
        if isinstance(term, Load) and reader.leaves[term.leaf].node in reader.given and factor == 1:
            continue  # a position of which somebody makes sure
        if not isinstance(term, Iota) or term.axis >= len(shape):
            return False
        if reader.sizes.at_most(0, factor):
            continue
        if not reader.sizes.at_most(factor, 0):
            return False
        lowest = lowest + factor * (reader.sizes.expr(shape[len(shape) - 1 - term.axis]) - 1)
    return reader.sizes.at_most(0, lowest)


def _overwritten_slice(reader: Reader, node: fx.Node) -> Expr | None:
    """Read ``slice_scatter(old, new, dim, start, end)`` with step one."""
    found, new = _source(reader, node), reader.operand(node.args[1])
    replacement = node.args[1]
    if found is None or new is None or not isinstance(replacement, fx.Node):
        return None
    old, source = found
    shape = shape_of(source)
    dim, step = _dimension(node, 2, 0, len(shape)), _argument(node, 5, "step", 1)
    start = None if dim is None else _start(reader, _argument(node, 3, "start", None), shape[dim])
    if dim is None or start is None or step != 1:
        return None
    axis = len(shape) - 1 - dim
    length = reader.sizes.expr(shape_of(replacement)[dim])
    if axis in axes_of(new):
        new = substitute(new, {axis: add(Iota(axis), Size(start), -1)})
    inside = Compare("ge", Iota(axis), Size(start)), Compare("lt", Iota(axis), Size(start + length))
    return Where(inside[0], Where(inside[1], new, old), old)


_OPERATORS: Final[Mapping[Handler, tuple[object, ...]]] = {
    _reshape: (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    ),
    _expand: (aten.expand.default,),
    _permute: (aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default),
    _slice: (aten.slice.Tensor,),
    _select: (aten.select.int,),
    _repeat: (aten.repeat.default,),
    _triangle: (aten.tril.default, aten.triu.default),
    _gather: (aten.index.Tensor,),
    _index_select: (aten.index_select.default,),
    _overwritten_slice: (aten.slice_scatter.default,),
}

MOVEMENT: Final[Mapping[object, Handler]] = {
    target: handler for handler, targets in _OPERATORS.items() for target in targets
}
"""Handlers by operator."""
