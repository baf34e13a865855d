"""Types in processes of their own: a type that takes too much memory or time ends its process, not the sweep."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Final

from tests.zoo.sweep import Row, examine

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

__all__ = ["run_all"]

MAX_BYTES: Final = 6 << 30
MAX_SECONDS: Final = 900.0


@dataclass
class _Running:
    name: str
    process: ForkProcess
    deadline: float


def run_all(names: Sequence[str], jobs: int, quick: bool) -> Iterator[Row]:
    """Yield a row for every type as it is done, ``jobs`` of them at a time, see :func:`tests.zoo.sweep.examine`."""
    waiting = list(names)
    running: dict[Connection, _Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, started = _start(waiting.pop(0), quick)
            running[receiver] = started
        nearest = min(item.deadline for item in running.values())
        ready = wait(list(running), timeout=max(0.0, nearest - time.monotonic()))
        for receiver, item in list(running.items()):
            if receiver in ready or time.monotonic() >= item.deadline:
                del running[receiver]
                yield _finish(receiver, item)


def _start(name: str, quick: bool) -> tuple[Connection, _Running]:
    # What was imported is there already in a process that is forked; importing takes longer than many a type.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, quick, sender))
    process.start()
    sender.close()
    return receiver, _Running(name, process, time.monotonic() + MAX_SECONDS)


def _work(name: str, quick: bool, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    sender.send(examine(name, quick).json())


def _finish(receiver: Connection, item: _Running) -> Row:
    row = Row(item.name)
    try:
        if receiver.poll():
            row = Row.parse(receiver.recv())
        else:
            row.problems.append(f"took more than {MAX_SECONDS:.0f} seconds")
    except EOFError:
        item.process.join(10)
        row.problems.append(f"its process ended with {item.process.exitcode}")
    receiver.close()
    item.process.kill()
    item.process.join()
    return row
