"""Errors a user can cause, one class per mistake; every message says what, where, and what to do."""

from __future__ import annotations

__all__ = ["AdaKVError", "CompilationRefusedError", "OptionsError"]


class AdaKVError(Exception):
    """Base class of the errors this package raises on purpose."""


class OptionsError(AdaKVError, ValueError):
    """An option has an unknown name, a wrong type or a value out of range."""


class CompilationRefusedError(AdaKVError, RuntimeError):
    """With ``strict=True``: a graph holds an attention with a KV cache that was not compressed."""
