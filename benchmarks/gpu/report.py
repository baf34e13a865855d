"""The rows of a run as Markdown tables, targets first, and as a plot."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.run import Row
from benchmarks.gpu.targets import TARGETS, compression_ms
from benchmarks.table import cell, section, table

__all__ = ["SMOKE", "markdown", "table", "write"]

SMOKE: Final = "smoke: not a measurement"
_WAYS: Final = ("adakv", "adakv graphs", "inductor", "static graphs")
_RIVALS: Final = ("varlen heads", "varlen rows", "flash-attn heads", "flash-attn rows", "sdpa gqa", "sdpa grouped")


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write ``gpu.md`` and, where matplotlib is installed, ``gpu.png``."""
    text = markdown(rows)
    if importlib.util.find_spec("matplotlib") is None:
        text += "\nNo plot: matplotlib is not installed.\n"
    else:
        from benchmarks.gpu.plot import plot

        if plot(rows, folder / "gpu.png"):
            text += "\n![Decode attention: share of the copy bandwidth, and speed-up over the full cache](gpu.png)\n"
    (folder / "gpu.md").write_text(text)


def markdown(rows: Sequence[Row]) -> str:
    """Return the whole report."""
    machine = next((row for row in rows if row["kind"] == "machine"), {})
    smoke = SMOKE in (machine.get("smoke"),)
    title = f"# GPU results ({SMOKE})" if smoke else "# GPU results"
    facts = [f"{name} {value}" for name, value in machine.items() if name not in ("part", "kind", "smoke", "parts")]
    sections = [
        title,
        f"`python -m benchmarks.gpu`; {', '.join(facts)}. Times are medians.",
        *([] if smoke else [section("Targets", _targets(rows))]),
        section("Checks", _checks(rows)),
        section("Bandwidth of a copy", _bandwidths(rows)),
        section("Decode attention, one layer, one token", _decode(rows)),
        section("Compression, one layer", _compression(rows)),
        section("Time to first token", _prefill(rows)),
        section("Time per token", _tokens(rows)),
        section("Notes", _listed(rows, "note", "text")),
        section("Not measured", _absent(rows)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _cases(rows: Sequence[Row], part: str, kind: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and row["kind"] == kind]


def _us(row: Row, name: str) -> float | None:
    return row["times"].get(name, {}).get("us")


def _times(ours: float | None, theirs: float | None) -> str | None:
    """Return how many times as long the other takes."""
    return None if ours is None or theirs is None else f"{theirs / ours:.2f}x"


def _targets(rows: Sequence[Row]) -> str:
    return table(
        ["target", "bound", "measured", "verdict", "source"],
        [
            (
                target.name,
                f"{'>=' if target.at_least else '<='} {target.value:g} {target.unit}".strip(),
                target.figure(rows),
                target.verdict(rows),
                target.source,
            )
            for target in TARGETS
        ],
    )


def _checks(rows: Sequence[Row]) -> str:
    checks = _cases(rows, "checks", "check")
    if not checks:
        return ""
    failed = [row for row in checks if not row["passed"]]
    text = f"{len(checks) - len(failed)} of {len(checks)} passed."
    return text + ("\n\n" + table(["failed", "why"], [(row["name"], row["why"]) for row in failed]) if failed else "")


def _bandwidths(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["kind"] == "bandwidth"]
    return table(["part", "GB/s"], [(row["part"], row["gb_per_s"]) for row in found])


def _decode(rows: Sequence[Row]) -> str:
    cases = _cases(rows, "decode", "case")
    rivals = [name for name in _RIVALS if any(_us(row, name) is not None for row in cases)]
    head = ["batch", "context", "budget", "skew", "floor us", "adakv us", "low-high", "GB/s", "of copy", "launches"]
    lines: list[list[object]] = []
    for row in cases:
        ours = row["times"]["adakv"]
        spread = f"{ours['low']:.3g}-{ours['high']:.3g}" if "us" in ours else None
        line: list[object] = [
            row["batch"],
            row["context"],
            row["budget"],
            row["skew"],
            row["floor_us"],
            ours.get("us"),
            spread,
        ]
        share = row.get("share_of_copy")
        line += [row.get("gb_per_s"), None if share is None else f"{share:.0%}", row.get("launches")]
        for name in rivals:
            theirs = _us(row, name)
            line.append(None if theirs is None else f"{theirs:.3g} ({_times(ours.get('us'), theirs) or '-'})")
        lines.append(line)
    return table(head + [f"{name} us" for name in rivals], lines)


def _compression(rows: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for row in _cases(rows, "compression", "case"):
        ours = _us(row, "adakv")
        others = [
            f"{name} {cell(float(times['us']))} ({_times(ours, times['us']) or '-'})"
            for name, times in row["times"].items()
            if name != "adakv" and "us" in times
        ]
        line = [row["op"], row["context"], row.get("budget"), row["floor_us"], ours, row.get("gb_per_s")]
        lines.append([*line, row.get("launches"), ", ".join(others) or None])
    return table(["op", "context", "budget", "floor us", "adakv us", "GB/s", "launches", "others, us"], lines)


def _by_shape(rows: Sequence[Row], kind: str) -> dict[tuple[int, int], dict[str, Row]]:
    shapes: dict[tuple[int, int], dict[str, Row]] = {}
    for row in _cases(rows, "end_to_end", kind):
        shapes.setdefault((row["batch"], row["context"]), {})[row["way"]] = row
    return shapes


def _prefill(rows: Sequence[Row]) -> str:
    kernel_ms = compression_ms(rows)
    lines: list[list[object]] = []
    for (batch, context), ways in _by_shape(rows, "prefill").items():
        ours, plain = ways.get("adakv", {}), ways.get("inductor", {})
        more = ours["ms"] / plain["ms"] - 1 if ours and plain else None
        kernels = kernel_ms.get(context) if batch == 1 else None
        lines.append(
            [
                batch,
                context,
                ours.get("ms"),
                plain.get("ms"),
                None if more is None else f"{more:+.2%}",
                None if kernels is None or not plain else f"{kernels / plain['ms']:.2%}",
                ours.get("peak_gib"),
                plain.get("peak_gib"),
                ours.get("first_call_s"),
                plain.get("first_call_s"),
            ]
        )
    head = ["batch", "context", "adakv ms", "inductor ms", "difference", "our kernels alone"]
    head += ["adakv peak GiB", "inductor peak GiB", "adakv first call s", "inductor first call s"]
    return table(head, lines)


def _tokens(rows: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for (batch, context), ways in _by_shape(rows, "decode").items():
        graphs = ways.get("adakv graphs", {}).get("ms")
        for way in _WAYS:
            if (row := ways.get(way)) is None:
                continue
            spread = f"{row['low']:.3g}-{row['high']:.3g}"
            line: list[Any] = [batch, context, way, row["floor_ms"], row["ms"], spread, _times(graphs, row["ms"])]
            lines.append([*line, row.get("peak_gib"), row.get("recordings"), row.get("skips"), row["first_call_s"]])
    head = ["batch", "context", "way", "floor ms", "ms", "low-high", "over adakv graphs", "peak GiB"]
    return table([*head, "recordings", "skipped graphs", "first call s"], lines)


def _listed(rows: Sequence[Row], kind: str, field: str) -> str:
    return "\n".join(f"- {row['part']}: {cell(row[field])}" for row in rows if row["kind"] == kind)


def _absent(rows: Sequence[Row]) -> str:
    lines = [
        (row["part"], row["kind"], row["what"], row["why"])
        for row in rows
        if row["kind"] in ("skipped", "failed", "crashed")
    ]
    smoke = any("smoke" in row for row in rows)
    reasons: Counter[tuple[str, str, str, str]] = Counter()
    for row in rows:
        for name, times in row.get("times", {}).items():
            if "absent" in times:
                reasons[row["part"], "absent", name, times["absent"]] += 1
            elif not times.get("graph", True) and not smoke:
                reasons[row["part"], "no graph", name, "could not be captured: timed as it is, launches included"] += 1
    lines += [(part, kind, f"{name}, {count} cases", why) for (part, kind, name, why), count in reasons.items()]
    return table(["part", "", "what", "why"], lines)
