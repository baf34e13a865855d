"""One picture of the decode attention: how near it comes to a copy, and how it does against the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.run import Row

__all__ = ["plot"]


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draw what there is; return whether there was anything."""
    cases = [row for row in rows if row["part"] == "decode" and row["kind"] == "case" and "us" in row["times"]["adakv"]]
    if not cases:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    # The longest context and the smallest batch there are: the case with a target.
    batch, context = min(row["batch"] for row in cases), max(row["context"] for row in cases)
    chosen = [row for row in cases if (row["batch"], row["context"]) == (batch, context)]
    for budget in dict.fromkeys(row["budget"] for row in chosen):
        line = sorted((row["skew"], row["share_of_copy"]) for row in chosen if row["budget"] == budget)
        left.plot(*zip(*line, strict=True), marker="o", label=f"budget {budget}")
    left.axhline(0.8, linestyle=":", color="grey")
    left.set_xlabel("longest head over mean")
    left.set_ylabel("share of copy bandwidth")
    left.set_title(f"batch {batch}, context {context}")
    left.set_ylim(0, 1.1)
    left.legend()
    for name in ("varlen heads", "varlen rows", "sdpa gqa", "sdpa grouped"):
        points = [
            (row["entries"] * row["batch"], row["times"][name]["us"] / row["times"]["adakv"]["us"])
            for row in cases
            if "us" in row["times"].get(name, {})
        ]
        if points:
            right.plot(*zip(*points, strict=True), ".", label=name)
    right.axhline(1, linestyle=":", color="grey")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("entries of a KV head, mean, all rows")
    right.set_ylabel("time over adakv's")
    right.set_title("rivals, all cases")
    if right.has_data():
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True
