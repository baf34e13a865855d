"""Follow the dimensions of tensors up through views, so that an attention is recognised in whatever layout it is.

A dimension is written as the axes it is made of, major first: ``("b", "h")`` is a batch and heads merged into one. Axes
are split when a view shows that they consist of several, everywhere at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from adakv_compile.passes.nodes import arg, is_cast, same_size, shape_of, static_int

__all__ = ["Axes", "Dims", "Step", "climb"]

aten = torch.ops.aten

Dims = tuple[tuple[str, ...], ...]
"""For every dimension the axes it is made of, major first; none for one of size one."""
Size = int | torch.SymInt

_UNCHANGED = (
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
)
_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_LAST = 2**62


@dataclass(frozen=True)
class Step:
    """A value on the way up, and what its dimensions are.

    Attributes:
        node: The value.
        dims: Its dimensions.
        whole: Whether every element of it is used below: no part was taken out on the way.
    """

    node: fx.Node
    dims: Dims
    whole: bool = True


@dataclass
class Axes:
    """The axes of one attention.

    Attributes:
        sizes: Size of every axis.
        parts: What an axis was found to consist of.
        picked: For an axis of which the attention uses one element (keys and values packed in one tensor), which one.
    """

    sizes: dict[str, Size] = field(default_factory=dict[str, Size])
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    picked: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, name: str, size: Size) -> str:
        """Add an axis under a name that is still free; return the name."""
        while name in self.sizes:
            name += "'"
        self.sizes[name] = size
        return name

    def name(self, shape: Sequence[Size], names: Sequence[str]) -> Dims:
        """Add one axis for every dimension."""
        return tuple((self.add(name, size),) for name, size in zip(names, shape, strict=True))

    def flat(self, dim: Sequence[str]) -> tuple[str, ...]:
        """Return the smallest axes that a dimension is known to consist of."""
        found: list[str] = []
        for axis in dim:
            parts = self.parts.get(axis)
            found.extend((axis,) if parts is None else self.flat(parts))
        return tuple(found)

    def resolve(self, dims: Dims) -> Dims:
        """Return the dimensions in the smallest known axes."""
        return tuple(self.flat(dim) for dim in dims)

    def size(self, dim: Sequence[str]) -> Size:
        """Return the product of some axes' sizes."""
        product: Size = 1
        for axis in self.flat(dim):
            product = product * self.sizes[axis]
        return product

    def regroup(self, dims: Dims, shape: Sequence[Size]) -> Dims | None:
        """Return the dimensions of the same elements viewed as ``shape``, or ``None`` if that isn't certain."""
        atoms = [axis for dim in self.resolve(dims) for axis in dim]
        groups: list[list[str]] = []
        for position, size in enumerate(shape):
            group: list[str] = []
            product: Size = 1
            while not same_size(product, size):
                if not atoms:
                    return None
                axis = atoms.pop(0)
                if not _divides(product * self.sizes[axis], size):
                    pieces = self._split(axis, product, size, shape[position + 1 :])
                    if pieces is None:
                        return None
                    axis = pieces[0]
                    atoms.insert(0, pieces[1])
                group.append(axis)
                product = product * self.sizes[axis]
            if not group and atoms and static_int(self.sizes[atoms[0]]) == 1:
                group.append(atoms.pop(0))
            groups.append(group)
        if any(static_int(self.sizes[axis]) != 1 for axis in atoms) or (atoms and not groups):
            return None
        if atoms:
            groups[-1].extend(atoms)
        return tuple(map(tuple, groups))

    def _split(self, axis: str, product: Size, size: Size, after: Sequence[Size]) -> tuple[str, str] | None:
        """Split an axis so that ``product`` times its first part is ``size``."""
        whole = self.sizes[axis]
        candidates: list[tuple[Size, Size]] = [(size, following) for following in after[:1] if product == 1]
        if isinstance(size, int) and isinstance(product, int) and isinstance(whole, int) and size % product == 0:
            first = size // product
            candidates.append((first, whole // max(1, first)))
        for first, second in candidates:
            if same_size(first * second, whole) and static_int(first) != 1:
                pieces = (self.add(f"{axis}.0", first), self.add(f"{axis}.1", second))
                self.parts[axis] = pieces
                if axis in self.picked and isinstance(second, int):
                    self.picked[pieces[0]], self.picked[pieces[1]] = divmod(self.picked[axis], second)
                return pieces
        return None

    def carve(self, dim: Sequence[str], sizes: Sequence[Size]) -> Dims | None:
        """Split one dimension into several."""
        return self.regroup((tuple(dim),), sizes)

    def identify(self, dims: Dims, known: Dims) -> bool:
        """Let the axes of ``dims``, which belong to nothing yet, be those of ``known``; tell whether they fit."""
        if len(dims) != len(known):
            return False
        for ours, theirs in zip(self.resolve(dims), self.resolve(known), strict=True):
            single = [axis for axis in theirs if static_int(self.sizes[axis]) == 1]
            right = [axis for axis in theirs if axis not in single]
            for axis in ours:
                if static_int(self.sizes[axis]) == 1:
                    self.parts[axis] = (single.pop(0),) if single else ()
                    continue
                taken: list[str] = []
                while right and (not taken or not same_size(self.size(taken), self.sizes[axis])):
                    taken.append(right.pop(0))
                if not same_size(self.size(taken), self.sizes[axis]):
                    return False
                if (axis,) != tuple(taken):
                    self.parts[axis] = tuple(taken)
            if right:
                return False
        return True


def climb(axes: Axes, node: fx.Node, dims: Dims, *, casts: bool = False) -> Iterator[Step]:
    """Yield a value and what it is a view of, up to the first value that is none.

    Repetitions count as views: what is repeated has an axis less.

    Args:
        axes: Learns how axes are split.
        node: The value.
        dims: Its dimensions.
        casts: Whether a change to a wider floating-point type counts as a view: the operators compute in float32.
    """
    step = Step(node, dims)
    yield step
    while (above := _above(axes, step, casts)) is not None:
        step = above
        yield step


def _above(axes: Axes, step: Step, casts: bool) -> Step | None:
    node, dims = step.node, axes.resolve(step.dims)
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:
        return _part_of(axes, step, source, cast("int", node.args[1]))
    if not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    found: Dims | None = None
    whole = step.whole
    if node.target in _UNCHANGED or (casts and _widens(node, source)):
        found = dims
    elif node.target in _RESHAPES:
        found = axes.regroup(dims, shape_of(source))
    elif node.target in (aten.transpose.int, aten.permute.default, aten.t.default):
        found = _permuted(node, dims)
    elif node.target is aten.expand.default:
        found = _unexpanded(dims, shape_of(source), shape_of(node))
    elif node.target in (aten.repeat_interleave.self_int, aten.repeat.default):
        found = _unrepeated(axes, node, dims, shape_of(source))
    elif node.target is aten.slice.Tensor:
        found, whole = _unsliced(axes, step, source)
    elif node.target is aten.select.int:
        dim, index = cast("tuple[int, int]", node.args[1:3])
        found, whole = _unselected(axes, dims, dim, index, shape_of(source)), False
    return None if found is None else Step(source, found, whole)


def _widens(node: fx.Node, source: fx.Node) -> bool:
    return is_cast(node) and source.meta["val"].dtype.itemsize <= node.meta["val"].dtype.itemsize


def _permuted(node: fx.Node, dims: Dims) -> Dims | None:
    rank = len(dims)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in cast("list[int]", node.args[1])]
    elif rank >= 2:
        first, second = (0, 1) if node.target is aten.t.default else cast("tuple[int, int]", node.args[1:3])
        first, second = first % rank, second % rank
        order[first], order[second] = order[second], order[first]
    found: list[tuple[str, ...]] = [()] * rank
    for new, old in enumerate(order):
        found[old] = dims[new]
    return tuple(found)


def _unexpanded(dims: Dims, narrow: Sequence[Size], wide: Sequence[Size]) -> Dims:
    """Drop the axes along which a value was repeated; what has size one on both sides keeps its axis."""
    extra = len(wide) - len(narrow)
    pairs = zip(dims[extra:], narrow, wide[extra:], strict=True)
    return tuple(dim if static_int(small) != 1 or static_int(large) == 1 else () for dim, small, large in pairs)


def _unrepeated(axes: Axes, node: fx.Node, dims: Dims, narrow: Sequence[Size]) -> Dims | None:
    rank = len(dims)
    if node.target is aten.repeat.default:
        repeats = cast("list[int]", node.args[1])
        tiled = [1] * (len(repeats) - len(narrow)) == repeats[: len(repeats) - len(narrow)]
        factors, innermost = dict(enumerate(repeats[len(repeats) - len(narrow) :])), False
        if not tiled or len(repeats) != len(narrow):
            return None
    else:
        dim = arg(node, 2, "dim")
        if not isinstance(dim, int):
            return None
        factors, innermost = {dim % rank: cast("int", node.args[1])}, True
    found = list(dims)
    for dim, factor in factors.items():
        if factor == 1:
            continue
        if static_int(narrow[dim]) == 1:
            found[dim] = ()
            continue
        sizes = (narrow[dim], factor) if innermost else (factor, narrow[dim])
        pieces = axes.carve(found[dim], sizes)
        if pieces is None:
            return None
        found[dim] = pieces[0 if innermost else 1]
    return tuple(found)


def _unsliced(axes: Axes, step: Step, source: fx.Node) -> tuple[Dims | None, bool]:
    node, dims = step.node, axes.resolve(step.dims)
    if arg(node, 4, "step", 1) != 1:
        return None, False
    dim = cast("int", arg(node, 1, "dim", 0)) % len(dims)
    old, new = shape_of(source)[dim], shape_of(node)[dim]
    if same_size(old, new):
        return dims, step.whole
    start = arg(node, 2, "start")
    start = 0 if start is None else start
    return _unpicked(axes, dims, dim, start, old, new), False


def _unpicked(axes: Axes, dims: Dims, dim: int, start: object, old: Size, new: Size) -> Dims | None:
    """Return the dimensions of a tensor of which equal part number ``start / new`` was taken."""
    if not (isinstance(start, int) and isinstance(old, int) and isinstance(new, int)) or not new or old % new:
        return None
    start = start + old if start < 0 else start
    if start % new:
        return None
    axis = axes.add("p", old // new)
    axes.picked[axis] = start // new
    return (*dims[:dim], (axis, *dims[dim]), *dims[dim + 1 :])


def _unselected(axes: Axes, dims: Dims, dim: int, index: object, wide: Sequence[Size]) -> Dims | None:
    dim %= len(wide)
    size = wide[dim]
    if not (isinstance(index, int) and isinstance(size, int)):
        return None
    axis = axes.add("p", size)
    axes.picked[axis] = index % size
    return (*dims[:dim], (axis,), *dims[dim:])


def _part_of(axes: Axes, step: Step, several: fx.Node, index: int) -> Step | None:
    """Follow one of the tensors that a split made."""
    source = several.args[0] if several.args else None
    if not isinstance(source, fx.Node):
        return None
    dims = axes.resolve(step.dims)
    shape = shape_of(source)
    if several.target is aten.unbind.int:
        found = _unselected(axes, dims, cast("int", arg(several, 1, "dim", 0)), index, shape)
    elif several.target in (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default, aten.split.sizes):
        dim = cast("int", arg(several, 2, "dim", 0)) % len(shape)
        new = shape_of(step.node)[dim]
        sizes = [value.shape[dim] for value in several.meta["val"]]
        if any(not same_size(size, new) for size in sizes):
            return None
        found = _unpicked(axes, dims, dim, index * new if isinstance(new, int) else None, shape[dim], new)
    else:
        return None
    return None if found is None else Step(source, found, False)


def _divides(number: Size, size: Size) -> bool:
    if isinstance(number, int) and isinstance(size, int):
        return number <= size and size % number == 0
    return same_size(cast("torch.SymInt", size) % number, 0)
