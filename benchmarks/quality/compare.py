"""From answers to cells: means over trainings with intervals, and paired differences with standard errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, Final

from adakv_compile.evaluation.records import Record
from adakv_compile.evaluation.statistics import Difference, Interval, interval, paired

__all__ = ["SURE", "Name", "answered", "by_setting", "difference", "mean", "overall", "verdict"]

SURE: Final = 2.0
"""Standard errors from which a difference is counted for one side."""

Name = tuple[str, str, Any]
"""Protocol, method, budget."""


def answered(records: Iterable[Record], full: Iterable[Record]) -> list[Record]:
    """Return the records of questions that the full cache answers completely right under the same protocol.

    What it can't answer tells methods apart by the model's own errors, and eviction may even mend these. Which
    questions are left depends on the full cache alone, not on what is compared.

    Args:
        records: Records of any method.
        full: Those of the full cache.
    """
    right = {(record["protocol"], _question(record)) for record in full if record["score"] == 1.0}
    return [record for record in records if (record["protocol"], _question(record)) in right]


def by_setting(records: Iterable[Record]) -> dict[Name, list[Record]]:
    """Return the records that have a score, by protocol, method and budget."""
    found: defaultdict[Name, list[Record]] = defaultdict(list)
    for record in records:
        if record["score"] is not None:
            found[record["protocol"], record["method"], record["budget"]].append(record)
    return dict(found)


def mean(records: Iterable[Record]) -> Interval | None:
    """Return the mean score in per cent over the trainings, each task with the same weight; None without records."""
    seeds: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        seeds[record["seed"]][record["task"]].append(record["score"])
    means = [sum(sum(s) / len(s) for s in tasks.values()) / len(tasks) for tasks in seeds.values()]
    return interval([100 * value for value in means]) if means else None


def difference(ours: Iterable[Record], theirs: Iterable[Record]) -> Difference | None:
    """Return the mean difference in per cent over the questions that both answered, with its standard error."""
    return overall([(ours, theirs)])


def overall(sides: Iterable[tuple[Iterable[Record], Iterable[Record]]]) -> Difference | None:
    """Return the mean difference in per cent over several settings, with its standard error.

    A question's answers under several budgets are alike, so they are one observation: their mean.

    Args:
        sides: Records of a setting of ours and of one of theirs, for each budget.
    """
    found: defaultdict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for ours, theirs in sides:
        known = {_question(record): record["score"] for record in theirs}
        for record in ours:
            if (question := _question(record)) in known:
                found[question].append((record["score"], known[question]))
    means = [(fmean(ours for ours, _ in some), fmean(theirs for _, theirs in some)) for some in found.values()]
    return paired(means) if means else None


def verdict(differences: Sequence[Difference | None]) -> tuple[int, int, int]:
    """Return how many differences are for the first side, for the second, and for neither by :data:`SURE` errors."""
    told = [d for d in differences if d is not None and d.error is not None]
    first = sum(d.mean > SURE * (d.error or 0) and d.mean > 0 for d in told)
    second = sum(-d.mean > SURE * (d.error or 0) and d.mean < 0 for d in told)
    return first, second, len(told) - first - second


def _question(record: Record) -> tuple[Any, ...]:
    return record["seed"], record["task"], record["index"]
