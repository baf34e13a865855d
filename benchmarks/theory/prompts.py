"""Generated documents, each with one question about it and the answer; every token comes from a seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from adakv_compile.evaluation.prompts import build
from adakv_compile.evaluation.sample import Sample
from benchmarks.retriever import corpus
from benchmarks.retriever import vocabulary as vocab

__all__ = ["Prompt", "make_prompts", "of_sample"]

_TASKS: Final = {task.name: task for task in corpus.TASKS}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A document, a question about it and the true answer, as token ids.

    Attributes:
        task: Name of the task.
        document: The document.
        question: The question; of the retriever two words: that it is one, and the name that is asked for.
        answer: The value and its closing word.
    """

    task: str
    document: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def aware(self) -> tuple[int, ...]:
        """The prompt of who knows the question while the document is read."""
        return self.document + self.question


def make_prompts(tasks: Sequence[str], length: int, count: int, seed: int) -> list[Prompt]:
    """Return ``count`` prompts of every task.

    Args:
        tasks: Names of tasks of the retriever that ask one question.
        length: Tokens of a prompt with its answer.
        count: Documents of each task.
        seed: Seed; a document depends on it, on its task and on its number, not on how many there are.

    Raises:
        ValueError: A task is unknown or asks several questions.
    """
    prompts: list[Prompt] = []
    for name in tasks:
        task = _TASKS.get(name)
        if task is None or task.questions != 1:
            known = ", ".join(task.name for task in corpus.TASKS if task.questions == 1)
            raise ValueError(f"no task {name!r} with a single question; there are {known}")
        for number in range(count):
            rng = np.random.default_rng([seed, list(_TASKS).index(name), number])
            text = corpus.recall_document(rng, length, task)
            ids, (question,) = tuple(text.ids.tolist()), text.questions
            ask = question.start + 2
            answer = (*question.answer, vocab.END)
            prompts.append(Prompt(name, ids[: question.start], ids[question.start : ask], answer))
    return prompts


def of_sample(sample: Sample, tokenizer: Any) -> Prompt:
    """Return a sample of a retrieval task with the answer that the test bed was taught: ``KEY is: VALUE.`` for each.

    Args:
        sample: As `benchmarks.quality.samples.make` yields it.
        tokenizer: The test bed's.

    Raises:
        ValueError: The question doesn't ask for keys, or for one key with several values.
    """
    asked = re.search(r" for (.+) mentioned in ", sample.question)
    keys = re.findall(r"[a-z]+-[a-z]+", asked[1]) if asked else []
    if len(keys) != len(sample.answers):
        raise ValueError(f"{sample.task!r} asks for {len(keys)} keys and has {len(sample.answers)} answers")
    told = " ".join(f"{key} is: {value}." for key, value in zip(keys, sample.answers, strict=True))
    prompt = build(sample, tokenizer, "question-agnostic")
    answer = tokenizer(told, add_special_tokens=False).input_ids
    return Prompt(sample.task, prompt.compressed, prompt.question, (*answer, tokenizer.eos_token_id))
