"""``python -m tests.zoo``: the full sweep over transformers' causal language models; writes ``docs/support.md``."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Final

import torch
import transformers

from tests.zoo.configs import TYPES
from tests.zoo.sweep import Row
from tests.zoo.table import render
from tests.zoo.workers import run_all

__all__ = ["main"]

PAGE: Final = Path(__file__).parents[2] / "docs" / "support.md"


def main() -> int:
    """Run what is asked for; return the exit status: 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("types", nargs="*", help="these types alone; the page is not written")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, help="a file of JSON lines; types that it holds are not run again")
    parser.add_argument("--quick", action="store_true", help="the checks at a small budget alone; no page is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    unknown = sorted({*given.types} - {*TYPES})
    if unknown:
        parser.error(f"not in the mapping: {', '.join(unknown)}")
    out: Path | None = given.out
    rows = {row.name: row for row in _read(out)}
    wanted: list[str] = given.types or list(TYPES)
    for row in run_all([name for name in wanted if name not in rows], given.jobs, given.quick):
        rows[row.name] = row
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(row.json() + "\n")
        _tell(row, len(rows))
    if not given.types and not given.quick:
        PAGE.write_text(render([rows[name] for name in TYPES]), encoding="utf-8")
    return int(any(rows[name].problems for name in wanted))


def _read(out: Path | None) -> list[Row]:
    if out is None or not out.exists():
        return []
    return [Row.parse(line) for line in out.read_text(encoding="utf-8").splitlines()]


def _tell(row: Row, done: int) -> None:
    lines = [*row.reasons[:2], *(f"FAILS {problem}" for problem in row.problems[:3])]
    head = f"{done:3} {row.name:24} {row.status} {row.compressed}/{row.attentions} {row.graphs} graphs {row.seconds} s"
    sys.stderr.write("\n      ".join([head, *lines]) + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main())
