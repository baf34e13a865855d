"""Decide what happens to an attention whose keys and values are written into preallocated buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from adakv_compile.buffer_call import Buffer, Consecutive, Fact, Place, Shows
from adakv_compile.capture import Program
from adakv_compile.options import Options
from adakv_compile.passes.attention import AttentionSite
from adakv_compile.passes.buffers import BufferWrite, find_write
from adakv_compile.passes.cache import CacheUpdate
from adakv_compile.passes.constants import Constants
from adakv_compile.passes.masks import MaskKind, MaskProof, MaskProver
from adakv_compile.passes.nodes import same_size, shape_of, skip_no_ops, source_line, static_int
from adakv_compile.passes.positions import HostNumbers, Start
from adakv_compile.passes.rolled import room_of_newest
from adakv_compile.report import Reason, Refusal
from adakv_compile.runtime.layout import STANDARD
from adakv_compile.symbolic.expr import (
    Compare,
    Expr,
    Iota,
    Load,
    Size,
    add,
    axes_of,
    integer,
    linear,
    scale,
    substitute,
)

__all__ = ["BufferSite", "BufferUse", "Buffers", "share"]


@dataclass(frozen=True)
class BufferUse:
    """How a rewritten attention treats its layer's buffers.

    Attributes:
        call: What the host does with them at every call.
        key: Where the keys are written.
        value: Where the values are written.
        whole: Whether attention reads slots behind the last token, which nobody wrote in this conversation.
        mask: A mask input that says which tokens are padding, where it was not proved.
    """

    call: Buffer
    key: BufferWrite
    value: BufferWrite
    whole: bool
    mask: fx.Node | None

    def __str__(self) -> str:
        whose = "owned by the caller" if self.call.key.argument is not None else "made in this call"
        return (
            f"buffer of {self.key.slots} slots {whose}, stays dense, and what is kept lies beside it: attention reads"
            " less, memory is not saved; this holds where the last several-token call was compressed and nothing else"
            " wrote to the buffer"
        )


@dataclass(frozen=True)
class BufferSite:
    """An attention to buffers that is understood.

    Attributes:
        site: The attention, in axes that know the buffers.
        key: The keys' update.
        value: The values' update.
        proof: What its mask means.
        use: How it is treated.
    """

    site: AttentionSite
    key: CacheUpdate
    value: CacheUpdate
    proof: MaskProof
    use: BufferUse


def share(sites: Sequence[BufferSite]) -> BufferUse:
    """Return how the first of several attentions to one layer's buffers treats them: as all of them need it.

    Args:
        sites: The attentions, in order.
    """
    calls = [site.use.call for site in sites]
    same = dict.fromkeys(position for call in calls for position in call.same)
    facts = dict.fromkeys(fact for call in calls for fact in call.facts)
    return dataclasses.replace(sites[0].use, call=dataclasses.replace(calls[0], same=tuple(same), facts=tuple(facts)))


class Buffers:
    """Understands the attentions of one graph that read buffers.

    Args:
        program: The captured graph; it is only read.
        options: The user's options.
        sites: The attentions.
        constants: What the model keeps.
    """

    def __init__(
        self, program: Program, options: Options, sites: Sequence[AttentionSite], constants: Constants
    ) -> None:
        self._program = program
        self._options = options
        self._writes = {site.node: _writes(program, site) for site in sites}
        self._facts: dict[fx.Node, Fact] = {}
        found = [write for pair in self._writes.values() if pair is not None for write in pair]
        indices = [write.index for write in found if isinstance(write, BufferWrite)]
        given = self._given(indices) if indices else {}
        self._prover = MaskProver(program.module.graph, constants, given)
        self._numbers = HostNumbers(program, self._prover.reader.sizes)
        self._taken: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def decide(self, site: AttentionSite) -> BufferSite | Refusal | None:
        """Return what is done with an attention; ``None`` if its cache is no buffer."""
        room = room_of_newest(self._program, site)
        if room is not None:
            return _moving(room, self._options.budget)
        writes = self._writes[site.node]
        if writes is None:
            return None
        for write in writes:
            if isinstance(write, Refusal):
                return write
        key, value = (write for write in writes if isinstance(write, BufferWrite))
        if self._program.compressed:
            return _refused("other attentions of this graph have a compressed cache")
        if key.buffer is value.buffer:
            return _refused("it holds keys and values")
        pair = (key.written, value.written)
        if any(self._taken.get(write.buffer, pair) != pair for write in (key, value)):
            return _refused("several attentions read it, each as keys or values of another pair")
        site = dataclasses.replace(site, keys=key.operand, values=value.operand)
        tokens = site.query_length
        for write in (key, value):
            if not same_size(shape_of(write.new)[write.sequence_dim], tokens):
                return _refused(f"{tokens} queries come with {shape_of(write.new)[write.sequence_dim]} new entries")
        decided = self._understood(site, key, value)
        if isinstance(decided, BufferSite):
            self._taken |= dict.fromkeys((key.buffer, value.buffer), pair)
        return decided

    def _understood(self, site: AttentionSite, key: BufferWrite, value: BufferWrite) -> BufferSite | Refusal:
        starts = [self._start(write, site.query_length) for write in (key, value)]
        position, of_values = starts
        if position is None or of_values is None:
            return _refused("its positions are not one after the other, or not known before the call")
        mask = self._mask(site, position)
        if isinstance(mask, Refusal):
            return mask
        proof, offset, facts = mask
        for other, what in ((of_values, "the values are written"), (offset, "the mask shows the first query its key")):
            if self._numbers.differ(position, other):
                return _refused(f"the keys are written at {position}, but {what} at {other}")
        call = self._call(site, (key, value), position, [of_values, offset], facts)
        if call is None:
            return _refused("its sizes are no sums of the graph's inputs")
        one_token = static_int(site.query_length) == 1
        if one_token and call.key.argument is None:
            return Refusal(Reason.DENSE_CACHE, "the buffer is made for a single token")
        whole = not self._numbers.same(offset, Start(None, (), self._newest(site)))
        use = BufferUse(call, key, value, whole, site.mask if any(isinstance(fact, Shows) for fact in facts) else None)
        updates = [
            CacheUpdate(
                past=write.buffer,
                compressed=one_token,
                new=write.new,
                whole=write.whole,
                dims=write.dims,
                cached=write.whole,
                slots=(),
                layout=STANDARD,
            )
            for write in (key, value)
        ]
        return BufferSite(site, updates[0], updates[1], proof, use)

    def _newest(self, site: AttentionSite) -> sympy.Expr:
        """Return the position of the first query if the last one's key is the last that is read."""
        sizes = self._numbers.sizes
        return sizes.canonical(sizes.expr(site.key_length) - sizes.expr(site.query_length))

    def _call(
        self,
        site: AttentionSite,
        writes: tuple[BufferWrite, BufferWrite],
        position: Start,
        others: Sequence[Start],
        facts: Sequence[Fact],
    ) -> Buffer | None:
        first = self._numbers.position(position)
        same = [self._numbers.position(start) for start in others if not self._numbers.same(position, start)]
        slots, rows, tokens = map(self._numbers.number, (writes[0].slots, site.batch_size, site.query_length))
        places = [_place(self._program, write) for write in writes]
        if first is None or slots is None or rows is None or tokens is None or None in same:
            return None
        return Buffer(
            key=places[0],
            value=places[1],
            slots=slots,
            rows=rows,
            tokens=tokens,
            position=first,
            same=tuple(other for other in same if other is not None),
            facts=tuple(facts),
        )

    def _given(self, indices: Sequence[fx.Node | int]) -> Mapping[fx.Node, Expr]:
        """Return what is taken for known of inputs: positions count up."""
        reader = MaskProver(self._program.module.graph).reader
        given: dict[fx.Node, Expr] = {}
        for index in indices:
            if isinstance(index, fx.Node) and isinstance(index.meta["val"], torch.Tensor):
                reader.read(index)
        for leaf in list(reader.leaves.values()):
            value = leaf.node.meta["val"]
            if leaf.node.op != "placeholder" or value.dtype not in (torch.int64, torch.int32) or value.dim() > 1:
                continue
            first = Load(leaf.node.name, (integer(0),) * value.dim(), "int")
            if value.dim() == 1 and static_int(value.shape[0]) != 1:
                given[leaf.node] = add(first, Iota(0))
                self._facts[leaf.node] = Consecutive(self._program.inputs.index(leaf.node))
            else:
                given[leaf.node] = first
        return given

    def _start(self, write: BufferWrite, tokens: int | torch.SymInt) -> Start | None:
        """Return where the first of the new entries is put."""
        reader = self._prover.reader
        if isinstance(write.index, int):
            return Start(None, (), sympy.Integer(write.index)) if write.index >= 0 else None
        if not isinstance(write.index.meta["val"], torch.Tensor):
            return Start(None, (), reader.sizes.expr(write.index.meta["val"]))
        entry, rank = reader.read(write.index), write.index.meta["val"].dim()
        axis = 0 if rank == 1 else len(shape_of(write.new)) - 1 - write.sequence_dim
        if write.index.meta["val"].dtype is torch.bool:
            slot = _true_slot(entry, axis)
            return None if slot is None else self._numbers.start_of_entries(slot, tokens, reader.leaves)
        if axes_of(entry) - {axis}:
            return None
        return self._numbers.start_of_entries(substitute(entry, {axis: Iota(0)}), tokens, reader.leaves)

    def _mask(self, site: AttentionSite, position: Start) -> tuple[MaskProof, Start, list[Fact]] | Refusal:
        """Return what the mask means, up to which position the first query sees, and what must hold for that."""
        facts = list(self._facts.values())
        reader = self._prover.reader
        proof = self._prover.prove(site.mask, is_causal=site.is_causal, q_len=site.query_length, kv_len=site.key_length)
        where = proof.where or source_line(site.node)
        if proof.bias is not None:
            return Refusal(Reason.MASK_UNPROVEN, f"in front of a buffer: {proof.bias.reason}", where)
        one_token = static_int(site.query_length) == 1
        newest = Start(None, (), self._newest(site))
        full = proof.kind is MaskKind.FULL and one_token
        if proof.kind is MaskKind.UNPROVEN or (full and not self._numbers.same(position, newest)):
            shown = self._shown(site, position)
            if shown is None and full:
                return Refusal(Reason.MASK_NOT_CAUSAL, "it shows slots of the buffer behind the last token", where)
            if shown is None:
                return Refusal(Reason.MASK_UNPROVEN, proof.reason or "", where)
            looked_at = MaskProof(MaskKind.CAUSAL, steps=("the mask input is looked at in every call",))
            return looked_at, position, [*facts, shown]
        window = static_int(proof.window)
        if proof.window is not None and window is None:
            return Refusal(Reason.MASK_UNPROVEN, f"the sliding window {proof.window} is not a number", where)
        if window is not None and isinstance(self._options.budget, int) and self._options.budget >= window - 1:
            return Refusal(Reason.WITHIN_WINDOW, f"window {window}, budget {self._options.budget}")
        if full:
            return proof, newest, facts
        if proof.kind not in (MaskKind.CAUSAL, MaskKind.SLIDING_WINDOW):
            return Refusal(Reason.MASK_NOT_CAUSAL, f"the mask is {proof}", where)
        offset = proof.offset
        start = None if offset is None else self._numbers.start_of(offset, reader.leaves)
        if start is None:
            return Refusal(Reason.MASK_UNPROVEN, "what the first query sees is not known before the call", where)
        return proof, start, facts

    def _shown(self, site: AttentionSite, position: Start) -> Shows | None:
        """Return what must hold of a mask that is an input, for it to be causal from the write on."""
        mask = None if site.mask is None else skip_no_ops(site.mask)
        first = self._numbers.position(position)
        if mask is None or mask.op != "placeholder" or site.is_causal or first is None:
            return None
        shape, dtype = shape_of(mask), mask.meta["val"].dtype
        wanted = (site.query_length, site.key_length)
        if len(shape) != 4 or static_int(shape[1]) != 1 or not (dtype is torch.bool or dtype.is_floating_point):
            return None
        if not all(same_size(a, b) for a, b in zip(shape[2:], wanted, strict=True)):
            return None
        return Shows(self._program.inputs.index(mask), first)


