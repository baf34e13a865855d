"""The answers of all parts as a page, a picture and a table of every score."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from adakv_compile.evaluation.methods import FULL, METHODS
from adakv_compile.evaluation.records import Record
from adakv_compile.evaluation.statistics import Difference
from benchmarks.gpu.report import table
from benchmarks.quality.compare import SURE, answered, by_setting, difference, mean, overall, verdict
from benchmarks.quality.parts import ADAPTIVE, AWARE, MAIN
from benchmarks.quality.plot import draw

__all__ = ["markdown", "scores_csv", "write"]

_PAIRS: Final = (("ada-snapkv", "snapkv"), ("ada-pyramid", "pyramidkv"))
"""The same scores, with adaptive budgets and with equal ones."""

_COLUMNS: Final = ("part", "protocol", "method", "budget", "seed", "task", "index", "score", "kept", "prompt_sha256")

#: The budget at which the page tells what every head keeps.
_HEADS_AT: Final = 96

Found = Mapping[str, Sequence[Record]]


def write(facts: Mapping[str, Any], found: Found, folder: Path) -> None:
    """Write ``quality.md``, ``quality.png`` and ``quality.csv.gz``.

    Args:
        facts: What was asked, on what.
        found: The records of each part.
        folder: Where to; created if absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.md").write_text(markdown(facts, found))
    # Without a time stamp: the same answers are the same file.
    (folder / "quality.csv.gz").write_bytes(gzip.compress(scores_csv(found).encode(), mtime=0))
    if MAIN.name in found:
        main = found[MAIN.name]
        draw(answered(main, _of(main, method=FULL)), folder / "quality.png")


