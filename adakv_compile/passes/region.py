"""Find what is computed from cached values position by position: the keys and values of a latent cache."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import fx

from adakv_compile.passes.axes import Axes
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.nodes import arg, same_size, shape_of, static_int

__all__ = ["TAKE_SIZES", "Region", "clone", "find_region", "operands_with"]

aten = torch.ops.aten

_SAME: Final = (
    aten.cos.default,
    aten.sin.default,
    aten.exp.default,
    aten.reciprocal.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.sigmoid.default,
)
_POINTWISE: Final = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.pow.Tensor_Tensor,
    aten.copy.default,
    aten.type_as.default,
)
_RESHAPES: Final = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)
_SPLITS: Final = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
TAKE_SIZES: Final = (aten.new_empty.default, aten.new_zeros.default, aten.expand.default, *_RESHAPES[:3])
"""Operators that are told the sizes of their result."""
_NORMS: Final = (aten.rms_norm.default, aten.layer_norm.default)


@dataclass(frozen=True)
class Region:
    """Values of which every position depends on the same position of the sources, and on nothing that has positions.

    Attributes:
        sources: The cached values, with the dimension of their sequence.
        nodes: What is computed from them, in order, with that dimension; None for tuples of such values.
        positional: What else is computed with, and depends on the position alone, with that dimension.
    """

    sources: Mapping[fx.Node, int]
    nodes: Mapping[fx.Node, int | None]
    positional: Mapping[fx.Node, int]


def find_region(
    results: Sequence[tuple[fx.Node, int]],
    is_source: Callable[[fx.Node, int], bool],
    is_positional: Callable[[fx.Node, int], bool] = lambda _node, _dim: False,
) -> Region | None:
    """Return what some values are computed from position by position, ``None`` if that isn't certain.

    Args:
        results: Values with the dimension of their sequence.
        is_source: Tells the cached values.
        is_positional: Tells values that depend on nothing but the position.
    """
    sources: dict[fx.Node, int] = {}
    positional: dict[fx.Node, int] = {}
    found: dict[fx.Node, int | None] = {}
    pending = list(results)
    while pending:
        node, dim = pending.pop()
        known = sources.get(node, found.get(node, positional.get(node)))
        if known is not None:
            if known != dim:
                return None
            continue
        if is_source(node, dim):
            sources[node] = dim
            continue
        if is_positional(node, dim):
            positional[node] = dim
            continue
        above = operands_with(node, dim)
        if above is None:
            return None
        found[node] = dim
        if node.target is operator.getitem:
            found[cast("fx.Node", node.args[0])] = None
        pending.extend(above)
    order = [node for node in results[0][0].graph.nodes if node in found]
    return Region(sources, {node: found[node] for node in order}, positional)


def clone(
    emit: Emitter, region: Region, sources: Mapping[fx.Node, fx.Node], length: int | fx.Node
) -> dict[fx.Node, fx.Node]:
    """Compute a region again from other sources; return what stands for each of its values.

    Args:
        emit: Adds the calls.
        region: What to compute.
        sources: What stands for its sources, and for what depends on the position alone.
        length: The length of their sequence.
    """
    made = dict(sources)
    for node, dim in region.nodes.items():
        args = list(fx.map_arg(node.args, lambda source: made.get(source, source)))
        if node.target in TAKE_SIZES and dim is not None:
            args[1] = _sizes(node, cast("Sequence[Any]", args[1]), dim, length)
        made[node] = emit.call(cast("Callable[..., Any]", node.target), *args, **node.kwargs)
    return made


def _sizes(node: fx.Node, sizes: Sequence[Any], dim: int, length: int | fx.Node) -> list[Any]:
    """Return the sizes that a value is given, with another length; what was inferred would add a guard."""
    found: list[Any] = []
    for position, (size, actual) in enumerate(zip(sizes, shape_of(node), strict=True)):
        inferred = isinstance(size, int) and size == -1
        if position == dim:
            found.append(-1 if inferred and node.target is aten.expand.default else length)
        else:
            found.append(actual if inferred and isinstance(actual, int) else size)
    return found


def operands_with(node: fx.Node, dim: int) -> list[tuple[fx.Node, int]] | None:
    """Return the operands that have the sequence, and in which dimension; ``None`` if positions are mixed.

    Args:
        node: A value.
        dim: The dimension of its sequence.
    """
    if node.op != "call_function" or not node.args:
        return None
    if node.target is aten.cat.default:
        return _concatenated(node, dim)
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:
        return _taken(source, dim)
    rank = len(shape_of(source))
    if node.target in _SAME:
        return [(source, dim)]
    if node.target in _POINTWISE:
        return _broadcast(node, dim)
    if node.target in _RESHAPES:
        return _reshaped(node, source, dim)
    if node.target is aten.expand.default:
        before = dim - (len(shape_of(node)) - rank)
        return [(source, before)] if before >= 0 and static_int(shape_of(source)[before]) != 1 else None
    if node.target in (aten.transpose.int, aten.permute.default):
        return [(source, _permutation(node, rank)[dim])]
    if node.target in (aten.slice.Tensor, aten.slice_scatter.default):
        return _sliced(node, source, dim)
    if node.target is aten.select.int:
        at = cast("int", node.args[1]) % rank
        return None if at == dim + (at <= dim) else [(source, dim + (at <= dim))]
    if node.target is aten.linear.default or node.target in _NORMS:
        mixed = 1 if node.target is aten.linear.default else len(cast("list[int]", node.args[1]))
        return [(source, dim)] if dim < rank - mixed else None
    if node.target is aten.matmul.default:
        right = node.args[1]
        plain = isinstance(right, fx.Node) and len(shape_of(right)) == 2
        return [(source, dim)] if plain and dim < rank - 1 else None
    if node.target in (aten.new_empty.default, aten.new_zeros.default):
        return []
    return None


def _concatenated(node: fx.Node, dim: int) -> list[tuple[fx.Node, int]] | None:
    along = cast("int", arg(node, 1, "dim", 0)) % len(shape_of(node))
    return None if along == dim else [(part, dim) for part in cast("list[fx.Node]", node.args[0])]


def _taken(several: fx.Node, dim: int) -> list[tuple[fx.Node, int]] | None:
    if several.target not in _SPLITS:
        return None
    source = cast("fx.Node", several.args[0])
    rank = len(shape_of(source))
    if several.target is aten.unbind.int:
        at = cast("int", arg(several, 1, "dim", 0)) % rank
        before = dim + (at <= dim)
        return [(source, before)]
    at = cast("int", arg(several, 2, "dim", 0)) % rank
    return None if at == dim else [(source, dim)]


def _broadcast(node: fx.Node, dim: int) -> list[tuple[fx.Node, int]] | None:
    rank, found = len(shape_of(node)), list[tuple[fx.Node, int]]()
    for operand in node.args[:2]:
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            continue
        before = dim - (rank - len(shape_of(operand)))
        if before >= 0 and (static_int(shape_of(operand)[before]) != 1 or static_int(shape_of(node)[dim]) == 1):
            found.append((operand, before))
    return found or None


def _reshaped(node: fx.Node, source: fx.Node, dim: int) -> list[tuple[fx.Node, int]] | None:
    axes = Axes()
    dims = axes.name(shape_of(node), [f"r{i}" for i in range(len(shape_of(node)))])
    regrouped = axes.regroup(dims, shape_of(source))
    if regrouped is None:
        return None
    # Axes of size one lie beside others as well as alone.
    wanted = dims[dim]
    before = [
        tuple(axis for axis in group if axis in wanted or static_int(axes.sizes[axis]) != 1)
        for group in axes.resolve(regrouped)
    ]
    return [(source, before.index(wanted))] if before.count(wanted) == 1 else None


def _permutation(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [dim % rank for dim in cast("list[int]", node.args[1])]
    first, second = (dim % rank for dim in cast("tuple[int, int]", node.args[1:3]))
    order[first], order[second] = order[second], order[first]
    return order


def _sliced(node: fx.Node, source: fx.Node, dim: int) -> list[tuple[fx.Node, int]] | None:
    scatter = node.target is aten.slice_scatter.default
    along = cast("int", arg(node, 2 if scatter else 1, "dim", 0)) % len(shape_of(node))
    if along == dim and (scatter or not same_size(shape_of(source)[dim], shape_of(node)[dim])):
        return None
    return [(source, dim), (cast("fx.Node", node.args[1]), dim)] if scatter else [(source, dim)]