def _writes(program: Program, site: AttentionSite) -> tuple[BufferWrite | Refusal, BufferWrite | Refusal] | None:
    key, value = (find_write(program, site, which) for which in ("key", "value"))
    if key is None and value is None:
        return None
    if key is None or value is None:
        refusal = Refusal(Reason.KEY_VALUE_MISMATCH, "only one of them is written into a buffer")
        return refusal, refusal
    return key, value


def _true_slot(chosen: Expr, axis: int) -> Expr | None:
    """Return the slot for which booleans over slots are true, if they are so for just one, by their form."""
    match chosen:
        case Compare("eq", difference, Size(zero)) if zero == 0:
            factor = linear(difference)[0].get(Iota(axis))
            if factor not in (1, -1):
                return None
            slot = add(scale(Iota(axis), factor), difference, -1)
            slot = slot if factor == 1 else scale(slot, sympy.Integer(-1))
            return None if axes_of(slot) else slot
        case _:
            return None


def _moving(room: int | torch.SymInt, budget: float) -> Refusal:
    """Return why a buffer of the newest tokens is left alone: no token is seen that it does not hold."""
    if isinstance(budget, int) and (held := static_int(room)) is not None and budget >= held - 1:
        return Refusal(Reason.WITHIN_WINDOW, f"a buffer of the newest {held} tokens, budget {budget}")
    return _refused(f"holds the newest {room} tokens, which move from slot to slot: it is left as it is")


def _refused(why: str) -> Refusal:
    return Refusal(Reason.CACHE_FORM, f"the cache is a buffer, and {why}")


def _place(program: Program, write: BufferWrite) -> Place:
    if write.buffer.op == "placeholder":
        return Place(program.inputs.index(write.buffer))
    return Place(None, program.outputs.index(write.written))
