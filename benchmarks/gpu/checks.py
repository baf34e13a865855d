"""The kernels' checks on the device, natively, spread over processes that each compile their own kernels.

A kernel that corrupts its process fails there alone: what was left to do in it is done in a new one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.gpu.run import Row, Run, read_rows

__all__ = ["names", "run", "run_all"]


def names() -> tuple[list[str], list[Row]]:
    """Return every check as ``"op/name"``, and a failure for each op whose checks can't be loaded."""
    from tests.kernels.checks import OPS, checks_of

    found: list[str] = []
    broken: list[Row] = []
    for op in OPS:
        try:
            found += [f"{op}/{name}" for name in checks_of(op)]
        except Exception as error:  # noqa: BLE001, PERF203  # the others can be run
            broken.append(_lost(op, f"{type(error).__name__}: {error}"))
    return found, broken


def run(run: Run, wanted: Sequence[str]) -> None:
    """Run checks one after the other and write how each went; ends after one that may have spoilt the device."""
    from tests.kernels.checks import checks_of
    from tests.kernels.checks.draw import run_check
    from tests.kernels.interpreter import repaired_bfloat16

    with repaired_bfloat16() if run.smoke else nullcontext():
        _run(run, wanted, lambda op, check: run_check(checks_of(op)[check], run.device))


def _run(run: Run, wanted: Sequence[str], check_one: Callable[[str, str], None]) -> None:
    for name in wanted:
        if run.left < 0:
            return
        op, _, check = name.partition("/")
        run.write("started", name=name)
        begin = time.perf_counter()
        try:
            check_one(op, check)
            if not run.smoke:
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  # every check is to be reported
            run.write("check", name=name, passed=False, why=f"{type(error).__name__}: {error}"[:2000])
            if not isinstance(error, AssertionError) and not run.smoke:
                return
        else:
            run.write("check", name=name, passed=True, seconds=time.perf_counter() - begin)


def run_all(
    wanted: Sequence[str], workers: int, folder: Path, start: Callable[[Path, Sequence[str]], str | None]
) -> list[Row]:
    """Run checks in several processes at a time; a process that dies costs only the check that it was at.

    Args:
        wanted: Names of checks.
        workers: Processes at a time.
        folder: For their results.
        start: Runs checks in a process that appends to a file, and returns why it ended early, or None.

    Returns:
        A row for each check that was run or killed its process; none for those that there was no time for.
    """

    def one(slice_: int) -> list[Row]:
        left = list(wanted[slice_::workers])
        done: list[Row] = []
        while left:
            path = folder / f"checks-{slice_}-{len(left)}.jsonl"
            why = start(path, left)
            rows = read_rows(path)
            finished = [row for row in rows if row["kind"] == "check"]
            known = {row["name"] for row in finished}
            begun = [row["name"] for row in rows if row["kind"] == "started" and row["name"] not in known]
            if begun:
                finished.append(_lost(begun[0], why or "its process ended"))
            elif not finished:
                # It did not even start: no check would.
                return done + ([_lost(left[0], why)] if why else [])
            done += finished
            ended = {row["name"] for row in finished}
            left = [name for name in left if name not in ended]
        return done

    with ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(one, range(workers)) for row in rows]


def _lost(name: str, why: str) -> Row:
    return {"part": "checks", "kind": "check", "name": name, "passed": False, "why": why}
