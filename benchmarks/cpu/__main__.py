"""``python -m benchmarks.cpu``: the whole path on a CPU, part by part, beside plain Inductor.

Each part has a process and a deadline of its own, so that one that fails costs no other, and appends to ``cpu.jsonl``
as it goes; ``cpu.md``, with each target beside its figure, and ``cpu_*.png`` are written anew after every part. All of
them take less than fifteen minutes on two quiet cores. Ratios come from runs that take turns in one process; figures
are medians, with quartiles.

``--against REF`` measures the parts on another commit in turn with this working tree, in processes one after the other,
and prints how the times compare.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu.parts import OPTIONAL, PARTS
from benchmarks.part import Row, append_rows, read_rows

__all__ = ["Start", "Wanted", "main", "measure"]

RESULTS = Path(__file__).parents[1] / "results"

Start = Callable[[str, Path, float, bool], str | None]
""":func:`benchmarks.cpu.child.start`."""


@dataclass(frozen=True)
class Wanted:
    """What to do.

    Attributes:
        parts: In order.
        out: Folder of the results.
        smoke: To no end but to see that it runs.
        slack: Factor on the time that each part may take.
    """

    parts: tuple[str, ...]
    out: Path
    smoke: bool
    slack: float = 1.0


def measure(wanted: Wanted, start: Start) -> int:
    """Run the parts, and write the results after each.

    Returns:
        The exit status: 1 if a part did not come to its end.
    """
    from benchmarks.cpu.report import SMOKE
    from benchmarks.machine import describe

    wanted.out.mkdir(parents=True, exist_ok=True)
    rows = wanted.out / "cpu.jsonl"
    rows.write_text("")
    head: Row = {"part": "all", "kind": "machine", **describe(), "parts": wanted.parts}
    append_rows(rows, head | ({"smoke": SMOKE} if wanted.smoke else {}))
    status = 0
    for part in wanted.parts:
        begin = time.time()
        seconds = wanted.slack * PARTS[part].seconds
        _say(f"{part}: at most {seconds:.0f} s")
        if why := start(part, rows, begin + seconds, wanted.smoke):
            append_rows(rows, {"part": part, "kind": "crashed", "what": part, "why": why})
            status = 1
            _say(f"{part}: {why}")
        append_rows(rows, {"part": part, "kind": "took", "seconds": round(time.time() - begin, 1)})
        _write(wanted.out, read_rows(rows))
    failed = [row for row in read_rows(rows) if row["kind"] == "failed"]
    return status or int(bool(failed))


def _write(folder: Path, rows: Sequence[Row]) -> None:
    from benchmarks.cpu.plot import draw
    from benchmarks.cpu.report import markdown

    (folder / "cpu.md").write_text(markdown(rows, draw(rows, folder)))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--peers", action="store_true", help="also kvpress, in an environment that is made for it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; not a measurement")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; quick: none)")
    parser.add_argument("--slack", type=float, default=1.0, help="factor on the parts' deadlines, on a busy machine")
    parser.add_argument("--against", metavar="REF", help="compare with another commit, and write nothing else")
    parser.add_argument("--pairs", type=int, default=3, help="processes of each commit and part (default: %(default)s)")
    given = parser.parse_args(arguments)
    names = given.only.split(",") if given.only else [part for part in PARTS if part not in OPTIONAL]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    parts = tuple(part for part in PARTS if part in names or (given.peers and part == "peers"))
    from benchmarks.cpu.child import start

    if given.against:
        from benchmarks.cpu.against import NoSuchCommitError, compare

        try:
            page, status = compare(given.against, parts, given.pairs, given.quick)
        except NoSuchCommitError as error:
            parser.error(str(error))
        _say(page)
        return status
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or (Path(folder) if given.quick else RESULTS)
        status = measure(Wanted(parts, out, given.quick, given.slack), start)
        _say((out / "cpu.md").read_text())
    return status


if __name__ == "__main__":
    raise SystemExit(main())
