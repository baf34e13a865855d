"""The only stage that changes a graph: put the plan's operators where the attention and the cache updates were."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import fx

from adakv_compile import _torch, kernels
from adakv_compile.buffer_call import Buffer
from adakv_compile.call import (
    STORE_TENSORS,
    Assumed,
    Boundary,
    CachedLength,
    CausalMask,
    Grown,
    Made,
    Output,
    Returned,
    StoreSize,
)
from adakv_compile.capture import Program
from adakv_compile.passes.axes import Dims
from adakv_compile.passes.buffer_emit import Turned, padding_of, turn
from adakv_compile.passes.buffer_plan import BufferUse
from adakv_compile.passes.cache import CacheUpdate
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.inputs import GraphInputs
from adakv_compile.passes.nodes import arg, same_layout, same_size, shape_of, static_int
from adakv_compile.passes.padding import emit_padding
from adakv_compile.passes.plan import Action, Plan, PlannedSite
from adakv_compile.passes.region import Region, clone
from adakv_compile.policy import Policy

__all__ = ["Rewritten", "rewrite"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """A graph on plain tensors and how to call it.

    Attributes:
        module: The rewritten graph.
        inputs: Example inputs of ``module``: the caller's, or fakes for the parts of a store.
        boundary: How its arguments and results relate to those of Dynamo's graph.
        unguarded: Symbolic sizes that Dynamo doesn't guard on, with where they come from in a call.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    boundary: Boundary
    unguarded: tuple[tuple[torch.SymInt, StoreSize], ...]


def rewrite(program: Program, plan: Plan, example_inputs: Sequence[Any]) -> Rewritten:
    """Rewrite the captured graph, all sites of the plan or none.

    Args:
        program: The captured graph; its module is consumed.
        plan: What to do.
        example_inputs: The inputs Dynamo passed, one for each placeholder of the captured graph.

    Raises:
        RuntimeError: A value of the dense cache is still needed after the rewrite.
    """
    inputs = GraphInputs(program, example_inputs)
    try:
        return _Rewriter(program, plan, inputs).run()
    except Exception:
        with contextlib.suppress(RuntimeError):
            _torch.take_guards(program.fake_mode, [size for size, _ in inputs.unguarded])
        raise


