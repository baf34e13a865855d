"""The files that a run leaves beside its records: tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adakv_compile.evaluation import plots, summary
from adakv_compile.evaluation.records import Record

__all__ = ["write"]


def write(records: Sequence[Record], directory: Path, head: str) -> list[Path]:
    """Write ``summary.md``, ``summary.csv`` and the pictures, in place of those of before.

    Args:
        records: All records.
        directory: Where to put them.
        head: First line of the Markdown: what was run.

    Returns:
        The files.
    """
    tables, compared = summary.scores(records), summary.differences(records)
    text = f"{head}\n\n{summary.as_markdown(tables)}"
    if any(record["seed"] != records[0]["seed"] for record in records):
        text += "\n± is half the 95 % confidence interval of the mean over the seeds.\n"
    if compared:
        text += (
            f"\n## Paired differences\n\nMean over the samples that both have, ± its standard error.\n\n"
            f"{summary.as_markdown(compared)}"
        )
    markdown, data = directory / "summary.md", directory / "summary.csv"
    markdown.write_text(text, encoding="utf-8")
    data.write_text(summary.as_csv([*tables, *compared]), encoding="utf-8")
    return [markdown, data, *plots.draw(records, directory)]
