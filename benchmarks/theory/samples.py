"""The loss, the bound and the mass of one prompt, for every layer, budget and allocation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.theory.allocation import ALLOCATIONS, Observed, kept_scores, oracle, window_scores
from benchmarks.theory.dense import DenseLayer, attend
from benchmarks.theory.loss import Measured, measure, project
from benchmarks.theory.prompts import Prompt

__all__ = ["CASES", "Sample", "Settings", "of_layer", "of_prompt"]

CASES: Final = {
    "oracle, last query": "the last query's own weights decide, and the loss is that of this query: the theorem's case",
    "window, last query": "the observation window decides, the loss is that of its last query",
    "window, answer": "the observation window decides, the loss is the mean over the queries that write the answer",
}
"""Who decides what is kept and where the loss is measured."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the prompts are measured with.

    Attributes:
        budgets: Entries per KV head on average, window included; those that don't exceed the window are left out.
        window: Observation window in tokens.
        kernel_size: Width of the max-pooling of the window's scores.
    """

    budgets: tuple[int, ...]
    window: int
    kernel_size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One layer of one prompt, under one allocation.

    Attributes:
        case: One of :data:`CASES`.
        layer: The layer.
        budget: Entries per KV head on average.
        allocation: One of :data:`~benchmarks.theory.allocation.ALLOCATIONS`.
        loss: L1 norm of what eviction changes in the attention output, over the L1 norm of that output.
        bound: The paper's bound, over the same.
        mass: Attention mass that is kept, mean over the query heads.
        scores: Sum of the pooled scores that are kept outside the window.
    """

    case: str
    layer: int
    budget: int
    allocation: str
    loss: float
    bound: float
    mass: float
    scores: float


def of_prompt(network: Any, prompt: Prompt, settings: Settings) -> Iterator[Sample]:
    """Yield the samples of a prompt whose question was in the text when entries were evicted.

    Args:
        network: Decoder of the Llama type with eager attention.
        prompt: The prompt; its true answer is read, word by word, after it.
        settings: Budgets and scores.
    """
    answer = prompt.answer[:-1]  # the closing word is written, not read
    layers = attend(network, prompt.aware + answer, settings.window + len(answer))
    for number, layer in enumerate(layers):
        yield from of_layer(layer, number, len(answer), settings)


def of_layer(layer: DenseLayer, number: int, answer: int, settings: Settings) -> Iterator[Sample]:
    """Yield the samples of one layer.

    Args:
        layer: Its attention on a prompt and, as the last queries, its answer.
        number: Which layer it is.
        answer: Words of the answer.
        settings: Budgets and scores.
    """
    heads, length = layer.values.shape[:2]
    end = length - answer
    projected = project(layer.values, layer.output)
    window = layer.weights[:, -answer - settings.window : -answer, :end]
    queries = {"last query": range(-answer - 1, -answer), "answer": range(-answer, 0)}
    observed = {"oracle": oracle(window[:, -1], heads), "window": window_scores(window, heads, settings.kernel_size)}
    for case in CASES:
        who, where = case.split(", ")
        for budget in settings.budgets:
            if budget <= observed[who].window:
                continue
            for allocation, alpha in ALLOCATIONS.items():
                keep = observed[who].keep(budget, alpha)
                found = [_at(layer, projected, keep, query) for query in queries[where]]
                yield _sample((case, number, budget, allocation), observed[who], keep, found)


def _at(layer: DenseLayer, projected: Tensor, keep: Tensor, query: int) -> Measured:
    """Measure one query, counted from the end; what came after the eviction is all there."""
    visible = layer.weights.shape[-1] + query + 1
    later = torch.ones(keep.shape[0], visible - keep.shape[1], dtype=torch.bool)
    return measure(layer.weights[:, query, :visible], projected[:, :visible], torch.cat([keep, later], 1))


def _sample(key: tuple[str, int, int, str], observed: Observed, keep: Tensor, found: Sequence[Measured]) -> Sample:
    count = len(found)
    return Sample(
        *key,
        loss=sum(m.loss / m.norm for m in found) / count,
        bound=sum(m.bound / m.norm for m in found) / count,
        mass=sum(m.mass for m in found) / count,
        scores=kept_scores(observed, keep),
    )
