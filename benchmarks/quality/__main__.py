"""What eviction costs, on three trainings of the test bed: ``python -m benchmarks.quality``.

Answers go to ``--out``, a folder for each part, as `adakv eval` leaves them; a run that was stopped goes on with the
same command. The page and the pictures go to ``--results``. Parts that are not asked can be taken ``--from`` the table
of an earlier run on the same weights, to compare with.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from adakv_compile.evaluation.records import Record, Records
from adakv_compile.evaluation.runner import Plan, run
from benchmarks.machine import describe
from benchmarks.quality import earlier, samples
from benchmarks.quality.models import Trained, folders
from benchmarks.quality.parts import MAIN, PARTS, Part
from benchmarks.quality.report import write
from benchmarks.testbed.model import WEIGHTS

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask what was not asked yet, and write the report.

    Args:
        arguments: Command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with a folder for each training")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tasks", nargs="+", help="tasks; those that the full cache answers if not given")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt and its answer")
    parser.add_argument("--count", type=int, default=12, help="samples of each task and training")
    parser.add_argument("--batch", type=int, default=12, help="samples that are answered together")
    parser.add_argument("--inner", default="eager", help="compiler of the rewritten graphs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/quality"))
    parser.add_argument("--from", type=Path, dest="earlier", metavar="TABLE", help="an earlier quality.csv.gz")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    given = parser.parse_args(arguments)

    torch.set_num_threads(given.threads)
    transformers_logging.disable_progress_bar()
    try:
        where = folders(given.weights)
        tasks = given.tasks or samples.learned([path / "scores.json" for path in where.values()], given.length)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    trained = Trained(where)
    questions = {
        seed: samples.make(trained.tokenizer, tasks, given.length, given.count, seed) for seed in trained.seeds
    }
    shared = {
        "weights": trained.fingerprints,
        "tasks": tasks,
        "length": given.length,
        "count": given.count,
        "inner": given.inner,
    }
    found: dict[str, list[Record]] = {}
    for name in given.parts:
        part = PARTS[name]
        plan = Plan(part.settings, part.protocols, questions, {"inner": given.inner, **part.options}, batch=given.batch)
        found[name] = _answered(part, plan, trained, given.out / name, shared)
    facts = {"trainings": len(where), "batch": given.batch, **_told(shared)}
    if given.earlier:
        try:
            taken = {name: some for name, some in earlier.read(given.earlier).items() if name not in found}
            now = [record for records in found.values() for record in records]
            earlier.check_questions(taken.get(MAIN.name, []), now)
        except (OSError, ValueError) as error:
            parser.error(f"--from: {error}")
        facts["parts of an earlier run"] = " ".join(taken)
        found = {name: both[name] for name in PARTS if name in (both := taken | found)}
    write({**facts, **describe()}, found, given.results)


def _answered(part: Part, plan: Plan, trained: Trained, out: Path, shared: Mapping[str, Any]) -> list[Record]:
    """Return all answers of a part, those of before and those that were missing."""
    told = {**shared, "settings": [s.label for s in part.settings], "options": dict(part.options)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Records(out, told) as records,
        Progress(*columns, TimeRemainingColumn(), speed_estimate_period=600) as progress,
    ):
        bar = progress.add_task(part.name, total=plan.size, completed=len(records.done))

        def tell(setting: str) -> None:
            progress.update(bar, description=f"{part.name}: {setting}", completed=len(records.done))

        run(plan, trained.network, trained.tokenizer, torch.device("cpu"), records, tell, trained.enter)
        return list(records.done.values())


def _told(shared: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in shared.items() if name != "weights"}
    return {**told, "tasks": " ".join(shared["tasks"])}


if __name__ == "__main__":
    main()
