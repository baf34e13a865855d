"""Scores against budgets, a row of panels for each protocol and a column for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from adakv_compile.evaluation.methods import FULL, METHODS
from adakv_compile.evaluation.records import Record
from benchmarks.quality.compare import by_setting, mean

__all__ = ["draw"]


def draw(records: Sequence[Record], path: Path) -> None:
    """Save the picture; bars are half the 95 % confidence interval over the trainings.

    Args:
        records: Those of the main part.
        path: Where to.
    """
    protocols = list(dict.fromkeys(record["protocol"] for record in records))
    tasks = list(dict.fromkeys(record["task"] for record in records))
    columns: list[str | None] = [None, *tasks]
    figure = Figure(figsize=(2.6 * len(columns), 2.5 * len(protocols)), layout="constrained")
    axes = figure.subplots(len(protocols), len(columns), sharex=True, sharey=True, squeeze=False)
    for row, protocol in zip(axes, protocols, strict=True):
        for axis, task in zip(row, columns, strict=True):
            shown = [r for r in records if r["protocol"] == protocol and task in (None, r["task"])]
            _panel(axis, shown)
            axis.set_title(task or "all tasks", fontsize=8)
        row[0].set_ylabel(f"score, {protocol}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("entries per KV head", fontsize=8)
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=130)


def _panel(panel: Any, records: Sequence[Record]) -> None:
    settings = by_setting(records)
    budgets = sorted({budget for _, _, budget in settings if budget is not None})
    for method in METHODS:
        if method == FULL:
            continue
        cells = [
            mean([r for (_, m, b), some in settings.items() if (m, b) == (method, at) for r in some]) for at in budgets
        ]
        points = [(at, cell.mean, cell.half or 0.0) for at, cell in zip(budgets, cells, strict=True) if cell]
        if points:
            panel.errorbar(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, capsize=2, label=method)
    full = mean([record for record in records if record["method"] == FULL])
    if full is not None:
        panel.axhline(full.mean, color="black", linestyle="--", linewidth=1)
    panel.set_ylim(-2, 103)
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [str(budget) for budget in budgets])
    panel.tick_params(labelsize=6)
