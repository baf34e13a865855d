"""Who is compared: a name, the process it runs in, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.client import RefusedError, Worker, WorkerError
from benchmarks.peers.ours import Ours

__all__ = ["PAIRS", "Contestant", "Sides", "full", "pruned"]

#: Two contestants of one rule: what they keep must be the same.
PAIRS: Final = (("adakv_compile snapkv", "kvpress SnapKV"), ("adakv_compile ada-snapkv", "kvpress AdaKV+SnapKV"))
_DEATHS: Final = 3


@dataclass(frozen=True, slots=True)
class Contestant:
    """One kind of cache.

    Attributes:
        name: What the tables call it.
        peer: Whether it runs in the peers' environment.
        way: What it is asked for.
    """

    name: str
    peer: bool
    way: Mapping[str, Any]


def full() -> list[Contestant]:
    """Return those that keep everything."""
    return [
        Contestant("DynamicCache", False, {"kind": "dynamic"}),
        Contestant("DynamicCache, kvpress's transformers", True, {"kind": "dynamic"}),
        Contestant("QuantizedCache (quanto, 4 bits)", True, {"kind": "quantized"}),
    ]


def pruned(budget: int, window: int, kernel: int) -> list[Contestant]:
    """Return those that keep ``budget`` entries per head on average.

    Args:
        budget: Entries, window included.
        window: Observation window in tokens.
        kernel: Width of the average pooling.
    """
    way = {"budget": budget, "window": window, "kernel": kernel}
    return [
        Contestant(PAIRS[0][0], False, {"kind": "snapkv", **way}),
        Contestant(PAIRS[0][1], True, {"kind": "snapkv", **way}),
        Contestant(PAIRS[1][0], False, {"kind": "ada-snapkv", **way}),
        Contestant(PAIRS[1][1], True, {"kind": "adakv", **way}),
    ]


class Sides:
    """This process and the peers' worker, which is started again when it died, a few times.

    Args:
        ours: This process's side.
        start: Starts a worker; None if there is no environment for one.
        checkpoint: Folder of the model.
        threads: Threads of each side; only one of them computes at a time.
    """

    def __init__(self, ours: Ours, start: Callable[[], Worker] | None, checkpoint: Path, threads: int) -> None:
        self._ours = ours
        self._start = start
        self._load = {"model": str(checkpoint), "threads": threads}
        self._worker: Worker | None = None
        self._deaths = 0

    def ask(self, contestant: Contestant, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask a contestant's side to do something.

        Raises:
            WorkerError: The peers' side died, or has died too often, or there is none.
            RefusedError: The side can't do it.
        """
        if contestant.peer:
            return self.ask_peer(do, **arguments)
        try:
            return getattr(self._ours, do)(**arguments)
        except (RuntimeError, ValueError) as error:
            raise RefusedError(f"{type(error).__name__}: {error}") from error

    def ask_peer(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask the peers' worker.

        Raises:
            WorkerError: It died, or has died too often, or there is none.
            RefusedError: It can't do it.
        """
        if self._start is None:
            raise WorkerError("there is no environment for the peers")
        if self._deaths >= _DEATHS:
            raise WorkerError(f"not started again: it died {self._deaths} times")
        try:
            if self._worker is None:
                self._worker = self._loaded(self._start)
            return self._worker.ask(do, **arguments)
        except WorkerError:
            self._worker = None
            self._deaths += 1
            raise

    def _loaded(self, start: Callable[[], Worker]) -> Worker:
        fresh = start()
        try:
            fresh.ask("load", **self._load)
        except RefusedError as error:
            fresh.close()
            self._deaths = _DEATHS  # it would refuse again
            raise WorkerError(f"can't load the model: {error}") from error
        return fresh

    def next_cell(self) -> None:
        """Forget this process's compiled models."""
        self._ours.reset()

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
