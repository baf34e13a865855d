"""This backend beside what a user would pick instead: ``python -m benchmarks.peers``.

The same model, prompts and budgets, in one run: NVIDIA's kvpress in a virtual environment of its own, which the first
run makes, and the caches of transformers. Results are written line by line; a peer that fails is part of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from adakv_compile.evaluation.errors import EvaluationError
from benchmarks.machine import describe
from benchmarks.peers import worker
from benchmarks.peers.client import RefusedError, Worker, WorkerError
from benchmarks.peers.contestants import Sides
from benchmarks.peers.environment import PeersMissingError, default_folder, prepare
from benchmarks.peers.ours import Ours
from benchmarks.peers.report import markdown
from benchmarks.peers.run import Comparison, Plan
from benchmarks.quality.models import folders
from benchmarks.quality.samples import make
from benchmarks.retriever import model
from benchmarks.theory.prompts import Prompt, make_prompts, of_sample

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and write ``peers.jsonl`` and ``peers.md``.

    Args:
        arguments: Command line; the process's own when None.

    Returns:
        0, or 1 if the peers could not be installed or started: the results then hold this side only.
    """
    parser = _parser()
    typed = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(typed)
    torch.set_num_threads(given.threads)
    transformers_logging.disable_progress_bar()
    try:
        checkpoint, tasks, prompts = _asked(given)
    except (EvaluationError, ValueError) as error:
        parser.error(str(error))
    console = Console(stderr=True)
    with console.status("the peers' environment; the first time, this takes minutes"):
        start, missing = _peers(given.environment, Path(tempfile.gettempdir()) / "adakv-peers.log", given.timeout)
    if start is None:
        console.print(missing["kvpress"], highlight=False)
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    plan = Plan(prompts, given.windows, given.budgets, given.kernel_size, given.rounds)
    options = {"pool": "avg", "alpha": 0.2, "safeguard": "hard", "inner": given.inner, "strict": True}
    sides = Sides(Ours(checkpoint, options), start, checkpoint, given.threads)
    path = given.out / "peers.jsonl"
    # Before the results are begun, which make the tree another than the commit's.
    here = {**describe(), "load": round(os.getloadavg()[0], 1)}
    with console.status("") as status:
        comparison = Comparison(plan, sides, network, path, status.update)
        try:
            versions = sides.ask_peer("hello")["versions"]
        except (WorkerError, RefusedError) as error:
            versions = f"not there ({error})"
        comparison.write(
            "run",
            command=shlex.join(["python", "-m", "benchmarks.peers", *typed]),
            model=checkpoint.name if given.testbed is None else f"test bed, training {given.testbed}",
            documents=len(prompts),
            tasks=tasks,
            length=given.length,
            seed=given.seed,
            ours=options,
            here=here,
            peers=versions,
        )
        for name, why in missing.items():
            comparison.write("failed", name=name, what="installation", why=why)
        try:
            comparison.run()
        finally:
            sides.close()
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            (given.out / "peers.md").write_text(markdown(rows))
    return 1 if start is None else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--environment", type=Path, default=default_folder(), help="the peers' virtual environment")
    parser.add_argument("--checkpoint", type=Path, default=model.CHECKPOINT, help="folder with the retriever's weights")
    parser.add_argument(
        "--testbed", type=int, metavar="SEED", help="a training of the test bed in place of the retriever"
    )
    parser.add_argument(
        "--tasks", nargs="+", help="tasks with one answer for a key [default: few many, or three of RULER]"
    )
    parser.add_argument("--documents", type=int, default=20, help="documents of each task")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a document with its question and answer")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 8], help="64 is the default of kvpress")
    parser.add_argument("--kernel-size", type=int, default=5, help="width of the average pooling")
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="compiler of this backend")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of the timing")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds in which the peers must answer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    return parser


def _asked(given: argparse.Namespace) -> tuple[Path, Sequence[str], list[Prompt]]:
    """Return the model's folder, the names of the tasks and the prompts.

    Raises:
        EvaluationError: A task of RULER is unknown.
        ValueError: A training, or a task of the retriever, is unknown, or a task has no single answer for a key.
    """
    if given.testbed is None:
        tasks = given.tasks or ["few", "many"]
        return given.checkpoint, tasks, make_prompts(tasks, given.length, given.documents, given.seed)
    trained = folders()
    if given.testbed not in trained:
        raise ValueError(f"no training {given.testbed} of the test bed; there are {', '.join(map(str, trained))}")
    tasks = given.tasks or ["niah_single_2", "niah_multikey_1", "niah_multiquery"]
    tokenizer = AutoTokenizer.from_pretrained(trained[given.testbed])
    samples = make(tokenizer, tasks, given.length, given.documents, given.seed)
    return trained[given.testbed], tasks, [of_sample(sample, tokenizer) for sample in samples]


def _peers(folder: Path, log: Path, timeout: float) -> tuple[Callable[[], Worker] | None, dict[str, Any]]:
    """Return what starts a worker, None if there is no environment, and what could not be installed."""
    try:
        environment = prepare(folder)
    except PeersMissingError as error:
        return None, {"kvpress": str(error)}
    # -I: the worker's folder and this project stay out of its path.
    command = [str(environment.python), "-I", worker.__file__]
    return functools.partial(Worker, command, log, timeout), dict(environment.missing)


if __name__ == "__main__":
    raise SystemExit(main())
