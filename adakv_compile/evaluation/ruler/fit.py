"""The largest prompt that fits a length, under the tokenizer of the model that will read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adakv_compile.evaluation import prompts
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.sample import Sample

__all__ = ["fit", "prompt_tokens"]


def prompt_tokens(tokenizer: Any, sample: Sample) -> int:
    """Return how many tokens the prompt of a sample has, as the runner builds it: chat template and special tokens too.

    Args:
        tokenizer: The model's tokenizer.
        sample: The sample.

    Returns:
        Tokens of the question-aware prompt.
    """
    return prompts.build(sample, tokenizer, "question-aware").tokens


def fit(tokenizer: Any, length: int, build: Callable[[int], Sample], *, least: int = 1) -> Sample:
    """Return the sample with the most units of haystack that leaves room for its answer.

    Args:
        tokenizer: The model's tokenizer.
        length: Most tokens of prompt and answer together.
        build: Makes the sample with a number of units; more units must not make it shorter.
        least: Fewest units that make a sample.

    Returns:
        The longest sample with ``prompt + max_new_tokens <= length``.

    Raises:
        EvaluationError: If not even the shortest fits; the message says what length it needs.
    """

    def needed(sample: Sample) -> int:
        return prompt_tokens(tokenizer, sample) + sample.max_new_tokens

    best = build(least)
    shortest = needed(best)
    if shortest > length:
        raise EvaluationError(
            f"{best.task} doesn't fit {length} tokens: the shortest prompt and its answer need {shortest} under this "
            f"tokenizer; choose a length of at least {shortest}"
        )
    low, step = least, 8
    while needed(sample := build(low + step)) <= length:
        best, low, step = sample, low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        sample = build(middle)
        if needed(sample) <= length:
            best, low = sample, middle
        else:
            high = middle
    return best
