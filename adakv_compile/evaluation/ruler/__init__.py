"""RULER: thirteen synthetic tasks at any length (Hsieh et al. 2024, arXiv:2404.06654).

Eleven tasks are made here from a seed, under the tokenizer of the model that will read them; the two of questions about
documents need SQuAD and HotpotQA. Texts, word lists and haystacks are our own, written from the protocol, so scores are
comparable with each other and not with published ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.ruler import counting, documents, niah, tracing
from adakv_compile.evaluation.ruler.fit import fit, prompt_tokens
from adakv_compile.evaluation.sample import Sample

__all__ = ["GENERATED", "TASKS", "samples"]

GENERATED: Final[tuple[str, ...]] = (*niah.SPECS, "vt", "cwe", "fwe")
"""Tasks that need nothing but a seed."""

TASKS: Final[tuple[str, ...]] = (*GENERATED, *documents.SOURCES)
"""All tasks, those that need a data set at the end."""

Build = Callable[[int], Sample]


def _prepare(task: str, index: int, length: int, seed: int) -> tuple[Build, int]:
    """Return what makes a sample of a number of units, and the fewest units."""
    # A text as the seed: it goes through a hash, so neighbouring seeds and indices have nothing in common.
    rng = random.Random(f"{task}/{seed}/{index}")
    if task in niah.SPECS:
        return niah.build(task, index, niah.SPECS[task], rng), 1
    if task == "vt":
        return tracing.build(index, rng), 1
    if task == "cwe":
        return counting.common_words(index, rng, length=length), 10
    if task == "fwe":
        return counting.frequent_words(index, rng), counting.LEAST_CODED
    return documents.build(task, index, rng), 0


def samples(task: str, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Sample]:
    """Yield samples of a task, each as long as ``length`` allows.

    Args:
        task: A name in `TASKS`.
        tokenizer: The model's tokenizer.
        length: Most tokens of a prompt and its answer together.
        count: Number of samples.
        seed: The same seed, task and index give the same sample under the same tokenizer, whatever ``count`` is.

    Yields:
        Samples in order; ``meta`` holds the length asked for and the tokens of the prompt.

    Raises:
        EvaluationError: If the task is unknown, the length is too short for it, or a data set isn't at hand.
    """
    if task not in TASKS:
        raise EvaluationError(f"unknown RULER task {task!r}; choose from {', '.join(TASKS)}")
    for index in range(count):
        build, least = _prepare(task, index, length, seed)
        sample = fit(tokenizer, length, build, least=least)
        meta = (("length", length), ("tokens", prompt_tokens(tokenizer, sample)), ("seed", seed), *sample.meta)
        yield replace(sample, meta=meta)
