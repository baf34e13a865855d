"""Ada-KV's theory, measured: ``python -m benchmarks.theory``.

For every layer, budget and allocation, from the dense attention of a trained decoder: the L1 loss of the attention
output after eviction, the paper's bound on it, and the attention mass that is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from transformers.utils import logging as transformers_logging

from benchmarks.machine import describe
from benchmarks.retriever import model
from benchmarks.theory.prompts import make_prompts
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
    parser.add_argument("--tasks", nargs="+", default=["few", "many"], help="the retriever's tasks with one question")
    parser.add_argument("--documents", type=int, default=40, help="documents of each task")
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
    try:
        prompts = make_prompts(given.tasks, given.length, given.documents, given.seed)
    except ValueError as error:
        parser.error(str(error))
    network = model.load(given.checkpoint)
    network.set_attn_implementation("eager")
    samples: list[Sample] = []
    for prompt in track(prompts, "dense attention"):
        samples += of_prompt(network, prompt, settings)
    facts = {
        "model": given.checkpoint.name,
        "tasks": " and ".join(given.tasks),
        "documents": len(prompts),
        "length": given.length,
        "window": given.window,
        "max-pool": given.kernel_size,
        "seed": given.seed,
        **describe(),
    }
    write(facts, summarise(samples), given.out)


if __name__ == "__main__":
    main()
