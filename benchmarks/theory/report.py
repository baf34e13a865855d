"""The cells of a run as JSON lines, as Markdown and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.gpu.report import table
from benchmarks.theory.samples import CASES
from benchmarks.theory.summary import Cell

__all__ = ["draw", "markdown", "write"]


def write(facts: Mapping[str, Any], cells: Sequence[Cell], folder: Path) -> None:
    """Write ``theory.jsonl``, ``theory.md`` and ``theory.png``.

    Args:
        facts: What was measured, on what.
        cells: The results.
        folder: Where to; created if absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "run", **facts}, *({"kind": "cell", **cell.row()} for cell in cells)]
    (folder / "theory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "theory.md").write_text(markdown(facts, cells))
    draw(cells, folder / "theory.png")


def markdown(facts: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Return the report: all layers together, then layer by layer."""
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    sections = [
        "# Ada-KV's theory, measured",
        f"`python -m benchmarks.theory`; {told}.",
        "Loss: L1 norm of what eviction changes in a layer's attention output, relative to the norm of that output. "
        "Bound: Theorem 3.1, relative to the same. Mass: attention that is kept, mean over the query heads. Lower, "
        "same: share of the samples (a prompt and a layer) in which the figure is lower than, or equal to, that of the "
        "uniform allocation. Change: mean difference of the loss, with its standard error; samples of one prompt are "
        "not independent, so over all layers the error is a little too small.",
    ]
    for case, meaning in CASES.items():
        sections.append(f"## {case[0].upper()}{case[1:]}\n\nHere {meaning}.")
        sections.append(_table([cell for cell in cells if cell.case == case and cell.layer is None], layers=False))
    sections.append("## Layer by layer")
    for case in CASES:
        body = _table([cell for cell in cells if cell.case == case and cell.layer is not None], layers=True)
        sections.append(f"### {case[0].upper()}{case[1:]}\n\n{body}")
    sections.append("![Loss against budget, layer by layer](theory.png)")
    return "\n\n".join(sections) + "\n"


def _table(cells: Sequence[Cell], *, layers: bool) -> str:
    head = ["budget", "allocation", "samples", "loss", "change", "loss lower", "same", "bound", "bound lower", "same"]
    lines: list[list[object]] = []
    for cell in sorted(cells, key=lambda cell: (-1 if cell.layer is None else cell.layer, cell.budget)):
        uniform = cell.allocation == "uniform"
        line: list[object] = [cell.budget, cell.allocation, cell.samples, f"{cell.loss:.4f}"]
        line.append(None if uniform else f"{cell.loss_change:+.4f} ± {cell.loss_error:.4f}")
        line += [None if uniform else f"{share:.1%}" for share in (cell.lower_loss, cell.same_loss)]
        line.append(f"{cell.bound:.2f}")
        line += [None if uniform else f"{share:.1%}" for share in (cell.lower_bound, cell.same_bound)]
        line.append(f"{cell.mass:.4f}")
        lines.append([cell.layer, *line] if layers else line)
    return table([*(["layer"] if layers else []), *head, "mass"], lines)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Save the mean loss against the budget, a row of panels for each case and a column for each layer."""
    layers = sorted({cell.layer for cell in cells if cell.layer is not None})
    budgets = sorted({cell.budget for cell in cells})
    figure = Figure(figsize=(2.7 * max(1, len(layers)), 2.2 * len(CASES)), layout="constrained")
    axes = figure.subplots(len(CASES), max(1, len(layers)), sharex=True, squeeze=False)
    for row, case in zip(axes, CASES, strict=True):
        for axis, layer in zip(row, layers, strict=False):
            shown = [cell for cell in cells if cell.case == case and cell.layer == layer]
            for allocation in dict.fromkeys(cell.allocation for cell in shown):
                line = sorted((cell.budget, cell.loss) for cell in shown if cell.allocation == allocation)
                axis.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1, label=allocation)
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, [str(budget) for budget in budgets])
            axis.set_title(f"layer {layer}: {case}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.set_ylim(bottom=0)
        row[0].set_ylabel("relative loss", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("entries per KV head", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
