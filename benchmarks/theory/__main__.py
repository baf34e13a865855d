"""Ada-KV's theory, measured: ``python -m benchmarks.theory``.

For every layer, budget and allocation, from the dense attention of a trained decoder: the L1 loss of the attention
output after eviction, the paper's bound on it, and the attention mass that is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers.utils import logging as transformers_logging

from adakv_compile.evaluation.errors import EvaluationError
from benchmarks.machine import describe
from benchmarks.quality.models import Trained, folders
from benchmarks.quality.samples import make
from benchmarks.retriever import model
from benchmarks.theory.prompts import Prompt, make_prompts, of_sample
from benchmarks.theory.report import write
from benchmarks.theory.samples import Sample, Settings, of_prompt
from benchmarks.theory.summary import summarise

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results.

    Args:
        arguments: Command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=model.CHECKPOINT, help="folder with the retriever's weights")
    parser.add_argument(
        "--testbed", action="store_true", help="all trainings of the test bed in place of the retriever"
    )
    parser.add_argument(
        "--tasks", nargs="+", help="tasks with one answer for a key [default: few many, or two of RULER]"
    )
    parser.add_argument("--documents", type=int, default=40, help="documents of each task, and of each training")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a document with its question and answer")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--window", type=int, default=8, help="observation window in tokens")
    parser.add_argument("--kernel-size", type=int, default=7, help="width of the max-pooling")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    given = parser.parse_args(arguments)

    torch.set_num_threads(given.threads)
    transformers_logging.disable_progress_bar()
    settings = Settings(tuple(given.budgets), given.window, given.kernel_size)
    tasks = given.tasks or (["niah_multikey_1", "niah_multiquery"] if given.testbed else ["few", "many"])
    try:
        decoders = _trained(given, tasks) if given.testbed else _retriever(given, tasks)
        samples: list[Sample] = []
        for name, network, prompts in decoders:
            network.set_attn_implementation("eager")
            for prompt in track(prompts, f"dense attention, {name}"):
                samples += of_prompt(network, prompt, settings)
    except (EvaluationError, ValueError) as error:
        parser.error(str(error))
    facts = {
        "model": "test bed, all trainings" if given.testbed else given.checkpoint.name,
        "tasks": " and ".join(tasks),
        "documents": given.documents,
        "length": given.length,
        "window": given.window,
        "max-pool": given.kernel_size,
        "seed": given.seed,
        **describe(),
    }
    write(facts, summarise(samples), given.out)


_Decoder = tuple[str, Any, Sequence[Prompt]]
"""Name, network, and what it reads."""


def _retriever(given: argparse.Namespace, tasks: Sequence[str]) -> Iterator[_Decoder]:
    prompts = make_prompts(tasks, given.length, given.documents, given.seed)
    yield given.checkpoint.name, model.load(given.checkpoint), prompts


def _trained(given: argparse.Namespace, tasks: Sequence[str]) -> Iterator[_Decoder]:
    trained = Trained(folders())
    for seed in trained.seeds:
        trained.enter(seed)
        found = make(trained.tokenizer, tasks, given.length, given.documents, seed)
        yield f"training {seed}", trained.network, [of_sample(sample, trained.tokenizer) for sample in found]


if __name__ == "__main__":
    main()
