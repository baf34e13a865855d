"""A decode step behind a long prompt, against what eviction could reach at best and against the full caches.

The ceiling is the same model under plain Inductor with a dense cache that holds only as many entries as were kept.
"""

from __future__ import annotations

from typing import Final

from benchmarks.cpu import caches
from benchmarks.cpu.decoders import SMALL, TINY, build, compiled
from benchmarks.cpu.run import PLAIN, Run, at_most, ratios
from benchmarks.cpu.steps import stepper, time_steps
from benchmarks.cpu.timing import flat
from benchmarks.models import twin

__all__ = ["BUDGET", "CEILING", "run"]

BUDGET: Final = 512
CEILING: Final = "ceiling"


def run(run: Run) -> None:
    """Time steps at 16k and at 64k tokens."""
    shape, budget = (TINY, 48) if run.smoke else (SMALL, BUDGET)
    model = build(shape)
    plain = compiled(twin(model), "inductor")
    ours = compiled(model, "adakv", budget=budget)
    lengths = (64, 128) if run.smoke else (16_384, 65_536)
    run.note(
        f"step: caches are filled with random entries; the longest head has {caches.SKEW} times the mean. The ceiling "
        f"is plain Inductor on a dense cache of {budget} entries."
    )
    for number, length in enumerate(lengths):
        if number and not run.has_time(f"context {length}", 60):
            break
        rivals = {
            "adakv": stepper(ours, caches.compressed(model, shape, length, budget)),
            CEILING: stepper(plain, caches.dense(model, shape, budget)),
            "DynamicCache": stepper(plain, caches.dense(model, shape, length)),
        }
        if number == 0:
            rivals["StaticCache"] = stepper(plain, caches.static(model, shape, length, 512))
        times = time_steps(run, rivals, rounds=24, calls=2, share=0.5 if number == 0 else 0.9)
        for name, rounds in times.items():
            run.figure(f"context {length}: {name}", "ms", flat(rounds, 1e3), context=length, way=name)
        mine = times.pop("adakv")
        run.figure(
            f"context {length}: step over the ceiling's",
            "x",
            ratios(mine, times[CEILING]),
            f"{PLAIN}, dense cache of {budget}",
            at_most(1.05),
        )
        for name in times:
            if name != CEILING:
                run.figure(
                    f"context {length}: full {name} over adakv", "x", ratios(times[name], mine), f"{PLAIN}, {name}"
                )
