"""From a sample to the tokens that a model reads, under each of the two protocols."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from adakv_compile.evaluation.sample import Sample

__all__ = ["PROTOCOLS", "Prompt", "Protocol", "build"]

Protocol = Literal["question-aware", "question-agnostic"]
"""Whether what is compressed ends with the question, or the question comes after the compression."""

PROTOCOLS: Final[tuple[str, ...]] = get_args(Protocol)

# No text of a benchmark holds it, and no template changes it.
_GAP: Final = "\x1e<the question follows>\x1e"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads.

    Attributes:
        compressed: Token ids that are read at once and then compressed.
        question: Token ids that are read after that; empty in the question-aware protocol.
    """

    compressed: tuple[int, ...]
    question: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.compressed) + len(self.question)

    @property
    def sha256(self) -> str:
        """SHA-256 of all token ids in decimal, separated by spaces: the same for both ways to split one prompt."""
        return hashlib.sha256(" ".join(map(str, (*self.compressed, *self.question))).encode()).hexdigest()


def build(sample: Sample, tokenizer: Any, protocol: str) -> Prompt:
    """Return the tokens of a sample's prompt.

    A chat template is put around context and question, thinking switched off where it knows of that; the prefix of the
    answer follows the header of the assistant's turn. In the question-agnostic protocol the text is split where the
    context ends, and each side becomes tokens by itself, so that nothing of the question is in what is compressed.

    Args:
        sample: The sample.
        tokenizer: The model's tokenizer.
        protocol: A name in :data:`PROTOCOLS`.
    """
    chat = sample.chat and bool(getattr(tokenizer, "chat_template", None))
    if protocol == "question-aware":
        text = sample.joined or sample.context + sample.question
        if chat:
            text = _turn(tokenizer, text)
        return Prompt(_ids(tokenizer, text + sample.answer_prefix, special=not chat), ())
    if chat:
        before, _, after = _turn(tokenizer, sample.context + _GAP + sample.question).partition(_GAP)
    else:
        before, after = sample.context, sample.question
    after += sample.answer_prefix
    return Prompt(_ids(tokenizer, before, special=not chat), _ids(tokenizer, after, special=False))


def _turn(tokenizer: Any, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def _ids(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    # A template writes its own special tokens. Longer than the tokenizer expects is for the caller to judge.
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
