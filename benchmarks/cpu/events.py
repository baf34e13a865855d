"""What a profile of PyTorch says about one call: times by where they were spent, and memory in order of time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

__all__ = ["OURS", "alive", "innermost", "peak", "profiled", "top_level"]

OURS: Final = "adakv::"
"""What the names of this package's operators begin with."""


def profiled(call: Callable[[], object], memory: bool = False) -> Any:
    """Return the profile of a call whose result is dropped at its end."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=memory, activities=cpu) as profile:
        call()
    return profile


def top_level(profile: Any, prefix: str) -> dict[str, float]:
    """Return the milliseconds of events of a prefix, by name, what they call included; none of them counts twice."""
    times: dict[str, float] = {}
    for event in profile.events():
        if event.name.startswith(prefix) and not _inside(event, prefix):
            times[event.name] = times.get(event.name, 0.0) + event.cpu_time_total / 1e3
    return times


def innermost(profile: Any, prefix: str, inside: str) -> float:
    """Return the milliseconds of events of one prefix inside of those of another."""
    found = (event for event in profile.events() if event.name.startswith(prefix) and _inside(event, inside))
    return sum(event.cpu_time_total for event in found) / 1e3


def alive(profile: Any, size: int) -> list[int]:
    """Return how many allocations of just ``size`` bytes were alive after each of them and of their releases."""
    addresses: set[int] = set()
    counts: list[int] = []
    for change, address in _changes(profile):
        if change == size:
            addresses.add(address)
        elif change == -size:
            addresses.discard(address)
        else:
            continue
        counts.append(len(addresses))
    return counts


def peak(profile: Any) -> int:
    """Return the most bytes held at once, of those allocated during the profile."""
    held = most = 0
    for change, _ in _changes(profile):
        held += change
        most = max(most, held)
    return most


def _inside(event: Any, prefix: str) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(prefix):
            return True
        parent = parent.cpu_parent
    return False


def _changes(profile: Any) -> Sequence[tuple[int, int]]:
    """Return bytes and addresses of all allocations, positive, and releases, negative, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    return [(event["args"]["Bytes"], event["args"]["Addr"]) for event in memory]
