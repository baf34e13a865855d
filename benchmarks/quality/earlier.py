"""The answers of an earlier run, from the table that it left."""

from __future__ import annotations

import csv
import gzip
import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adakv_compile.evaluation.records import Record

__all__ = ["check_questions", "read"]


def read(path: Path) -> dict[str, list[Record]]:
    """Return the records of each part, as far as `quality.csv.gz` tells them.

    Args:
        path: The table.

    Raises:
        OSError: It can't be read.
    """
    found: defaultdict[str, list[Record]] = defaultdict(list)
    for row in csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode())):
        found[row["part"]].append(
            {
                "protocol": row["protocol"],
                "method": row["method"],
                "budget": _number(row["budget"]),
                "seed": int(row["seed"]),
                "task": row["task"],
                "index": int(row["index"]),
                "score": None if row["score"] == "" else float(row["score"]),
                "kept": _number(row["kept"]),
                "prompt_sha256": row["prompt_sha256"],
            }
        )
    return dict(found)


def check_questions(earlier: Iterable[Record], now: Iterable[Record]) -> None:
    """Check that an earlier run asked all that this one asked, word for word.

    Raises:
        ValueError: A question is another one, or is missing.
    """
    asked = {_question(record): record["prompt_sha256"] for record in earlier}
    for record in now:
        if asked.get(_question(record)) != record["prompt_sha256"]:
            raise ValueError(f"the earlier run did not ask {' '.join(map(str, _question(record)))} in these words")


def _question(record: Record) -> tuple[Any, ...]:
    return record["protocol"], record["seed"], record["task"], record["index"]


def _number(text: str) -> Any:
    if text == "":
        return None
    return float(text) if "." in text else int(text)
