"""``python -m benchmarks.cpu``: memory, decode step, compile time and call boundary of the whole path on a CPU.

Every ratio comes from interleaved runs of one process; figures are medians. Results go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import adakv_compile
from adakv_compile.backend import adakv
from benchmarks.machine import describe

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"


def _model(layers: int) -> LlamaForCausalLM:
    """Return a random decoder of about 100M parameters (12 layers): 12 query heads on 4 KV heads of 64."""
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _dims(config: LlamaConfig) -> tuple[int, int]:
    """Return KV heads and head dimension."""
    assert config.num_key_value_heads is not None
    return config.num_key_value_heads, config.hidden_size // config.num_attention_heads


def _filled(model: LlamaForCausalLM, length: int) -> DynamicCache:
    """Return a dense cache of random entries: the time of attention does not depend on their values."""
    cache = DynamicCache(config=model.config)
    heads, dim = _dims(model.config)
    shape = (1, heads, length, dim)
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def _steps(model: Callable[..., Any], cache: DynamicCache, count: int) -> list[float]:
    """Return the seconds of ``count`` decode steps."""
    token, seconds = torch.ones(1, 1, dtype=torch.long), []
    for _ in range(count):
        begin = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - begin)
    return seconds


def _memory(model: LlamaForCausalLM, length: int, budget: int) -> tuple[dict[str, Any], DynamicCache]:
    """Prefill a long prompt and compare what the cache holds with the formula."""
    ids = torch.randint(0, 16_000, (1, length))
    begin = time.perf_counter()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    seconds = time.perf_counter() - begin
    stats = adakv_compile.cache_stats(cache)
    heads, dim = _dims(model.config)
    formula = 2 * model.config.num_hidden_layers * heads * budget * dim * 4
    row = {
        "prompt": length,
        "budget": budget,
        "bytes_held": stats.bytes_held,
        "bytes_of_formula": formula,
        "held_over_formula": stats.bytes_held / formula,
        "bytes_dense": stats.bytes_dense,
        "prefill_seconds_compile_included": seconds,
    }
    return row, cache


def _decode(
    ours: LlamaForCausalLM, plain: LlamaForCausalLM, cache: DynamicCache, length: int, budget: int, rounds: int
) -> dict[str, Any]:
    """Time decode steps, interleaved: compressed, Inductor on the full cache, and on a dense cache of the budget."""
    caches = {"adakv": cache, "inductor_full": _filled(plain, length), "inductor_budget_long": _filled(plain, budget)}
    models = {"adakv": ours, "inductor_full": plain, "inductor_budget_long": plain}
    for name in caches:
        _steps(models[name], caches[name], 4)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(rounds):
        for name in caches:
            seconds[name] += _steps(models[name], caches[name], 3)
    medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    spread = {name: [min(values) * 1e3, max(values) * 1e3] for name, values in seconds.items()}
    return {
        "context": length,
        "budget": budget,
        "median_ms": medians,
        "min_max_ms": spread,
        "speed_up_over_full": medians["inductor_full"] / medians["adakv"],
        "over_ceiling": medians["adakv"] / medians["inductor_budget_long"],
    }


def _timeline(model: Callable[..., Any], config: LlamaConfig, length: int) -> list[int]:
    """Return how many dense K or V tensors of a layer are alive after every allocation of a prefill."""
    heads, dim = _dims(config)
    wanted = heads * length * dim * 4
    ids = torch.randint(0, 16_000, (1, length))
    model(ids, use_cache=True, logits_to_keep=1)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kept = model(ids, use_cache=True, logits_to_keep=1)
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    alive: set[int] = set()
    counts: list[int] = []
    for event in memory:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size == wanted:
            alive.add(address)
        elif size == -wanted:
            alive.discard(address)
        else:
            continue
        counts.append(len(alive))
    return counts


def _compile_times(length: int) -> dict[str, float]:
    """Return cold compile seconds, prefill and one decode step, of four-layer models, with fresh caches each."""
    times: dict[str, float] = {}
    for name, backend, options in (("inductor", "inductor", None), ("adakv", adakv, {"budget": 512})):
        torch.compiler.reset()
        model = _model(4)
        model.compile(backend=backend, options=options, dynamic=True)
        with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
            begin = time.perf_counter()
            cache = model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
            times[name] = time.perf_counter() - begin
    times["ratio"] = times["adakv"] / times["inductor"]
    return times


def _boundary() -> dict[str, float]:
    """Time the call boundary alone: 32 layers of views to stores and back, with nothing compiled in between."""
    from adakv_compile.call import STORE_TENSORS, Boundary, Grown, Past, StorePart, bind
    from adakv_compile.runtime.boundary import wrap_prefill

    layers, heads, dim = 32, 8, 128
    args: list[Tensor] = []
    for _ in range(layers):
        entries = torch.zeros(1, heads * 64, dim)
        offsets = torch.arange(heads + 1, dtype=torch.int32)[None] * 64
        positions = torch.zeros(1, heads * 64, dtype=torch.int32)
        args += wrap_prefill(entries, entries.clone(), offsets, positions, 4096)
    boundary = Boundary(
        inputs=tuple(StorePart(i, name) for i in range(layers) for name in STORE_TENSORS),
        pasts=tuple(Past(2 * i, 2 * i + 1, 1, False) for i in range(layers)),
        outputs=tuple(Grown(i, kind, "all") for i in range(layers) for kind in ("key", "value")),
    )
    call = bind(boundary, lambda *parts: (), lambda *parts: ())
    seconds: list[float] = []
    for _ in range(300):
        begin = time.perf_counter()
        args = list(call(*args))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds) * 1e6
    return {"layers": layers, "microseconds_a_step": median, "microseconds_a_layer": median / layers}


def _plot(timelines: dict[str, list[int]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    for name, counts in timelines.items():
        axes.step(range(len(counts)), counts, where="post", label=name)
    axes.set_xlabel("allocations and releases of this size, in order of time")
    axes.set_ylabel("dense K or V tensors alive")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _table(results: dict[str, Any]) -> str:
    memory, decode = results["memory"], results["decode"]
    medians, times, boundary = decode["median_ms"], results["compile_seconds"], results["boundary"]
    peaks = results["timeline_peaks"]
    machine = results["machine"]
    return "\n".join(
        [
            "# CPU results",
            "",
            f"`python -m benchmarks.cpu`; {machine['cores']} threads, torch {machine['torch']}, transformers "
            f"{machine['transformers']}; {results['parameters'] / 1e6:.0f}M-parameter Llama, fp32, batch 1.",
            "",
            "| figure | value |",
            "|---|---|",
            f"| cache held after {memory['prompt']} tokens, budget {memory['budget']} | "
            f"{memory['bytes_held'] / 2**20:.2f} MiB = {memory['held_over_formula']:.4f} x the formula "
            f"(dense: {memory['bytes_dense'] / 2**20:.1f} MiB) |",
            f"| dense K or V tensors alive at most in a prefill | {peaks['adakv']} (Inductor: {peaks['inductor']}) |",
            f"| decode step at {decode['context']}, adakv | {medians['adakv']:.1f} ms |",
            f"| decode step, Inductor on the full DynamicCache | {medians['inductor_full']:.1f} ms "
            f"({decode['speed_up_over_full']:.2f}x slower) |",
            f"| decode step, Inductor on a dense cache of {decode['budget']} entries (the ceiling) | "
            f"{medians['inductor_budget_long']:.1f} ms (adakv takes {decode['over_ceiling']:.2f}x of it) |",
            f"| cold compile, 4 layers, prefill and decode | {times['adakv']:.1f} s "
            f"({times['ratio']:.2f}x of Inductor's {times['inductor']:.1f} s) |",
            f"| call boundary, {boundary['layers']} layers | {boundary['microseconds_a_step']:.0f} us a step, "
            f"{boundary['microseconds_a_layer']:.1f} us a layer |",
            "",
        ]
    )


def main() -> None:
    """Run everything and write ``cpu.json``, ``cpu.md`` and ``timeline.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16_384)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--timeline", type=int, default=2048, help="prompt length of the allocation timeline")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    ours = _model(given.layers)
    plain = copy.deepcopy(ours)
    ours.compile(backend=adakv, options={"budget": given.budget}, dynamic=True)
    plain.compile(backend="inductor", dynamic=True)
    results: dict[str, Any] = {
        "machine": describe(),
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "boundary": _boundary(),
    }
    with torch.no_grad():
        results["memory"], cache = _memory(ours, given.context, given.budget)
        results["decode"] = _decode(ours, plain, cache, given.context, given.budget, given.rounds)
        del cache
        models = {"adakv": ours, "inductor": plain}
        timelines = {name: _timeline(model, ours.config, given.timeline) for name, model in models.items()}
        results["timeline_peaks"] = {name: max(counts) for name, counts in timelines.items()}
        results["compile_seconds"] = _compile_times(256)
    (given.out / "cpu.json").write_text(json.dumps(results, indent=2) + "\n")
    (given.out / "cpu.md").write_text(_table(results))
    _plot(timelines, given.out / "timeline.png")


if __name__ == "__main__":
    main()
