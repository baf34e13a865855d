"""What compression adds to a prompt, in time and in memory, and a long prompt read in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import adakv_compile
from benchmarks.cpu.decoders import SMALL, TINY, Shape, build, compiled
from benchmarks.cpu.events import OURS, alive, peak, profiled, top_level
from benchmarks.cpu.run import PLAIN, Run, at_most, ratios
from benchmarks.cpu.steps import time_steps
from benchmarks.cpu.timing import flat
from benchmarks.models import twin

__all__ = ["run"]

_ATTENTION = f"{OURS}prefill_attention"
"""The prompt's attention itself, which the model has anyway."""


def run(run: Run) -> None:
    """Time a prompt, look at what is alive in it, then read a long one in chunks."""
    shape, budget = (TINY, 48) if run.smoke else (SMALL, 512)
    model = build(shape)
    plain = compiled(twin(model), "inductor")
    ours = compiled(model, "adakv", budget=budget)
    length = 128 if run.smoke else 4096
    prompts = {"adakv": _reader(ours, length), PLAIN: _reader(plain, length)}
    times = time_steps(run, prompts, rounds=4, calls=1, share=0.35)
    for name, rounds in times.items():
        run.figure(f"prompt of {length}: {name}", "ms", flat(rounds, 1e3))
    run.figure(f"prompt of {length}: adakv over {PLAIN}", "x", ratios(times["adakv"], times[PLAIN]), PLAIN)
    _shares(run, prompts["adakv"], length, flat(times["adakv"], 1e3))
    _alive(run, shape, {"adakv": ours, PLAIN: plain}, 128 if run.smoke else 2048)
    del model, plain, ours, prompts
    torch.compiler.reset()
    if run.has_time("a prompt in chunks", 0 if run.smoke else 30):
        _chunks(run)


def _reader(model: Callable[..., Any], length: int) -> Callable[[], Any]:
    ids = torch.randint(TINY.vocabulary, (1, length))

    def read() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    return read


def _shares(run: Run, read: Callable[[], Any], length: int, whole: list[float]) -> None:
    """Write the time of scoring, selection and compaction, of all layers together."""
    profiles = [top_level(profiled(read), OURS) for _ in range(2 if run.smoke else 3)]
    added = [{name: ms for name, ms in one.items() if not name.startswith(_ATTENTION)} for one in profiles]
    for name in sorted({name for one in added for name in one}):
        run.figure(f"prompt of {length}: {name}, all layers", "ms", [one.get(name, 0.0) for one in added])
    median = sorted(whole)[len(whole) // 2]
    shares = [100 * sum(one.values()) / median for one in added]
    run.figure(f"prompt of {length}: scoring, selection and compaction", "%", shares, "the prompt", at_most(3.0))


def _alive(run: Run, shape: Shape, models: dict[str, Callable[..., Any]], length: int) -> None:
    """Write how many dense K or V tensors of a layer are alive at once."""
    size = shape.kv_bytes(length) // shape.layers // 2
    for name, model in models.items():
        read = _reader(model, length)
        read()
        counts = alive(profiled(read, memory=True), size)
        run.series("timeline", name, range(len(counts)), [[count] for count in counts])
        target = at_most(2) if name == "adakv" else None
        run.figure(f"dense K or V tensors alive at most, {name}", "tensors", max(counts, default=0), target=target)


def _chunks(run: Run) -> None:
    """Read a prompt of 64k tokens, 1k at a time, with a small decoder: memory must not grow with the prompt."""
    shape = TINY if run.smoke else Shape(2, 8, 4, 64, 1024, 1000)
    model = build(shape)
    ours = compiled(model, "adakv", budget=48 if run.smoke else 512)
    count, size = (4, 64) if run.smoke else (64, 1024)
    cache: Any = None
    peaks: dict[int, int] = {}
    held: dict[int, int] = {}

    def read() -> None:
        nonlocal cache
        ids = torch.randint(shape.vocabulary, (1, size))
        with torch.no_grad():
            cache = ours(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    for chunk in range(1, count + 1):
        if chunk in (3, count):
            peaks[chunk] = peak(profiled(read, memory=True))
        else:
            read()
        held[chunk] = adakv_compile.cache_stats(cache).bytes_held
    whole = count * size
    for chunk, most in peaks.items():
        run.figure(f"{whole} tokens in chunks of {size}: allocated at most in chunk {chunk}", "MiB", most / 2**20)
    over = peaks[count] / peaks[3]
    run.figure(f"{whole} tokens in chunks: last chunk's peak over the third's", "x", over, "chunk 3", at_most(1.05))
    run.figure(f"{whole} tokens in chunks: cache held", "MiB", held[count] / 2**20)
    over = held[count] / held[3]
    run.figure(f"{whole} tokens in chunks: cache held over the third chunk's", "x", over, "chunk 3", at_most(1.0))
