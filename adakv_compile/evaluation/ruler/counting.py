"""Common and frequent words: what occurs most often in a list of words, or in a text of coded ones."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Sequence
from typing import Final

from adakv_compile.evaluation import words
from adakv_compile.evaluation.sample import Sample

__all__ = ["LEAST_CODED", "common_words", "frequent_words", "zeta_counts"]

_COMMON: Final = 10
_CWE_TOKENS: Final = 120
_FWE_TOKENS: Final = 50
_FREQUENT: Final = 3
_ALPHA: Final = 2.0
_DOTS: Final = "..."
#: Repetitions of common and of other words, from this length on and below it.
_LONG: Final = 4096
_REPEATS: Final = (30, 3)
_SHORT_REPEATS: Final = (6, 1)
_EXAMPLE_OTHERS: Final = 10

LEAST_CODED: Final = 75
"""Fewest coded words of a text: with fewer, the fourth and the fifth rank may be as frequent."""


def _numbered(rng: random.Random, common: Sequence[str], others: Sequence[str], repeats: tuple[int, int]) -> str:
    listed = [*common] * repeats[0] + [*others] * repeats[1]
    rng.shuffle(listed)
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))


def _list_text(listed: str) -> str:
    return f"Below is a numbered list of words. Some appear more often than others. Memorize those.\n{listed}\n"


_LIST_QUESTION: Final = f"Question: What are the {_COMMON} most common words in the above list?"
_LIST_PREFIX: Final = f" Answer: The top {_COMMON} words that appear most often in the list are:"


def common_words(index: int, rng: random.Random, *, length: int) -> Callable[[int], Sample]:
    """Prepare a sample: a solved short example, then the list and the question.

    Args:
        index: Number of the sample.
        rng: Source of randomness.
        length: Tokens asked for; short lists have fewer repetitions.

    Returns:
        A function from the number of words that aren't common to the sample.
    """
    repeats = _REPEATS if length >= _LONG else _SHORT_REPEATS
    shown = words.countable(rng, _COMMON + _EXAMPLE_OTHERS)
    shown_list = _numbered(rng, shown[:_COMMON], shown[_COMMON:], _SHORT_REPEATS)
    state = rng.getrandbits(64)
    answer = " ".join(f"{number}. {word}" for number, word in enumerate(shown[:_COMMON], 1))
    example = f"{_list_text(shown_list)}{_LIST_QUESTION}{_LIST_PREFIX} {answer}\n\n"

    def sample(count: int) -> Sample:
        own = random.Random(state)
        pool = words.countable(own, _COMMON + count)
        return Sample(
            task="cwe",
            index=index,
            context=example + _list_text(_numbered(own, pool[:_COMMON], pool[_COMMON:], repeats)),
            question=_LIST_QUESTION,
            answer_prefix=_LIST_PREFIX,
            answers=tuple(pool[:_COMMON]),
            metric="string_match_all",
            max_new_tokens=_CWE_TOKENS,
            meta=(("units", count),),
        )

    return sample


def zeta_counts(total: int) -> list[int]:
    """Return how often the words of each rank occur: in proportion to ``rank ** -2``, rounded down.

    Words that wouldn't occur are left out. The dots are first; the three ranks after them differ in frequency, and
    from the rest, from `LEAST_CODED` on.

    Args:
        total: Words in the text, about.

    Returns:
        Occurrences by rank.
    """
    share = total / (math.pi**2 / 6)
    counts: list[int] = []
    while (occurrences := int(share * (len(counts) + 1) ** -_ALPHA)) > 0:
        counts.append(occurrences)
    return counts


def frequent_words(index: int, rng: random.Random) -> Callable[[int], Sample]:
    """Prepare a sample of coded words whose frequencies fall off as a zeta distribution.

    Args:
        index: Number of the sample.
        rng: Source of randomness.

    Returns:
        A function from the number of words in the text to the sample.
    """
    state = rng.getrandbits(64)

    def sample(count: int) -> Sample:
        own = random.Random(state)
        counts = zeta_counts(count)
        taken: dict[str, None] = {}
        while len(taken) < len(counts) - 1:
            taken["".join(own.choices(string.ascii_lowercase, k=6))] = None
        ranked = [_DOTS, *taken]
        text = [word for word, times in zip(ranked, counts, strict=True) for _ in range(times)]
        own.shuffle(text)
        return Sample(
            task="fwe",
            index=index,
            context=(
                "Read the coded text below and keep track of how often each coded word appears.\n"
                + " ".join(text)
                + "\n"
            ),
            question=(
                "Question: What are the three words that appear most often in the above coded text? Ignore the dots "
                f"'{_DOTS}' and do not explain."
            ),
            answer_prefix=" Answer: According to the coded text above, the three words that appear most often are:",
            answers=tuple(ranked[1 : 1 + _FREQUENT]),
            metric="string_match_all",
            max_new_tokens=_FWE_TOKENS,
            meta=(("units", count),),
        )

    return sample
