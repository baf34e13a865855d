"""The results of a run on disk: one JSON line per sample, none lost and none twice, whatever ended the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from adakv_compile.evaluation.errors import EvaluationError

__all__ = ["CONFIGURATION", "RECORDS", "Key", "Record", "Records", "key_of", "read"]

CONFIGURATION: Final = "config.json"
"""File that says what was run."""

RECORDS: Final = "records.jsonl"
"""File with a line for each sample."""

Record = Mapping[str, Any]
Key = tuple[Any, ...]
"""What tells one sample's record from every other one of a run."""

_KEY: Final = ("method", "budget", "protocol", "seed", "task", "length", "index")


def key_of(record: Record) -> Key:
    """Return the key of a record."""
    return tuple(record[name] for name in _KEY)


def read(path: Path) -> tuple[dict[Key, Record], int]:
    """Return the records of a file by key, and how many of its bytes are whole lines.

    A last line without an end was being written when the run was killed: it isn't counted.

    Raises:
        EvaluationError: A whole line is no record.
    """
    if not path.exists():
        return {}, 0
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    records: dict[Key, Record] = {}
    for number, line in enumerate(text[:whole].splitlines(), start=1):
        record = _parsed(path, number, line)
        records.setdefault(key_of(record), record)
    return records, whole


def _parsed(path: Path, number: int, line: bytes) -> Record:
    try:
        record: Any = json.loads(line)
        key_of(record)
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"line {number} of {str(path)!r} is no record; delete it and run again") from error
    return record


class Records:
    """The open results of a run; a context manager.

    Args:
        directory: Where they are; made if absent.
        configuration: Everything that results depend on; only a run of the same one continues in the directory.

    Attributes:
        done: The records so far, by key.

    Raises:
        EvaluationError: The directory holds something else, another run is writing to it, or it can't be written.
    """

    def __init__(self, directory: Path, configuration: Mapping[str, Any]) -> None:
        self.directory = directory
        with ExitStack() as undo:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                _claim(directory, configuration)
                path = directory / RECORDS
                self._file = undo.enter_context(path.open("ab"))
            except OSError as error:
                raise EvaluationError(f"can't write to {str(directory)!r}: {error.strerror or error}") from error
            _lock(self._file.fileno(), directory)
            self.done, whole = read(path)
            # Not before the lock: the half line may be one that another run is just writing.
            self._file.truncate(whole)
            undo.pop_all()

    def append(self, record: Record) -> None:
        """Write a record; it is on disk when this returns.

        Raises:
            ValueError: There is one with the same key.
        """
        key = key_of(record)
        if key in self.done:
            raise ValueError(f"there is a record of {key} already")
        line = json.dumps(record, allow_nan=False)
        # One write of a whole line: whatever ends the process leaves at most the last one incomplete.
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        # As it will be read again, so that tables don't depend on which run an answer is from.
        self.done[key] = json.loads(line)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _claim(directory: Path, configuration: Mapping[str, Any]) -> None:
    """Check that a directory is this configuration's, or make it so if it is empty."""
    path = directory / CONFIGURATION
    # As it will be read again: tuples become lists.
    ours: dict[str, Any] = json.loads(json.dumps(configuration))
    if not path.exists():
        found = sorted(entry.name for entry in directory.iterdir() if entry.name != path.name + ".part")
        if found:
            raise EvaluationError(
                f"{str(directory)!r} is not empty and not the directory of an evaluation (it holds {found[0]!r} and no "
                f"{CONFIGURATION}); choose another one"
            )
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
        return
    try:
        theirs: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise EvaluationError(f"{str(path)!r} is not the configuration of an evaluation; choose another directory")
    different = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if different:
        told = "; ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in different)
        raise EvaluationError(
            f"{str(directory)!r} belongs to another evaluation: {told}. Choose another directory, or repeat that one"
        )


def _lock(file: int, directory: Path) -> None:
    """Keep other runs out until the file is closed, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EvaluationError(f"another run is writing to {str(directory)!r}; wait for it to end") from error
