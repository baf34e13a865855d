"""The table that users read: every type with its status and the reason for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch
import transformers

from tests.zoo.sweep import Row

__all__ = ["render"]

_HEAD: Final = """\
# Decoders of transformers

Written by `python -m tests.zoo`, not by hand: every type in the causal language model mapping of transformers
{transformers}, as a small random model on PyTorch {torch}. For each of them, with and without left padding:

- with a budget that is at least the length, `generate` returns the uncompressed tokens;
- with a small budget, every step equals the uncompressed model's, evicted entries hidden in its attention;
- the entries that every head keeps are those that the paper's algorithm keeps, given the attention that the model
  really computes;
- every attention is in the report: on a compressed cache, or refused with a reason.

*Attentions* counts those on a compressed cache among all. *Graphs* is what a prompt and the steps after it are
compiled to.

| Status | Types |
| --- | --- |
"""
_ORDER: Final = ("compressed", "partly compressed", "refused", "nothing to compress", "not run", "crashed")
_MEANING: Final = {
    "compressed": "all attentions work on a compressed cache",
    "partly compressed": "some attentions do, the others are refused with a reason",
    "refused": "the model runs as under plain Inductor, with a reason",
    "nothing to compress": "no attention has a cache that grows",
    "not run": "transformers itself can't build the small model, or generate with it",
    "crashed": "it took too much time or memory, or an error ended it",
}


def render(rows: Sequence[Row]) -> str:
    """Return the page, Markdown."""
    counts = Counter(row.status for row in rows)
    failing = sum(bool(row.problems) for row in rows)
    page = _HEAD.format(torch=torch.__version__.partition("+")[0], transformers=transformers.__version__)
    page += "".join(f"| {status}: {_MEANING[status]} | {counts[status]} |\n" for status in _ORDER if counts[status])
    cached = counts["compressed"] + counts["partly compressed"] + counts["refused"]
    page += f"| in all | {len(rows)} |\n\n{failing} of them fail a check."
    if cached:
        share = counts["compressed"] / cached
        page += f" {counts['compressed']} of the {cached} with a cache, {share:.1%}, are compressed."
    page += "\n\n"
    page += "| Type | Status | Attentions | Graphs | Why; what fails |\n| --- | --- | --- | --- | --- |\n"
    for row in sorted(rows, key=lambda row: row.name):
        ran = row.status not in ("not run", "crashed")
        counts_text = f"{row.compressed} of {row.attentions} | {row.graphs}" if ran else " | "
        page += f"| {row.name} | {row.status} | {counts_text} | {_cell(row)} |\n"
    return page


def _cell(row: Row) -> str:
    lines = [*row.reasons[:2], *(f"**fails** {problem}" for problem in row.problems[:2])]
    return "; ".join(_plain(line) for line in lines)


def _plain(line: str, limit: int = 160) -> str:
    """Return text that fits a cell: one line, no addresses of objects, no bars, not too long."""
    text = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(line.split())).replace("|", "\\|")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
