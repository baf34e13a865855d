"""A Llama-3.1-8B-shaped model of random weights through ``model.compile``: first token, tokens, peak memory.

One model in memory, compiled in several ways:

- ``adakv``: ``backend="adakv"``; its prefill, and decode without CUDA graphs;
- ``adakv graphs``: the same with ``mode="reduce-overhead"``, continuing on the caches of ``adakv``;
- ``inductor``: ``backend="inductor"`` with a ``DynamicCache``; its prefill is the uncompressed one;
- ``static graphs``: ``backend="inductor"``, ``mode="reduce-overhead"`` and a full ``StaticCache``.

Compile times count, so the shapes come in order of importance and end where the time does.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Attention, shapes
from benchmarks.gpu.timing import copy_bandwidth

__all__ = ["run"]

BUDGET = 0.1
FIRST = ("prefill", "adakv graphs", "static graphs")
THEN = ("adakv", "inductor")
"""Decode without CUDA graphs: two more compilations."""
PLAN = (
    (1, 32_768, FIRST),
    (1, 131_072, FIRST),
    (1, 8_192, FIRST),
    (8, 32_768, FIRST),
    (1, 32_768, THEN),
    (1, 131_072, THEN),
    (1, 8_192, THEN),
    (8, 8_192, FIRST),
    (8, 131_072, FIRST),
    (8, 32_768, THEN),
)
"""Batch, context, and what is measured there."""
WARM_UP = 4
"""Steps before those that are timed: compilation, a run outside of a graph, the recording."""
STEPS = 256
"""Of replayed graphs; they tell how often a growing tail is recorded anew."""
FEW_STEPS = 32
FIRST_COMPILATION = 45.0
"""Seconds that a compilation is expected to take before one was seen."""


@dataclass
class Bench:
    """The part's state: the model, its compiled twins and how long their compilations took."""

    run: Run
    attention: Attention
    model: Any
    bandwidth: float
    twins: dict[str, Any] = field(default_factory=dict[str, Any])
    compiled: dict[tuple[object, ...], float] = field(default_factory=dict[tuple[object, ...], float])

    def call(self, name: str) -> Any:
        """Return the model compiled in a way."""
        if name not in self.twins:
            twin = models.twin(self.model)
            twin.compile(**_ways(self.run)[name])
            self.twins[name] = twin
        return self.twins[name]

    def expected(self, *graph: object) -> float:
        """Return the seconds that compiling a graph will take, 0 if it was compiled."""
        if self.run.smoke or graph in self.compiled:
            return 0.0
        # A graph of the same model and way for another batch is the best guess; the last one otherwise.
        alike = [seconds for known, seconds in self.compiled.items() if known[:2] == graph[:2]]
        return 1.2 * [FIRST_COMPILATION, *self.compiled.values(), *alike][-1]

    def first(self, graph: tuple[object, ...], call: Callable[[], Any]) -> tuple[Any, float]:
        """Return the result and the seconds of a call that may compile."""
        begin = time.perf_counter()
        result = call()
        _wait(self.run)
        seconds = time.perf_counter() - begin
        if graph not in self.compiled:
            self.compiled[graph] = seconds
        return result, seconds


def run(run: Run) -> None:
    """Write rows of prefills and of decode steps."""
    if importlib.util.find_spec("transformers") is None:
        run.skip("end to end", "transformers is not installed")
        return
    attention = shapes(run.smoke)
    # Prefill and decode of four ways at two kinds of batch; the default stops at 8.
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        bench = Bench(run, attention, models.build(run), copy_bandwidth(run))
        for batch, context, wanted in ((1, attention.contexts[0], FIRST + THEN),) if run.smoke else PLAN:
            _shape(bench, batch, context, wanted)


def _ways(run: Run) -> dict[str, dict[str, Any]]:
    if run.smoke:
        # Without Inductor's compilations: they take minutes and run no kernel of ours. Twice the same rival.
        ours: dict[str, Any] = {"budget": 0.5, "window": 8, "inner": "eager", "kernels": "triton", "strict": True}
        plain: dict[str, Any] = {"backend": "eager", "dynamic": True}
        compressed: dict[str, Any] = {"backend": "adakv", "options": ours, "dynamic": True}
        return {"adakv": compressed, "adakv graphs": compressed, "inductor": plain, "static graphs": plain}
    budget: dict[str, Any] = {"budget": BUDGET, "strict": True}
    graphs = {**budget, "inductor": {"mode": "reduce-overhead"}}
    return {
        "adakv": {"backend": "adakv", "options": budget, "dynamic": True},
        "adakv graphs": {"backend": "adakv", "options": graphs, "dynamic": True},
        "inductor": {"backend": "inductor", "dynamic": True},
        "static graphs": {"backend": "inductor", "mode": "reduce-overhead", "dynamic": False},
    }


