"""What every rewrite of an attention is put together from: operands in the operators' order, rules, results."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import fx

from adakv_compile import kernels
from adakv_compile.buffer_call import Buffer
from adakv_compile.call import (
    CachedLength,
    Grown,
    Made,
    Output,
    Returned,
)
from adakv_compile.capture import Program
from adakv_compile.passes.axes import Dims
from adakv_compile.passes.buffer_emit import Turned, padding_of, turn
from adakv_compile.passes.buffer_plan import BufferUse
from adakv_compile.passes.cache import CacheUpdate
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.inputs import GraphInputs
from adakv_compile.passes.masks import NEGLIGIBLE
from adakv_compile.passes.nodes import arg, same_layout, same_size, shape_of, static_int
from adakv_compile.passes.padding import emit_padding
from adakv_compile.passes.planned import Action, Plan, PlannedSite
from adakv_compile.policy import Policy

__all__ = ["Opened", "Pieces", "kinds"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Opened:
    """A past whose store's parts are inputs of the graph.

    Attributes:
        past: Its index among the pasts.
        parts: The inputs, by field of the store.
        lengths: Those lengths that the host knows, if somebody asked for them.
    """

    past: int
    parts: dict[str, fx.Node]
    lengths: list[fx.Node] = field(default_factory=list[fx.Node])


@dataclass
class Pieces:
    """What is collected while a graph is rewritten.

    Attributes:
        program: The captured graph.
        plan: What to do.
        inputs: The inputs of the rewritten graph.
        results: What the rewritten graph returns.
        cached: The outputs that are caches, by slot.
        replaced: What stands for concatenations with nothing.
        opened: The stores, by the index of the attention that owns them.
        buffers: The preallocated buffers.
    """

    program: Program
    plan: Plan
    inputs: GraphInputs
    results: list[fx.Node] = field(default_factory=list[fx.Node])
    cached: dict[int, Output] = field(default_factory=dict[int, Output])
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    opened: dict[int, Opened] = field(default_factory=dict[int, "Opened"])
    buffers: list[Buffer] = field(default_factory=list[Buffer])

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.program.module.graph

    def op(self, spec: kernels.OpSpec, planned: PlannedSite) -> Callable[..., Any]:
        """Return the overload of an op that the site was given."""
        return spec.overload_for(cast("kernels.Kernels", planned.kernels.name))

    def emit(self, planned: PlannedSite) -> Emitter:
        """Return what adds calls for an attention."""
        return Emitter(self.graph, self.program.fake_mode, planned.site.node)

    def last_of(self, planned: PlannedSite) -> fx.Node:
        """Return the last node of an attention: its operator, or what the model wrote, whichever comes later."""
        spelled = self.program.spelled.get(planned.site.node)
        return planned.site.node if spelled is None else spelled.result

    def later(self, node: fx.Node, *others: fx.Node) -> fx.Node:
        """Return the last of some nodes; a cache may be cut to its newest entries after the attention."""
        wanted, last, after = set(others), node, node.next
        while wanted and after.op != "output":
            last = after if after in wanted else last
            after = after.next
        return last

    def open(self, owner: PlannedSite, appends: int | torch.SymInt) -> Opened:
        """Return the store behind a past, as inputs of the graph."""
        if owner.index not in self.opened:
            self.opened[owner.index] = Opened(*self.inputs.add_past(owner, appends))
        return self.opened[owner.index]

    def arranged(self, emit: Emitter, planned: PlannedSite, node: fx.Node, dims: Dims, which: str) -> fx.Node:
        """Return keys or values as ``[B, Hkv, L, D]``."""
        operand = planned.site.operand(which)
        return emit.arrange(operand.axes, node, dims, operand.order)

    def new(self, emit: Emitter, planned: PlannedSite) -> tuple[fx.Node, fx.Node]:
        """Return the entries of this call, as the operators take them."""
        new = [cast("fx.Node", update.new) for update in (planned.key, planned.value)]
        if planned.late is not None:
            new[0] = planned.late.of_new(emit, new[0], planned.key.sequence_dim)
        key, value = (
            self.arranged(emit, planned, entries, update.dims, which)
            for entries, (update, which) in zip(new, kinds(planned), strict=True)
        )
        return key, value

    def embedded(self, planned: PlannedSite, cache: fx.Node, which: str) -> fx.Node:
        """Return what attention reads of a cache that is kept before its position embedding, or the cache itself."""
        return planned.late.result if planned.late is not None and which == "key" else cache

    def rules(self, planned: PlannedSite) -> tuple[Any, ...]:
        """Return what an attention to a store is told about who sees what."""
        site, mask = planned.site, planned.mask
        return (self.lookup(planned), self.columns(planned), site.sinks, site.scale, mask.sliding_window, site.softcap)

    def lookup(self, planned: PlannedSite) -> fx.Node | None:
        """Return the mask that is looked up as ``[B or 1, 1 or Hq, T or 1, L]``."""
        mask = planned.mask.lookup
        return None if mask is None else self.widened(self.emit(planned), mask)

    def widened(self, emit: Emitter, mask: fx.Node) -> fx.Node:
        """Return a mask with all four dimensions."""
        while len(shape_of(mask)) < 4:
            mask = emit.call(aten.unsqueeze.default, mask, 0)
        return mask

    def of_one_head(self, emit: Emitter, scores: fx.Node, policy: str) -> fx.Node:
        """Return the scores ``[B, 1, L]`` of what one cached head holds for all heads, as of a group of query heads."""
        together = aten.amax.default if Policy.decode(policy).gqa == "max" else aten.mean.dim
        return emit.call(together, scores, [1], True)

    def in_layout_of(self, emit: Emitter, out: fx.Node, like: fx.Node) -> fx.Node:
        """Give an attention's output the memory layout that the graph's later views were traced for.

        Raises:
            RuntimeError: The layout is neither ``[B, H, T, D]`` nor ``[B, T, H, D]`` in memory.
        """
        if same_layout(out, like):
            return out
        if like.target is kernels.attention.SPEC.overload:
            return emit.call(aten.clone.default, out, memory_format=torch.contiguous_format)
        rows = emit.call(aten.transpose.int, out, 1, 2)
        rows = emit.call(aten.clone.default, rows, memory_format=torch.contiguous_format)
        by_token = emit.call(aten.transpose.int, rows, 1, 2)
        if same_layout(by_token, like):
            return by_token
        by_head = emit.call(aten.clone.default, out, memory_format=torch.contiguous_format)
        if not same_layout(by_head, like):
            raise RuntimeError(f"the attention {like.name} has strides {like.meta['val'].stride()}")
        return by_head

    def without_empty_past(self, update: CacheUpdate) -> fx.Node:
        """Return what the caller keeps, after replacing ``cat([empty, new])`` by ``new``."""
        if update.past is not None or update.new is None or update.whole is update.new:
            return update.cached
        if update.whole not in self.replaced:
            new = update.new
            if _is_viewed(update.whole) and not same_layout(update.whole, new):
                # Views behind it were traced for the concatenation's own layout in memory.
                emit = Emitter(self.graph, self.program.fake_mode, update.whole)
                with self.graph.inserting_before(update.whole):
                    new = emit.call(aten.clone.default, new, memory_format=torch.contiguous_format)
            update.whole.replace_all_uses_with(new)
            self.replaced[update.whole] = new
        return self.replaced[update.whole] if update.cached is update.whole else update.cached

    def current(self, whole: fx.Node) -> fx.Node:
        """Return what stands for a cache after empty pasts were dropped."""
        return self.replaced.get(whole, whole)

    def padding(self, planned: PlannedSite, start: int | fx.Node | None = None) -> fx.Node | None:
        """Emit the padding of all columns, or of those from ``start`` on, if there is any."""
        fact, emit = planned.mask.padding, self.emit(planned)
        if planned.mask.visible is not None:
            row = emit.call(aten.select.int, self.widened(emit, planned.mask.visible), 2, -1)
            row = emit.call(aten.select.int, row, 1, 0)
            if planned.mask.proof.additive:
                row = emit.call(aten.gt.Scalar, row, NEGLIGIBLE)
            return row if start is None else emit.call(aten.slice.Tensor, row, 1, start)
        known = None
        if fact is not None:
            known = emit_padding(fact, lambda target, args: emit.call(target, *args), planned.site.key_length, start)
        elif planned.buffer is not None and planned.buffer.mask is not None:
            known = padding_of(emit, planned.buffer.mask)
        if known is None and planned.action is Action.DECODE:
            return None
        turned = self.turned(planned)
        return known if turned is None else turned.padding(known)

    def turned(self, planned: PlannedSite) -> Turned | None:
        """Emit the order in which the slots of a buffer are read, if there are some behind the last token."""
        if planned.buffer is None or not planned.buffer.whole:
            return None
        return turn(self.emit(planned), planned.buffer, planned.site.key_length)

    def keep_beside(self, use: BufferUse, *, past: int | None = None, first: int | None = None) -> None:
        """Note what is kept beside a preallocated buffer: a past that grew, or the results from ``first`` on."""
        self.buffers.append(dataclasses.replace(use.call, past=past, first=first))

    def columns(self, planned: PlannedSite) -> fx.Node | None:
        """Emit the padding of all columns; a sliding cache without one still needs its columns told apart."""
        if not planned.mask.columns:
            return self.padding(planned)
        emit, query = self.emit(planned), planned.site.query
        size = [emit.size(size) for size in (shape_of(query)[0], planned.site.key_length)]
        return emit.call(aten.ones.default, size, dtype=torch.bool, device=query.meta["val"].device)

    def length(self, emit: Emitter, node: fx.Node) -> int | fx.Node:
        """Return the sequence length of ``[B, H, L, D]``: a number, or a node that holds it."""
        length = shape_of(node)[2]
        return length if isinstance(length, int) else emit.call(aten.sym_size.int, node, 2)

    def cached_length(self, update: CacheUpdate) -> CachedLength:
        """Say how long the tensor is that the caller keeps."""
        if not update.is_sliding:
            return "all"
        fixed = static_int(update.cached_length)
        if fixed is not None:
            return fixed
        if update.past is not None and same_size(update.cached_length, update.past_length):
            return "as before"
        start = arg(update.cached, 2, "start")
        if isinstance(start, fx.Node) and same_size(-start.meta["val"], update.cached_length):
            with self.graph.inserting_after(start):
                emit = Emitter(self.graph, self.program.fake_mode, start)
                return self.result(emit.call(operator.neg, start))
        raise RuntimeError(f"the length {update.cached_length} of a sliding cache can't be computed from the inputs")

    def return_made(
        self,
        planned: PlannedSite,
        stored: tuple[fx.Node, fx.Node, fx.Node, fx.Node],
        tokens: int | fx.Node,
        past: int | None,
        cached: CachedLength,
    ) -> None:
        """Return a new store, of which the boundary makes the caches that the caller gets."""
        first = len(self.results)
        self.results.extend(stored)
        count = tokens if isinstance(tokens, int) else self.result(tokens)
        for update, which in kinds(planned):
            for slot in update.slots:
                self.cached[slot] = Made(first, "pair" if update.is_pair else which, count, past, cached, update.layout)

    def return_grown(self, planned: PlannedSite, past: int) -> None:
        """Let the boundary make the caller's caches of a store that was appended to."""
        cached = self.cached_length(planned.key)
        for update, which in kinds(planned):
            for slot in update.slots:
                self.cached[slot] = Grown(past, "pair" if update.is_pair else which, cached, update.layout)

    def result(self, node: fx.Node) -> Returned:
        """Return ``node`` from the graph, once for every symbolic value."""
        for i, other in enumerate(self.results):
            if other is node or (
                isinstance(other.meta["val"], torch.SymInt) and same_size(other.meta["val"], node.meta["val"])
            ):
                return Returned(i)
        self.results.append(node)
        return Returned(len(self.results) - 1)


def _is_viewed(node: fx.Node) -> bool:
    """Whether a value is viewed in other dimensions, for which its layout in memory matters."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user.target in (aten.view.default, aten._unsafe_view.default):
            return True
        if user.target in (aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.alias.default):
            pending.extend(user.users)
    return False


def kinds(planned: PlannedSite) -> tuple[tuple[CacheUpdate, Literal["key"]], tuple[CacheUpdate, Literal["value"]]]:
    """Return the keys and the values of an attention."""
    return (planned.key, "key"), (planned.value, "value")
