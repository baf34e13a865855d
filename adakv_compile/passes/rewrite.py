"""The only stage that changes a graph: put the plan's operators where the attention and the cache updates were."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from adakv_compile import _torch, kernels
from adakv_compile.assumptions import Assumed, CausalMask, StoreSize
from adakv_compile.call import (
    STORE_TENSORS,
    Boundary,
    Output,
    Returned,
)
from adakv_compile.capture import Program
from adakv_compile.passes.inputs import GraphInputs
from adakv_compile.passes.nodes import arg, same_size, shape_of
from adakv_compile.passes.pieces import Pieces, kinds
from adakv_compile.passes.planned import Action, Plan, PlannedSite
from adakv_compile.passes.region import Region, clone

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
    finished = False
    try:
        rewritten = _Rewriter(program, plan, inputs).run()
        finished = True
    finally:
        if not finished:
            with contextlib.suppress(RuntimeError):
                _torch.take_guards(program.fake_mode, [size for size, _ in inputs.unguarded])
    return rewritten


@dataclass
class _Rewriter(Pieces):
    def run(self) -> Rewritten:
        self._restore()
        owners = {planned.index: planned for planned in self.plan.sites if planned.owner is None}
        for planned, policy in zip(self.plan.sites, self.plan.policies, strict=True):
            owner = planned if planned.owner is None else owners[planned.owner]
            if planned.latent is not None and owner.action is Action.RECOMPRESS:
                self._recompress_latents(planned, planned.latent, policy)
            elif planned.latent is not None and owner.action is not Action.COMPRESS:
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
        site, mask, emit = planned.site, planned.mask, self.emit(planned)
        caches = [self.without_empty_past(update) for update in (planned.key, planned.value)]
        lse = self._attend(planned)
        # Right after the attention, so that this layer's dense cache dies before the next layer's is made.
        with self.graph.inserting_before(self.later(self.last_of(planned), *caches).next):
            key, value = (
                self.arranged(emit, planned, self.embedded(planned, cache, which), update.dims, which)
                for cache, (update, which) in zip(caches, kinds(planned), strict=True)
            )
            turned = self.turned(planned)
            if turned is not None:
                key, value = (turned.select(entries, 2) for entries in (key, value))
            padding = self.padding(planned)
            if turned is not None:
                seen = key
            elif planned.latent is None:
                whole = self.embedded(planned, self.current(planned.key.whole), "key")
                seen = self.arranged(emit, planned, whole, planned.key.dims, "key")
            else:
                seen = cast("fx.Node", site.node.args[1])
            scores = emit.call(
                self.op(kernels.observe.SPEC, planned),
                *(site.query, seen, self.lookup(planned), None if mask.covers_padding else padding, lse, site.sinks),
                *(site.scale, mask.sliding_window, site.softcap, policy),
            )
            if planned.latent is not None:
                scores = self.of_one_head(emit, scores, policy)
            if planned.key.is_sliding:
                # Queries saw more than the cache keeps.
                start = cast("int | fx.Node", arg(planned.key.cached, 2, "start", 0))
                scores = emit.call(aten.slice.Tensor, scores, 2, start)
                scores = emit.call(aten.clone.default, scores, memory_format=torch.contiguous_format)
                padding = self.padding(planned, start)
            kept = emit.call(
                self.op(kernels.select.SPEC, planned),
                *(scores, padding, mask.reach, policy),
            )
            positions, offsets = (emit.call(operator.getitem, kept, i) for i in range(2))
            stored = emit.call(self.op(kernels.compact.SPEC, planned), key, value, positions, offsets)
            keys, values = (emit.call(operator.getitem, stored, i) for i in range(2))
            if turned is not None:
                positions = turned.positions(positions)
            if planned.buffer is not None:
                self.keep_beside(planned.buffer, first=len(self.results))
                self.results.extend((keys, values, offsets, positions))
                return
            tokens = self.length(emit, key)
        self.return_made(planned, (keys, values, offsets, positions), tokens, None, "all")

    def _decode(self, planned: PlannedSite) -> None:
        site, emit = planned.site, self.emit(planned)
        opened = self.open(planned, appends=1)
        with self.graph.inserting_before(site.node):
            out = emit.call(
                self.op(kernels.decode_attention.SPEC, planned),
                site.query,
                *self.new(emit, planned),
                *(opened.parts[name] for name in STORE_TENSORS),
                *self.rules(planned),
            )
            out = self.in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        if planned.buffer is not None:
            self.keep_beside(planned.buffer, past=opened.past)
        self.return_grown(planned, opened.past)

    def _read(self, planned: PlannedSite, owner: PlannedSite) -> None:
        """Attend to a store that holds the new tokens by now."""
        site, emit = planned.site, self.emit(planned)
        opened = self.open(owner, appends=0)
        with self.graph.inserting_before(site.node):
            out = emit.call(
                self.op(kernels.attend.SPEC, planned),
                site.query,
                *(opened.parts[name] for name in STORE_TENSORS),
                *self.rules(planned),
            )
            out = self.in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        if planned is owner:
            self.return_grown(planned, opened.past)

    def _recompress(self, planned: PlannedSite, owner: PlannedSite, policy: str) -> None:
        site, mask, emit = planned.site, planned.mask, self.emit(planned)
        opened = self.open(owner, appends=0)
        if not opened.lengths:
            opened.lengths.extend(
                self.inputs.add_host_length(opened.past, name) for name in ("tail_length", "prefix_length")
            )
        with self.graph.inserting_before(site.node):
            key, value = self.new(emit, planned)
            result = emit.call(
                self.op(kernels.extend.SPEC, planned),
                *(site.query, key, value),
                *(opened.parts[name] for name in STORE_TENSORS if name != "cursor"),
                *opened.lengths,
                *self.rules(planned),
                policy,
                planned is owner and (mask.lookup is None or mask.bias),
            )
            out, *stored = (emit.call(operator.getitem, result, i) for i in range(5))
            tokens = self.length(emit, key)
            out = self.in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        if planned is owner:
            keys, values, offsets, positions = stored
            made = (keys, values, offsets, positions)
            self.return_made(planned, made, tokens, opened.past, self.cached_length(planned.key))

    def _attend_to_latents(self, planned: PlannedSite, region: Region) -> None:
        """Append to a latent cache, compute the keys and values of what it holds, and attend."""
        site, emit = planned.site, self.emit(planned)
        opened = self.open(planned, appends=site.query_length)
        with self.graph.inserting_before(site.node):
            held = emit.call(
                kernels.entries.SPEC.overload,
                *self.new(emit, planned),
                *(opened.parts[name] for name in STORE_TENSORS),
                *(self.lookup(planned), self.columns(planned), planned.mask.sliding_window),
            )
            *latents, visible = (emit.call(operator.getitem, held, i) for i in range(3))
            _, out = self._attend_to_computed(planned, region, latents, visible)
        site.node.replace_all_uses_with(out)
        self.return_grown(planned, opened.past)

    def _recompress_latents(self, planned: PlannedSite, region: Region, policy: str) -> None:
        """Attend to a latent cache and several new tokens, and keep the best of all of it."""
        site, mask, emit = planned.site, planned.mask, self.emit(planned)
        opened = self.open(planned, appends=0)
        lengths = [self.inputs.add_host_length(opened.past, name) for name in ("tail_length", "prefix_length")]
        with self.graph.inserting_before(site.node):
            new, padding = self.new(emit, planned), self.columns(planned)
            laid = emit.call(
                kernels.lay_out.SPEC.overload,
                *new,
                *(opened.parts[name] for name in STORE_TENSORS if name != "cursor"),
                *lengths,
                *(self.lookup(planned), padding, mask.sliding_window),
            )
            *latents, visible, at = (emit.call(operator.getitem, laid, i) for i in range(4))
            key, out = self._attend_to_computed(planned, region, latents, visible)
            scores = emit.call(
                self.op(kernels.observe.SPEC, planned),
                *(site.query, key, visible, emit.call(aten.ge.Scalar, at, 0), None, site.sinks),
                *(site.scale, None, site.softcap, policy),
            )
            tokens = self.length(emit, new[0])
            length = emit.call(operator.add, emit.call(operator.add, *lengths), tokens)
            kept = emit.call(
                kernels.retain.SPEC.overload,
                *(self.of_one_head(emit, scores, policy), at, *latents, length, padding, mask.sliding_window, policy),
                mask.lookup is None or mask.bias,
            )
            keys, values, offsets, positions = (emit.call(operator.getitem, kept, i) for i in range(4))
        site.node.replace_all_uses_with(out)
        made = (keys, values, offsets, positions)
        self.return_made(planned, made, tokens, opened.past, self.cached_length(planned.key))

    def _attend_to_computed(
        self, planned: PlannedSite, region: Region, latents: Sequence[fx.Node], visible: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        """Compute keys and values of cached latents and attend to them; return the keys and the result."""
        site, emit = planned.site, self.emit(planned)
        sources = {
            update.whole: emit.arrange(operand.axes, latent, tuple(map(tuple, operand.order)), update.dims)
            for (update, which), latent in zip(kinds(planned), latents, strict=True)
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
        return key, self.in_layout_of(emit, out, site.node)

    def _attend(self, planned: PlannedSite) -> fx.Node | None:
        """Let the chosen backend compute a prompt's attention; return its log-sum-exp if ``observe`` can use it."""
        site, choice = planned.site, planned.attention
        if choice is None or choice.name == "model":
            return None
        emit = self.emit(planned)
        lse = None
        if choice.name == "padded":
            with self.graph.inserting_before(site.node):
                out = emit.call(
                    kernels.padded_attention.SPEC.overload,
                    *(site.query, *site.node.args[1:3], self.padding(planned), site.scale),
                )
                out = self.in_layout_of(emit, out, site.node)
            site.node.replace_all_uses_with(out)
            return None
        with self.graph.inserting_before(site.node):
            fake = site.query.meta["val"]
            # Grouped heads have flash and cuDNN kernels; elsewhere PyTorch would fall back to plain products.
            grouped = fake.device.type == "cuda" and fake.dtype in (torch.float16, torch.bfloat16)
            if choice.name == "sdpa" and not grouped:
                key, value = cast("tuple[fx.Node, fx.Node]", site.node.args[1:3])
            else:
                key, value = (
                    self.arranged(
                        emit, planned, self.embedded(planned, self.current(update.whole), which), update.dims, which
                    )
                    for update, which in kinds(planned)
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
            out = self.in_layout_of(emit, out, site.node)
        site.node.replace_all_uses_with(out)
        return lse if kernels.prefill_attention.BACKENDS[choice.name].gives_lse else None

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


def _is_replaced(planned: PlannedSite) -> bool:
    """Whether a prompt's attention is computed by something else than what the model wrote."""
    return planned.attention is not None and planned.attention.name != "model"
