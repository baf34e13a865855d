"""Times of GPU work: CUDA graphs replayed in turn between events, medians, and the bandwidth of a copy as the floor.

The same calls go through a plain loop on the CPU in smoke mode; the figures then mean nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.run import Run

__all__ = ["Contender", "Ready", "Timings", "compare", "copies_for", "copy_bandwidth", "launches", "prepare"]

REPLAYS = 24
SLOW_REPLAYS = 6
"""For what takes more than :data:`SLOW_MS` a replay."""
SLOW_MS = 100.0

Timings = dict[str, dict[str, Any]]
"""Of each contender: ``us``, ``low``, ``high``, ``replays`` and ``graph``, or ``absent`` with the reason."""


@dataclass(frozen=True)
class Contender:
    """One way to do a piece of work.

    Attributes:
        calls: The same work on different memory, done one after the other, so that nothing is found in the L2 cache
            that would not be there in a model.
        reset: What must be done before them, outside of the timed part.
    """

    calls: Sequence[Callable[[], object]]
    reset: Callable[[], object] | None = None


@dataclass(frozen=True)
class _Timing:
    us: float
    low: float
    high: float
    replays: int
    graph: bool


@dataclass(frozen=True)
class Ready:
    """A contender that ran once: captured as a graph, or as it is.

    Attributes:
        run: Makes all calls.
        contender: What it is made of.
        graph: Whether ``run`` replays a CUDA graph.
        milliseconds: What ``run`` took once.
    """

    run: Callable[[], object]
    contender: Contender
    graph: bool
    milliseconds: float


def copies_for(run: Run, size: int, most: int = 256) -> int:
    """Return how many copies of a working set of ``size`` bytes to use in turn so that the L2 cache holds none."""
    if run.smoke:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(most, math.ceil(3 * cache / max(size, 1))))


def prepare(run: Run, contenders: Mapping[str, Contender | str]) -> dict[str, Ready | str]:
    """Run and capture contenders, to be compared more than once.

    Args:
        run: The part.
        contenders: By name; a text says why one is absent.

    Returns:
        Each contender as it will be timed, or why it can't be.
    """
    ready: dict[str, Ready | str] = {}
    for name, contender in contenders.items():
        if isinstance(contender, str):
            ready[name] = contender
            continue
        try:
            ready[name] = _prepared(run, contender)
        except Exception as error:  # noqa: BLE001  # a rival that can't run is a result
            ready[name] = _reason(error)
            _drop_memory(run)
    return ready


def compare(run: Run, contenders: Mapping[str, Contender | Ready | str]) -> Timings:
    """Time contenders in turn, replay by replay, so that what disturbs one disturbs all.

    Args:
        run: The part.
        contenders: By name; a text says why one is absent.

    Returns:
        Microseconds of one call of each.
    """
    fresh = {name: one for name, one in contenders.items() if not isinstance(one, Ready)}
    known = {name: one for name, one in contenders.items() if isinstance(one, Ready)}
    prepared = {**known, **prepare(run, fresh)}
    ready = {name: one for name in contenders if isinstance(one := prepared[name], Ready)}
    timings: Timings = {name: {"absent": one} for name, one in prepared.items() if isinstance(one, str)}
    for name, times in (_looped(ready) if run.smoke else _replayed(ready)).items():
        calls = len(ready[name].contender.calls)
        each = [1e3 * time / calls for time in times]
        timing = _Timing(statistics.median(each), min(each), max(each), len(each), ready[name].graph)
        timings[name] = asdict(timing)
    return {name: timings[name] for name in contenders}


def copy_bandwidth(run: Run) -> float:
    """Measure and note the GB/s at which a large tensor is copied, reading and writing counted: the floor of memory."""
    size = 1 << (16 if run.smoke else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=run.device)
    target = torch.zeros_like(source)
    timing = compare(run, {"copy": Contender([lambda: target.copy_(source)] * 4)})["copy"]
    speed = 2 * size / timing["us"] / 1e3
    run.write("bandwidth", gb_per_s=speed, **timing)
    return speed


def launches(run: Run, call: Callable[[], object]) -> int | None:
    """Return how many kernels, copies and fills a call puts on the GPU; None where that can't be observed."""
    activity = torch.profiler.ProfilerActivity.CUDA
    if run.smoke or activity not in torch.profiler.supported_activities():
        return None
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    # Where the driver keeps its counters to itself there are no events at all.
    return sum("sync" not in event.name.lower() for event in on_device) or None


def _prepared(run: Run, contender: Contender) -> Ready:
    def once() -> None:
        for call in contender.calls:
            call()

    if run.smoke:
        _reset(contender)
        contender.calls[0]()
        return Ready(once, contender, graph=False, milliseconds=0)
    side = torch.cuda.Stream()
    for _ in range(2):
        _reset(contender)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
        torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = _captured(once, side)
    replay = once if graph is None else graph.replay
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _reset(contender)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return Ready(replay, contender, graph is not None, begin.elapsed_time(end))


def _captured(once: Callable[[], object], side: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """Return a graph of what a call does, None if it can't be captured: something in it waits for the device.

    Without ``torch.cuda.graph``, which collects garbage and empties the caches of memory every time.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            graph.capture_begin()
            try:
                once()
            finally:
                graph.capture_end()
    except Exception:  # noqa: BLE001  # it ran before, and is timed as it is
        torch.cuda.synchronize()
        return None
    return graph


def _replayed(ready: Mapping[str, Ready]) -> dict[str, list[float]]:
    """Return milliseconds of replays, one contender after the other."""
    # Written before every replay: it evicts the L2 cache and keeps the GPU busy while the host launches the graph.
    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ready}
    for replay in range(REPLAYS):
        for name, one in ready.items():
            if replay >= SLOW_REPLAYS and one.milliseconds > SLOW_MS:
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            _reset(one.contender)
            flush.zero_()
            begin.record()
            one.run()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}


def _looped(ready: Mapping[str, Ready]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ready}
    for name, one in ready.items():
        _reset(one.contender)
        begin = time.perf_counter()
        one.run()
        times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def _reset(contender: Contender) -> None:
    if contender.reset is not None:
        contender.reset()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _drop_memory(run: Run) -> None:
    if not run.smoke:
        torch.cuda.empty_cache()
