"""Read one write to a buffer: what is written, along which dimension, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import fx

from adakv_compile.passes.nodes import arg, same_size, shape_of, skip_no_ops, static_int

__all__ = ["WRITES", "Entries", "dim_of", "is_copy", "is_step_one", "read_write"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Entries:
    """New entries of a buffer.

    Attributes:
        old: What is written to.
        new: The new entries, one to each slot that is written.
        index: Their slots: an integer tensor ``[T]`` or of the shape of ``new``; for a single one also booleans that
            broadcast to the buffer and are true where it goes; or, without a tensor, where the first of them is put.
        dim: The dimension of ``old`` and ``new`` along which they are put.
    """

    old: fx.Node
    new: fx.Node
    index: fx.Node | int
    dim: int


def read_write(node: fx.Node) -> Entries | str:
    """Return what a write does, or why that is not understood.

    Args:
        node: A call of one of :data:`WRITES`.
    """
    reader = _READERS.get(node.target)
    found = f"{node.target} is not understood" if reader is None else reader(node)
    if isinstance(found, str):
        return found
    wanted, given = shape_of(found.old), shape_of(found.new)
    if len(wanted) != len(given) or found.new.meta["val"].dtype != found.old.meta["val"].dtype:
        return "the new entries are repeated or cast"
    if not _alike(wanted, given, found.dim):
        return "the new entries are repeated"
    if not isinstance(found.index, fx.Node):
        return found
    index = found.index.meta["val"]
    if not isinstance(index, torch.Tensor) or index.dtype is torch.bool:
        return found
    if index.dtype not in (torch.int64, torch.int32) or index.dim() not in (1, len(given)):
        return f"its positions are {index.dtype} of {index.dim()} dimensions"
    if not same_size(index.shape[found.dim if index.dim() > 1 else 0], given[found.dim]):
        return "the new entries are repeated"
    if index.dim() > 1 and not _alike(tuple(index.shape), given, found.dim):
        return "only some of the new entries are written"
    return found


def dim_of(node: fx.Node, position: int) -> int:
    """Return an argument that names a dimension, counted from the front."""
    return cast("int", arg(node, position, "dim", 0)) % len(shape_of(node))


def is_step_one(node: fx.Node, position: int) -> bool:
    """Tell whether a slice leaves nothing out."""
    return arg(node, position, "step", 1) == 1


def is_copy(node: fx.Node) -> bool:
    """Tell whether ``copy(old, new)`` is ``new``, neither repeated nor cast."""
    if node.target is not aten.copy.default:
        return False
    old, new = cast("fx.Node", node.args[0]), cast("fx.Node", node.args[1])
    fits = old.meta["val"].dtype == new.meta["val"].dtype and len(shape_of(old)) == len(shape_of(new))
    return fits and _alike(shape_of(old), shape_of(new), None)


def _alike(one: tuple[int | torch.SymInt, ...], other: tuple[int | torch.SymInt, ...], apart: int | None) -> bool:
    """Tell whether two shapes are the same, apart from one dimension."""
    return all(same_size(a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)) if i != apart)


def _index_copy(node: fx.Node) -> Entries:
    old, _, index, new = cast("tuple[fx.Node, int, fx.Node, fx.Node]", node.args)
    return Entries(old, new, index, dim_of(node, 1))


def _index_put(node: fx.Node) -> Entries | str:
    old, indices, new = cast("tuple[fx.Node, list[fx.Node | None], fx.Node]", node.args[:3])
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or arg(node, 3, "accumulate", False):
        return "it is indexed in several dimensions, or added to"
    ((dim, index),) = given
    # True positions select as many entries as there are, which is data.
    return "it is indexed by booleans" if index.meta["val"].dtype is torch.bool else Entries(old, new, index, dim)


def _scatter(node: fx.Node) -> Entries:
    old, _, index, new = cast("tuple[fx.Node, int, fx.Node, fx.Node]", node.args[:4])
    return Entries(old, new, index, dim_of(node, 1))


def _slice_scatter(node: fx.Node) -> Entries | str:
    old, new = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    start = arg(node, 3, "start", 0)
    start = 0 if start is None else start
    if not is_step_one(node, 5) or not isinstance(start, (fx.Node, int)):
        return "its positions are not one after the other"
    return Entries(old, _copied(new), start, dim_of(node, 2))


def _select_scatter(node: fx.Node) -> Entries | str:
    old, source, _, index = cast("tuple[fx.Node, fx.Node, int, object]", node.args[:4])
    dim, source = dim_of(node, 2), skip_no_ops(_copied(source))
    above = source.args[0] if source.target in (aten.select.int, aten.squeeze.dim) else None
    if not isinstance(above, fx.Node) or cast("int", source.args[1]) % len(shape_of(above)) != dim:
        return "the new entry has no dimension of the sequence"
    if static_int(shape_of(above)[dim]) != 1 or not isinstance(index, (fx.Node, int)):
        return "the new entry is one of several"
    return Entries(old, above, index, dim)


def _where(node: fx.Node) -> Entries | str:
    chosen, new, old = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args)
    wanted, given = shape_of(old), shape_of(new)
    if len(wanted) != len(given) or len(wanted) != len(shape_of(node)):
        return "the new entries are repeated"
    repeated = [dim for dim, (a, b) in enumerate(zip(wanted, given, strict=True)) if not same_size(a, b)]
    if len(repeated) != 1 or static_int(given[repeated[0]]) != 1:
        return "another thing is chosen than a single new entry"
    (dim,) = repeated
    axis = dim - len(wanted)
    shape = shape_of(chosen)
    if len(shape) < -axis or not same_size(shape[axis], wanted[dim]):
        return "the new entry goes to every slot or to none"
    return Entries(old, new, chosen, dim)


def _copied(node: fx.Node) -> fx.Node:
    """Return what ``copy`` writes, if that has the shape and dtype of what it is written to."""
    return cast("fx.Node", node.args[1]) if is_copy(node) else node


_READERS: Final[dict[object, Callable[[fx.Node], Entries | str]]] = {
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.scatter.src: _scatter,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
    aten.where.self: _where,
}
WRITES: Final[frozenset[object]] = frozenset(_READERS)
"""Operators that give a buffer with some slots overwritten."""