def _shape(bench: Bench, batch: int, context: int, wanted: tuple[str, ...]) -> None:
    """Measure what is wanted at one batch and context, as far as memory and time go."""
    run, attention = bench.run, bench.attention
    where = f"batch {batch}, context {context}"
    dense = attention.layers * batch * attention.kv_heads * context * attention.entry_bytes(run.dtype)
    # The widest moment of a layer: gate, up and their product, and a few hidden states.
    activations = 3 * batch * context * run.dtype.itemsize * (bench.model.config.intermediate_size + 4096)
    kept = int(dense * BUDGET)
    cache: Any = None

    def compressed(name: str, steps: int) -> None:
        nonlocal cache
        graphs = [(name, what, batch > 1) for what in ("prefill", "decode")]
        needed = sum(bench.expected(*graph) for graph in graphs) + _cost(batch, context)
        if (
            cache is None
            and name == "adakv"
            and run.has_memory(f"{name}, {where}", kept + activations)
            and run.has_time(f"{name}, {where}", needed)
        ):
            cache = _prefill(bench.call("adakv"), _prompt(bench, batch, context))
        if cache is not None:
            cache = _decode(bench, name, batch, context, cache, steps, kept)

    def prefills() -> None:
        nonlocal cache
        if run.has_memory(f"adakv, {where}", kept + activations):
            fits = run.has_memory(f"inductor's prefill, {where}", dense + activations)
            cache = _prefills(bench, ["inductor", "adakv"] if fits else ["adakv"], batch, context)

    def static() -> None:
        name = "static graphs"
        expected = bench.expected(name, "decode", batch, context)
        if run.has_memory(f"static cache, {where}", dense) and run.has_time(f"{name}, {where}", expected + 5):
            full = models.static_cache(run, bench.model, attention, batch, context, FEW_STEPS + 2 * WARM_UP)
            _decode(bench, name, batch, context, full, FEW_STEPS, dense)

    def dynamic() -> None:
        # Every step copies the whole cache.
        if run.has_memory(f"dynamic cache, {where}", 2 * dense):
            full = models.dynamic_cache(run, bench.model, attention, batch, context)
            _decode(bench, "inductor", batch, context, full, FEW_STEPS, dense)

    measures: dict[str, Callable[[], None]] = {
        "prefill": prefills,
        "adakv graphs": lambda: compressed("adakv graphs", STEPS),
        "static graphs": static,
        "adakv": lambda: compressed("adakv", FEW_STEPS),
        "inductor": dynamic,
    }
    for what in wanted:
        with run.attempt(f"{what}, {where}"):
            measures[what]()


def _prefills(bench: Bench, ways: list[str], batch: int, context: int) -> Any:
    """Time prefills in turn; return a compressed cache, or None if there was no time for one."""
    run = bench.run
    where = f"batch {batch}, context {context}"
    ids = _prompt(bench, batch, context)
    cost = _cost(batch, context)
    cold: dict[str, float] = {}
    for name in list(ways):
        graph = (name, "prefill", batch > 1)
        if not run.has_time(f"prefill of {name}, {where}", bench.expected(*graph) + cost):
            ways.remove(name)
        elif graph not in bench.compiled:
            _, cold[name] = bench.first(graph, lambda name=name: _prefill(bench.call(name), ids))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    cache = None
    for index in range(1 if run.smoke else 4 if batch * context <= 1 << 16 else 2):
        if index and not run.has_time(f"round {index + 1} of prefills, {where}", cost):
            break
        begun = time.perf_counter()
        for name in ways:
            cache = None  # the full caches of two ways do not always fit
            _collect(run)
            with _peak(run, peaks, name):
                begin = time.perf_counter()
                cache = _prefill(bench.call(name), ids)
                _wait(run)
                seconds[name].append(time.perf_counter() - begin)
        cost = time.perf_counter() - begun
    for name in ways:
        run.write(
            "prefill",
            way=name,
            batch=batch,
            context=context,
            ms=1e3 * statistics.median_low(seconds[name]),
            low=1e3 * min(seconds[name]),
            high=1e3 * max(seconds[name]),
            rounds=len(seconds[name]),
            first_call_s=cold.get(name),
            peak_gib=peaks.get(name),
            weights_gib=_gib(bench),
        )
    return cache if ways and ways[-1] == "adakv" else None


