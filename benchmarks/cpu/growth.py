"""What a token costs late in a generation and behind a long text.

The tail is what the generation itself appended: it is read at every step, evicted or not. What a step takes more for
that reason is told apart by a dense cache of as many entries under plain Inductor, which reads the same bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cpu import caches
from benchmarks.cpu.decoders import SMALL, TINY, Shape, build, compiled
from benchmarks.cpu.run import PLAIN, Run, at_most, ratios
from benchmarks.cpu.steps import stepper, time_steps
from benchmarks.cpu.timing import Rounds, flat
from benchmarks.models import twin

__all__ = ["run"]


def run(run: Run) -> None:
    """Time steps against the tail's length, the growth of the tail, and steps against the context."""
    shape, budget = (TINY, 48) if run.smoke else (SMALL, 512)
    model = build(shape)
    plain = compiled(twin(model), "inductor")
    ours = compiled(model, "adakv", budget=budget)

    run.note(
        "growth: generated tokens are kept and attended to. At token 4,000 a step reads 94 MiB more than at token 1, "
        "beside 350 MB of weights; the dense cache's step with as many entries has the same to read and copies it, too."
    )
    prompt = 128 if run.smoke else 16_384
    tails = (1, 8, 32) if run.smoke else (1, 500, 1000, 2000, 4000)
    mine = {str(tail): stepper(ours, caches.compressed(model, shape, prompt + tail, budget, tail)) for tail in tails}
    theirs = {f"dense {tail}": stepper(plain, caches.dense(model, shape, budget + tail)) for tail in tails}
    times = time_steps(run, {**mine, **theirs}, rounds=20, calls=2, share=0.4)
    _tails(run, shape, budget, tails, times)
    _doublings(run, ours, caches.compressed(model, shape, prompt, budget))

    contexts = (64, 128) if run.smoke else tuple(1024 << doublings for doublings in range(8))
    mine = {str(length): stepper(ours, caches.compressed(model, shape, length, budget)) for length in contexts}
    _contexts(run, contexts, time_steps(run, mine, rounds=20, calls=2, share=0.9))


def _tails(run: Run, shape: Shape, budget: int, tails: Sequence[int], times: dict[str, Rounds]) -> None:
    first = times[str(tails[0])]
    for tail in tails:
        ours, dense = times[str(tail)], times[f"dense {tail}"]
        read = shape.kv_bytes(budget + tail)
        run.figure(f"token {tail}: step", "ms", flat(ours, 1e3), bytes_read=read)
        run.figure(f"token {tail}: {PLAIN}, dense cache of {budget + tail}", "ms", flat(dense, 1e3), bytes_read=read)
        run.figure(f"token {tail}: bytes that attention reads", "MiB", read / 2**20)
        if tail != tails[0]:
            grown = ratios(dense, times[f"dense {tails[0]}"])
            run.figure(f"token {tail}: {PLAIN}'s dense step over that of token 1", "x", grown, "token 1")
            run.figure(f"token {tail}: step over token 1's", "x", ratios(ours, first), "token 1", at_most(1.05))
        run.figure(f"token {tail}: step over a dense cache's", "x", ratios(ours, dense), PLAIN, at_most(1.05))
    for line, prefix in (("adakv", ""), (f"{PLAIN}, as many entries", "dense ")):
        run.series("growth", line, tails, [flat(times[f"{prefix}{tail}"], 1e3) for tail in tails])


def _doublings(run: Run, model: Callable[..., Any], cache: Any) -> None:
    """Step through several doublings of the tail: what they cost, shared out over all tokens."""
    step = stepper(model, cache)
    store = cache.layers[0].keys.store
    tokens = 70 if run.smoke else 260
    seconds: list[float] = []
    copied = 0
    for _ in range(tokens):
        before, used = store.capacity, store.tail_length
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
        copied += used if store.capacity != before else 0
    mean, median = statistics.fmean(seconds[4:]), statistics.median(seconds[4:])
    run.figure(f"{tokens} tokens from an empty tail: mean step over the median one", "x", mean / median, "itself")
    over = copied / store.tail_length
    # Doubling copies 64 + 128 + ... entries: less than twice as many as there are, right behind the last one.
    run.figure(f"{tokens} tokens: entries copied by doublings over entries appended", "x", over, target=at_most(2.0))


def _contexts(run: Run, contexts: Sequence[int], times: dict[str, Rounds]) -> None:
    first = times[str(contexts[0])]
    for length in contexts:
        run.figure(f"context {length}: step", "ms", flat(times[str(length)], 1e3))
        if length != contexts[0]:
            over = ratios(times[str(length)], first)
            run.figure(f"context {length}: step over context {contexts[0]}'s", "x", over, "itself", at_most(1.05))
    run.series("context", "adakv", contexts, [flat(times[str(length)], 1e3) for length in contexts])
