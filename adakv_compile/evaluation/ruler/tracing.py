"""Variable tracking: which variables end up with a value that is handed on from one to the next."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from typing import Final

from adakv_compile.evaluation.haystack import NOISE, insert, slots
from adakv_compile.evaluation.sample import Sample

__all__ = ["HOPS", "build", "chain"]

HOPS: Final = 4
"""Times that the value is handed on; one more variable than that is asked for."""

_MAX_NEW_TOKENS: Final = 30
_LETTERS: Final = 5
_EXAMPLE_UNITS: Final = 5


def chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Return a value, the variables that hold it, and the assignments in order.

    Args:
        rng: Source of randomness.

    Returns:
        Value of five digits, `HOPS` + 1 names, as many statements.
    """
    value = str(rng.randint(10_000, 99_999))
    taken: dict[str, None] = {}
    while len(taken) < HOPS + 1:
        taken["".join(rng.choices(string.ascii_uppercase, k=_LETTERS))] = None
    names = list(taken)
    given = [value, *(f"VAR {name}" for name in names[:-1])]
    return value, names, [f"VAR {name} = {source}" for name, source in zip(names, given, strict=True)]


def _text(body: Sequence[str]) -> str:
    return (
        "Memorize and follow the chain of variable assignments hidden in the text below.\n\n" + "\n".join(body) + "\n"
    )


def _question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def _prefix(value: str) -> str:
    return (
        f" Answer: According to the chain of variable assignments in the text above, {HOPS + 1} variables are assigned "
        f"the value {value}, they are:"
    )


def build(index: int, rng: random.Random) -> Callable[[int], Sample]:
    """Prepare a sample: a solved short example, then the text and the question.

    Args:
        index: Number of the sample.
        rng: Source of randomness.

    Returns:
        A function from the number of lines of noise to the sample.
    """
    shown_value, shown, statements = chain(rng)
    shown_body = insert([NOISE] * _EXAMPLE_UNITS, statements, slots(rng, HOPS + 1))
    example = f"{_text(shown_body)}{_question(shown_value)}{_prefix(shown_value)} {' '.join(shown)}\n\n"
    value, names, assignments = chain(rng)
    depths = slots(rng, HOPS + 1)

    def sample(count: int) -> Sample:
        return Sample(
            task="vt",
            index=index,
            context=example + _text(insert([NOISE] * count, assignments, depths)),
            question=_question(value),
            answer_prefix=_prefix(value),
            answers=tuple(names),
            metric="string_match_all",
            max_new_tokens=_MAX_NEW_TOKENS,
            meta=(("units", count),),
        )

    return sample
