"""Questions about documents: the paragraph with the answer lies among others of the same data set.

SQuAD 2.0 and HotpotQA are CC BY-SA 4.0 and not part of this package: they are read through ``datasets``.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from adakv_compile.evaluation.errors import EvaluationError, need
from adakv_compile.evaluation.sample import Sample

__all__ = ["SOURCES", "Question", "Source", "build", "hotpot", "squad"]

_MAX_NEW_TOKENS: Final = 32

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A question, what answers it, and the paragraphs that hold the answer.

    Attributes:
        text: The question.
        answers: References, any of which will do.
        gold: Paragraphs that are needed.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a task's rows come from.

    Attributes:
        path: Name of the data set.
        name: Its configuration, or None.
        read: Makes questions and the pool of all paragraphs of its rows.
    """

    path: str
    name: str | None
    read: Callable[[Iterable[Row]], tuple[list[Question], list[str]]]


def squad(rows: Iterable[Row]) -> tuple[list[Question], list[str]]:
    """Read SQuAD 2.0; questions without an answer only give their paragraph.

    Args:
        rows: Rows of the validation split.

    Returns:
        Questions, and every paragraph once.
    """
    questions: list[Question] = []
    pool: dict[str, None] = {}
    for row in rows:
        pool[row["context"]] = None
        if answers := tuple(dict.fromkeys(row["answers"]["text"])):
            questions.append(Question(row["question"], answers, (row["context"],)))
    return questions, list(pool)


def hotpot(rows: Iterable[Row]) -> tuple[list[Question], list[str]]:
    """Read HotpotQA with distractors.

    Args:
        rows: Rows of the validation split.

    Returns:
        Questions, and every paragraph once, its title in front.
    """
    questions: list[Question] = []
    pool: dict[str, None] = {}
    for row in rows:
        given = row["context"]
        texts = {t: f"{t}\n{''.join(s)}" for t, s in zip(given["title"], given["sentences"], strict=True)}
        pool |= dict.fromkeys(texts.values())
        titles = dict.fromkeys(row["supporting_facts"]["title"])
        gold = tuple(texts[title] for title in titles if title in texts)
        questions.append(Question(row["question"], (row["answer"],), gold))
    return questions, list(pool)


SOURCES: Final[dict[str, Source]] = {
    "qa_1": Source("rajpurkar/squad_v2", None, squad),
    "qa_2": Source("hotpotqa/hotpot_qa", "distractor", hotpot),
}


@cache
def _load(task: str) -> tuple[list[Question], list[str]]:
    """Return a task's questions and paragraphs; read once in a process, as reading takes seconds."""
    source = SOURCES[task]
    wanted = repr(source.path) + (f", {source.name!r}" if source.name else "")
    hint = f"""fetch it where there is a network: python -c "import datasets; datasets.load_dataset({wanted})\""""
    need("datasets")
    datasets: Any = importlib.import_module("datasets")
    try:
        rows = datasets.load_dataset(source.path, source.name, split="validation")
    except (OSError, ValueError) as error:
        # Without a network `datasets` raises ConnectionError, an OSError, or ValueError for what isn't cached.
        message = f"{task} reads {source.path}, which is not here ({type(error).__name__}); {hint}"
        raise EvaluationError(message) from error
    return source.read(rows)


def build(task: str, index: int, rng: random.Random) -> Callable[[int], Sample]:
    """Prepare a sample: question and order of the other paragraphs are drawn.

    Args:
        task: ``qa_1`` or ``qa_2``.
        index: Number of the sample.
        rng: Source of randomness.

    Returns:
        A function from the number of other paragraphs to the sample; as many as there are is the most.

    Raises:
        EvaluationError: If the data set isn't at hand.
    """
    questions, pool = _load(task)
    asked = rng.choice(questions)
    others = [paragraph for paragraph in rng.sample(pool, len(pool)) if paragraph not in asked.gold]
    state = rng.getrandbits(64)

    def sample(count: int) -> Sample:
        # Paragraphs come again, as a data set's are limited and a length isn't.
        chosen = [*asked.gold, *(others[i % len(others)] for i in range(count))]
        random.Random(state).shuffle(chosen)
        body = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(chosen, 1))
        instruction = "Answer the question from the given documents. Give only the answer and no other words."
        return Sample(
            task=task,
            index=index,
            context=f"{instruction}\n\nThese are the documents.\n\n{body}\n\n",
            question=f"{instruction}\n\nQuestion: {asked.text}",
            answer_prefix=" Answer:",
            answers=asked.answers,
            metric="string_match_part",
            max_new_tokens=_MAX_NEW_TOKENS,
            meta=(("units", count),),
        )

    return sample
