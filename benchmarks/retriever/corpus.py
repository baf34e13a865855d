"""Generated documents with facts to recall; every token comes from a seed.

A document is filler text with facts ``key NAME value.. end`` spread through
it, followed by questions ``question NAME value.. end``. The answer is the
value of the named fact, so it can be scored exactly and it cannot be guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.retriever import vocabulary as vocab

__all__ = [
    "TASKS",
    "Document",
    "Question",
    "RecallTask",
    "copy_document",
    "filler",
    "recall_document",
    "training_batch",
]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: The successor table is part of the language the weights were trained on.
_SUCCESSORS: Final[Ids] = np.random.default_rng(1234).integers(0, vocab.FILLER.count, size=(vocab.FILLER.count, 4))
_SUCCESSOR_CUMULATIVE: Final = np.cumsum([0.55, 0.25, 0.12, 0.08])
_RESTART: Final = 0.08

#: Words around the value in a fact (key, name, end) and in a question.
_OVERHEAD: Final = 3


@dataclass(frozen=True, slots=True)
class RecallTask:
    """One kind of document: how many facts, how long, how many questions.

    Attributes:
        name: Name used in tables.
        facts: Facts in the document; capped by the room and by the names.
        value_words: Smallest and largest number of words of a value.
        questions: Questions at the end of the document.
    """

    name: str
    facts: int
    value_words: tuple[int, int]
    questions: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a document.

    Attributes:
        start: Index of the word ``question``; the name follows it.
        answer: Ids of the value, without the closing word.
    """

    start: int
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A document with its questions and their answers.

    Attributes:
        ids: Token ids `[T]`.
        answers: True on the answer tokens, the closing word included, `[T]`.
        questions: The questions in order; empty for copy documents.
    """

    ids: Ids
    answers: Mask
    questions: tuple[Question, ...]


#: Values have at least three words where one answer is scored: the first
#: generated token comes from the prefill, which still sees the whole cache.
TASKS: Final[tuple[RecallTask, ...]] = (
    RecallTask("single", facts=1, value_words=(3, 3), questions=1),
    RecallTask("few", facts=4, value_words=(3, 3), questions=1),
    RecallTask("many", facts=48, value_words=(3, 3), questions=1),
    RecallTask("few4", facts=4, value_words=(4, 4), questions=1),
    RecallTask("mq", facts=8, value_words=(3, 3), questions=4),
)


def filler(rng: np.random.Generator, count: int) -> Ids:
    """Return ``count`` words of a first-order Markov chain with restarts.

    A restart forgets the past, so the runs between restarts are independent
    and advance together: the loop is over the longest run, not over the text.

    Args:
        rng: Source of randomness.
        count: Number of words.

    Returns:
        Filler ids `[count]`.
    """
    restart = rng.random(count) < _RESTART
    if count:
        restart[0] = True
    state = rng.integers(0, vocab.FILLER.count, count)
    branch = np.minimum(np.searchsorted(_SUCCESSOR_CUMULATIVE, rng.random(count)), 3)
    index = np.arange(count)
    age = index - np.maximum.accumulate(np.where(restart, index, 0))
    current = np.flatnonzero(age == 1)
    while current.size:
        state[current] = _SUCCESSORS[state[current - 1], branch[current]]
        current = current[current < count - 1] + 1
        current = current[~restart[current]]
    return state + vocab.FILLER.start


def recall_document(rng: np.random.Generator, length: int, task: RecallTask) -> Document:
    """Return a document of exactly ``length`` tokens for ``task``.

    Args:
        rng: Source of randomness.
        length: Number of tokens, questions and answers included.
        task: What the document holds and asks.

    Returns:
        The document; its questions are at the end.

    Raises:
        ValueError: If not even one fact fits beside the questions.
    """
    low, high = task.value_words
    room = length - 1 - task.questions * (_OVERHEAD + high)
    count = min(task.facts, room // (_OVERHEAD + high), vocab.NAMES.count)
    if count < 1:
        message = f"{task.questions} questions leave no room for a fact in {length}"
        raise ValueError(message)

    names = rng.permutation(vocab.NAMES.count)[:count] + vocab.NAMES.start
    sizes = rng.integers(low, high + 1, count)
    values = [tuple((rng.integers(0, vocab.VALUES.count, n) + vocab.VALUES.start).tolist()) for n in sizes]
    if count >= task.questions:
        asked = rng.permutation(count)[: task.questions]
    else:
        asked = rng.integers(0, count, task.questions)

    tail = [[vocab.QUESTION, int(names[i]), *values[i], vocab.END] for i in asked]
    context = length - 1 - sum(map(len, tail))
    facts = [[vocab.KEY, int(n), *v, vocab.END] for n, v in zip(names, values, strict=True)]

    ids = np.empty(length, np.int64)
    ids[0] = vocab.BOS
    free = context - sum(map(len, facts))
    text = filler(rng, free)
    cuts = np.sort(rng.integers(0, free + 1, count)).tolist()
    at, used = 1, 0
    for fact, cut in zip(facts, cuts, strict=True):
        ids[at : at + cut - used] = text[used:cut]
        at += cut - used
        used = cut
        ids[at : at + len(fact)] = fact
        at += len(fact)
    ids[at : at + free - used] = text[used:]
    at += free - used

    answers = np.zeros(length, np.bool_)
    questions = []
    for i, words in zip(asked, tail, strict=True):
        ids[at : at + len(words)] = words
        answers[at + 2 : at + len(words)] = True
        questions.append(Question(start=at, answer=values[i]))
        at += len(words)
    return Document(ids=ids, answers=answers, questions=tuple(questions))


def copy_document(rng: np.random.Generator, length: int) -> Document:
    """Return random words repeated until ``length``: dense copy supervision.

    Args:
        rng: Source of randomness.
        length: Number of tokens.

    Returns:
        A document without questions; every repeated word is an answer.
    """
    pool = np.concatenate([r.ids for r in (vocab.NAMES, vocab.VALUES, vocab.FILLER)])
    half = (length - 1) // 2
    period = int(rng.integers(max(4, half // 4), half + 1))
    # Repeats inside a period are ambiguous, so they are avoided where possible.
    segment = rng.choice(pool, period, replace=period > len(pool) // 2)
    ids = np.concatenate([[vocab.BOS], np.resize(segment, length - 1)])
    answers = np.arange(length) > period + 1
    return Document(ids=ids, answers=answers, questions=())


def training_batch(rng: np.random.Generator, length: int, rows: int, *, copy_share: float) -> tuple[Ids, Mask]:
    """Return one training batch with every task in it over time.

    Args:
        rng: Source of randomness.
        length: Tokens per document.
        rows: Documents.
        copy_share: Share of copy documents.

    Returns:
        Token ids and the answer mask, both `[rows, length]`.
    """
    documents = []
    for _ in range(rows):
        if rng.random() < copy_share:
            documents.append(copy_document(rng, length))
            continue
        questions = int(rng.integers(1, max(3, min(24, length // 32)) + 1))
        low = int(rng.integers(1, 5))
        high = low if rng.random() < 0.5 else 4
        most = min(vocab.NAMES.count, (length - 1) // (_OVERHEAD + high) - questions)
        # Log-uniform: one fact and a hundred facts are equally worth learning.
        facts = round(math.exp(rng.uniform(0.0, math.log(max(1.0, most)))))
        task = RecallTask("train", max(1, facts), (low, high), questions)
        documents.append(recall_document(rng, length, task))
    return np.stack([d.ids for d in documents]), np.stack([d.answers for d in documents])
