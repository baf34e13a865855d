"""LongBench's 16 English and code data sets: their prompts, lengths, truncation and metrics.

The figures are those of THUDM/LongBench (pred.py, eval.py, config/), prompts and lengths its files as they are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adakv_compile.evaluation.sample import Sample

__all__ = ["DATASETS", "Dataset", "longest_prompt", "max_new_tokens", "samples", "template", "truncated"]

_FILES: Final = Path(__file__).parents[1] / "data" / "longbench"
_MOST: Final = 31_500
"""Tokens of the longest prompt that the paper gives any model."""
_STEP, _ROOM = 500, 512


@dataclass(frozen=True, slots=True)
class Dataset:
    """One data set.

    Attributes:
        rows: Rows of its test split.
        metric: A name in :data:`adakv_compile.evaluation.metrics.METRICS`.
        group: What the paper counts it among.
        chat: Whether the chat template applies: not where examples in the prompt show the form of the answer.
    """

    rows: int
    metric: str
    group: str
    chat: bool = True


DATASETS: Final[Mapping[str, Dataset]] = {
    "narrativeqa": Dataset(200, "qa_f1", "single-document QA"),
    "qasper": Dataset(200, "qa_f1", "single-document QA"),
    "multifieldqa_en": Dataset(150, "qa_f1", "single-document QA"),
    "hotpotqa": Dataset(200, "qa_f1", "multi-document QA"),
    "2wikimqa": Dataset(200, "qa_f1", "multi-document QA"),
    "musique": Dataset(200, "qa_f1", "multi-document QA"),
    "gov_report": Dataset(200, "rouge_l", "summarisation"),
    "qmsum": Dataset(200, "rouge_l", "summarisation"),
    "multi_news": Dataset(200, "rouge_l", "summarisation"),
    "trec": Dataset(200, "classification_first_line", "few-shot", chat=False),
    "triviaqa": Dataset(200, "qa_f1_first_line", "few-shot", chat=False),
    "samsum": Dataset(200, "rouge_l_first_line", "few-shot", chat=False),
    "passage_count": Dataset(200, "count", "synthetic"),
    "passage_retrieval_en": Dataset(200, "retrieval", "synthetic"),
    "lcc": Dataset(500, "code_similarity", "code", chat=False),
    "repobench-p": Dataset(500, "code_similarity", "code", chat=False),
}
"""The data sets in the order of the paper's tables."""


@functools.cache
def _table(name: str) -> Mapping[str, Any]:
    return json.loads((_FILES / f"dataset2{name}.json").read_text(encoding="utf-8"))


def template(dataset: str) -> str:
    """Return the prompt of a data set, with ``{context}`` and most often ``{input}`` in it."""
    return _table("prompt")[dataset]


def max_new_tokens(dataset: str) -> int:
    """Return the longest answer in tokens."""
    return _table("maxlen")[dataset]


def longest_prompt(positions: int | None) -> int:
    """Return the most tokens of a prompt that a model is given.

    As in the original configurations: 3,500 of 4,096 positions, 7,500 of 8,192, never above 31,500.

    Args:
        positions: The model's, or None if they aren't bounded.
    """
    if positions is None:
        return _MOST
    return max(1, min(_MOST, (positions - _ROOM) // _STEP * _STEP if positions > 2 * _ROOM else positions // 2))


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def truncated(tokenizer: Any, text: str, most: int) -> str:
    """Return a text of which the middle was cut out, if it has more than ``most`` tokens.

    The first and the last ``most // 2`` tokens, special ones of the tokenizer counted, are decoded and joined, so that
    the result may have some tokens more or fewer when it is read again.
    """
    ids, half = _ids(tokenizer, text), most // 2
    if len(ids) <= most:
        return text
    # Not ids[-half:], which is everything if half is 0.
    parts = ids[:half], ids[len(ids) - half :]
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)


def _split(tokenizer: Any, before: str, question: str, most: int) -> str:
    """Return the part before the question, cut in its middle at the same tokens as the whole prompt would be.

    The question stays whole: in the question-agnostic protocol it isn't part of what is compressed.
    """
    asked, half = len(_ids(tokenizer, question, special=False)), most // 2
    ids = _ids(tokenizer, before)
    if len(ids) + asked <= most:
        return before
    last = max(0, half - asked)
    parts = ids[:half], ids[len(ids) - last :]
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)


def samples(
    dataset: str, rows: Sequence[Mapping[str, Any]], tokenizer: Any, most: int, task: str | None = None
) -> Iterator[Sample]:
    """Yield a sample for every row.

    Args:
        dataset: A name in :data:`DATASETS`.
        rows: Rows with ``context``, ``input``, ``answers`` and ``all_classes``.
        tokenizer: The model's tokenizer, by which prompts are cut.
        most: Longest prompt in tokens, the chat template not counted.
        task: What to call it, if not ``dataset``.
    """
    facts = DATASETS[dataset]
    head, tail = template(dataset).split("{context}")
    for index, row in enumerate(rows):
        question = tail.replace("{input}", row["input"])
        before = head + row["context"]
        yield Sample(
            task=task or dataset,
            index=index,
            context=_split(tokenizer, before, question, most),
            question=question,
            answer_prefix="",
            answers=tuple(row["answers"]),
            metric=facts.metric,
            max_new_tokens=max_new_tokens(dataset),
            classes=tuple(row.get("all_classes") or ()),
            chat=facts.chat,
            meta=(("words", int(row.get("length") or len(row["context"].split()))),),
            joined=truncated(tokenizer, before + question, most),
            # A summary is one line, and LongBench ends it there, but never before its first token.
            stop=("\n",) if dataset == "samsum" else (),
        )
