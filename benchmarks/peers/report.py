"""The lines of a comparison as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.report import table
from benchmarks.peers.compare import TIE

__all__ = ["markdown"]

Row = Mapping[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """Return the whole report.

    Args:
        rows: The lines of the results file.
    """
    facts = next((row for row in rows if row["kind"] == "run"), {})
    sections = [
        "# This backend and its peers",
        f"`{facts.get('command', 'python -m benchmarks.peers')}`; {_listed(facts)}.",
        "All on the same weights, prompts and budgets, in float32, one process computing at a time. Both programs are "
        "set to one rule, that of kvpress: hard safeguard, average pooling, mean over the group; 64 is its own window. "
        "A budget counts entries per KV head, the window included.",
        _section(
            "Answers",
            "Exactly right answers. Aware: the question was in the prompt when entries were evicted; "
            "agnostic: it came after.",
            _scores(rows),
        ),
        _section(
            "Kept entries",
            "Heads that kept exactly the same entries in both programs. Ties: heads that differ only "
            f"in entries whose scores, computed anew in float64, lie within {TIE:g} of each other. Gap: largest "
            "relative difference of such scores.",
            _kept(rows),
        ),
        _section(
            "Memory",
            "Bytes of the cache after a prompt was read: entries (with the room that is allocated for new "
            "ones), and what says which are there. Peak: most that was allocated at once while a prompt was read and "
            "eight tokens were decoded.",
            _memory(rows),
        ),
        _section(
            "Time",
            "Milliseconds, median and quartiles; the contestants take turns, so what else the machine does hits all of "
            "them (its load at the start is above). adakv_compile is compiled by its inner compiler, the others run in "
            "eager mode. The model is tiny: these are the costs of the machinery, not of attention.",
            _times(rows),
        ),
        _section("Not compared", "", _absent(rows)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(title: str, words: str, body: str) -> str:
    return "\n\n".join(part for part in (f"## {title}", words, body) if part) if body else ""


def _listed(facts: Row) -> str:
    parts = [f"{name} {_flat(value)}" for name, value in facts.items() if name not in ("kind", "command")]
    return "; ".join(parts)


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _cell(row: Row) -> list[object]:
    return [row.get("window"), row.get("budget")]


def _key(row: Row) -> tuple[str, int | None, int | None]:
    return row["name"], row.get("window"), row.get("budget")


def _scores(rows: Sequence[Row]) -> str:
    scores = _of(rows, "score")
    columns = list(dict.fromkeys((row["protocol"], row["task"]) for row in scores))
    lines: dict[tuple[str, int | None, int | None], dict[tuple[str, str], str]] = {}
    for row in scores:
        right = row["right"]
        lines.setdefault(_key(row), {})[row["protocol"], row["task"]] = f"{sum(right)}/{len(right)}"
    return table(
        ["cache", "window", "budget", *(f"{protocol}, {task}" for protocol, task in columns)],
        [[*key, *(cells.get(column) for column in columns)] for key, cells in lines.items()],
    )


def _kept(rows: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for row in _of(rows, "kept"):
        different = row["heads"] - row["equal"] - row["tied"]
        gap = "-" if row["equal"] == row["heads"] else "not a tie" if row["gap"] is None else f"{row['gap']:.1e}"
        lines.append(
            [
                " / ".join(row["names"]),
                *_cell(row),
                row["protocol"],
                f"{row['equal']}/{row['heads']}",
                row["tied"],
                different,
                f"{row['shared'] / row['entries']:.3%}",
                f"{row['lowest']:.1%}",
                gap,
            ]
        )
    head = ["programs", "window", "budget", "protocol", "equal heads", "ties", "others", "shared", "worst head", "gap"]
    return table(head, lines)


def _memory(rows: Sequence[Row]) -> str:
    peaks = {_key(row): row for row in _of(rows, "peak")}
    lines: list[list[object]] = []
    for row in _of(rows, "bytes"):
        # Those that keep everything are measured again beside every budget; once is enough here.
        near = peaks.get(_key(row)) or next((peak for key, peak in peaks.items() if key[0] == row["name"]), None)
        peak = None if near is None else f"{near['peak_bytes'] / 2**20:.2f}"
        held = [f"{row[name] / 2**10:.1f}" for name in ("cache_bytes", "index_bytes")]
        lines.append([row["name"], *_cell(row), row["tokens"], *held, peak])
    return table(["cache", "window", "budget", "tokens", "entries, KiB", "bookkeeping, KiB", "peak, MiB"], lines)


def _times(rows: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for row in _of(rows, "time"):
        line: list[object] = [row["name"], *_cell(row)]
        for what in ("decode", "prefill"):
            line += [f"{row[what]['median_ms']:.2f}", f"{row[what]['low_ms']:.2f}-{row[what]['high_ms']:.2f}"]
        lines.append([*line, row["decode"]["count"]])
    return table(["cache", "window", "budget", "a step", "quartiles", "prefill", "quartiles", "steps"], lines)


def _absent(rows: Sequence[Row]) -> str:
    lines = [
        [row.get("name", "all"), *_cell(row), row.get("what"), row["why"]]
        for row in rows
        if row["kind"] in ("failed", "skipped")
    ]
    return table(["cache", "window", "budget", "what", "why"], lines)
