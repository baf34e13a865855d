"""Errors about a live compressed cache; every message says what, where, and what to do."""

from __future__ import annotations

from adakv_compile.errors import AdaKVError

__all__ = [
    "CacheError",
    "CacheMismatchError",
    "CropError",
    "TailGrowthError",
    "UnsupportedCacheOperation",
]


class CacheError(AdaKVError, RuntimeError):
    """Base class of the errors about a live compressed cache."""


class CacheMismatchError(CacheError):
    """A key and a value that are used together don't belong to the same layer, length or device."""


class CropError(CacheError):
    """Tokens were removed that lie in the evicted part, of which some entries no longer exist."""


class TailGrowthError(CacheError):
    """There is no memory for the tokens appended since the last eviction; the cache is as it was."""


class UnsupportedCacheOperation(CacheError):  # noqa: N818 - what is raised, in the user's words
    """Code asked of a compressed cache something only a dense tensor can do."""
