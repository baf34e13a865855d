"""One part of a benchmark: the time it has, where its results go, and what becomes of what fails."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Part", "Row", "append_rows", "read_rows"]

Row = dict[str, Any]
"""One line of the results; ``part`` and ``kind`` say which."""


@dataclass
class Part:
    """One part, in a process of its own.

    Attributes:
        part: Its name.
        rows: File to which results are appended, line by line: the machine may be taken away at any time.
        deadline: ``time.time()`` by which the part should have ended.
        smoke: Only to see that everything runs: tiny shapes, no measurement.
        notes: What the results should say besides, once.
    """

    part: str
    rows: Path
    deadline: float
    smoke: bool
    notes: set[str] = field(default_factory=set[str])

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.time()

    def write(self, kind: str, **row: Any) -> None:
        """Append a line to the results."""
        append_rows(self.rows, {"part": self.part, "kind": kind, **row})

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Tell whether ``seconds`` are left for something; if not, the results say that it was skipped."""
        if self.left > seconds:
            return True
        self.skip(what, f"time: {max(self.left, 0):.0f} s left, about {seconds:.0f} s needed")
        return False

    def skip(self, what: str, why: str) -> None:
        """Say that something was not measured."""
        self.write("skipped", what=what, why=why)

    def fail(self, what: str, error: BaseException) -> None:
        """Say that something raised, with the end of its traceback."""
        trace = "".join(traceback.format_exception(error)).splitlines()
        self.write("failed", what=what, why=f"{type(error).__name__}: {error}"[:1000], trace=trace[-12:])

    @contextmanager
    def attempt(self, what: str) -> Generator[None, None, None]:
        """Go on behind whatever raises in here, the reason being a result."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # recorded
            self.fail(what, error)

    def note(self, text: str) -> None:
        """Say something about the results, once."""
        if text not in self.notes:
            self.notes.add(text)
            self.write("note", text=text)


def append_rows(path: Path, *rows: Row) -> None:
    """Append lines to a results file."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the lines of a results file; a last line that a killed process left unfinished is dropped."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
