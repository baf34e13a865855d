"""Pictures of a run: needles found by length and depth, scores against what was kept, what every head keeps."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from adakv_compile.evaluation.methods import FULL
from adakv_compile.evaluation.records import Record

__all__ = ["draw"]

_WIDEST: Final = 3
"""Panels beside each other."""

_TICKS: Final = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
"""Per cents on the axis of what was kept."""


def draw(records: Iterable[Record], directory: Path) -> list[Path]:
    """Draw what the records hold, for each protocol by itself.

    Args:
        records: Records; those without a score are left out.
        directory: Where to put the pictures.

    Returns:
        The pictures: ``scores-PROTOCOL.png``, ``heads-PROTOCOL.png`` and, where depths are known,
        ``needle-PROTOCOL.png``.
    """
    protocols: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["score"] is not None:
            protocols[record["protocol"]].append(record)
    made: list[Path] = []
    for protocol, found in protocols.items():
        figures = {"scores": _scores(found), "heads": _heads(found), "needle": _needle(found)}
        for name, figure in figures.items():
            if figure is not None:
                figure.suptitle(f"{_TITLES[name]}, {protocol}")
                path = directory / f"{name}-{protocol}.png"
                figure.savefig(path, dpi=140)
                made.append(path)
    return made


_TITLES: Final = {
    "scores": "Score against entries kept",
    "heads": "Entries kept by every head",
    "needle": "Needles found",
}


def _by_setting(records: Sequence[Record]) -> dict[tuple[str, Any], list[Record]]:
    settings: defaultdict[tuple[str, Any], list[Record]] = defaultdict(list)
    for record in records:
        settings[record["method"], record["budget"]].append(record)
    return dict(settings)


def _label(setting: tuple[str, Any]) -> str:
    return setting[0] if setting[1] is None else f"{setting[0]} {setting[1]}"


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and that many panels."""
    from matplotlib.figure import Figure

    wide = min(count, _WIDEST)
    high = math.ceil(count / wide)
    figure = Figure(figsize=(width * wide + 1, height * high + 0.6), layout="constrained")
    panels = [panel for row in figure.subplots(high, wide, squeeze=False) for panel in row]
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def _needle(records: Sequence[Record]) -> Any:
    """Return a heat map of length and depth for every setting, or None."""
    placed = [record for record in records if "depth" in record["meta"] and record["length"] is not None]
    if not placed:
        return None
    lengths = sorted({record["length"] for record in placed})
    depths = sorted({record["meta"]["depth"] for record in placed})
    settings = _by_setting(placed)
    figure, panels = _panels(len(settings), 3.2, 2.6)
    image = None
    for panel, (setting, found) in zip(panels, settings.items(), strict=True):
        cells: defaultdict[tuple[Any, Any], list[float]] = defaultdict(list)
        for record in found:
            cells[record["meta"]["depth"], record["length"]].append(100 * record["score"])
        table = [[statistics.fmean(cells.get((d, n), [math.nan])) for n in lengths] for d in depths]
        image = panel.imshow(table, aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
        panel.set(title=_label(setting), xlabel="tokens", ylabel="depth in per cent")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    figure.colorbar(image, ax=panels, label="score")
    return figure


def _scores(records: Sequence[Record]) -> Any:
    """Return a line of mean scores for every method, over the mean share of entries that was measured."""
    figure, (panel,) = _panels(1, 6.5, 4.2)
    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, _), found in _by_setting(records).items():
        # Not the budget: it may be a share or a number, and a short prompt is kept whole.
        kept = statistics.fmean(record["kept"] / record["dense_entries"] for record in found)
        lines[method].append((100 * kept, 100 * statistics.fmean(record["score"] for record in found)))
    for method, points in lines.items():
        if method == FULL:
            panel.axhline(points[0][1], color="black", linestyle="--", label="full cache")
        else:
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
    panel.set(xlabel="entries kept, per cent of the full cache", ylabel="mean score over all samples", xscale="log")
    # A logarithmic axis of less than a decade would have no number or one.
    low, high = panel.get_xlim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.legend()
    return figure


def _heads(records: Sequence[Record]) -> Any:
    """Return a table of layers and heads for every compressed setting, or None."""
    settings = {setting: found for setting, found in _by_setting(records).items() if setting[0] != FULL}
    if not settings:
        return None
    figure, panels = _panels(len(settings), 3.2, 2.6)
    for panel, (setting, found) in zip(panels, settings.items(), strict=True):
        layers = len(found[0]["heads"])
        widest = max(map(len, found[0]["heads"]))
        table = [
            [_mean(record["heads"][layer][head : head + 1] for record in found) for head in range(widest)]
            for layer in range(layers)
        ]
        image = panel.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        panel.set(title=_label(setting), xlabel="KV head", ylabel="layer")
        figure.colorbar(image, ax=panel)
    return figure


def _mean(cells: Iterable[Sequence[int]]) -> float:
    """Return the mean of what there is: layers may differ in their number of heads."""
    values = [value for cell in cells for value in cell]
    return statistics.fmean(values) if values else math.nan
