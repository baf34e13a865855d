"""Training documents: haystacks and questions of the evaluation's generators, answered.

A document has the texts of `adakv_compile.evaluation.ruler.niah`, with two differences. It may have several
questions, as an answer is a small part of a long document; and each answer is written out, ``KEY is: VALUE.`` for
every value, so that a value is found the way it is hidden. Seeds are other than the evaluation's, and a fifth of the
pairs that make keys never occurs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from adakv_compile.evaluation import words
from adakv_compile.evaluation.haystack import NOISE, essay
from adakv_compile.evaluation.ruler import niah
from benchmarks.testbed import tokenizer as pieces

__all__ = ["Corpus", "held_out"]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_SENTENCES: Final = 6000
_HELD_OUT: Final = 5
#: Shares of kinds of haystack and of values.
_HAYSTACKS: Final = (("essay", 0.55), ("noise", 0.15), ("needles", 0.30))
_VALUES: Final[tuple[tuple[niah.Kind, float], ...]] = (("numbers", 0.62), ("words", 0.3), ("uuids", 0.08))
#: Of the documents with identifiers as values, those that have them as keys, too.
_IDENTIFIER_KEYS: Final = 0.25
_SEVERAL_VALUES: Final = 0.15
#: Documents whose keys are made of few words, and the words they have of one part. Of two random keys, one in a hundred
#: has the other's noun: a model that reads the noun alone is hardly ever wrong and never learns to read the adjective.
_ALIKE: Final = 0.5
_ALIKE_WORDS: Final = (1, 1, 2, 3)
#: More keys than this are drawn freely: one word makes some ninety.
_MOST_ALIKE: Final = 40
#: Tokens of an identifier, about: documents without room for some get numbers.
_LONG_VALUE: Final = 256


def held_out(key: str) -> bool:
    """Say whether a key is kept from training.

    Args:
        key: ``adjective-noun``.
    """
    adjective, _, noun = key.partition("-")
    return (words.ADJECTIVES.index(adjective) + words.NOUNS.index(noun)) % _HELD_OUT == 0


class _Names:
    """The keys of one document: none twice, none that is kept from training, alike where a document is to be hard."""

    def __init__(self, rng: random.Random, *, alike: bool) -> None:
        """Choose the words that all keys share.

        Args:
            rng: Source of randomness.
            alike: Whether the keys have few adjectives, or few nouns.
        """
        self._random = rng
        self._taken: set[str] = set()
        self._part = rng.randrange(2)
        few = rng.choice(_ALIKE_WORDS)
        self._few = rng.sample((words.ADJECTIVES, words.NOUNS)[self._part], few) if alike else []

    def take(self, key: str, together: int) -> str | None:
        """Return a key for the document in place of a random one, and remember it.

        Args:
            key: ``adjective-noun``, or an identifier.
            together: How many keys are drawn at a time.

        Returns:
            The key, one of its words exchanged where keys are alike; None if the document has it or training may not.
        """
        adjective, _, noun = key.partition("-")
        if noun in words.NOUNS:
            if self._few and together <= _MOST_ALIKE:
                word = self._random.choice(self._few)
                key = f"{adjective}-{word}" if self._part else f"{word}-{noun}"
            if held_out(key):
                return None
        if key in self._taken:
            return None
        self._taken.add(key)
        return key


@dataclass(frozen=True, slots=True)
class _Piece:
    """Token ids, and whether they are to be predicted."""

    ids: Sequence[int]
    answer: bool = False


class Corpus:
    """Endless training batches.

    Attributes:
        tokenizer: Turns text into ids.
        random: Source of all randomness.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Prepare the haystacks.

        Args:
            tokenizer: As `benchmarks.testbed.tokenizer.build` returns it.
            seed: Seed of all documents.
        """
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.random = random.Random(f"training/{seed}")
        self._essay = self._encode(essay(random.Random(f"training essay/{seed}"), _SENTENCES))
        self._noise = self._encode([NOISE])[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[number for word in text.split() for number in self._word(word)] for text in texts]

    def _word(self, word: str) -> list[int]:
        """Return the ids of a word: the tokenizer splits at white space only, so words can be kept one by one."""
        if (known := self._known.get(word)) is not None:
            return known
        ids = [token.id for token in self.tokenizer.backend_tokenizer.model.tokenize(word)]
        if not any(character.isdigit() for character in word):
            self._known[word] = ids
        return ids

    def _choose(self, shares: Sequence[tuple[str, float]]) -> str:
        return self.random.choices([name for name, _ in shares], [share for _, share in shares])[0]

    def _draw(self, kind: niah.Kind, key: niah.Kind, keys: int, values: int, names: _Names) -> list[list[niah.Needle]]:
        groups: list[list[niah.Needle]] = []
        while len(groups) < keys:
            for group in niah.draw(self.random, kind, key, keys, values):
                name = names.take(group[0].key, keys)
                if name is None:
                    continue
                groups.append([replace(needle, key=name) for needle in group])
        return groups[:keys]

    def _turn(self, groups: Sequence[Sequence[niah.Needle]]) -> list[str]:
        """Return the texts before the answer and the answer: key after key, values from the end of the text on.

        Told in any other order, a value would not say which comes next, and no training would make the answer sure.
        """
        asked = [needle for group in groups for needle in group]
        texts = niah.prompt(asked[0].kind, [group[0].key for group in groups], several=len(asked) > 1)
        answer = " ".join(f"{needle.key} is: {needle.value}." for needle in asked)
        return [texts.introduction, texts.question + texts.answer_prefix, answer]

    def document(self, length: int) -> tuple[Ids, Mask]:
        """Return one document.

        Args:
            length: Most tokens.

        Returns:
            Ids `[length]`, padded at the end; whether each is part of an answer `[length]`.
        """
        rng = self.random
        haystack = self._choose(_HAYSTACKS)
        kinds: list[niah.Kind] = [kind for kind, _ in _VALUES]
        kind = rng.choices(kinds, [share for _, share in _VALUES])[0]
        if length < _LONG_VALUE and kind == "uuids":
            kind = "numbers"
        long = kind == "uuids"
        key: niah.Kind = "uuids" if long and rng.random() < _IDENTIFIER_KEYS else "words"
        room = length - 20
        values = rng.randint(2, 4) if rng.random() < _SEVERAL_VALUES and haystack != "needles" and not long else 1
        size = (32 if long else 15) + (20 if key == "uuids" else 0)
        most = max(1, room // (3 * values * size))
        keys = min(most, rng.choice((2, 4, 8)) if haystack == "needles" else rng.choice((1, 2, 4, 4, 4, 8, 16)))
        names = _Names(rng, alike=rng.random() < _ALIKE)
        groups = self._draw(kind, key, keys, values, names)
        # From the end of the text to its beginning. The values of a key are told in this order, too.
        needles = [needle for group in groups for needle in group]
        rng.shuffle(needles)
        place = {needle.value: i for i, needle in enumerate(needles)}
        groups = [sorted(group, key=lambda needle: place[needle.value]) for group in groups]

        turns: list[list[str]] = []
        used = 0
        # Two documents in five ask once, as the evaluation does.
        wanted = 1 if rng.random() < 0.4 else rng.randint(2, max(4, length // 64))
        left = rng.sample(groups, len(groups))
        while left and len(turns) < wanted:
            several = rng.randint(2, 4) if values == 1 and rng.random() < 0.5 else 1
            together, left = left[:several], left[several:]
            cost = 26 + len(together) * (4 + 3 * (size - 12) * values + values * 4)
            if turns and used + cost + keys * values * size > room * 0.8:
                break
            used += cost
            turns.append(self._turn(together))
        return self._assemble(length, haystack, [needle.sentence for needle in needles], turns, kind, key, names)

    def _assemble(
        self,
        length: int,
        haystack: str,
        needles: list[str],
        turns: list[list[str]],
        kind: niah.Kind,
        key: niah.Kind,
        names: _Names,
    ) -> tuple[Ids, Mask]:
        rng = self.random
        encoded = self._encode([turns[0][0], *needles, *(text for turn in turns for text in turn[1:])])
        introduction, facts, said = encoded[0], encoded[1 : 1 + len(needles)], encoded[1 + len(needles) :]
        tail: list[_Piece] = []
        for question, answer in zip(said[::2], said[1::2], strict=True):
            tail += [_Piece(question), _Piece([*answer, pieces.EOS], answer=True)]
        free = length - 1 - len(introduction) - sum(map(len, facts)) - sum(len(piece.ids) for piece in tail)
        units = self._units(haystack, free, kind, key, names)
        # The first fact gets the last place.
        places = sorted(rng.randint(0, len(units)) for _ in facts)
        for place, fact in zip(reversed(places), facts, strict=True):
            units.insert(place, fact)
        body = [_Piece([pieces.BOS, *introduction]), *map(_Piece, units), *tail]
        ids = np.full(length, pieces.PAD, np.int64)
        answers = np.zeros(length, np.bool_)
        at = 0
        for piece in body:
            end = min(length, at + len(piece.ids))
            ids[at:end] = piece.ids[: end - at]
            answers[at:end] = piece.answer
            at = end
        return ids, answers

    def _units(self, haystack: str, free: int, kind: niah.Kind, key: niah.Kind, names: _Names) -> list[list[int]]:
        """Return units of haystack of at most ``free`` tokens."""
        if haystack == "needles":
            count = max(0, free) // 14 + 1
            source = self._encode([group[0].sentence for group in self._draw(kind, key, count, 1, names)])
        elif haystack == "noise":
            source = [self._noise] * (max(0, free) // len(self._noise) + 1)
        else:
            begin = self.random.randrange(_SENTENCES)
            source = [self._essay[(begin + i) % _SENTENCES] for i in range(max(0, free) // 6 + 1)]
        units: list[list[int]] = []
        for unit in source:
            free -= len(unit)
            if free < 0:
                break
            units.append(list(unit))
        return units

    def batch(self, length: int, rows: int) -> tuple[Ids, Mask]:
        """Return a batch.

        Args:
            length: Tokens of each document.
            rows: Documents.

        Returns:
            Ids and answers `[rows, length]`.
        """
        documents = [self.document(length) for _ in range(rows)]
        return np.stack([ids for ids, _ in documents]), np.stack([mask for _, mask in documents])
