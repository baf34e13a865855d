"""What a part of the benchmark is given: the device, the time it has, and where its results go."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch._ops import OpOverload

__all__ = ["Row", "Run", "read_rows"]

_SPOILT: Final = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "launch failure",
    "device-side assert",
)
"""Of messages behind which nothing runs on the device any more in this process."""

Row = dict[str, Any]
"""One line of the results; ``part`` and ``kind`` say which."""


@dataclass
class Run:
    """One part, in a process of its own.

    Attributes:
        part: Its name.
        rows: File to which results are appended, line by line: the machine may be taken away at any time.
        deadline: ``time.time()`` by which the part should have ended.
        smoke: Only to see that everything runs: tiny shapes on the CPU, Triton's interpreter, no measurement.
        notes: What the results should say besides, once.
    """

    part: str
    rows: Path
    deadline: float
    smoke: bool
    notes: set[str] = field(default_factory=set[str])

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of models and caches. Triton's interpreter can't compute with bfloat16."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.time()

    def write(self, kind: str, **row: Any) -> None:
        """Append a line to the results."""
        with self.rows.open("a") as file:
            file.write(json.dumps({"part": self.part, "kind": kind, **row}) + "\n")

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Tell whether ``seconds`` are left for something; if not, the results say that it was skipped."""
        if self.left > seconds:
            return True
        self.skip(what, f"time: {max(self.left, 0):.0f} s left, about {seconds:.0f} s needed")
        return False

    def has_memory(self, what: str, size: int) -> bool:
        """Tell whether ``size`` bytes are free on the device; if not, the results say that it was skipped."""
        if self.smoke:
            return True
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if size < 0.92 * free:
            return True
        self.skip(what, f"memory: {size / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")
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
        """Go on behind whatever raises in here, the reason being a result; not on a device that it has spoilt."""
        try:
            yield
        except Exception as error:
            self.fail(what, error)
            if any(word in str(error) for word in _SPOILT):
                raise
        if not self.smoke:
            gc.collect()
            torch.cuda.empty_cache()

    def note(self, text: str) -> None:
        """Say something about the results, once."""
        if text not in self.notes:
            self.notes.add(text)
            self.write("note", text=text)

    def op(self, name: str) -> OpOverload:
        """Return an op of the dialect as it runs on the device: the Triton implementation."""
        import adakv_compile.kernels as _  # noqa: F401  # registers the ops

        return getattr(getattr(torch.ops.adakv, name), "triton" if self.smoke else "default")


def read_rows(path: Path) -> list[Row]:
    """Return the lines of a results file; a last line that a killed process left unfinished is dropped."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
