"""The way times are taken on a GPU, on a stand-in for one: its clock is advanced by the calls themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import Contender, compare, prepare


class Device:
    """A GPU that does nothing but count milliseconds; a captured graph does its calls again when it is replayed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: list[float] | None = None
        self.log: list[str] = []

    def work(self, name: str, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            if self.capturing is None:
                self.now += milliseconds
            else:
                self.capturing.append(milliseconds)

        return call

    def read(self) -> None:
        """Wait for the device, which no capture allows."""
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now += 1.0

    def graph(self) -> Any:
        device = self

        class Graph:
            def capture_begin(self) -> None:
                device.capturing = []

            def capture_end(self) -> None:
                self.work, device.capturing = device.capturing or [], None

            def replay(self) -> None:
                device.log.append("replay")
                device.now += sum(self.work)

        return Graph()

    def event(self, enable_timing: bool) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, later: Any) -> float:
                return later.at - self.at

        return Event()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    class Flush:
        def zero_(self) -> None:
            made.now += 0.25

    for name, value in {
        "CUDAGraph": made.graph,
        "Event": made.event,
        "Stream": Stream,
        "current_stream": Stream,
        "empty_cache": lambda: None,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing.torch, "empty", lambda *args, **kwargs: Flush())
    return made


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("timing", tmp_path / "rows.jsonl", 0.0, smoke=False)


def test_a_call_takes_its_share_of_a_replay_and_nothing_around_it(device: Device, run: Run) -> None:
    reset = device.work("reset", 100.0)
    times = compare(
        run,
        {
            "fast": Contender([device.work("fast", 0.5), device.work("fast", 1.5)], reset),
            "slow": Contender([device.work("slow", 3.0)]),
        },
    )
    assert list(times) == ["fast", "slow"]
    assert [times[name]["us"] for name in times] == [pytest.approx(1e3), pytest.approx(3e3)]
    assert all(times[name]["graph"] and times[name]["replays"] == timing.REPLAYS for name in times)
    # Every call ran twice and was captured once; replays take turns, and a store is put back before each.
    assert device.log.count("fast") == 2 * 3
    assert device.log[-3:] == ["reset", "replay", "replay"]
    assert device.log.count("reset") == timing.REPLAYS + 3


def test_what_can_not_be_captured_is_timed_as_it_is(device: Device, run: Run) -> None:
    times = compare(run, {"reads": Contender([device.read]), "captured": Contender([device.work("other", 2.0)])})
    assert (times["reads"]["us"], times["reads"]["graph"]) == (pytest.approx(1e3), False)
    assert (times["captured"]["us"], times["captured"]["graph"]) == (pytest.approx(2e3), True)


def test_what_can_not_run_says_why(device: Device, run: Run) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    contenders = {"fails": Contender([fails]), "missing": "not installed", "works": Contender([device.work("x", 1.0)])}
    times = compare(run, contenders)
    assert times["fails"] == {"absent": "OutOfMemoryError: CUDA out of memory."}
    assert times["missing"] == {"absent": "not installed"}
    assert times["works"]["us"] == pytest.approx(1e3)


def test_slow_rivals_are_replayed_less_often(device: Device, run: Run) -> None:
    times = compare(run, {"slow": Contender([device.work("slow", 500.0)]), "fast": Contender([device.work("x", 1.0)])})
    assert times["slow"]["replays"] == timing.SLOW_REPLAYS
    assert times["fast"]["replays"] == timing.REPLAYS


def test_what_was_prepared_is_not_captured_again(device: Device, run: Run) -> None:
    ready = prepare(run, {"full": Contender([device.work("full", 2.0)])})
    for _ in range(2):
        assert compare(run, {"ours": Contender([device.work("ours", 1.0)]), **ready})["full"]["us"] == pytest.approx(
            2e3
        )
    assert (device.log.count("full"), device.log.count("ours")) == (3, 6)
