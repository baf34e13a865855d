"""Markdown tables of figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["cell", "section", "table"]

_WIDEST: Final = 300
"""Letters of a cell; the JSON lines have the whole text."""


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, empty if there are no lines; None is a dash, floats have three digits."""
    body = [[cell(value) for value in line] for line in lines]
    if not body:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def cell(value: object) -> str:
    """Return the text of a cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]} ..."


def section(title: str, body: str) -> str:
    """Return a section, empty if there is nothing to say."""
    return f"## {title}\n\n{body}" if body else ""
