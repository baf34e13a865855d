"""What a run found, in the layout of the paper's tables: data sets as columns, method and budget as rows."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from adakv_compile.evaluation.metrics import dataset_score
from adakv_compile.evaluation.records import Record
from adakv_compile.evaluation.statistics import interval, paired

__all__ = ["BASELINE", "Table", "as_csv", "as_markdown", "differences", "scores"]

BASELINE: Final = "snapkv"
"""The method that the others are compared with, sample by sample."""

_MISSING: Final = "-"
_Row = tuple[str, Any]
"""Method and budget."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: As many cells each.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def scores(records: Iterable[Record]) -> list[Table]:
    """Return the scores, one table for each protocol and, but for needles, each length.

    A data set's score is 100 times the mean over its rows, rounded to two decimals, the average the plain mean of
    these. With several seeds, each cell is the mean over the seeds and its 95 % confidence interval. Rows without a
    score, which crashed, are left out of the means and counted in a column of their own.
    """
    return [_score_table(title, found) for title, found in _groups(records).items()]


def differences(records: Iterable[Record]) -> list[Table]:
    """Return the mean differences to :data:`BASELINE` at the same budget, over the same samples, ± standard errors.

    Empty for a protocol in which that method wasn't run.
    """
    tables = [_difference_table(title, found) for title, found in _groups(records).items()]
    return [table for table in tables if table.rows]


def _column(record: Record) -> str:
    """Return what a record's column is: lengths for needles, else tasks."""
    return f"{record['length']:,}" if _is_needle(record) else str(record["task"])


def _is_needle(record: Record) -> bool:
    return "depth" in record["meta"] and record["length"] is not None


def _groups(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_length = record["length"] is not None and not _is_needle(record)
        of_needle = f"{record['task']}, " if _is_needle(record) else ""
        length = f", {record['length']:,} tokens" if by_length else ""
        groups[f"{of_needle}{record['protocol']}{length}"].append(record)
    return dict(groups)


def _columns(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(_column(record) for record in records))


def _by_row(records: Sequence[Record]) -> dict[_Row, list[Record]]:
    rows: defaultdict[_Row, list[Record]] = defaultdict(list)
    for record in records:
        rows[record["method"], record["budget"]].append(record)
    return dict(rows)


def _name(row: _Row) -> tuple[str, str]:
    return row[0], "all" if row[1] is None else str(row[1])


def _score_table(title: str, records: Sequence[Record]) -> Table:
    columns = _columns(records)
    rows: list[tuple[str, ...]] = []
    for row, found in _by_row(records).items():
        by_seed = _means(found)
        cells = [[means[column] for means in by_seed if column in means] for column in columns]
        whole = [sum(means.values()) / len(columns) for means in by_seed if len(means) == len(columns)]
        texts = [str(interval(values)) if values else _MISSING for values in (*cells, whole)]
        crashed = sum(record["score"] is None for record in found)
        rows.append((*_name(row), *texts, str(len(found)), str(crashed)))
    return Table(title, ("method", "budget", *columns, "average", "samples", "crashed"), tuple(rows))


def _means(records: Sequence[Record]) -> list[dict[str, float]]:
    """Return, for each seed, the score of every column."""
    seeds: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["score"] is not None:
            seeds[record["seed"]][_column(record)].append(record["score"])
    return [{column: dataset_score(values) for column, values in columns.items()} for columns in seeds.values()]


def _difference_table(title: str, records: Sequence[Record]) -> Table:
    columns = _columns(records)
    by_row = _by_row(records)
    rows: list[tuple[str, ...]] = []
    for (method, budget), found in by_row.items():
        baseline = by_row.get((BASELINE, budget))
        if method == BASELINE or baseline is None:
            continue
        theirs = _scored(baseline)
        ours = _scored(found)
        pairs: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for same, score in ours.items():
            if same in theirs:
                pairs[same[0]].append((score, theirs[same]))
        everything = [pair for column in columns for pair in pairs[column]]
        cells = [str(paired(some)) if some else _MISSING for some in (*(pairs[c] for c in columns), everything)]
        rows.append((*_name((method, budget)), *cells, str(len(everything))))
    header = ("method", "budget", *columns, "all samples", "pairs")
    return Table(f"{title}: difference to {BASELINE}", header, tuple(rows))


def _scored(records: Sequence[Record]) -> Mapping[tuple[str, int, int], float]:
    known = [record for record in records if record["score"] is not None]
    return {(_column(record), record["seed"], record["index"]): record["score"] for record in known}


def as_markdown(tables: Iterable[Table]) -> str:
    """Return tables as Markdown."""
    parts: list[str] = []
    for table in tables:
        lines = [table.header, tuple("---" if i < 2 else "---:" for i in range(len(table.header))), *table.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"### {table.title}\n\n{body}\n")
    return "\n".join(parts)


def as_csv(tables: Iterable[Table]) -> str:
    """Return tables as one CSV of ``table, method, budget, column, value`` lines."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "method", "budget", "column", "value"))
    for table in tables:
        for method, budget, *cells in table.rows:
            for column, cell in zip(table.header[2:], cells, strict=True):
                writer.writerow((table.title, method, budget, column, cell))
    return text.getvalue()