@dataclass(frozen=True)
class _Opened:
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
class _Rewriter:
    program: Program
    plan: Plan
    inputs: GraphInputs
    results: list[fx.Node] = field(default_factory=list[fx.Node])
    cached: dict[int, Output] = field(default_factory=dict[int, Output])
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    opened: dict[int, _Opened] = field(default_factory=dict[int, "_Opened"])
    buffers: list[Buffer] = field(default_factory=list[Buffer])

    @property
    def graph(self) -> fx.Graph:
        return self.program.module.graph

    def run(self) -> Rewritten:
        self._restore()
        owners = {planned.index: planned for planned in self.plan.sites if planned.owner is None}
        for planned, policy in zip(self.plan.sites, self.plan.policies, strict=True):
            owner = planned if planned.owner is None else owners[planned.owner]
            if planned.latent is not None and owner.action is not Action.COMPRESS:
                self._attend_to_latents(planned, planned.latent)
            elif owner.action is Action.COMPRESS:
                if planned is owner:
                    self._compress(planned, policy)
            elif owner.action is Action.RECOMPRESS:
                self._recompress(planned, owner, policy)
            elif owner.action is Action.DECODE and planned is owner:
                self._decode(planned)
            else:
                self._read(planned, owner)
        outputs = self._close()
        inputs = self.inputs.finish(
            past for planned in self.plan.sites for past in (planned.key.past, planned.value.past) if past is not None
        )
        self.graph.lint()
        self.program.module.recompile()
        return Rewritten(
            module=self.program.module,
            inputs=tuple(example for _, example in inputs),
            boundary=Boundary(
                tuple(source for source, _ in inputs),
                tuple(self.inputs.pasts),
                outputs,
                (
                    *(Assumed(self.program.inputs.index(node), self.program.kept[node]) for node in self.plan.assumed),
                    *(CausalMask(self.program.inputs.index(node)) for node in self.plan.checked),
                ),
                tuple(self.buffers),
            ),
            unguarded=tuple(self.inputs.unguarded),
        )

    def _restore(self) -> None:
        """Put back what the model wrote where the plan does not replace it, to the last bit."""
        attentions = [planned for planned in self.plan.sites if planned.key.compressed or _is_replaced(planned)]
        replaced = {planned.site.node for planned in attentions}
        for call, spelled in self.program.spelled.items():
            if call not in replaced:
                spelled.result.replace_all_uses_with(spelled.original)

    # -- the actions ------------------------------------------------------------------------------------------------

    def _compress(self, planned: PlannedSite, policy: str) -> None:
        site, mask, emit = planned.site, planned.mask, self._emit(planned)
        caches = [self._without_empty_past(update) for update in (planned.key, planned.value)]
        lse = self._attend(planned)
        # Right after the attention, so that this layer's dense cache dies before the next layer's is made.
        with self.graph.inserting_before(self._last_of(planned).next):
            key, value = (
                self._arranged(emit, planned, self._embedded(planned, cache, which), update.dims, which)
                for cache, (update, which) in zip(caches, _kinds(planned), strict=True)
            )
            turned = self._turned(planned)
            if turned is not None:
                key, value = (turned.select(entries, 2) for entries in (key, value))
            padding = self._padding(planned)
            if turned is not None:
                seen = key
            elif planned.latent is None:
                whole = self._embedded(planned, self._current(planned.key.whole), "key")
                seen = self._arranged(emit, planned, whole, planned.key.dims, "key")
            else:
                seen = cast("fx.Node", site.node.args[1])
            scores = emit.call(
                self._op(kernels.observe.SPEC, planned),
                *(site.query, seen, mask.lookup, padding, lse, site.sinks),
                *(site.scale, mask.sliding_window, site.softcap, policy),
            )
            if planned.latent is not None:
                # One cached head serves all: what is true of a group of query heads is true of them.
                together = aten.amax.default if Policy.decode(policy).gqa == "max" else aten.mean.dim
                scores = emit.call(together, scores, [1], True)
            if planned.key.is_sliding:
                # Queries saw more than the cache keeps.
                start = cast("int | fx.Node", arg(planned.key.cached, 2, "start", 0))
                scores = emit.call(aten.slice.Tensor, scores, 2, start)
                scores = emit.call(aten.clone.default, scores, memory_format=torch.contiguous_format)
                padding = self._padding(planned, start)
            kept = emit.call(
                self._op(kernels.select.SPEC, planned),
                *(scores, padding, mask.sliding_window, policy),
            )
            positions, offsets = (emit.call(operator.getitem, kept, i) for i in range(2))
            stored = emit.call(self._op(kernels.compact.SPEC, planned), key, value, positions, offsets)
            keys, values = (emit.call(operator.getitem, stored, i) for i in range(2))
            if turned is not None:
                positions = turned.positions(positions)
            if planned.buffer is not None:
                self._keep_beside(planned.buffer, first=len(self.results))
                self.results.extend((keys, values, offsets, positions))
                return
            tokens = self._length(emit, key)
        self._return_made(planned, (keys, values, offsets, positions), tokens, None, "all")

    def _decode(self, planned: PlannedSite) -> None:
        site, emit = planned.site, self._emit(planned)
        opened = self._open(planned, appends=1)
        with self.graph.inserting_before(site.node):
            out = emit.call(
                self._op(kernels.decode_attention.SPEC, planned),
                site.query,
                *self._new(emit, planned),
                *(opened.parts[name] for name in STORE_TENSORS),
                *self._rules(planned),
            )
            out = self._in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        if planned.buffer is not None:
            self._keep_beside(planned.buffer, past=opened.past)
        self._return_grown(planned, opened.past)

    def _read(self, planned: PlannedSite, owner: PlannedSite) -> None:
        """Attend to a store that holds the new tokens by now."""
        site, emit = planned.site, self._emit(planned)
        opened = self._open(owner, appends=0)
        with self.graph.inserting_before(site.node):
            out = emit.call(
                self._op(kernels.attend.SPEC, planned),
                site.query,
                *(opened.parts[name] for name in STORE_TENSORS),
                *self._rules(planned),
            )
            out = self._in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        if planned is owner:
            self._return_grown(planned, opened.past)

    def _recompress(self, planned: PlannedSite, owner: PlannedSite, policy: str) -> None:
        site, mask, emit = planned.site, planned.mask, self._emit(planned)
        opened = self._open(owner, appends=0)
        if not opened.lengths:
            opened.lengths.extend(
                self.inputs.add_host_length(opened.past, name) for name in ("tail_length", "prefix_length")
            )
        with self.graph.inserting_before(site.node):
            key, value = self._new(emit, planned)
            result = emit.call(
                self._op(kernels.extend.SPEC, planned),
                *(site.query, key, value),
                *(opened.parts[name] for name in STORE_TENSORS if name != "cursor"),
                *opened.lengths,
                *self._rules(planned),
                policy,
                planned is owner and (mask.lookup is None or mask.bias),
            )
            out, *stored = (emit.call(operator.getitem, result, i) for i in range(5))
            tokens = self._length(emit, key)
            out = self._in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        if planned is owner:
            keys, values, offsets, positions = stored
            made = (keys, values, offsets, positions)
            self._return_made(planned, made, tokens, opened.past, self._cached_length(planned.key))

    def _attend_to_latents(self, planned: PlannedSite, region: Region) -> None:
        """Append to a latent cache, compute the keys and values of what it holds, and attend."""
        site, emit = planned.site, self._emit(planned)
        opened = self._open(planned, appends=site.query_length)
        with self.graph.inserting_before(site.node):
            held = emit.call(
                kernels.entries.SPEC.overload,
                *self._new(emit, planned),
                *(opened.parts[name] for name in STORE_TENSORS),
                *(planned.mask.lookup, self._columns(planned), planned.mask.sliding_window),
            )
            *latents, visible = (emit.call(operator.getitem, held, i) for i in range(3))
            sources = {
                update.whole: emit.arrange(operand.axes, latent, tuple(map(tuple, operand.order)), update.dims)
                for (update, which), latent in zip(_kinds(planned), latents, strict=True)
                for operand in (site.operand(which),)
            }
            made = clone(emit, region, sources, emit.call(aten.sym_size.int, latents[0], 2))
            key, value = (made[cast("fx.Node", operand)] for operand in site.node.args[1:3])
            if site.is_plain:
                out = emit.call(
                    aten.scaled_dot_product_attention.default,
                    *(site.query, key, value, visible, 0.0, False),
                    scale=site.scale,
                    enable_gqa=not same_size(shape_of(key)[1], site.num_heads),
                )
            else:
                rules = (visible, site.sinks, False, site.scale, site.softcap)
                out = emit.call(kernels.attention.SPEC.overload, site.query, key, value, *rules)
            out = self._in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        self._return_grown(planned, opened.past)

    def _attend(self, planned: PlannedSite) -> fx.Node | None:
        """Let the chosen backend compute a prompt's attention; return its log-sum-exp if ``observe`` can use it."""
        site, choice = planned.site, planned.attention
        if choice is None or choice.name == "model":
            return None
        emit = self._emit(planned)
        lse = None
        with self.graph.inserting_before(site.node):
            fake = site.query.meta["val"]
            # Grouped heads have flash and cuDNN kernels; elsewhere PyTorch would fall back to plain products.
            grouped = fake.device.type == "cuda" and fake.dtype in (torch.float16, torch.bfloat16)
            if choice.name == "sdpa" and not grouped:
                key, value = cast("tuple[fx.Node, fx.Node]", site.node.args[1:3])
            else:
                key, value = (
                    self._arranged(
                        emit, planned, self._embedded(planned, self._current(update.whole), which), update.dims, which
                    )
                    for update, which in _kinds(planned)
                )
            if choice.name == "sdpa":
                out = emit.call(
                    aten.scaled_dot_product_attention.default,
                    *(site.query, key, value, None, 0.0, True),
                    scale=site.scale,
                    enable_gqa=not same_size(shape_of(key)[1], site.num_heads),
                )
            else:
                out_and_lse = emit.call(
                    kernels.prefill_attention.SPEC.overload,
                    *(site.query, key, value, site.scale, planned.mask.sliding_window, choice.name),
                )
                out, lse = (emit.call(operator.getitem, out_and_lse, i) for i in range(2))
            out = self._in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        return lse if kernels.prefill_attention.BACKENDS[choice.name].gives_lse else None

    # -- pieces -----------------------------------------------------------------------------------------------------

    def _op(self, spec: kernels.OpSpec, planned: PlannedSite) -> Callable[..., Any]:
        """Return the overload of an op that the site was given."""
        return spec.overload_for(cast("kernels.Kernels", planned.kernels.name))

    def _emit(self, planned: PlannedSite) -> Emitter:
        return Emitter(self.graph, self.program.fake_mode, planned.site.node)

    def _last_of(self, planned: PlannedSite) -> fx.Node:
        """Return the last node of an attention: its operator, or what the model wrote, whichever comes later."""
        spelled = self.program.spelled.get(planned.site.node)
        return planned.site.node if spelled is None else spelled.result

    def _open(self, owner: PlannedSite, appends: int | torch.SymInt) -> _Opened:
        """Return the store behind a past, as inputs of the graph."""
        if owner.index not in self.opened:
            self.opened[owner.index] = _Opened(*self.inputs.add_past(owner, appends))
        return self.opened[owner.index]

    def _arranged(self, emit: Emitter, planned: PlannedSite, node: fx.Node, dims: Dims, which: str) -> fx.Node:
        """Return keys or values as ``[B, Hkv, L, D]``."""
        operand = planned.site.operand(which)
        return emit.arrange(operand.axes, node, dims, operand.order)

    def _new(self, emit: Emitter, planned: PlannedSite) -> tuple[fx.Node, fx.Node]:
        """Return the entries of this call, as the operators take them."""
        new = [cast("fx.Node", update.new) for update in (planned.key, planned.value)]
        if planned.late is not None:
            new[0] = planned.late.of_new(emit, new[0], planned.key.sequence_dim)
        key, value = (
            self._arranged(emit, planned, entries, update.dims, which)
            for entries, (update, which) in zip(new, _kinds(planned), strict=True)
        )
        return key, value

    def _embedded(self, planned: PlannedSite, cache: fx.Node, which: str) -> fx.Node:
        """Return what attention reads of a cache that is kept before its position embedding, or the cache itself."""
        return planned.late.result if planned.late is not None and which == "key" else cache

    def _rules(self, planned: PlannedSite) -> tuple[Any, ...]:
        """Return what an attention to a store is told about who sees what."""
        site, mask = planned.site, planned.mask
        return (mask.lookup, self._columns(planned), site.sinks, site.scale, mask.sliding_window, site.softcap)

    def _in_layout_of(self, emit: Emitter, out: fx.Node, like: fx.Node) -> fx.Node:
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
        out = emit.call(aten.transpose.int, rows, 1, 2)
        if not same_layout(out, like):
            raise RuntimeError(f"the attention {like.name} has strides {like.meta['val'].stride()}")
        return out

    def _without_empty_past(self, update: CacheUpdate) -> fx.Node:
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

    def _current(self, whole: fx.Node) -> fx.Node:
        """Return what stands for a cache after empty pasts were dropped."""
        return self.replaced.get(whole, whole)

    def _padding(self, planned: PlannedSite, start: int | fx.Node | None = None) -> fx.Node | None:
        """Emit the padding of all columns, or of those from ``start`` on, if there is any."""
        fact, emit = planned.mask.padding, self._emit(planned)
        if planned.mask.checked is not None:
            # What the last token sees.
            row = emit.call(aten.select.int, planned.mask.checked, 2, -1)
            row = emit.call(aten.select.int, row, 1, 0)
            return row if start is None else emit.call(aten.slice.Tensor, row, 1, start)
        known = None
        if fact is not None:
            known = emit_padding(fact, lambda target, args: emit.call(target, *args), planned.site.key_length, start)
        elif planned.buffer is not None and planned.buffer.mask is not None:
            known = padding_of(emit, planned.buffer.mask)
        if known is None and planned.action is Action.DECODE:
            return None
        turned = self._turned(planned)
        return known if turned is None else turned.padding(known)

    def _turned(self, planned: PlannedSite) -> Turned | None:
        """Emit the order in which the slots of a buffer are read, if there are some behind the last token."""
        if planned.buffer is None or not planned.buffer.whole:
            return None
        return turn(self._emit(planned), planned.buffer, planned.site.key_length)

    def _keep_beside(self, use: BufferUse, *, past: int | None = None, first: int | None = None) -> None:
        self.buffers.append(dataclasses.replace(use.call, past=past, first=first))

    def _columns(self, planned: PlannedSite) -> fx.Node | None:
        """Emit the padding of all columns; a sliding cache without one still needs its columns told apart."""
        if not planned.mask.columns:
            return self._padding(planned)
        emit, query = self._emit(planned), planned.site.query
        size = [emit.size(size) for size in (shape_of(query)[0], planned.site.key_length)]
        return emit.call(aten.ones.default, size, dtype=torch.bool, device=query.meta["val"].device)

    def _length(self, emit: Emitter, node: fx.Node) -> int | fx.Node:
        """Return the sequence length of ``[B, H, L, D]``: a number, or a node that holds it."""
        length = shape_of(node)[2]
        return length if isinstance(length, int) else emit.call(aten.sym_size.int, node, 2)

    def _cached_length(self, update: CacheUpdate) -> CachedLength:
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
                return self._result(emit.call(operator.neg, start))
        raise RuntimeError(f"the length {update.cached_length} of a sliding cache can't be computed from the inputs")

    def _return_made(
        self,
        planned: PlannedSite,
        stored: tuple[fx.Node, fx.Node, fx.Node, fx.Node],
        tokens: int | fx.Node,
        past: int | None,
        cached: CachedLength,
    ) -> None:
        first = len(self.results)
        self.results.extend(stored)
        count = tokens if isinstance(tokens, int) else self._result(tokens)
        for update, which in _kinds(planned):
            for slot in update.slots:
                self.cached[slot] = Made(first, "pair" if update.is_pair else which, count, past, cached, update.layout)

    def _return_grown(self, planned: PlannedSite, past: int) -> None:
        cached = self._cached_length(planned.key)
        for update, which in _kinds(planned):
            for slot in update.slots:
                self.cached[slot] = Grown(past, "pair" if update.is_pair else which, cached, update.layout)

    def _result(self, node: fx.Node) -> Returned:
        """Return ``node`` from the graph, once for every symbolic value."""
        for i, other in enumerate(self.results):
            if other is node or (
                isinstance(other.meta["val"], torch.SymInt) and same_size(other.meta["val"], node.meta["val"])
            ):
                return Returned(i)
        self.results.append(node)
        return Returned(len(self.results) - 1)

    def _close(self) -> tuple[Output, ...]:
        """Write back mutated inputs, and return what is left of the outputs and the stores."""
        output = next(iter(self.graph.find_nodes(op="output")))
        # What was replaced is so here, not in the program.
        values = cast("tuple[object, ...]", output.args[0])
        finals = cast("tuple[fx.Node, ...]", values[: len(self.program.mutated)])
        with self.graph.inserting_before(output):
            for (target, _), value in zip(self.program.mutated, finals, strict=True):
                self.graph.call_function(aten.copy_.default, (target, value))
        outputs: list[Output] = []
        for slot, value in enumerate(values[len(finals) :]):
            if slot in self.cached:
                outputs.append(self.cached[slot])
            elif isinstance(value, fx.Node):
                self.results.append(value)
                outputs.append(Returned(len(self.results) - 1))
            else:
                outputs.append(Returned(None, value))
        output.args = (tuple(self.results),)
        return tuple(outputs)


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


def _is_replaced(planned: PlannedSite) -> bool:
    """Whether a prompt's attention is computed by something else than what the model wrote."""
    return planned.attention is not None and planned.attention.name != "model"


def _kinds(planned: PlannedSite) -> tuple[tuple[CacheUpdate, Literal["key"]], tuple[CacheUpdate, Literal["value"]]]:
    return (planned.key, "key"), (planned.value, "value")
