"""What the command line shows: the closing table, the picture of the budgets, the JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from adakv_compile.cli.errors import CommandError
from adakv_compile.cli.generate import Run, agreement
from adakv_compile.runtime.stats import CacheStats

__all__ = ["as_json", "check_picture", "head_budgets", "plot_heads", "summary", "verdict"]

_UNITS: Final = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
# Beyond this many cells the numbers in the picture can't be read.
_MOST_NUMBERS: Final = 400


def _bytes(count: int) -> str:
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _entries(stats: CacheStats) -> tuple[int, int]:
    """Return the entries kept and those of a dense cache, over all layers, heads and rows."""
    kept = sum(int(layer.head_lengths.sum()) for layer in stats.layers)
    return kept, sum(layer.head_lengths.numel() * layer.logical_length for layer in stats.layers)


def summary(runs: Sequence[Run], prompt_tokens: int) -> Table:
    """Return the closing table, one column for each run.

    Args:
        runs: What was measured.
        prompt_tokens: Length of the prompt.
    """
    parts = f" in {runs[0].chunks} parts" if runs[0].chunks > 1 else ""
    table = Table(title=f"{prompt_tokens:,} prompt tokens{parts}, {len(runs[0].tokens):,} generated")
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")
    entries = [_entries(run.stats) for run in runs]
    table.add_row("time to first token", *(_seconds(run.first_token) for run in runs))
    table.add_row("time per token (median)", *(_seconds(run.per_token) for run in runs))
    table.add_row("compilation, not in the above", *(_seconds(run.compiling) for run in runs))
    table.add_row("cache held", *(_bytes(run.stats.bytes_held) for run in runs))
    table.add_row("a dense cache", *(_bytes(run.stats.bytes_dense) for run in runs))
    table.add_row("held / dense", *(f"{run.stats.ratio:.1%}" for run in runs))
    table.add_row("entries kept", *(f"{kept:,} of {dense:,}" for kept, dense in entries))
    return table


def verdict(compressed: Run, full: Run) -> str:
    """Return one sentence on whether two runs gave the same answer."""
    at = agreement(compressed, full)
    if at is None:
        return f"Both caches give the same {len(full.tokens)} tokens."
    return f"The answers agree for {at} of {max(len(compressed.tokens), len(full.tokens))} tokens, then differ."


def head_budgets(stats: CacheStats) -> torch.Tensor:
    """Return the entries kept, the mean over the batch, ``[layers, most heads]`` in float32.

    A layer with fewer heads than another has NaN for those it lacks.
    """
    widest = max(layer.head_lengths.shape[1] for layer in stats.layers)
    table = torch.full((len(stats.layers), widest), float("nan"))
    for row, layer in zip(table, stats.layers, strict=True):
        row[: layer.head_lengths.shape[1]] = layer.head_lengths.float().mean(0)
    return table


def check_picture(path: Path) -> None:
    """Check that a picture of this name can be drawn.

    Raises:
        CommandError: The ending of the name is no format of pictures.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise CommandError(
            f"can't draw {str(path)!r}: {path.suffix!r} is not one of {', '.join(f'.{e}' for e in sorted(known))}"
        )


def plot_heads(stats: CacheStats, path: Path, title: str) -> None:
    """Save a heat map of the entries that every head of every layer keeps.

    Args:
        stats: What a compressed cache holds.
        path: Picture to write; the ending chooses the format.
        title: Its title.

    Raises:
        OSError: The file can't be written.
    """
    from matplotlib.figure import Figure

    table = head_budgets(stats)
    layers, heads = table.shape
    figure = Figure(figsize=(max(4.5, 0.45 * heads + 2.5), max(3.0, 0.32 * layers + 1.6)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table.numpy(), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="entries kept")
    axes.set(title=title, xlabel="KV head", ylabel="layer")
    axes.set_xticks(range(heads) if heads <= 32 else range(0, heads, 8))
    axes.set_yticks(range(layers) if layers <= 40 else range(0, layers, 5))
    if layers * heads <= _MOST_NUMBERS:
        half = float(table.nan_to_num().max()) / 2
        for layer, row in enumerate(table.tolist()):
            for head, kept in enumerate(row):
                if kept == kept:  # not NaN
                    ink = "black" if kept > half else "white"
                    axes.text(head, layer, f"{kept:.0f}", ha="center", va="center", color=ink, fontsize=7)
    figure.savefig(path, dpi=140)


def _run_as_dict(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "text": run.text,
        "tokens": list(run.tokens),
        "prompt_parts": run.chunks,
        "seconds_to_first_token": run.first_token,
        "seconds_per_token": run.per_token,
        "seconds_compiling": run.compiling,
        "cache": json.loads(run.stats.json()),
    }


def as_json(request: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Return everything as a JSON document.

    Args:
        request: What was asked for.
        runs: What was measured; the compressed run first, then the full one if there was one.
    """
    document: dict[str, Any] = {**request, "runs": [_run_as_dict(run) for run in runs]}
    if len(runs) == 2:
        at = agreement(runs[0], runs[1])
        document["agreement"] = {"same": at is None, "first_difference": at}
    return json.dumps(document, indent=2)
