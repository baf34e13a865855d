"""The tokenizer of the test bed: whole words, and numbers and identifiers in pairs of digits.

Words, punctuation and digits are pieces of a WordPiece vocabulary that splits at white space only, so text decodes to
what was encoded. The words are those that the generators use; anything else in ASCII falls apart into letters. A
number of seven digits is four tokens, as the larger tokenizers group digits by three.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from types import SimpleNamespace
from typing import Final

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from adakv_compile.evaluation import ruler, words

__all__ = ["BOS", "EOS", "PAD", "UNKNOWN", "build", "vocabulary"]

PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
UNKNOWN: Final = 3

_SPECIAL: Final = ("<pad>", "<s>", "</s>", "<unk>")
_HEXADECIMAL: Final = "0123456789abcdef"
_SAMPLES: Final = 6
_LENGTH: Final = 800
#: A word of the texts is found in several samples; the random words of some tasks are not.
_LEAST_SAMPLES: Final = 2


class _Words:
    """A tokenizer that counts words, for generating the text that the vocabulary is read from."""

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        """Return one id for every word."""
        return SimpleNamespace(input_ids=[0] * len(text.split()))


def _text_words() -> list[str]:
    """Return the words that several generated samples have, in order of the alphabet."""
    found: Counter[str] = Counter()
    for task in ruler.GENERATED:
        for sample in ruler.samples(task, _Words(), _LENGTH, _SAMPLES, seed=0):
            text = f"{sample.context}{sample.question}{sample.answer_prefix}"
            found.update(set(re.findall(r"(?<![\w-])[A-Za-z]+(?![\w-])", text)))
    return sorted(word for word, samples in found.items() if samples >= _LEAST_SAMPLES)


def vocabulary() -> list[str]:
    """Return all pieces in the order of their ids; ``##`` marks what continues a word."""
    pairs = ["".join(pair) for pair in itertools.product(_HEXADECIMAL, repeat=2)]
    single = string.ascii_letters + string.digits + string.punctuation
    pieces = [*_SPECIAL, "is:"]
    pieces += [*words.ADJECTIVES, *(f"##-{noun}" for noun in words.NOUNS), *words.NOUNS, *words.THINGS]
    pieces += [*pairs, *(f"##{pair}" for pair in pairs), *single, *(f"##{character}" for character in single)]
    pieces += _text_words()
    return list(dict.fromkeys(pieces))


def build(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer.

    Args:
        max_length: Longest context that the model was trained on.

    Returns:
        A fast tokenizer that puts ``<s>`` in front and pads on the left.
    """
    ids = {piece: number for number, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordPiece(ids, unk_token=_SPECIAL[UNKNOWN], max_input_chars_per_word=200))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIAL[BOS]} $A", special_tokens=[(_SPECIAL[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[PAD],
        bos_token=_SPECIAL[BOS],
        eos_token=_SPECIAL[EOS],
        unk_token=_SPECIAL[UNKNOWN],
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
