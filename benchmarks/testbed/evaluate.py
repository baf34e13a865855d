"""What the test bed answers with the full cache: ``python -m benchmarks.testbed.evaluate --model FOLDER``.

The samples are the evaluation's own, of seeds that training doesn't use. Heads are told apart by the entropy of the
attention that the last tokens of a prompt pay to it, which is what a method looks at when it shares entries out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakv_compile.evaluation import needle, prompts, ruler
from adakv_compile.evaluation.answer import Answerer
from adakv_compile.evaluation.metrics import METRICS
from adakv_compile.evaluation.sample import Sample
from benchmarks.testbed import model

__all__ = ["Score", "entropies", "main", "score"]

_SEED: Final = 99
_DEPTHS: Final = (0, 25, 50, 75, 100)
_WINDOW: Final = 32
_BATCH: Final = 10


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one task at one length.

    Attributes:
        task: Name of the task.
        length: Tokens of prompt and answer.
        mean: Mean score, in [0, 1].
        error: Standard error of the mean.
        count: Samples.
    """

    task: str
    length: int
    mean: float
    error: float
    count: int


def score(network: Any, tokenizer: Any, task: str, length: int, samples: Iterable[Sample]) -> Score:
    """Score the answers to all samples.

    Args:
        network: The decoder.
        tokenizer: Its tokenizer.
        task: Name for the table.
        length: Length for the table.
        samples: What to answer; at least one.

    Returns:
        Mean and standard error.
    """
    answerer = Answerer(network, tokenizer, torch.device("cpu"))
    scores: list[float] = []
    rest = list(samples)
    while rest:
        together, rest = rest[:_BATCH], rest[_BATCH:]
        read = [prompts.build(sample, tokenizer, "question-aware") for sample in together]
        answers = answerer.answer(read, together[0].max_new_tokens, together[0].stop)
        for sample, found in zip(together, answers, strict=True):
            told = tokenizer.decode(found.tokens, skip_special_tokens=True)
            scores.append(METRICS[sample.metric](told, sample.answers, sample.classes))
    mean = sum(scores) / len(scores)
    spread = sum((value - mean) ** 2 for value in scores) / max(1, len(scores) - 1)
    return Score(task, length, mean, math.sqrt(spread / len(scores)), len(scores))


@torch.no_grad()
def entropies(network: Any, tokenizer: Any, samples: Iterable[Sample]) -> torch.Tensor:
    """Return the entropy of every query head's attention, averaged over the last tokens of each prompt.

    Args:
        network: The decoder, with an attention that returns its weights (``attn_implementation="eager"``).
        tokenizer: Its tokenizer.
        samples: Prompts.

    Returns:
        Entropies in nats `[layers, query heads]`.
    """
    found: list[torch.Tensor] = []
    for sample in samples:
        ids = torch.tensor([prompts.build(sample, tokenizer, "question-aware").compressed])
        weights = network(ids, output_attentions=True, use_cache=False).attentions
        rows = torch.stack([layer[0, :, -_WINDOW:].double() for layer in weights])
        found.append(torch.special.entr(rows).sum(-1).mean(-1))
    return torch.stack(found).mean(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate from the command line.

    Args:
        arguments: Command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model.WEIGHTS / "0")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--count", type=int, default=20, help="samples of a task, and of each depth of the needle")
    parser.add_argument("--tasks", nargs="+", default=["needle", *ruler.GENERATED])
    parser.add_argument("--json", type=Path, help="write the scores here")
    options = parser.parse_args(arguments)

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    network: Any = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="eager").eval()
    table = Table("task", "length", "score", "samples")
    scores: list[Score] = []
    for task in options.tasks:
        for length in options.lengths:
            if task == "needle":
                samples = needle.samples(tokenizer, [length], _DEPTHS, options.count, _SEED)
            else:
                samples = ruler.samples(task, tokenizer, length, options.count, _SEED)
            one = score(network, tokenizer, task, length, samples)
            scores.append(one)
            table.add_row(task, str(length), f"{one.mean:.3f} ± {one.error:.3f}", str(one.count))
    heads = Table("layer", *(f"head {head}" for head in range(network.config.num_attention_heads)))
    prompts_of = needle.samples(tokenizer, [max(options.lengths)], _DEPTHS, 1, _SEED, "multi-key")
    found = entropies(network, tokenizer, prompts_of)
    for layer, row in enumerate(found.tolist()):
        heads.add_row(str(layer), *(f"{value:.2f}" for value in row))
    console = Console()
    console.print(table)
    console.print(heads)
    if options.json:
        records = [{slot: getattr(one, slot) for slot in one.__slots__} for one in scores]
        options.json.write_text(json.dumps({"scores": records, "entropies": found.tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
