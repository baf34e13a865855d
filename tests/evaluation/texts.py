"""A tokenizer of words and one of characters: enough to generate texts to a length."""

from __future__ import annotations

import re
from types import SimpleNamespace

__all__ = ["ChatTokenizer", "Tokenizer"]


class Tokenizer:
    """Words and punctuation, or single characters, and a special token in front."""

    def __init__(self, pattern: str = r"\w+|[^\w\s]") -> None:
        self.pattern = pattern

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [2] * len(re.findall(self.pattern, text)))


class ChatTokenizer(Tokenizer):
    """One with a template of five tokens."""

    chat_template = "user: {} . assistant:"

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
        return self.chat_template.format(turns[0]["content"])
