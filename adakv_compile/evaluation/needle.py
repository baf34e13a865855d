"""The needle in a haystack: one fact at every depth of texts of every length (Kamradt 2023, LLMTest_NeedleInAHaystack).

The original asks for a sentence about a city and lets a language model judge the answer. Here the fact is three words
that nothing but the text tells, so the answer is scored offline: all of the words together, or the share that was
found.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final, Literal, get_args

from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.haystack import essay
from adakv_compile.evaluation.ruler import niah
from adakv_compile.evaluation.ruler.fit import prompt_tokens
from adakv_compile.evaluation.sample import Sample

__all__ = ["KINDS", "METRICS", "Kind", "Metric", "samples"]

Kind = Literal["single", "multi-key", "multi-value", "multi-query"]
"""One fact; four of different keys, one of them asked for; four of one key; four of different keys, all asked for."""

KINDS: Final[tuple[str, ...]] = get_args(Kind)

Metric = Literal["string_match_all", "exact", "keyword_recall"]
"""The share of facts that the answer holds word by word; 1 for the facts and nothing else; the share of their words."""

METRICS: Final[tuple[str, ...]] = get_args(Metric)

_SEVERAL: Final = 4
_MAX_NEW_TOKENS: Final = 64
_SHAPES: Final[dict[str, tuple[int, int]]] = {
    "single": (1, 1),
    "multi-key": (_SEVERAL, 1),
    "multi-value": (1, _SEVERAL),
    "multi-query": (_SEVERAL, 1),
}


@dataclass(frozen=True, slots=True)
class _Cell:
    """A sample without its haystack.

    Attributes:
        sample: Everything but the text between introduction and question, which ``context`` holds alone.
        facts: Sentences to hide, in order.
        depths: Share of the tokens of the haystack before each, ascending.
        state: Seed of the haystack.
    """

    sample: Sample
    facts: tuple[str, ...]
    depths: tuple[float, ...]
    state: int


def _cell(kind: Kind, metric: Metric, index: int, depth: float, rng: random.Random) -> _Cell:
    keys, values = _SHAPES[kind]
    groups = niah.draw(rng, "words", "words", keys, values)
    needles = [needle for group in groups for needle in group]
    asked = groups[:1] if kind == "multi-key" else groups
    answers = tuple(needle.value for group in asked for needle in group)
    texts = niah.prompt("words", [group[0].key for group in asked], several=len(answers) > 1)
    # The first fact, which is always asked for, is at the depth; the others are spread evenly from there to the end.
    last = max(1, len(needles) - 1)
    depths = tuple(depth + (1 - depth) * i / last for i in range(len(needles)))
    sample = Sample(
        task="needle",
        index=index,
        context=texts.introduction,
        question=texts.question,
        answer_prefix=texts.answer_prefix,
        answers=answers if metric == "string_match_all" else (" ".join(answers),),
        metric=metric,
        max_new_tokens=_MAX_NEW_TOKENS,
    )
    return _Cell(sample, tuple(needle.sentence for needle in needles), depths, rng.getrandbits(64))


def _filled(cell: _Cell, sentences: Sequence[str], ends: Sequence[int], count: int) -> Sample:
    """Return the sample with the first ``count`` sentences of its haystack."""
    total = ends[count - 1] if count else 0
    # The end of a sentence at the depth or just before it, as the original moves back to a full stop.
    places = [bisect_right(ends, total * depth, 0, count) for depth in cell.depths]
    body: list[str] = []
    begin = 0
    for fact, place in zip(cell.facts, places, strict=True):
        body += [*sentences[begin:place], fact]
        begin = place
    body += sentences[begin:count]
    before = ends[places[0] - 1] if places[0] else 0
    found = round(100 * before / total, 2) if total else 0.0
    meta = (("units", count), ("depth_found", found))
    return replace(cell.sample, context=f"{cell.sample.context}{' '.join(body)}\n", meta=meta)


def _fit(cell: _Cell, tokenizer: Any, length: int) -> Sample:
    """Return the sample with as much haystack as leaves room for the answer."""

    def needed(sample: Sample) -> int:
        return prompt_tokens(tokenizer, sample) + sample.max_new_tokens

    shortest = needed(_filled(cell, [], [], 0))
    if shortest > length:
        raise EvaluationError(
            f"a needle doesn't fit {length} tokens: the shortest prompt and its answer need {shortest} under this "
            f"tokenizer; choose a length of at least {shortest}"
        )
    # No sentence of the haystack is shorter than four tokens under any tokenizer that doesn't merge words.
    sentences = essay(random.Random(cell.state), (length - shortest) // 4 + 1)
    ends = list(accumulate(len(tokenizer(f" {s}", add_special_tokens=False).input_ids) for s in sentences))
    # Sentence by sentence is only about what the whole text has, so the last ones are taken off one by one.
    count = bisect_right(ends, length - shortest)
    while needed(sample := _filled(cell, sentences, ends, count)) > length:
        count -= 1
    return sample


def samples(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int,
    kind: Kind = "single",
    metric: Metric = "string_match_all",
) -> Iterator[Sample]:
    """Yield ``count`` samples for every cell of the grid.

    Args:
        tokenizer: The model's tokenizer.
        lengths: Most tokens of a prompt and its answer together.
        depths: Per cent of the haystack's tokens before the first fact, which is put after a sentence there or before.
        count: Samples of a cell.
        seed: The same seed, cell and number give the same sample under the same tokenizer.
        kind: How many facts there are, and how many are asked for.
        metric: How answers are scored.

    Yields:
        Samples, lengths in the outer loop, depths in the inner. ``meta`` holds length and depth as asked for, the
        tokens of the prompt and the depth that was found.

    Raises:
        EvaluationError: If the kind or the metric is unknown, a depth isn't in [0, 100], or a length is too short.
    """
    if kind not in KINDS or metric not in METRICS:
        raise EvaluationError(
            f"a needle is one of {', '.join(KINDS)}, scored by {' or '.join(METRICS)}; not {kind!r}, {metric!r}"
        )
    if wrong := [depth for depth in depths if not 0 <= depth <= 100]:
        raise EvaluationError(f"depths are per cent, from 0 to 100; not {wrong[0]}")
    index = 0
    for length in lengths:
        for depth in depths:
            for number in range(count):
                rng = random.Random(f"needle/{kind}/{seed}/{length}/{depth}/{number}")
                sample = _fit(_cell(kind, metric, index, depth / 100, rng), tokenizer, length)
                tokens = prompt_tokens(tokenizer, sample)
                known = (("length", length), ("depth", depth), ("tokens", tokens), ("kind", kind), ("seed", seed))
                yield replace(sample, meta=(*known, *sample.meta))
                index += 1
