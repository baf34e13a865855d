"""Talks to a worker process: one request and one answer at a time, each a line of JSON."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["RefusedError", "Worker", "WorkerError"]

_TAIL: Final = 800
"""Letters of a dead worker's last words that are worth repeating."""


class WorkerError(RuntimeError):
    """The worker is gone, hangs, or talks nonsense; it has been ended."""


class RefusedError(RuntimeError):
    """The worker is well and says that it can't do what was asked."""


class Worker:
    """A worker process.

    Args:
        command: What starts it.
        log: File for what it writes to its standard error.
        timeout: Longest time that one answer may take, in seconds.

    Raises:
        WorkerError: It can't be started.
    """

    def __init__(self, command: Sequence[str], log: Path, timeout: float = 600.0) -> None:
        self._log = log
        self._timeout = timeout
        self._lines: queue.Queue[str | None] = queue.Queue()
        with log.open("a") as errors:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
                )
            except OSError as error:
                raise WorkerError(f"could not start {command[0]}: {error}") from error
        # A thread of its own, as a pipe can't be read with a timeout everywhere.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            do: What to do.
            **arguments: What JSON can hold.

        Raises:
            WorkerError: The worker died, did not answer in time, or its answer is not JSON.
            RefusedError: It answered that this failed; it can be asked again.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer to {do!r} in {self._timeout:g} s") from None
        except (OSError, ValueError):  # the pipe is broken, or closed
            line = None
        if line is None:
            raise WorkerError(f"died at {do!r}, {self._status()}: {self._last_words()}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            self.close()
            raise WorkerError(f"answered {do!r} with what is not JSON: {line[:_TAIL]!r}") from None
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; it may be closed twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except OSError:  # it is gone already
                self._process.stdin = None
        try:
            self._process.wait(timeout=2 if self.alive else None)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _status(self) -> str:
        self.close()
        return f"exit status {self._process.returncode}"

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-_TAIL:].strip() or "it said nothing"