def scores_csv(found: Found) -> str:
    """Return every score of every part as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for part, records in found.items():
        for record in records:
            writer.writerow((part, *(record.get(name) for name in _COLUMNS[1:])))
    return text.getvalue()


def markdown(facts: Mapping[str, Any], found: Found) -> str:
    """Return the page."""
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    sections = [
        "# What eviction costs on the test bed",
        f"`python -m benchmarks.quality`; {told}.",
        "Methods are compared on the questions that the full cache answers completely right; the others would show the "
        "model's own errors. Scores in per cent, every task with the same weight: the mean over the trainings ± half "
        "its 95 % confidence interval (Student's t). Differences are over the same questions under both, ± their "
        "standard error; over all budgets a question is one observation, its mean. Budgets are entries per KV head, "
        "the observation window of 32 included; prompts have some 900 tokens.",
    ]
    crashed = sum(record["score"] is None for records in found.values() for record in records)
    main = found.get(MAIN.name, [])
    if main:
        sections.append(_full(main))
        full = _of(main, method=FULL)
        found = {part: answered(records, full) for part, records in found.items()}
        main = found[MAIN.name]
        sections += [_scores(main, protocol) for protocol in MAIN.protocols]
        sections += [_pairs(main, *pair) for pair in _PAIRS]
        sections += [_by_task(main, protocol) for protocol in MAIN.protocols]
        sections.append(_heads(main))
    if main and len(found) > 1:
        sections.append(_variants(found))
    sections.append(f"Questions without an answer: {crashed}. Every score: quality.csv.gz.")
    return "\n\n".join(section for section in sections if section) + "\n"


def _tasks(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["task"] for record in records))


def _budgets(records: Sequence[Record]) -> list[Any]:
    return sorted({record["budget"] for record in records if record["budget"] is not None})


def _of(records: Sequence[Record], **wanted: object) -> list[Record]:
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]


def _full(records: Sequence[Record]) -> str:
    seeds = sorted({record["seed"] for record in records})
    lines: list[list[object]] = []
    for protocol in MAIN.protocols:
        full = _of(records, method=FULL, protocol=protocol)
        for task in _tasks(full):
            some = _of(full, task=task)
            right = sum(record["score"] == 1.0 for record in some)
            lines.append([protocol, task, *(mean(_of(some, seed=seed)) for seed in seeds), len(some), right])
    trainings = [f"training {seed}" for seed in seeds]
    return "## The full cache\n\n" + table(["protocol", "task", *trainings, "questions", "all right"], lines)


def _scores(records: Sequence[Record], protocol: str) -> str:
    settings, budgets = by_setting(records), _budgets(records)
    lines = [
        [method, *(mean(settings.get((protocol, method, budget), ())) for budget in budgets)]
        for method in METHODS
        if method != FULL
    ]
    return f"## Scores, {protocol}\n\n{table(['method', *map(str, budgets)], lines)}"


def _pairs(records: Sequence[Record], ours: str, theirs: str) -> str:
    settings, budgets = by_setting(records), _budgets(records)
    lines: list[list[object]] = []
    cells: list[Difference | None] = []
    for protocol in MAIN.protocols:
        for task in [*_tasks(records), None]:
            wanted: dict[str, object] = {} if task is None else {"task": task}
            sides = [
                (
                    _of(settings.get((protocol, ours, budget), []), **wanted),
                    _of(settings.get((protocol, theirs, budget), []), **wanted),
                )
                for budget in budgets
            ]
            row = [difference(*side) for side in sides]
            cells += row if task is not None else []
            lines.append([protocol, task or "all", *row, overall(sides)])
    first, second, neither = verdict(cells)
    return (
        f"## {ours} minus {theirs}\n\nOf {first + second + neither} cells of a task, a budget and a protocol, {first} "
        f"are for {ours} by more than {SURE:g} standard errors, {second} for {theirs}, {neither} for neither.\n\n"
        + table(["protocol", "task", *map(str, budgets), "all budgets"], lines)
    )


def _by_task(records: Sequence[Record], protocol: str) -> str:
    settings, budgets = by_setting(records), _budgets(records)
    lines = [
        [task, method, *(mean(_of(settings.get((protocol, method, budget), []), task=task)) for budget in budgets)]
        for task in _tasks(records)
        for method in METHODS
        if method != FULL
    ]
    return f"## Task by task, {protocol}\n\n{table(['task', 'method', *map(str, budgets)], lines)}"


def _heads(records: Sequence[Record]) -> str:
    """Return what every KV head keeps on average; nothing of records that don't tell, as those of an earlier table."""
    some = [r for r in _of(records, method=ADAPTIVE, budget=_HEADS_AT, protocol=AWARE) if r.get("heads")]
    lines: list[list[object]] = []
    for seed in sorted({record["seed"] for record in some}):
        kept = [record["heads"] for record in some if record["seed"] == seed]
        for number, layer in enumerate(zip(*kept, strict=True)):
            means = [sum(head) / len(head) for head in zip(*layer, strict=True)]
            lines.append([seed, number, *(f"{entries:.0f}" for entries in means)])
    if not lines:
        return ""
    names = [f"head {head}" for head in range(max(map(len, lines)) - 2)]
    return (
        f"## Entries of every KV head, {ADAPTIVE}, budget {_HEADS_AT}, {AWARE}\n\nMeans over the questions.\n\n"
        + table(["training", "layer", *names], lines)
    )


def _variants(found: Found) -> str:
    base = by_setting(found[MAIN.name])
    parts = {name: by_setting(records) for name, records in found.items() if name != MAIN.name}
    budgets = sorted({budget for settings in parts.values() for _, _, budget in settings})
    lines: list[list[object]] = []
    for name, settings in parts.items():
        for method in dict.fromkeys(method for _, method, _ in settings):
            pairs = {
                b: (settings.get(key, []), base.get(key, [])) for b in budgets if (key := _key(settings, method, b))
            }
            told = [difference(*pairs[b]) if b in pairs else None for b in budgets]
            lines.append([name, method, *told, overall(pairs.values())])
    return (
        "## One change of the default at a time, question-aware\n\nDifference to the default of the same method at the "
        "same budget. The default: ties=position, safeguard=soft, alpha=0.2, window=32, pool=max, gqa=mean.\n\n"
        + table(["change", "method", *map(str, budgets), "all budgets"], lines)
    )


def _key(settings: Mapping[Any, Any], method: str, budget: Any) -> Any:
    return next((key for key in settings if key[1:] == (method, budget)), None)
