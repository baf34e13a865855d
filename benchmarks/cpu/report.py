"""The rows of a run as a page of Markdown tables, one a part, with each target beside its figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.cpu.parts import PARTS
from benchmarks.part import Row
from benchmarks.table import cell, section, table

__all__ = ["SMOKE", "markdown"]

SMOKE: Final = "smoke: not a measurement"


def markdown(rows: Sequence[Row], plots: Sequence[tuple[str, str]] = ()) -> str:
    """Return the whole page.

    Args:
        rows: Of the run.
        plots: File and caption of each.
    """
    machine = next((row for row in rows if row["kind"] == "machine"), {})
    facts = [f"{name} {value}" for name, value in machine.items() if name not in ("part", "kind", "smoke", "parts")]
    figures = [row for row in rows if row["kind"] == "figure"]
    sections = [
        f"# CPU results ({SMOKE})" if machine.get("smoke") else "# CPU results",
        f"`python -m benchmarks.cpu`; {', '.join(facts)}. Random weights, float32 and batch 1 where nothing else "
        "is said. Figures are medians, "
        "ratios of the medians of each round of runs that took turns in one process.",
        section("Targets", _figures([row for row in figures if "target" in row], with_part=True)),
        *(section(PARTS[part].title, _figures([row for row in figures if row["part"] == part])) for part in PARTS),
        section("Plots", "\n\n".join(f"![{caption}]({file})" for file, caption in plots)),
        section("Notes", "\n".join(f"- {row['text']}" for row in rows if row["kind"] == "note")),
        section("Not measured", _absent(rows)),
    ]
    return "\n\n".join(text for text in sections if text) + "\n"


def _figures(rows: Sequence[Row], with_part: bool = False) -> str:
    lines: list[list[object]] = []
    for row in rows:
        several = row["count"] > 1
        verdict = {True: "met", False: "not met"}.get(row.get("met"))  # type: ignore[arg-type]
        lines.append(
            [
                *([row["part"]] if with_part else []),
                row["name"],
                float(row["median"]),
                row["unit"],
                _range(row["low"], row["high"]) if several else None,
                _range(row["min"], row["max"]) if several else None,
                row["against"],
                row.get("target"),
                verdict,
            ]
        )
    head = ["figure", "median", "unit", "quartiles", "min to max", "against", "target", "verdict"]
    return table([*(["part"] if with_part else []), *head], lines)


def _range(low: float, high: float) -> str:
    return f"{cell(low)} to {cell(high)}"


def _absent(rows: Sequence[Row]) -> str:
    kinds = ("skipped", "failed", "crashed")
    return table(
        ["part", "", "what", "why"],
        [(row["part"], row["kind"], row["what"], row["why"]) for row in rows if row["kind"] in kinds],
    )
