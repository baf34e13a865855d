"""Turn a buffer so that its last slot is the newest token's: the operators count positions from there."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from adakv_compile.passes.buffer_plan import BufferUse
from adakv_compile.passes.buffers import BufferWrite
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.nodes import shape_of

__all__ = ["Turned", "padding_of", "turn"]

aten = torch.ops.aten
Size = int | torch.SymInt


@dataclass(frozen=True)
class Turned:
    """The order in which a buffer's slots are read.

    Slot ``(c + end) % columns`` comes at column ``c``, so slots that were not written lie before all tokens, as padding
    on the left does, whatever the number of tokens is. No shape depends on it.

    Attributes:
        emit: Adds calls to the graph.
        columns: Slots that attention reads.
        end: Tokens in the buffer, new ones included: a number, or a node that holds it.
        slots: Int64 ``[columns]``, the slot of every column.
        real: Bool ``[columns]``, true where the slot was written.
    """

    emit: Emitter
    columns: int | fx.Node
    end: int | fx.Node
    slots: fx.Node
    real: fx.Node

    def select(self, tensor: fx.Node, dim: int) -> fx.Node:
        """Bring a dimension of slots into this order."""
        return self.emit.call(aten.index_select.default, tensor, dim, self.slots)

    def padding(self, known: fx.Node | None) -> fx.Node:
        """Return ``[B or 1, columns]`` booleans in this order, true for real tokens.

        Args:
            known: Which slots are no padding, by slot; None if there is none.
        """
        real = self.emit.call(aten.unsqueeze.default, self.real, 0)
        return real if known is None else self.emit.call(aten.logical_and.default, self.select(known, 1), real)

    def positions(self, columns: fx.Node) -> fx.Node:
        """Return the positions, int32, of what is in some columns."""
        shifted = self.emit.call(aten.sub.Tensor, self.emit.call(aten.add.Tensor, columns, self.end), self.columns)
        return self.emit.call(aten.clamp_min.default, shifted, 0)


def turn(emit: Emitter, use: BufferUse, columns: Size) -> Turned:
    """Add the nodes that compute the order.

    Args:
        emit: Adds calls to the graph.
        use: The buffers.
        columns: Slots that attention reads.
    """
    write = use.key
    count = emit.size(columns)
    if isinstance(write.index, fx.Node) and isinstance(write.index.meta["val"], torch.Tensor):
        end = emit.call(aten.add.Tensor, _last(emit, write, write.index), 1)
    else:
        end = _end_of_slice(emit, write.index, shape_of(write.new)[write.sequence_dim])
    numbers = emit.call(aten.arange.default, count, dtype=torch.int64, device=write.new.meta["val"].device)
    ahead = emit.call(aten.add.Tensor, numbers, end)
    slots = emit.call(aten.remainder.Scalar, ahead, count)
    return Turned(emit, count, end, slots, emit.call(aten.ge.Scalar, ahead, count))


def _last(emit: Emitter, write: BufferWrite, index: fx.Node) -> fx.Node:
    """Return the slot of the last new entry from their slots, which are the same for all rows and heads."""
    if index.meta["val"].dtype is not torch.bool:
        while shape_of(index):
            index = emit.call(aten.select.int, index, 0, -1)
        return index
    while len(shape_of(index)) > len(write.dims) - write.sequence_dim:
        index = emit.call(aten.select.int, index, 0, 0)
    while len(shape_of(index)) > 1:
        index = emit.call(aten.select.int, index, 1, 0)
    return emit.call(aten.argmax.default, emit.call(aten._to_copy.default, index, dtype=torch.int32))


def _end_of_slice(emit: Emitter, start: int | fx.Node, tokens: Size) -> int | fx.Node:
    count = emit.size(tokens)
    if isinstance(start, int) and isinstance(count, int):
        return start + count
    if start == 0:
        return count
    return emit.call(operator.add, start, count)


def padding_of(emit: Emitter, mask: fx.Node) -> fx.Node:
    """Return ``[B or 1, columns]`` booleans: what the last query of a causal mask is shown.

    Args:
        emit: Adds calls to the graph.
        mask: ``[B or 1, 1, T, columns]``.
    """
    row = emit.call(aten.select.int, emit.call(aten.select.int, mask, 1, 0), 1, -1)
    return row if row.meta["val"].dtype is torch.bool else emit.call(aten.eq.Scalar, row, 0)
