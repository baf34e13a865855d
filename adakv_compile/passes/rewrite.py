"""The only stage that changes a graph: put the plan's operators where the attention and the cache updates were."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import fx

from adakv_compile import kernels
from adakv_compile.call import (
    STORE_TENSORS,
    Boundary,
    CachedLength,
    Grown,
    Made,
    Output,
    Returned,
)
from adakv_compile.capture import Program
from adakv_compile.passes.cache import CacheUpdate
from adakv_compile.passes.inputs import GraphInputs
from adakv_compile.passes.nodes import arg, same_layout, same_size, shape_of, static_int
from adakv_compile.passes.padding import emit_padding
from adakv_compile.passes.plan import Action, Plan, PlannedSite

__all__ = ["Rewritten", "rewrite"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """A graph on plain tensors and how to call it.

    Attributes:
        module: The rewritten graph.
        inputs: Example inputs of ``module``: the caller's, or fakes for the parts of a store.
        boundary: How its arguments and results relate to those of Dynamo's graph.
        unguarded: Symbolic sizes that Dynamo doesn't guard on; the compiler must not have assumed anything of them.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    boundary: Boundary
    unguarded: tuple[torch.SymInt, ...]


def rewrite(program: Program, plan: Plan, example_inputs: Sequence[Any]) -> Rewritten:
    """Rewrite the captured graph, all sites of the plan or none.

    Args:
        program: The captured graph; its module is consumed.
        plan: What to do.
        example_inputs: The inputs Dynamo passed, one for each placeholder of the captured graph.

    Raises:
        RuntimeError: A value of the dense cache is still needed after the rewrite.
    """
    return _Rewriter(program, plan, GraphInputs(program, example_inputs)).run()


