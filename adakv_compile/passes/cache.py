"""Find how keys and values are cached: what was there, what is new, and where the caller gets it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.attention import Operand
from adakv_compile.passes.axes import Axes, Dims, Step, climb
from adakv_compile.passes.nodes import arg, same_size, shape_of, skip_no_ops, static_int
from adakv_compile.report import Reason, Refusal
from adakv_compile.runtime.layout import Layout

__all__ = ["CacheUpdate", "find_cache_update"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheUpdate:
    """One tensor's update, ``whole = cat([past, new])`` along the sequence, and what the caller keeps of it.

    Attributes:
        past: The cache as it came in, a placeholder, or ``None`` in the first call of a conversation.
        compressed: Whether ``past`` is a ``CompressedKV``.
        new: Entries of this call, or ``None`` if the attention reads a cache that already holds them.
        whole: What attention reads, perhaps in another layout.
        dims: Dimensions of ``new``, ``whole`` and ``cached``, in the axes of the attention.
        cached: What the caller keeps: ``whole``, or its newest entries in a sliding-window layer.
        slots: The outputs in which the caller gets ``cached``.
        layout: Their layout, and that of ``past``.
        holder: The tensor of keys and values that is returned, if ``cached`` is only put into it.
        part: In a tensor of keys and values, which half this is: 0 for keys, 1 for values.
    """

    past: fx.Node | None
    compressed: bool
    new: fx.Node | None
    whole: fx.Node
    dims: Dims
    cached: fx.Node
    slots: tuple[int, ...]
    layout: Layout
    holder: fx.Node | None = None
    part: int | None = None

    @property
    def is_pair(self) -> bool:
        """Whether the caller keeps keys and values in one tensor."""
        return self.part is not None

    @property
    def is_sliding(self) -> bool:
        """Whether the caller drops the oldest entries by itself."""
        return self.cached is not self.whole

    @property
    def cached_length(self) -> int | torch.SymInt:
        """Logical length of the cache after the call."""
        return shape_of(self.cached)[self.sequence_dim]

    @property
    def new_length(self) -> int | torch.SymInt:
        """Entries of this call."""
        return 0 if self.new is None else shape_of(self.new)[self.sequence_dim]

    @property
    def past_length(self) -> int | torch.SymInt:
        """Logical length of the cache before the call."""
        return 0 if self.past is None else shape_of(self.past)[self.layout.sequence_dim]

    @property
    def sequence_dim(self) -> int:
        """The dimension of ``new``, ``whole`` and ``cached`` that grows."""
        return next(i for i, dim in enumerate(self.dims) if "column" in dim)


@dataclass(frozen=True)
class _Returned:
    """An output that holds a cache."""

    slot: int
    cached: fx.Node
    whole: fx.Node
    dims: Dims
    holder: fx.Node | None = None


def find_cache_update(program: Program, operand: Operand, which: str) -> CacheUpdate | Refusal:
    """Analyse the keys or the values of one attention; the graph is only read.

    Args:
        program: The captured graph.
        operand: The keys or the values.
        which: ``"key"`` or ``"value"``.
    """
    steps, axes = operand.steps, operand.axes
    top = Step(steps[-1].node, axes.resolve(steps[-1].dims), steps[-1].whole)
    if top.node in program.compressed:
        return _read_only(program, operand, which, top)
    split = _split(axes, top, which)
    if isinstance(split, Refusal):
        return split
    targets = {top.node: top.dims} if split is not None else {step.node: axes.resolve(step.dims) for step in steps}
    found = _returned(program, axes, targets) or _returned_in_pair(program, axes, targets)
    past, new = (None, None) if split is None else split
    source = None if past is None else _source_of(axes, past, top.dims)
    if past is not None and (source is None or source.node.op != "placeholder"):
        return Refusal(Reason.CACHE_FORM, f"the {which}s are concatenated to a computed value, {past.name}")
    compressed = source is not None and source.node in program.compressed
    if not found:
        if not compressed:
            return Refusal(Reason.NO_CACHE, f"{which}s")
        return Refusal(Reason.CACHE_FORM, f"the compressed {which}s are extended but not returned")
    first = found[0]
    dims = axes.resolve(targets[first.whole])
    layouts = {_layout(operand, returned.dims) for returned in found}
    if source is not None:
        layouts.add(_layout(operand, source.dims))
    layout = layouts.pop()
    if layout is None or layouts:
        return Refusal(Reason.CACHE_FORM, f"the layout of the cached {which}s is not understood")
    if len({returned.cached for returned in found}) > 1:
        return Refusal(Reason.CACHE_FORM, f"the {which}s are returned in several forms")
    if source is not None and compressed and program.layouts[source.node] != layout:
        return Refusal(Reason.CACHE_FORM, f"the {which}s come in as {program.layouts[source.node]}, not {layout}")
    return CacheUpdate(
        past=None if source is None else source.node,
        compressed=compressed,
        new=first.whole if new is None else new,
        whole=first.whole,
        dims=dims,
        cached=first.cached,
        slots=tuple(returned.slot for returned in found),
        layout=layout,
        holder=first.holder,
        part=_part_of(axes, first.dims),
    )


def _part_of(axes: Axes, dims: Dims) -> int | None:
    """Return which of a pair is used."""
    return next((axes.picked[axis] for dim in dims for axis in dim if axis in axes.picked), None)


def _read_only(program: Program, operand: Operand, which: str, top: Step) -> CacheUpdate | Refusal:
    """Describe an attention to a compressed cache that nothing is added to."""
    layout = program.layouts[top.node]
    if _layout(operand, top.dims) != layout:
        return Refusal(Reason.CACHE_FORM, f"the {which}s come in as {layout} and are read in another way")
    slots = tuple(slot for slot, output in enumerate(program.outputs) if output is top.node)
    return CacheUpdate(
        past=top.node,
        compressed=True,
        new=None,
        whole=top.node,
        dims=top.dims,
        cached=top.node,
        slots=slots,
        layout=layout,
        part=_part_of(operand.axes, top.dims),
    )


def _split(axes: Axes, whole: Step, which: str) -> tuple[fx.Node | None, fx.Node] | Refusal | None:
    """Split ``cat([past, new])``; ``None`` if it is no concatenation along the sequence."""
    if whole.node.target is not aten.cat.default:
        return None
    parts = cast("list[fx.Node]", whole.node.args[0])
    nodes = [part for part in parts if not _is_empty(part)]
    dim = cast("int", arg(whole.node, 1, "dim", 0)) % len(whole.dims)
    if whole.dims[dim] != axes.flat(("column",)):
        # For instance a rotary embedding: the halves of the head dimension are put together. All of it is new.
        return None
    if len(nodes) == 1:
        return None, nodes[0]
    if len(nodes) == 2:
        return nodes[0], nodes[1]
    return Refusal(Reason.CACHE_FORM, f"the {which}s are concatenated from {len(nodes)} parts")


def _is_empty(node: fx.Node) -> bool:
    """Tell the empty tensor that a cache starts from (``torch.tensor([])``)."""
    shape = shape_of(node)
    return len(shape) == 1 and static_int(shape[0]) == 0


def _source_of(axes: Axes, past: fx.Node, dims: Dims) -> Step | None:
    """Return what the old part of a concatenation is a view of; its sequence is shorter than ``dims`` says."""
    names = [axis for dim in dims for axis in dim]
    shorter = Axes(dict(axes.sizes), dict(axes.parts), dict(axes.picked))
    position = next((i for i, dim in enumerate(dims) if "column" in dim), None)
    if position is None or len(dims[position]) != 1:
        return None
    shorter.sizes["column"] = shape_of(past)[position]
    *_, top = climb(shorter, past, dims)
    found = shorter.resolve(top.dims)
    new = shorter.picked.keys() - axes.picked.keys()
    if sorted(axis for dim in found for axis in dim if axis not in new) != sorted(names):
        return None
    for axis in new:
        axes.sizes[axis], axes.picked[axis] = shorter.sizes[axis], shorter.picked[axis]
    return Step(top.node, found)


def _returned(program: Program, axes: Axes, targets: Mapping[fx.Node, Dims]) -> list[_Returned]:
    """Return the outputs that hold one of ``targets``, or else the newest entries of one."""
    exact: list[_Returned] = []
    newest: list[_Returned] = []
    for slot, output in enumerate(program.outputs):
        if not isinstance(output, fx.Node) or not isinstance(output.meta.get("val"), torch.Tensor):
            continue
        if not any(node in targets for node in _sources(output)):
            continue
        scratch = Axes()
        fresh = scratch.name(shape_of(output), [f"r{i}" for i in range(len(shape_of(output)))])
        for step in climb(scratch, output, fresh):
            target = _target(step.node, targets)
            if target is None:
                continue
            if not step.whole:
                break
            dims = _translated(axes, scratch, fresh, step, targets[target])
            if dims is not None:
                (exact if target is step.node else newest).append(_Returned(slot, step.node, target, dims))
            break
    found = exact or newest
    return [returned for returned in found if returned.whole is found[0].whole]


def _returned_in_pair(program: Program, axes: Axes, targets: Mapping[fx.Node, Dims]) -> list[_Returned]:
    """Return the outputs in which one of ``targets`` lies beside another tensor of its shape."""
    found: list[_Returned] = []
    for slot, output in enumerate(program.outputs):
        holder = skip_no_ops(output) if isinstance(output, fx.Node) else None
        if holder is None or holder.target not in (aten.cat.default, aten.stack.default):
            continue
        parts = cast("list[fx.Node]", holder.args[0])
        held = [_held(axes, part, targets) for part in parts]
        if len(parts) != 2 or (held[0] is None) == (held[1] is None) or not _same_shape(*parts):
            continue
        index = 0 if held[1] is None else 1
        target, dims = cast("tuple[fx.Node, Dims]", held[index])
        dim = cast("int", arg(holder, 1, "dim", 0)) % len(shape_of(holder))
        axis = axes.add("p", 2)
        axes.picked[axis] = index
        if holder.target is aten.stack.default:
            dims = (*dims[:dim], (axis,), *dims[dim:])
        else:
            dims = (*dims[:dim], (axis, *dims[dim]), *dims[dim + 1 :])
        found.append(_Returned(slot, target, target, dims, holder))
    return found


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    first, second = shape_of(one), shape_of(other)
    return len(first) == len(second) and all(same_size(a, b) for a, b in zip(first, second, strict=True))


def _held(axes: Axes, part: fx.Node, targets: Mapping[fx.Node, Dims]) -> tuple[fx.Node, Dims] | None:
    """Return the target that a value is a view of, and the dimensions of the value."""
    scratch = Axes()
    fresh = scratch.name(shape_of(part), [f"r{i}" for i in range(len(shape_of(part)))])
    for step in climb(scratch, part, fresh):
        if step.node in targets:
            dims = _translated(axes, scratch, fresh, step, targets[step.node]) if step.whole else None
            return None if dims is None else (step.node, dims)
    return None


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a value, its first operand, that one's first operand, and so on."""
    while True:
        yield node
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node):
            return
        node = source


