"""Errors a user can cause, one class per mistake; every message says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["AdaKVError", "CompilationRefusedError", "OptionsError", "hint"]


class AdaKVError(Exception):
    """Base class of the errors this package raises on purpose."""


class OptionsError(AdaKVError, ValueError):
    """An option has an unknown name, a wrong type or a value out of range."""


class CompilationRefusedError(AdaKVError, RuntimeError):
    """With ``strict=True``: a graph holds an attention with a KV cache that was not compressed."""


def hint(word: object, known: Iterable[str]) -> str:
    """Return how a message about an unknown word goes on: with the nearest known one, or with a full stop.

    Args:
        word: What was given.
        known: What is known.
    """
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