def _cost(batch: int, context: int) -> float:
    """Return about the seconds that a prefill takes at most."""
    return 15 * batch * context / 1e5


def _prompt(bench: Bench, batch: int, context: int) -> Tensor:
    return torch.randint(0, bench.model.config.vocab_size, (batch, context), device=bench.run.device)


def _prefill(call: Any, ids: Tensor) -> Any:
    """Return the cache behind a prompt, its first token chosen."""
    out = call(ids, use_cache=True, logits_to_keep=1)
    out.logits[:, -1].argmax(-1)
    return out.past_key_values


def _decode(bench: Bench, name: str, batch: int, context: int, cache: Any, steps: int, held: int) -> Any:
    """Time decode steps that feed on each other's tokens.

    Args:
        bench: The part's state.
        name: How the model is compiled.
        batch: Rows.
        context: Entries of the prompt.
        cache: What the prefill left, or a full one.
        steps: To be timed.
        held: Bytes of the cache that a step reads.

    Returns:
        The cache behind the steps.
    """
    run, where = bench.run, f"batch {batch}, context {context}"
    graph = (name, "decode", batch, context) if name == "static graphs" else (name, "decode", batch > 1)
    if not run.has_time(f"decode of {name}, {where}", bench.expected(*graph) + 5):
        return cache
    steps = 2 if run.smoke else steps
    call = bench.call(name)
    token = torch.ones(batch, 1, dtype=torch.long, device=run.device)

    def step(token: Tensor) -> Tensor:
        nonlocal cache
        torch.compiler.cudagraph_mark_step_begin()
        out = call(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        # A new tensor: the next replay overwrites the logits.
        return out.logits[:, -1:].argmax(-1)

    skips = _skips()
    token, cold = bench.first(graph, lambda: step(token))
    for _ in range(0 if run.smoke else WARM_UP):
        token = step(token)
    _wait(run)
    recorded, capacity = _recordings(run), _capacity(cache)
    peaks: dict[str, float] = {}
    with _peak(run, peaks, name):
        times = _step_times(run, step, token, steps)
    extra: dict[str, Any] = {}
    after = _recordings(run)
    if recorded is not None and after is not None and "graphs" in name:
        # Asking for the number took one.
        extra = {"recordings": after - recorded - 1, "skips": _skips() - skips, "doublings": 0}
        if capacity:
            extra["doublings"] = (_capacity(cache) // capacity).bit_length() - 1
    moved = models.weight_bytes(bench.model) + held
    run.write(
        "decode",
        way=name,
        batch=batch,
        context=context,
        ms=statistics.median(times),
        low=min(times),
        high=max(times),
        steps=steps,
        floor_ms=moved / bench.bandwidth / 1e6,
        first_call_s=cold,
        peak_gib=peaks.get(name),
        weights_gib=_gib(bench),
        **extra,
    )
    return cache


def _step_times(run: Run, step: Callable[[Tensor], Tensor], token: Tensor, steps: int) -> list[float]:
    """Return milliseconds from the end of one step to the end of the next, on the device where there is one."""
    if run.smoke:
        marks = [time.perf_counter()]
        for _ in range(steps):
            token = step(token)
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        token = step(token)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


@contextmanager
def _peak(run: Run, peaks: dict[str, float], name: str) -> Generator[None, None, None]:
    """Note the most GiB that were allocated at a time, weights included."""
    if run.smoke:
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    peaks[name] = max(peaks.get(name, 0.0), torch.cuda.max_memory_allocated() / 2**30)


def _recordings(run: Run) -> int | None:
    """Return the number of the next CUDA graph that Inductor records, which takes that number; None: there is none."""
    if run.smoke:
        return None
    from torch._inductor.cudagraph_trees import get_container

    manager = get_container(torch.cuda.current_device()).tree_manager
    return None if manager is None else manager.new_graph_id().id


def _skips() -> int:
    """Return how many compiled graphs Inductor runs without a CUDA graph."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


def _capacity(cache: Any) -> int:
    """Return the room of a compressed cache's tail, 0 for another cache."""
    from adakv_compile import CompressedKV

    keys = cache.layers[0].keys
    return keys.store.capacity if isinstance(keys, CompressedKV) else 0


def _gib(bench: Bench) -> float:
    return sum(weight.numel() * weight.element_size() for weight in bench.model.parameters()) / 2**30


def _wait(run: Run) -> None:
    if not run.smoke:
        torch.cuda.synchronize()


def _collect(run: Run) -> None:
    gc.collect()
    if not run.smoke:
        torch.cuda.empty_cache()
