"""Needles in a haystack: the eight retrieval tasks of RULER (Hsieh et al. 2024, arXiv:2404.06654, section 3)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from adakv_compile.evaluation import words
from adakv_compile.evaluation.haystack import NOISE, essay, insert, slots
from adakv_compile.evaluation.sample import Sample

__all__ = ["SPECS", "Kind", "Needle", "Prompt", "Spec", "build", "draw", "listed", "prompt"]

Kind = Literal["numbers", "uuids", "words"]

_MAX_NEW_TOKENS: Final = 128


@dataclass(frozen=True, slots=True)
class Spec:
    """One retrieval task.

    Attributes:
        haystack: What the needles lie in: a repeated line, sentences, or more needles.
        key: What a key is made of.
        value: What a value is made of.
        keys: Different keys in the text; with a haystack of needles, those beside it.
        values: Values of each key.
        asked: Keys in the question.
    """

    haystack: Literal["noise", "essay", "needles"] = "essay"
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


SPECS: Final[dict[str, Spec]] = {
    "niah_single_1": Spec(haystack="noise"),
    "niah_single_2": Spec(),
    "niah_single_3": Spec(value="uuids"),
    "niah_multikey_1": Spec(keys=4),
    "niah_multikey_2": Spec(haystack="needles"),
    "niah_multikey_3": Spec(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": Spec(values=4),
    "niah_multiquery": Spec(keys=4, asked=4),
}


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact.

    Attributes:
        key: What is asked for.
        value: What answers.
        kind: What the value is called.
    """

    key: str
    value: str
    kind: Kind

    @property
    def sentence(self) -> str:
        """The fact as a sentence."""
        return f"One of the special magic {self.kind} for {self.key} is: {self.value}."


@dataclass(frozen=True, slots=True)
class Prompt:
    """The texts around a haystack.

    Attributes:
        introduction: Stands before the text.
        question: Stands after it.
        answer_prefix: What the answer begins with.
    """

    introduction: str
    question: str
    answer_prefix: str


def _identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _value(rng: random.Random, kind: Kind) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return _identifier(rng) if kind == "uuids" else words.phrase(rng)


def draw(rng: random.Random, kind: Kind, key: Kind, keys: int, values: int) -> list[list[Needle]]:
    """Return needles with different keys and different values.

    Args:
        rng: Source of randomness.
        kind: What values are.
        key: What keys are: words or identifiers.
        keys: Number of keys.
        values: Values of each.

    Returns:
        One list of needles for every key.
    """
    names = words.keys(rng, keys) if key == "words" else [_identifier(rng) for _ in range(keys)]
    taken: dict[str, None] = {}
    while len(taken) < keys * values:
        taken[_value(rng, kind)] = None
    drawn = iter(taken)
    return [[Needle(name, next(drawn), kind) for _ in range(values)] for name in names]


def listed(names: Sequence[str]) -> str:
    """Return names as a list in words.

    Args:
        names: At least one.

    Returns:
        ``a``, or ``a, b, and c``.
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def prompt(kind: Kind, names: Sequence[str], *, several: bool) -> Prompt:
    """Return what stands around the haystack.

    Args:
        kind: What values are.
        names: The keys asked for.
        several: Whether there is more than one answer; the texts are in the singular otherwise.

    Returns:
        The texts.
    """
    what = kind if several else kind.removesuffix("s")
    query = listed(names)
    if several:
        return Prompt(
            f"Special magic {what} are hidden in the text below. Memorize them, you will be asked for them later.\n",
            f"What are all the special magic {what} for {query} mentioned in the provided text?",
            f" The special magic {what} for {query} mentioned in the provided text are",
        )
    return Prompt(
        f"A special magic {what} is hidden in the text below. Memorize it, you will be asked for it later.\n",
        f"What is the special magic {what} for {query} mentioned in the provided text?",
        f" The special magic {what} for {query} mentioned in the provided text is",
    )


def _units(rng: random.Random, spec: Spec, taken: Sequence[Needle]) -> Callable[[int], list[str]]:
    """Return what makes the first ``n`` units of the haystack, each time the same."""
    state = rng.getrandbits(64)
    if spec.haystack == "noise":
        return lambda count: [NOISE] * count
    if spec.haystack == "essay":
        return lambda count: essay(random.Random(state), count)
    names = {needle.key for needle in taken}
    values = {needle.value for needle in taken}

    def needles(count: int) -> list[str]:
        # Some more are drawn than needed, for those that have the key or the value of a real needle. A longer text
        # isn't the shorter one continued: it only has more needles.
        drawn = draw(random.Random(state), spec.value, spec.key, count + len(taken) * 2, 1)
        return [n.sentence for [n] in drawn if n.key not in names and n.value not in values][:count]

    return needles


def build(task: str, index: int, spec: Spec, rng: random.Random) -> Callable[[int], Sample]:
    """Prepare a sample: needles, depths and question are drawn, the length is open.

    Args:
        task: Name of the task.
        index: Number of the sample.
        spec: What the task is.
        rng: Source of randomness.

    Returns:
        A function from the number of units of haystack to the sample.
    """
    groups = draw(rng, spec.value, spec.key, spec.keys, spec.values)
    needles = [needle for group in groups for needle in group]
    asked = rng.sample(range(spec.keys), spec.asked)
    rng.shuffle(needles)
    depths = slots(rng, len(needles))
    names = [groups[i][0].key for i in asked]
    answers = tuple(needle.value for i in asked for needle in groups[i])
    texts = prompt(spec.value, names, several=len(answers) > 1)
    units = _units(rng, spec, needles)
    separator = " " if spec.haystack == "essay" else "\n"
    first = min(depth for needle, depth in zip(needles, depths, strict=True) if needle.key in names)

    def sample(count: int) -> Sample:
        body = insert(units(count), [needle.sentence for needle in needles], depths)
        return Sample(
            task=task,
            index=index,
            context=f"{texts.introduction}{separator.join(body)}\n",
            question=texts.question,
            answer_prefix=texts.answer_prefix,
            answers=answers,
            metric="string_match_all",
            max_new_tokens=_MAX_NEW_TOKENS,
            meta=(("units", count), ("depth", round(100 * first, 1))),
        )

    return sample