def _target(node: fx.Node, targets: Mapping[fx.Node, Dims]) -> fx.Node | None:
    """Return the target that a node is, or of which it is the newest entries."""
    if node in targets:
        return node
    if node.target is not aten.slice.Tensor or arg(node, 4, "step", 1) != 1:
        return None
    source = skip_no_ops(cast("fx.Node", node.args[0]))
    end = arg(node, 3, "end")
    reaches_end = end is None or (isinstance(end, int) and end >= 2**62)
    if source not in targets or not reaches_end:
        return None
    dims = targets[source]
    dim = cast("int", arg(node, 1, "dim", 0)) % len(dims)
    everything = same_size(shape_of(source)[dim], shape_of(node)[dim])
    return source if "column" in dims[dim] and not everything else None


def _translated(axes: Axes, scratch: Axes, fresh: Dims, step: Step, known: Dims) -> Dims | None:
    """Return the dimensions of an output in the axes of what it is a view of."""
    seen = scratch.resolve(step.dims)
    known = axes.resolve(known)
    if len(seen) != len(known):
        return None
    scratch.sizes.update({axis: axes.sizes[axis] for dim in known for axis in dim})
    # A sliding cache is shorter than what it is cut from.
    for ours, theirs, size in zip(seen, known, shape_of(step.node), strict=True):
        if "column" in theirs:
            scratch.sizes["column"] = size
        if not ours and theirs and static_int(size) != 1:
            return None
    return scratch.resolve(fresh) if scratch.identify(seen, known) else None


def _layout(operand: Operand, dims: Dims) -> Layout | None:
    """Return the layout of a cached tensor, ``None`` if an axis is split over dimensions."""
    axes = operand.axes
    letters = dict.fromkeys(axes.picked, "p")
    for letter, group in zip("bhld", operand.order, strict=True):
        letters.update(dict.fromkeys(group, letter))
    found: list[str] = []
    for dim in axes.resolve(dims):
        if any(axis not in letters or (axis in axes.picked and axes.sizes[axis] != 2) for axis in dim):
            return None
        text = "".join(letters[axis] for axis in dim)
        found.append("".join(letter for i, letter in enumerate(text) if text[i - 1 : i] != letter) or "1")
    everything = "".join(found)
    # An axis of size one may have no dimension; it lies beside its neighbour as well as anywhere.
    for missing, beside, group in (("h", "d", operand.heads), ("b", "h", operand.batch)):
        if missing not in everything and static_int(axes.size(group)) == 1:
            found = [dim.replace(beside, missing + beside) for dim in found]
    try:
        return Layout(tuple(found))
    except ValueError:
        return None
