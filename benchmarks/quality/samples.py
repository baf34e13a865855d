"""The questions: tasks that every model of the test bed answers with the full cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from adakv_compile.evaluation import needle, ruler
from adakv_compile.evaluation.sample import Sample

__all__ = ["DEPTHS", "LEAST", "NEEDLE", "learned", "make"]

LEAST: Final = 0.98
"""Mean score of the full cache from which a task is asked. Methods are compared on questions that it answers right."""

NEEDLE: Final = "needle"
DEPTHS: Final = (0, 25, 50, 75, 100)


def learned(scores: Sequence[Path], length: int, least: float = LEAST) -> list[str]:
    """Return the tasks that the models answer with everything kept.

    Args:
        scores: A ``scores.json`` of `benchmarks.testbed.evaluate` for each model.
        length: Tokens of prompt and answer.
        least: Mean score over the models.

    Raises:
        ValueError: A file has no score of this length.
    """
    found: dict[str, list[float]] = {}
    for path in scores:
        rows = [row for row in json.loads(path.read_text())["scores"] if row["length"] == length]
        if not rows:
            raise ValueError(
                f"{path} has no score at {length} tokens; run benchmarks.testbed.evaluate with that length"
            )
        for row in rows:
            found.setdefault(row["task"], []).append(row["mean"])
    return [task for task, means in found.items() if sum(means) / len(scores) >= least]


def make(tokenizer: Any, tasks: Sequence[str], length: int, count: int, seed: int) -> list[Sample]:
    """Return ``count`` samples of every task, the needle's spread over :data:`DEPTHS`.

    Args:
        tokenizer: The test bed's.
        tasks: RULER's tasks, and :data:`NEEDLE`.
        length: Most tokens of a prompt and its answer together.
        count: Samples of a task.
        seed: Their seed.
    """
    samples: list[Sample] = []
    for task in tasks:
        if task == NEEDLE:
            samples += needle.samples(tokenizer, [length], DEPTHS, -(-count // len(DEPTHS)), seed)
        else:
            samples += ruler.samples(task, tokenizer, length, count, seed)
    return samples
