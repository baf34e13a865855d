"""``python -m benchmarks.gpu``: check the kernels on a GPU, then time them, the compression and whole models.

Needs a CUDA device, this repository, torch and triton; transformers for the whole models, flash-attn and matplotlib for
one rival and the plot, where they are installed. In this order, in under nine minutes on one H200::

    checks       the checks of tests/kernels/checks, natively; if one fails, nothing is timed and the exit status is 1
    decode       decode attention at Llama-3.1-8B shapes, ragged caches of any skew, against the full cache and varlen
    compression  scores, selection and compaction of one layer, against eager PyTorch, topk and index_select
    end_to_end   first token, tokens and peak memory of a random-weight Llama-3.1-8B, against Inductor and static caches

Each part has a process of its own, so that a crash costs no other part, and appends to ``gpu.jsonl`` as it goes;
``gpu.md`` (with the targets) and ``gpu.png`` are written anew after every part. Times are medians of CUDA-graph
replays, in turn with the rivals, beside a floor from the bandwidth of a copy in the same process. ``--minutes`` is a
budget: what does not fit is listed as skipped. ``--smoke`` runs everything at tiny shapes on a CPU, in Triton's
interpreter, and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.run import Row, append_rows, read_rows

__all__ = ["PARTS", "Start", "main", "measure"]

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("checks", "decode", "compression", "end_to_end")
_SHARES = {"checks": 0.4, "decode": 0.25, "compression": 0.2, "end_to_end": 1.0}
"""Of the time that is left when a part begins, the most that it may take."""

Start = Callable[[str, Path, float, bool, Sequence[str]], str | None]
""":func:`benchmarks.gpu.child.start`."""


@dataclass(frozen=True)
class Wanted:
    """What to do.

    Attributes:
        parts: In order.
        out: Folder of the results.
        seconds: For everything.
        smoke: On the CPU, to see that it runs.
        commit: Of the code, where git can't tell.
    """

    parts: tuple[str, ...]
    out: Path
    seconds: float
    smoke: bool
    commit: str | None = None


def measure(wanted: Wanted, start: Start) -> int:
    """Run the parts, and write the results after each.

    Returns:
        The exit status: 1 if a check failed or a part did not come to its end.
    """
    from benchmarks.gpu import report
    from benchmarks.machine import describe

    deadline = time.time() + wanted.seconds
    wanted.out.mkdir(parents=True, exist_ok=True)
    rows = wanted.out / "gpu.jsonl"
    rows.write_text("")
    head: Row = {"part": "all", "kind": "machine", **describe(wanted.commit), "parts": wanted.parts}
    if wanted.smoke:
        head["smoke"] = report.SMOKE
    append_rows(rows, head)
    status = 0
    for part in wanted.parts:
        left = deadline - time.time()
        if left < 5:
            append_rows(
                rows, {"part": part, "kind": "skipped", "what": part, "why": f"time: {max(left, 0):.0f} s left"}
            )
            continue
        _say(f"{part}: {left:.0f} s left of {wanted.seconds:.0f}")
        ends = time.time() + _SHARES[part] * left
        if part == "checks":
            found = _checks(wanted, ends, start)
            append_rows(rows, *found)
            failed = [row for row in found if not row.get("passed", True)]
            for row in failed:
                _say(f"FAILED {row['name']}: {row['why']}")
            status = status or int(bool(failed))
        elif why := start(part, rows, ends, wanted.smoke, ()):
            append_rows(rows, {"part": part, "kind": "crashed", "what": part, "why": why})
            status = 1
        report.write(read_rows(rows), wanted.out)
        if part == "checks" and status:
            _say("nothing is timed as long as a check fails (--skip-checks times anyway)")
            break
    _say(report.markdown(read_rows(rows)))
    return status


def _checks(wanted: Wanted, ends: float, start: Start) -> list[Row]:
    """Run all checks; in smoke mode those of the quickest op."""
    from benchmarks.gpu import checks

    workers = 1 if wanted.smoke else max(1, min(8, (os.cpu_count() or 1) // 2))
    names, broken = checks.names()
    if wanted.smoke:
        # Tests of their own run all of them.
        names = [name for name in names if name.startswith("compact/")]
    with tempfile.TemporaryDirectory() as folder:
        part = functools.partial(_start_checks, start, ends, wanted.smoke)
        rows = broken + checks.run_all(names, workers, Path(folder), part)
    missing = sorted(set(names) - {row["name"] for row in rows})
    if missing:
        what = f"{len(missing)} checks: {', '.join(missing)}"
        rows.append({"part": "checks", "kind": "skipped", "what": what, "why": "time"})
    return rows


def _start_checks(start: Start, ends: float, smoke: bool, rows: Path, names: Sequence[str]) -> str | None:
    return start("checks", rows, ends, smoke, names)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; not a measurement")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip-checks", action="store_true", help="time kernels that were not checked")
    parser.add_argument("--minutes", type=float, default=8.5, help="time budget (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; smoke: none)")
    parser.add_argument("--commit", help="of the code, for a copy without its git history")
    given = parser.parse_args(arguments)
    parts = tuple(part for part in PARTS if not given.only or part in given.only)
    if given.skip_checks:
        parts = tuple(part for part in parts if part != "checks")
    if not given.smoke:
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --smoke shows on a CPU that everything runs")
    from benchmarks.gpu.child import start

    with tempfile.TemporaryDirectory() as folder:
        out = given.out or (Path(folder) if given.smoke else RESULTS)
        return measure(Wanted(parts, out, 60 * given.minutes, given.smoke, given.commit), start)


if __name__ == "__main__":
    raise SystemExit(main())
