"""The comparison: every budget and window, every contestant, on the same prompts, in one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.client import RefusedError, WorkerError
from benchmarks.peers.compare import Agreement, Kept, agree, pooled_scores, total
from benchmarks.peers.contestants import PAIRS, Contestant, Sides, full, pruned
from benchmarks.theory.dense import attend
from benchmarks.theory.prompts import Prompt

__all__ = ["PROTOCOLS", "Comparison", "Plan"]

PROTOCOLS: Final = ("aware", "agnostic")
"""The question is in the prompt when entries are evicted, or comes after it."""

_TIMED: Final = 8
"""Steps of a round that are timed; two come before them."""

Row = dict[str, Any]
_Failures = (RefusedError, WorkerError)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        prompts: The prompts.
        windows: Observation windows in tokens.
        budgets: Entries per KV head on average, window included.
        kernel: Width of the average pooling.
        rounds: Rounds of the timing, in which the contestants take turns.
    """

    prompts: Sequence[Prompt]
    windows: Sequence[int]
    budgets: Sequence[int]
    kernel: int
    rounds: int


class Comparison:
    """A run.

    Args:
        plan: What is compared.
        sides: Who computes.
        network: The decoder with eager attention: which scores decided is only computed where kept sets differ.
        rows: File for the results, line by line; started anew.
        say: Told what is being done.
    """

    def __init__(self, plan: Plan, sides: Sides, network: Any, rows: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._sides = sides
        self._network = network
        self._file = rows
        self._say = say
        self._kept: dict[tuple[str, str, int], Kept] = {}
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("")

    def write(self, kind: str, **row: Any) -> None:
        """Append a line to the results."""
        with self._file.open("a") as file:
            file.write(json.dumps({"kind": kind, **row}) + "\n")

    def run(self) -> None:
        """Compare everything."""
        standing = [contestant for contestant in full() if self._score(contestant, {})]
        for window in self._plan.windows:
            for budget in self._plan.budgets:
                cell = {"window": window, "budget": budget}
                if budget <= window:
                    self.write("skipped", **cell, why="the budget does not exceed the window, which is always kept")
                    continue
                self._kept.clear()
                self._sides.next_cell()
                found = [one for one in pruned(budget, window, self._plan.kernel) if self._score(one, cell)]
                for pair in PAIRS:
                    self._compare(pair, cell)
                self._measure([*standing, *found], cell)

    def _score(self, contestant: Contestant, cell: Row) -> bool:
        """Let a contestant answer all questions; tell whether it can."""
        self._say(f"{contestant.name} {_words(cell)}")
        right: dict[tuple[str, str], list[int]] = {}
        sizes: Row = {}
        try:
            for protocol in PROTOCOLS:
                for number, prompt in enumerate(self._plan.prompts):
                    text, then = (prompt.aware, ()) if protocol == "aware" else (prompt.document, prompt.question)
                    prefix = {"prompt": list(text), "way": dict(contestant.way), "watch": True}
                    sizes = self._sides.ask(contestant, "open", **prefix)
                    kept = sizes.pop("kept")
                    del sizes["seconds"]
                    if kept is not None:
                        self._kept[contestant.name, protocol, number] = kept
                    self._sides.ask(contestant, "feed", tokens=list(then))
                    answer = self._sides.ask(contestant, "decode", count=len(prompt.answer))["tokens"]
                    right.setdefault((protocol, prompt.task), []).append(int(tuple(answer) == prompt.answer))
        except _Failures as error:
            self.write("failed", name=contestant.name, **cell, what="answers", why=str(error))
            return False
        finally:
            for (protocol, task), outcomes in right.items():
                row: Row = {"name": contestant.name, **cell, "protocol": protocol, "task": task, "right": outcomes}
                self.write("score", **row)
        self.write("bytes", name=contestant.name, **cell, tokens=len(self._plan.prompts[-1].document), **sizes)
        return True

    def _compare(self, pair: tuple[str, str], cell: Row) -> None:
        """Compare what two contestants of one rule kept."""
        for protocol in PROTOCOLS:
            parts: list[Agreement] = []
            for number, prompt in enumerate(self._plan.prompts):
                first, second = (self._kept.get((name, protocol, number)) for name in pair)
                if first is None or second is None:
                    continue
                scores = None
                if first != second:
                    text = prompt.aware if protocol == "aware" else prompt.document
                    way = {"window": cell["window"], "kernel": self._plan.kernel}
                    scores = pooled_scores(attend(self._network, text, cell["window"]), way)
                parts.append(agree(first, second, scores))
            if parts:
                agreed = total(parts).row()
                self.write("kept", names=list(pair), **cell, protocol=protocol, prompts=len(parts), **agreed)

    def _measure(self, contestants: Sequence[Contestant], cell: Row) -> None:
        """Time decode steps, the contestants taking turns, and measure the peak of each."""
        prompt = list(self._plan.prompts[-1].aware)
        seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
        prefill: dict[str, list[float]] = {one.name: [] for one in contestants}
        failed: set[str] = set()
        for number in range(self._plan.rounds):
            self._say(f"timing {_words(cell)}, round {number + 1} of {self._plan.rounds}")
            for one in contestants:
                if one.name in failed:
                    continue
                try:
                    opened = self._sides.ask(one, "open", prompt=prompt, way=dict(one.way))
                    self._sides.ask(one, "decode", count=2)
                    steps = self._sides.ask(one, "decode", count=_TIMED)
                except _Failures as error:
                    failed.add(one.name)
                    self.write("failed", name=one.name, **cell, what="timing", why=str(error))
                    continue
                seconds[one.name] += steps["seconds"]
                prefill[one.name].append(opened["seconds"])
        for one in contestants:
            if one.name in failed:
                continue
            self.write(
                "time", name=one.name, **cell, decode=_spread(seconds[one.name]), prefill=_spread(prefill[one.name])
            )
            try:
                peak = self._sides.ask(one, "peak", prompt=prompt, way=dict(one.way), count=_TIMED)
            except _Failures as error:
                self.write("failed", name=one.name, **cell, what="peak", why=str(error))
                continue
            self.write("peak", name=one.name, **cell, **peak)


def _spread(seconds: Sequence[float]) -> Row:
    """Return the median, the quartiles and the count, in milliseconds."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    low, median, high = (1e3 * value for value in quartiles)
    return {"median_ms": median, "low_ms": low, "high_ms": high, "count": len(seconds)}


def _words(cell: Row) -> str:
    return f"window {cell['window']}, budget {cell['budget']}" if cell else ""
