"""One question about one context: what every benchmark yields and the runner answers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Meta", "Sample"]

Meta = tuple[tuple[str, int | float | str], ...]
"""What plots need to know about a sample, as pairs, so that a sample stays hashable."""


@dataclass(frozen=True, slots=True)
class Sample:
    r"""A context, a question about it, and the answers that count as right.

    Attributes:
        task: Data set or task, as ``"qasper"``, ``"niah_single_1"`` or ``"needle"``.
        index: Number within the task and seed, from 0.
        context: What the question-agnostic protocol compresses, without a chat template.
        question: What follows the context.
        answer_prefix: What the assistant's turn starts with, or ``""``.
        answers: References.
        metric: A name in :data:`adakv_compile.evaluation.metrics.METRICS`.
        max_new_tokens: Most tokens to generate.
        classes: All classes of a classification.
        chat: Whether the model's chat template applies, where it has one.
        meta: Length, depth and whatever else a plot needs.
        joined: The prompt of the question-aware protocol where it isn't context + question; else ``""``.
        stop: The answer ends at the token that ends one of these texts, ``"\n"`` for one line, but has at least one
            token; may be empty.
    """

    task: str
    index: int
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    classes: tuple[str, ...] = ()
    chat: bool = True
    meta: Meta = ()
    joined: str = ""
    stop: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, int | float | str]:
        """``meta`` as a dictionary."""
        return dict(self.meta)
