"""The pictures of a run: one for each name under which it wrote series."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.part import Row

__all__ = ["PLOTS", "draw"]


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        caption: What it shows.
        x: Label of the axis.
        y: Label of the axis.
        logarithmic: Of the axes, ``"x"``, ``"y"`` or both.
        steps: Whether a value holds up to the next.
    """

    caption: str
    x: str
    y: str
    logarithmic: str = ""
    steps: bool = False


PLOTS: Final = {
    "op": Plot("Attention operator over a copy of the same bytes", "entries of a layer's row", "times a copy", "x"),
    "context": Plot("Decode step against the context", "tokens of the text", "ms", "x"),
    "growth": Plot("Decode step against the length of the tail", "tokens generated", "ms"),
    "compile": Plot("Stages of a compilation", "layers", "seconds"),
    "timeline": Plot(
        "Dense K or V tensors alive during a prompt",
        "allocations and releases of this size, in order of time",
        "tensors",
        steps=True,
    ),
}


def draw(rows: Sequence[Row], folder: Path) -> list[tuple[str, str]]:
    """Draw what there is, with the quartiles as a band.

    Returns:
        File name and caption of each picture; nothing where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    drawn: list[tuple[str, str]] = []
    for name, plot in PLOTS.items():
        lines = [row for row in rows if row["kind"] == "series" and row["plot"] == name]
        if not lines:
            continue
        figure = Figure(figsize=(7, 3.2))
        axes = figure.subplots()
        for row in lines:
            if plot.steps:
                axes.step(row["x"], row["median"], where="post", label=row["line"])
            else:
                axes.plot(row["x"], row["median"], marker="o", label=row["line"])
                axes.fill_between(row["x"], row["low"], row["high"], alpha=0.2)
        if "x" in plot.logarithmic:
            axes.set_xscale("log", base=2)
        if "y" in plot.logarithmic:
            axes.set_yscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        axes.set_title(plot.caption)
        axes.legend(fontsize="small")
        figure.tight_layout()
        file = f"cpu_{name}.png"
        figure.savefig(folder / file, dpi=120)
        drawn.append((file, plot.caption))
    return drawn
