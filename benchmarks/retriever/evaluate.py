"""Exact match with the full cache: ``python -m benchmarks.retriever.evaluate``.

Answers are decoded greedily and freely: nothing of the true answer is shown to
the model, not even between the questions of one document.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from benchmarks.retriever import corpus, model
from benchmarks.retriever import vocabulary as vocab

__all__ = ["Score", "greedy", "main", "score"]


@dataclass(frozen=True, slots=True)
class Score:
    """Exact match of one task at one length.

    Attributes:
        task: Name of the task.
        length: Tokens per document.
        right: Questions answered exactly, the closing word included.
        total: Questions asked.
    """

    task: str
    length: int
    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of the questions answered exactly."""
        return self.right / self.total

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.total)


@torch.no_grad()
def greedy(network: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Return the next ``count`` tokens; only the last is not in the cache.

    Args:
        network: The decoder.
        cache: Keys and values of everything before ``ids``; extended in place.
        ids: New tokens `[B, T]`.
        count: Tokens to decode.

    Returns:
        Decoded tokens `[B, count]`.
    """
    decoded = []
    for _ in range(count):
        logits = network(ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        decoded.append(ids)
    return torch.cat(decoded, dim=1)


def score(
    network: PreTrainedModel,
    task: corpus.RecallTask,
    length: int,
    *,
    documents: int,
    seed: int,
    rows: int = 4,
) -> Score:
    """Ask every question of generated documents in turn and count.

    Args:
        network: The decoder.
        task: What to generate; its values must all have the same length.
        length: Tokens per document, questions and answers included.
        documents: Number of documents.
        seed: Seed of the documents.
        rows: Documents per batch.

    Returns:
        The count over all questions of all documents.

    Raises:
        ValueError: If the values may differ in length.
    """
    low, high = task.value_words
    if low != high:
        message = f"task {task.name!r} must have values of one length, not {low}-{high}"
        raise ValueError(message)
    rng = np.random.default_rng(seed)
    right = total = 0
    while total < documents * task.questions:
        count = min(rows, documents - total // task.questions)
        batch = [corpus.recall_document(rng, length, task) for _ in range(count)]
        ids = torch.from_numpy(np.stack([d.ids for d in batch]))
        cache = DynamicCache(config=network.config)
        # Equal value lengths put the questions of all rows in the same place.
        pending = ids[:, : batch[0].questions[0].start]
        for i in range(task.questions):
            at = batch[0].questions[i].start
            prompt = torch.cat([pending, ids[:, at : at + 2]], dim=1)
            decoded = greedy(network, cache, prompt, high + 1)
            pending = decoded[:, -1:]
            for row, document in zip(decoded.tolist(), batch, strict=True):
                right += row == [*document.questions[i].answer, vocab.END]
            total += count
    return Score(task.name, length, right, total)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score a checkpoint and show the table.

    Args:
        arguments: Command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=model.CHECKPOINT)
    parser.add_argument("--lengths", type=int, nargs="+", default=[model.MAX_LENGTH])
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the scores")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    network = model.load(options.checkpoint)
    table = Table("task", "length", "facts", "questions", "right", "exact match")
    scores = []
    for length in options.lengths:
        for task in corpus.TASKS:
            result = score(network, task, length, documents=options.documents, seed=options.seed)
            scores.append(result)
            table.add_row(
                task.name,
                str(length),
                str(task.facts),
                str(task.questions),
                f"{result.right}/{result.total}",
                f"{result.accuracy:.3f} ± {result.error:.3f}",
            )
    Console().print(table)
    if options.out:
        rows = [{**asdict(s), "accuracy": s.accuracy} for s in scores]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
