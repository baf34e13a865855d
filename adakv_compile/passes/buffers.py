"""Find where keys and values are written into a preallocated buffer, and at which position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.attention import AttentionSite, Operand
from adakv_compile.passes.axes import Axes, Dims, Step, climb
from adakv_compile.passes.nodes import arg, same_size, shape_of, skip_no_ops
from adakv_compile.passes.written import WRITES, dim_of, is_copy, is_step_one, read_write
from adakv_compile.report import Reason, Refusal

__all__ = ["BufferWrite", "find_write"]

aten = torch.ops.aten
Size = int | torch.SymInt

_BORN: Final[frozenset[Callable[..., object]]] = frozenset(
    {
        aten.zeros.default,
        aten.empty.memory_format,
        aten.full.default,
        aten.new_zeros.default,
        aten.new_empty.default,
        aten.zeros_like.default,
        aten.empty_like.default,
    }
)
_OFTEN_SOMETHING_ELSE: Final = (aten.copy.default, aten.scatter.src, aten.where.self)


@dataclass(frozen=True)
class BufferWrite:
    """New entries of one tensor written into a buffer, of which attention reads slots ``0 .. columns - 1``.

    Attributes:
        operand: The keys or values, in axes that know the buffer.
        buffer: The buffer as it came in: a placeholder, or what the graph made it from.
        written: The buffer afterwards.
        whole: What attention reads of it, before views that only change the layout.
        dims: The dimensions of ``whole`` and ``new``.
        new: The new entries.
        index: Slots of the new entries, as in :class:`~adakv_compile.passes.written.Entries`.
    """

    operand: Operand
    buffer: fx.Node
    written: fx.Node
    whole: fx.Node
    dims: Dims
    new: fx.Node
    index: fx.Node | int

    @property
    def sequence_dim(self) -> int:
        """The dimension of the slots."""
        return _column(self.dims)

    @property
    def slots(self) -> Size:
        """Tokens that the buffer has room for."""
        return shape_of(self.buffer)[self.sequence_dim]


@dataclass
class _Read:
    """What attention reads, on the way up from it: a view, cut from the start of a larger one."""

    axes: Axes
    step: Step
    whole: Step | None = None


def find_write(program: Program, site: AttentionSite, which: str) -> BufferWrite | Refusal | None:
    """Return where an attention's keys or values were written into a buffer; ``None`` if they were not.

    Args:
        program: The captured graph; it is only read.
        site: The attention.
        which: ``"key"`` or ``"value"``.
    """
    operand = site.operand(which)
    read = _climb(operand)
    if read is None:
        return None
    top = read.step
    dims = read.axes.resolve(top.dims)
    if sorted(axis for dim in dims for axis in dim if axis in ("batch", "column")) != ["batch", "column"]:
        return _refused(which, "the batch and the sequence are not dimensions of the buffer")
    written = top.node
    if written.target in _OFTEN_SOMETHING_ELSE and not any(
        skip_no_ops(final) is written for _, final in program.mutated
    ):
        return None
    # Copied as a whole from a value that was made of it: the copy is what the caller gets.
    inner = skip_no_ops(cast("fx.Node", written.args[1])) if is_copy(written) else written
    batch = dims.index(("batch",)) if ("batch",) in dims else None
    column = dims.index(("column",)) if ("column",) in dims else None
    if column is None:
        return _refused(which, "the slots of the buffer are not a dimension of their own")
    rows = None
    if inner.target is aten.slice_scatter.default and dim_of(inner, 2) == batch and batch != column:
        rows = inner
        source = cast("fx.Node", inner.args[1])
        if not _starts_at_zero(inner, 3) or not is_step_one(inner, 5):
            return _refused(which, "other rows are written than attention reads")
        inner = source
    found = read_write(inner)
    if isinstance(found, str):
        return _refused(which, found)
    if found.dim != column:
        return _refused(which, "not along the sequence")
    old, new = found.old, found.new
    if batch is None or not same_size(shape_of(new)[batch], operand.axes.size(operand.batch)):
        return _refused(which, "other rows are written than attention reads")
    buffer = _buffer_of(old, batch if rows is not None else None)
    if rows is not None and buffer is not skip_no_ops(cast("fx.Node", rows.args[0])):
        return _refused(which, "two buffers are mixed")
    if buffer is None or not (buffer.op == "placeholder" or buffer.target in _BORN) or buffer in program.compressed:
        return _refused(which, "something is written to the buffer before, or it is computed")
    if refusal := _is_kept(program, buffer, written):
        return _refused(which, refusal)
    whole = read.whole or Step(top.node, dims)
    axes = Axes(dict(operand.axes.sizes), dict(read.axes.parts), dict(operand.axes.picked))
    axes.sizes = {**read.axes.sizes, "batch": shape_of(site.query)[0], "column": site.key_length}
    return BufferWrite(
        operand=dataclasses.replace(operand, axes=axes),
        buffer=buffer,
        written=written,
        whole=whole.node,
        dims=axes.resolve(whole.dims),
        new=new,
        index=found.index,
    )


def _refused(which: str, why: str) -> Refusal:
    return Refusal(Reason.CACHE_FORM, f"the {which}s are written into a buffer, and {why}")


def _column(dims: Dims) -> int:
    return next(i for i, dim in enumerate(dims) if "column" in dim)


def _climb(operand: Operand) -> _Read | None:
    """Follow an operand up to a write; slices from the start of the sequence or the batch make it larger."""
    axes = Axes(dict(operand.axes.sizes), dict(operand.axes.parts))
    first = operand.steps[0]
    read = _Read(axes, Step(first.node, first.dims))
    while True:
        cut = None
        for step in climb(axes, read.step.node, read.step.dims):
            read.step = step
            if not step.whole:
                return None
            if step.node.target in WRITES or is_copy(step.node):
                return read
            cut = _cut(axes, step)
            if cut is not None:
                break
        if cut is None:
            return None
        axis, source = cut
        dims = axes.resolve(read.step.dims)
        if read.whole is None:
            read.whole = Step(read.step.node, dims)
        axes.sizes[axis] = shape_of(source)[dims.index((axis,))]
        read.step = Step(source, dims)


def _cut(axes: Axes, step: Step) -> tuple[str, fx.Node] | None:
    """Return the axis along which a slice from zero on is shorter than its source, and the source."""
    node = step.node
    if node.target is not aten.slice.Tensor or not is_step_one(node, 4) or not _starts_at_zero(node, 2):
        return None
    source = cast("fx.Node", node.args[0])
    dim = dim_of(node, 1)
    (axis, *others) = axes.resolve(step.dims)[dim] or ("",)
    if others or axis not in ("batch", "column") or same_size(shape_of(source)[dim], shape_of(node)[dim]):
        return None
    return axis, source


def _starts_at_zero(node: fx.Node, position: int) -> bool:
    return arg(node, position, "start") in (None, 0)


def _buffer_of(node: fx.Node, batch: int | None) -> fx.Node | None:
    """Return the buffer that is written to, or of which the first rows are."""
    node = skip_no_ops(node)
    if batch is not None and node.target is aten.slice.Tensor and dim_of(node, 1) == batch:
        if not _starts_at_zero(node, 2) or not is_step_one(node, 4):
            return None
        node = skip_no_ops(cast("fx.Node", node.args[0]))
    return node


def _is_kept(program: Program, buffer: fx.Node, written: fx.Node) -> str | None:
    """Return why the caller does not get the buffer just as this write leaves it, ``None`` if it does."""
    if buffer.op != "placeholder":
        slots = [output for output in program.outputs if output is written]
        if len(slots) != 1:
            return "the caller does not get it back" if not slots else "the caller gets it back several times"
        return None
    final = dict(program.mutated).get(buffer)
    if final is None:
        return "the result is another tensor than the buffer"
    if skip_no_ops(final) is not written:
        return "it is written to again"
    return None
