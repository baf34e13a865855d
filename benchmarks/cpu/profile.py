"""Where the time of a decode step goes, by PyTorch's own profiler.

A profile makes a step with many small operators longer: shares are of the profiled step, beside the time of one that is
not profiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from benchmarks.cpu import caches
from benchmarks.cpu.decoders import LARGE, SMALL, TINY, Shape, build, compiled
from benchmarks.cpu.events import OURS, innermost, profiled, top_level
from benchmarks.cpu.run import Run
from benchmarks.cpu.steps import stepper, time_steps
from benchmarks.cpu.timing import flat

__all__ = ["run"]

_LOOKUP: Final = "TorchDynamo Cache Lookup"
_REGION: Final = "Torch-Compiled Region"
_INDUCTOR: Final = "## Call CompiledFxGraph"


def run(run: Run) -> None:
    """Profile steps of two decoders."""
    decoders = {"tiny decoder": TINY} if run.smoke else {"88M decoder": SMALL, "1B-shaped decoder": LARGE}
    run.note("profile: the 1B-shaped decoder has 4 of the 16 layers of a Llama of 1B parameters, in float32.")
    for name, shape in decoders.items():
        if run.has_time(name, 0 if run.smoke else 25):
            with run.attempt(name):
                _profile(run, name, shape)


def _profile(run: Run, name: str, shape: Shape) -> None:
    model = build(shape)
    budget, length = (48, 128) if run.smoke else (512, 16_384)
    ours = compiled(model, "adakv", budget=budget)
    step = stepper(ours, caches.compressed(model, shape, length, budget))
    times = time_steps(run, {"adakv": step}, rounds=10)["adakv"]
    run.figure(f"{name}: step, not profiled", "ms", flat(times, 1e3))
    parts: dict[str, list[float]] = {}
    for _ in range(2 if run.smoke else 15):
        for part, milliseconds in _parts(step).items():
            parts.setdefault(part, []).append(milliseconds)
    whole = parts["profiled step"]
    for part, milliseconds in parts.items():
        run.figure(f"{name}: {part}", "ms", milliseconds)
        if part != "profiled step":
            shares = [100 * one / all_ for one, all_ in zip(milliseconds, whole, strict=True)]
            run.figure(f"{name}: share of {part}", "%", shares, "profiled step")


def _parts(step: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds of one step and of its parts, which add up to it."""
    whole = 0.0

    def timed() -> None:
        nonlocal whole
        begin = time.perf_counter()
        step()
        whole = (time.perf_counter() - begin) * 1e3

    profile: Any = profiled(timed)
    region, inductor = (sum(top_level(profile, prefix).values()) for prefix in (_REGION, _INDUCTOR))
    lookup, ours = (sum(top_level(profile, prefix).values()) for prefix in (_LOOKUP, OURS))
    appends = innermost(profile, "aten::copy_", OURS)
    return {
        "profiled step": whole,
        "Dynamo's guards": lookup,
        "our boundary and AOTAutograd's": region - inductor,
        "Inductor's code without our operators": inductor - ours,
        "our attention operators without copies": ours - appends,
        "copies in them, appends above all": appends,
        "Python around the compiled code": whole - lookup - region,
    }
