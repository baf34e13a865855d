"""The 512 words of the retriever: ids, readable text, tokenizer.

The ids are fixed by the trained weights; the words only make documents
readable. A fact reads ``remember alice amber canyon velvet .`` and its
question ``recall alice`` is answered by ``amber canyon velvet .``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

__all__ = [
    "BOS",
    "END",
    "EOS",
    "FILLER",
    "KEY",
    "MARKERS",
    "NAMES",
    "PAD",
    "QUESTION",
    "SIZE",
    "UNKNOWN",
    "VALUES",
    "WORDS",
    "WordRange",
    "build_tokenizer",
    "decode",
    "encode",
]


@dataclass(frozen=True, slots=True)
class WordRange:
    """A run of ids that play one part in the grammar.

    Attributes:
        start: First id.
        count: Number of ids.
    """

    start: int
    count: int

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """All ids of the range `[count]`."""
        return np.arange(self.start, self.start + self.count, dtype=np.int64)


SIZE: Final = 512

PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
KEY: Final = 3
END: Final = 5
QUESTION: Final = 6
UNKNOWN: Final = 15

NAMES: Final = WordRange(16, 112)
VALUES: Final = WordRange(128, 96)
MARKERS: Final = WordRange(224, 32)
FILLER: Final = WordRange(256, 256)

#: Ids 4 and 7 to 14 belong to tasks the packaged weights were not taught.
_SPECIAL: Final = (
    "<pad> <s> </s> remember is . recall answer copy frequent see noise <spare-0> <spare-1> <spare-2> <unk>"
)

_NAMES: Final = """
aaron abigail adam agnes albert alice amelia andrew anna anthony arthur audrey
barbara beatrice benjamin bernard bertha boris brenda bruno camille carl
caroline cecilia charles charlotte chloe clara claude colin cynthia daniel
daphne david deborah dennis diana dominic dora doris douglas edgar edith edward
eleanor elena elliot elsa emil emma eric esther eugene eva felix fiona flora
florence francis frederick gabriel george gertrude gilbert gloria gordon greta
gustav hannah harold harriet hector heidi helen henry herbert hilda horace hugo
ida ingrid irene isaac isabel ivan jacob jasper joan joel johanna jonas joseph
judith julia karl katherine kenneth laura lawrence leonard linda louis lucy
magnus margaret martin matilda maurice maximilian megan melissa michael
"""

_VALUES: Final = """
acorn amber anchor antler apricot arrow balcony bamboo barley basket beacon
blanket boulder bramble bronze bucket button candle canyon carpet castle cedar
cherry cinnamon clover cobalt compass copper coral cotton crimson crystal dagger
diamond dolphin emerald engine falcon feather fiddle flannel fountain garnet
ginger glacier granite hammer harbor harvest hazel helmet indigo iron ivory
jacket jasmine jewel kettle ladder lantern lavender lemon linen lizard magnet
maple marble meadow mirror mosaic needle nutmeg olive onyx orchid oyster paddle
parrot pebble pepper pigeon pillow pocket prism quartz raven ribbon saddle
saffron sapphire scarlet silver timber tulip velvet walnut
"""

_MARKERS: Final = """
monday tuesday wednesday thursday friday saturday sunday january february march
april may june july august september october november december spring summer
autumn winter dawn noon dusk midnight north south east west center
"""

_FILLER: Final = """
the of and to in a that it was for on with as his they at be this have from or
had by but some what there we other were all your when up use word how said an
each she which do their time if will way about many then them would write like
so these her long make thing him two has look more day could go come did my
sound no most number who over know water than call first people side been now
find any new work part take get place made live where after back little only
round man year came show every good me give our under name very through just
form much great think say help low line before turn cause same mean differ move
right boy old too does tell sentence set three want air well also play small
end put home read hand port large spell add even land here must big high such
follow act why ask men change went light kind off need house picture try us
again animal point mother world near build self earth father head stand own page
should country found answered school grow study still learn plant cover food sun
four thought let keep eye never last door between city tree cross since hard
start might story saw far sea draw left late run while press close night real
life few stop open seem together next white children begin got walk example ease
paper often always music those both mark book
"""


def _words() -> tuple[str, ...]:
    """Return the word of every id, in order."""
    groups = (
        (_SPECIAL, 16),
        (_NAMES, NAMES.count),
        (_VALUES, VALUES.count),
        (_MARKERS, MARKERS.count),
        (_FILLER, FILLER.count),
    )
    words: list[str] = []
    for text, count in groups:
        group = text.split()
        if len(group) != count:
            message = f"expected {count} words, found {len(group)}: {group[:3]}..."
            raise ValueError(message)
        words += group
    if len(set(words)) != SIZE:
        repeated = sorted({w for w in words if words.count(w) > 1})
        message = f"words must be distinct, repeated: {repeated}"
        raise ValueError(message)
    return tuple(words)


#: The word of every id.
WORDS: Final[tuple[str, ...]] = _words()

_IDS: Final[dict[str, int]] = {word: i for i, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    """Return the ids of the words of ``text``.

    Args:
        text: Words separated by white space.

    Returns:
        One id per word.

    Raises:
        KeyError: If a word is not in the vocabulary.

    Examples:
        >>> encode("remember alice amber .")
        [3, 21, 129, 5]
    """
    return [_IDS[word] for word in text.split()]


def decode(ids: Iterable[int]) -> str:
    """Return the text of ``ids``.

    Args:
        ids: Token ids.

    Returns:
        The words, separated by single spaces.

    Examples:
        >>> decode([6, 21])
        'recall alice'
    """
    return " ".join(WORDS[int(i)] for i in ids)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return a Hugging Face tokenizer that agrees with `encode` and `decode`.

    Args:
        max_length: Longest context the model was trained on.

    Returns:
        A word-level tokenizer; it pads on the left and adds no tokens.
    """
    tokenizer = Tokenizer(WordLevel(_IDS, unk_token=WORDS[UNKNOWN]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=WORDS[PAD],
        bos_token=WORDS[BOS],
        eos_token=WORDS[EOS],
        unk_token=WORDS[UNKNOWN],
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
