"""Two commits in turn: the same parts, measured by this benchmark, on this working tree's package and on another's."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.cpu.child import start
from benchmarks.cpu.parts import PARTS
from benchmarks.part import Row, read_rows
from benchmarks.process import ROOT
from benchmarks.table import table

__all__ = ["NoSuchCommitError", "compare", "paired", "worktree"]

_TIMES = ("us", "ms", "s")


class NoSuchCommitError(ValueError):
    """What was given names no commit of this repository."""


@contextmanager
def worktree(ref: str, root: Path = ROOT) -> Generator[Path, None, None]:
    """Check a commit out in a temporary folder, and remove it in the end.

    Args:
        ref: Commit, branch or tag.
        root: Of the repository.

    Raises:
        NoSuchCommitError: There is no such commit, or no repository.
    """
    name = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if name.returncode:
        raise NoSuchCommitError(
            f"--against {ref}: no commit, branch or tag of the repository in {root} has this name. "
            "`git log --oneline` lists commits; a shallow clone has only the last ones."
        )
    with tempfile.TemporaryDirectory(prefix="adakv-against-") as folder:
        tree = Path(folder) / "tree"
        added = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), name.stdout.strip()],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        if added.returncode:
            raise NoSuchCommitError(f"--against {ref}: git could not check it out: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            removal = ["git", "worktree", "remove", "--force", str(tree)]
            subprocess.run(removal, cwd=root, capture_output=True, check=False)


def compare(ref: str, parts: Sequence[str], pairs: int, smoke: bool) -> tuple[str, int]:
    """Run parts on both commits, one process after the other, and compare their times.

    Both sides are measured by the benchmark of this working tree; only the package ``adakv_compile`` is another one.

    Args:
        ref: The other commit.
        parts: Their names.
        pairs: Processes of each side for each part.
        smoke: To no end but to see that it runs.

    Returns:
        A page of Markdown, and the exit status: 1 if a process did not come to its end.
    """
    failures: list[str] = []
    sections = [f"# This working tree against {ref}"]
    with worktree(ref) as tree, tempfile.TemporaryDirectory() as folder:
        sides = {"here": ROOT, "there": Path(folder) / "there"}
        sides["there"].mkdir()
        (sides["there"] / "adakv_compile").symlink_to(tree / "adakv_compile", target_is_directory=True)
        (sides["there"] / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
        for part in parts:
            runs: dict[str, list[list[Row]]] = {side: [] for side in sides}
            for number in range(pairs):
                for side in sides if number % 2 == 0 else reversed(sides):
                    rows = Path(folder) / f"{part}-{number}-{side}.jsonl"
                    # Caches of compiled code of its own: the other side's must not serve it.
                    caches = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / f"caches-{side}")}
                    deadline = time.time() + PARTS[part].seconds
                    if why := start(part, rows, deadline, smoke, sides[side], caches):
                        failures.append(f"- {part}, {side}: {why}")
                    runs[side].append(read_rows(rows))
            sections.append(f"## {PARTS[part].title}\n\n" + paired(runs["here"], runs["there"]))
    if failures:
        sections.append("## Failed\n\n" + "\n".join(failures))
    return "\n\n".join(sections) + "\n", int(bool(failures))


def paired(here: Sequence[Sequence[Row]], there: Sequence[Sequence[Row]]) -> str:
    """Return a table of the figures that both sides have, pair by pair of processes.

    Args:
        here: Rows of each process of this side.
        there: Rows of the processes that ran beside them.
    """
    lines: list[list[object]] = []
    names = dict.fromkeys(row["name"] for rows in here for row in rows if row["kind"] == "figure")
    for name in names:
        both = [
            (ours, theirs)
            for ours, theirs in ((_of(a, name), _of(b, name)) for a, b in zip(here, there, strict=True))
            if ours is not None and theirs is not None
        ]
        if not both:
            continue
        ours, theirs = ([side["median"] for side in sides] for sides in zip(*both, strict=True))
        over = [a / b for a, b in zip(ours, theirs, strict=True) if b]
        unit = both[0][0]["unit"]
        spread = f"{min(over):.3g} to {max(over):.3g}" if over else None
        middle = statistics.median(over) if over else None
        shown = [float(statistics.median(ours)), float(statistics.median(theirs)), middle, spread, len(both)]
        lines.append([name, unit, *shown, "time" if unit in _TIMES else None])
    head = ["figure", "unit", "here", "there", "here over there", "min to max", "pairs", ""]
    return table(head, lines) or "Nothing that both sides measured."


def _of(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row["kind"] == "figure" and row["name"] == name), None)