@dataclass
class _Rewriter:
    program: Program
    plan: Plan
    inputs: GraphInputs
    results: list[fx.Node] = field(default_factory=list[fx.Node])
    cached: dict[int, Output] = field(default_factory=dict[int, Output])
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])

    @property
    def graph(self) -> fx.Graph:
        return self.program.module.graph

    def run(self) -> Rewritten:
        self._restore()
        for planned, policy in zip(self.plan.sites, self.plan.policies, strict=True):
            if planned.action is Action.COMPRESS:
                self._compress(planned, policy)
            elif planned.action is Action.DECODE:
                self._decode(planned)
            else:
                self._recompress(planned, policy)
        outputs = self._close()
        inputs = self.inputs.finish(
            past for planned in self.plan.sites for past in (planned.key.past, planned.value.past) if past is not None
        )
        self.graph.lint()
        self.program.module.recompile()
        return Rewritten(
            module=self.program.module,
            inputs=tuple(example for _, example in inputs),
            boundary=Boundary(tuple(source for source, _ in inputs), tuple(self.inputs.pasts), outputs),
            unguarded=tuple(self.inputs.unguarded),
        )

    def _restore(self) -> None:
        """Put back what the model wrote where the plan does not replace it, to the last bit."""
        replaced = {
            planned.site.node
            for planned in self.plan.sites
            if planned.attention is None or planned.attention.name != "model"
        }
        for result, original in self.program.spelled.items():
            operator_call = result if result.target is aten.scaled_dot_product_attention.default else result.args[0]
            if operator_call not in replaced:
                result.replace_all_uses_with(original)

    # -- the three actions ------------------------------------------------------------------------------------------

    def _compress(self, planned: PlannedSite, policy: str) -> None:
        site, mask = planned.site, planned.mask
        key, value = (self._without_empty_past(update) for update in (planned.key, planned.value))
        lse = self._attend(planned)
        # Right after the attention, so that this layer's dense cache dies before the next layer's is made.
        with self.graph.inserting_before(site.node.next):
            cached = planned.key.cached
            start = cast("int | fx.Node", arg(cached, 2, "start", 0)) if planned.key.is_sliding else None
            padding = self._padding(planned, start)
            scores = self._call(
                self._op(kernels.observe.SPEC, planned),
                (site.query, key, padding, lse, site.scale, mask.sliding_window, policy),
                like=site.node,
            )
            kept = self._call(
                self._op(kernels.select.SPEC, planned),
                (scores, padding, mask.sliding_window, policy),
                like=site.node,
            )
            positions, offsets = (self._call(operator.getitem, (kept, i), like=site.node) for i in range(2))
            stored = self._call(
                self._op(kernels.compact.SPEC, planned),
                (key, value, positions, offsets),
                like=site.node,
            )
            keys, values = (self._call(operator.getitem, (stored, i), like=site.node) for i in range(2))
            tokens = self._length(key)
        self._return_made(planned, (keys, values, offsets, positions), tokens, None, "all")

    def _decode(self, planned: PlannedSite) -> None:
        site, mask = planned.site, planned.mask
        past, parts = self.inputs.add_past(planned, appends=1)
        with self.graph.inserting_before(site.node):
            out = self._call(
                self._op(kernels.decode_attention.SPEC, planned),
                (
                    site.query,
                    planned.key.new,
                    planned.value.new,
                    *(parts[name] for name in STORE_TENSORS),
                    mask.lookup,
                    self._columns(planned),
                    site.scale,
                    mask.sliding_window,
                ),
                like=site.node,
            )
            out = self._in_layout_of(out, site.node)
        site.node.replace_all_uses_with(out)
        cached = self._cached_length(planned.key)
        for update, kind in _kinds(planned):
            for slot in update.slots:
                self.cached[slot] = Grown(past, kind, cached)

    def _recompress(self, planned: PlannedSite, policy: str) -> None:
        site, mask = planned.site, planned.mask
        past, parts = self.inputs.add_past(planned, appends=0)
        lengths = [self.inputs.add_host_length(past, name) for name in ("tail_length", "prefix_length")]
        with self.graph.inserting_before(site.node):
            result = self._call(
                self._op(kernels.extend.SPEC, planned),
                (
                    site.query,
                    planned.key.new,
                    planned.value.new,
                    *(parts[name] for name in STORE_TENSORS if name != "cursor"),
                    *lengths,
                    mask.lookup,
                    self._columns(planned),
                    site.scale,
                    mask.sliding_window,
                    policy,
                    mask.lookup is None,
                ),
                like=site.node,
            )
            out, *stored = (self._call(operator.getitem, (result, i), like=site.node) for i in range(5))
            tokens = self._length(planned.key.new)
            out = self._in_layout_of(out, site.node)
        site.node.replace_all_uses_with(out)
        keys, values, offsets, positions = stored
        self._return_made(planned, (keys, values, offsets, positions), tokens, past, self._cached_length(planned.key))

    def _attend(self, planned: PlannedSite) -> fx.Node | None:
        """Let the chosen backend compute a prompt's attention; return its log-sum-exp if ``observe`` can use it."""
        site, choice = planned.site, planned.attention
        if choice is None or choice.name == "model":
            return None
        key, value = (self.replaced.get(node, node) for node in (site.key, site.value))
        lse = None
        with self.graph.inserting_before(site.node):
            if choice.name == "sdpa":
                fake = site.query.meta["val"]
                # Grouped heads have flash and cuDNN kernels; elsewhere PyTorch would fall back to plain products.
                grouped = fake.device.type == "cuda" and fake.dtype in (torch.float16, torch.bfloat16)
                given = (key, value) if grouped else cast("tuple[fx.Node, ...]", site.node.args[1:3])
                out = self._call(
                    aten.scaled_dot_product_attention.default,
                    (site.query, *given, None, 0.0, True),
                    like=site.node,
                    scale=site.scale,
                    enable_gqa=not same_size(shape_of(given[0])[1], site.num_heads),
                )
            else:
                arguments = (site.query, key, value, site.scale, planned.mask.sliding_window, choice.name)
                result = self._call(kernels.prefill_attention.SPEC.overload, arguments, like=site.node)
                out, lse = (self._call(operator.getitem, (result, i), like=site.node) for i in range(2))
            out = self._in_layout_of(out, site.node)
        site.node.replace_all_uses_with(out)
        # A sliding cache scores only what it keeps, which is less than what the queries saw.
        gives = kernels.prefill_attention.BACKENDS[choice.name].gives_lse and not planned.key.is_sliding
        return lse if gives else None

    # -- pieces -----------------------------------------------------------------------------------------------------

    def _op(self, spec: kernels.OpSpec, planned: PlannedSite) -> Callable[..., Any]:
        """Return the overload of an op that the site was given."""
        return spec.overload_for(cast("kernels.Kernels", planned.kernels.name))

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """Add a call whose fake value comes from the operator itself, with the provenance of ``like``."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        with self.program.fake_mode:
            node.meta["val"] = target(*values, **kwargs)
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            if name in like.meta:
                node.meta[name] = like.meta[name]
        return node

    def _in_layout_of(self, out: fx.Node, like: fx.Node) -> fx.Node:
        """Give an attention's output the memory layout that the graph's later views were traced for.

        Raises:
            RuntimeError: The layout is neither ``[B, H, T, D]`` nor ``[B, T, H, D]`` in memory.
        """
        if same_layout(out, like):
            return out
        rows = self._call(aten.transpose.int, (out, 1, 2), like=like)
        rows = self._call(aten.clone.default, (rows,), like=like, memory_format=torch.contiguous_format)
        out = self._call(aten.transpose.int, (rows, 1, 2), like=like)
        if not same_layout(out, like):
            raise RuntimeError(f"the attention {like.name} has strides {like.meta['val'].stride()}")
        return out

    def _without_empty_past(self, update: CacheUpdate) -> fx.Node:
        """Return what the caller keeps, after replacing ``cat([empty, new])`` by ``new``."""
        if update.past is not None or update.whole is update.new:
            return update.cached
        update.whole.replace_all_uses_with(update.new)
        self.replaced[update.whole] = update.new
        return update.new if update.cached is update.whole else update.cached

    def _padding(self, planned: PlannedSite, start: int | fx.Node | None = None) -> fx.Node | None:
        """Emit the padding of all columns, or of those from ``start`` on, if there is any."""
        fact = planned.mask.padding
        if fact is None:
            return None

        def emit(target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
            return self._call(target, args, like=planned.site.node)

        return emit_padding(fact, emit, planned.site.key_length, start)

    def _columns(self, planned: PlannedSite) -> fx.Node | None:
        """Emit the padding of all columns; a sliding cache without one still needs its columns told apart."""
        columns = planned.site.key_length
        if not planned.mask.columns:
            return self._padding(planned)
        batch, device = shape_of(planned.site.query)[0], planned.site.query.meta["val"].device
        node = self.graph.call_function(
            aten.ones.default,
            ([self._size(batch), self._size(columns)],),
            {"dtype": torch.bool, "device": device},
        )
        with self.program.fake_mode:
            node.meta["val"] = torch.ones((batch, columns), dtype=torch.bool, device=device)
        return node

    def _size(self, size: int | torch.SymInt) -> int | fx.Node:
        """Return a node that computes a symbolic size, from the graph's own inputs."""
        if isinstance(size, int):
            return size
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return node
            if node.op == "output":
                break
        raise RuntimeError(f"no value of the graph holds the size {size}")

    def _length(self, node: fx.Node) -> int | fx.Node:
        """Return the sequence length of a value: a number, or a node that holds it."""
        length = shape_of(node)[2]
        return length if isinstance(length, int) else self._call(aten.sym_size.int, (node, 2), like=node)

    def _cached_length(self, update: CacheUpdate) -> CachedLength:
        """Say how long the tensor is that the caller keeps."""
        if not update.is_sliding:
            return "all"
        fixed = static_int(update.cached_length)
        if fixed is not None:
            return fixed
        if update.past is not None and same_size(update.cached_length, shape_of(update.past)[2]):
            return "as before"
        start = arg(update.cached, 2, "start")
        if isinstance(start, fx.Node) and same_size(-start.meta["val"], update.cached_length):
            with self.graph.inserting_after(start):
                return self._result(self._call(operator.neg, (start,), like=start))
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
        for update, kind in _kinds(planned):
            for slot in update.slots:
                self.cached[slot] = Made(first, kind, count, past, cached)

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
        with self.graph.inserting_before(output):
            for target, value in self.program.mutated:
                self.graph.call_function(aten.copy_.default, (target, value))
        outputs: list[Output] = []
        for slot, value in enumerate(self.program.outputs):
            if slot in self.cached:
                outputs.append(self.cached[slot])
            elif isinstance(value, fx.Node):
                self.results.append(value)
                outputs.append(Returned(len(self.results) - 1))
            else:
                outputs.append(Returned(None, value))
        output.args = (tuple(self.results),)
        return tuple(outputs)


def _kinds(planned: PlannedSite) -> tuple[tuple[CacheUpdate, Literal["key"]], tuple[CacheUpdate, Literal["value"]]]:
    return (planned.key, "key"), (planned.value, "value")
