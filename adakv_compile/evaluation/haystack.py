"""What needles are hidden in: a repeated line, or sentences that a grammar makes up.

The benchmarks' own haystacks are essays by one author, which nobody may pass on. Ours are nobody's: every sentence
comes from a seed. They are plain English by form and about nothing in particular, so they say nothing that could be
the answer. They are also more alike than an essay's, of some two hundred different words: results are comparable with
each other, not with published ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

__all__ = ["NOISE", "essay", "insert", "slots"]

NOISE: Final = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The line that fills the context of the tasks without essays."""

_SLOTS: Final = 40

_WORDS: Final = """
person: baker|clerk|doctor|driver|farmer|keeper|miller|neighbor|painter|sailor|student|teacher|visitor|writer
quality: big|careless|cheap|common|fine|good|heavy|important|new|old|ordinary|perfect|poor|small|strange
did: borrowed|bought|carried|cleaned|described|found|forgot|lost|measured|moved|opened|painted|sold|studied
object: book|box|chair|coat|door|letter|machine|map|picture|question|story|table|wheel|lamp
place: at the corner|behind the school|beside the church|by the lake|in the library|in the market|near the station
place: on the bridge|on the hill|under the roof
time: after lunch|before dinner|during the summer|every morning|in the evening|last week|on Monday|on Friday
time: some years ago
idea: change|effort|failure|growth|learning|money|progress|success|time|trust|work|writing
verb: begin|build|explain|finish|judge|keep|notice|plan|share|understand
adverb: often|rarely|slowly|usually|certainly|almost|always
link: although|because|but|so|while
"""

_FORMS: Final[tuple[str, ...]] = (
    "The {quality} {person} {did} the {object} {place}.",
    "The {person} {did} a {quality} {object} {time}.",
    "Most people think that {idea} comes from {idea2}.",
    "It is hard to {verb} {idea} without {idea2}.",
    "We {adverb} {verb} what the {person} {did} {time}.",
    "The {person} {did} the {object} {link} the {person2} {did2} it {place}.",
    "There was a {quality} {object} {place}.",
    "You can {verb} a {object} only if you {verb2} the {idea} behind it.",
    "If {idea} matters, then {idea2} matters more.",
    "Nobody knew who {did} the {object} {place}.",
    "I remember a {person} who {adverb} {did} things {place}.",
    "In the end, {idea} is {adverb} a kind of {idea2}.",
)


def _lists() -> dict[str, list[str]]:
    """Return the words that can stand for each name in a form."""
    lists: dict[str, list[str]] = {}
    for line in _WORDS.strip().splitlines():
        name, _, words = line.partition(": ")
        lists.setdefault(name, []).extend(words.split("|"))
    return lists


_LISTS: Final = _lists()


def essay(rng: random.Random, count: int) -> list[str]:
    """Return the first ``count`` sentences of an endless text.

    A longer text from the same state of ``rng`` begins with the shorter one, which a search for the length relies on.

    Args:
        rng: Source of randomness.
        count: Number of sentences.

    Returns:
        Sentences that end in a full stop.
    """
    sentences: list[str] = []
    for _ in range(count):
        chosen = {name: rng.choice(words) for name, words in _LISTS.items()}
        chosen |= {f"{name}2": rng.choice(_LISTS[name]) for name in ("idea", "person", "did", "verb")}
        sentences.append(rng.choice(_FORMS).format_map(chosen))
    return sentences


def slots(rng: random.Random, count: int) -> list[float]:
    """Return ``count`` different depths out of 40 that are evenly spread, in ascending order.

    Args:
        rng: Source of randomness.
        count: Number of depths, at most 40.

    Returns:
        Depths in [0, 1].
    """
    return sorted(slot / (_SLOTS - 1) for slot in rng.sample(range(_SLOTS), count))


def insert(units: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Put needles between the units of a haystack.

    Args:
        units: Sentences or lines.
        needles: What is put between them.
        depths: Share of the units that come before each needle, ascending.

    Returns:
        Units and needles in order.
    """
    places = [int(len(units) * depth) for depth in depths]
    result: list[str] = []
    begin = 0
    for needle, place in zip(needles, places, strict=True):
        result += [*units[begin:place], needle]
        begin = place
    return result + list(units[begin:])
