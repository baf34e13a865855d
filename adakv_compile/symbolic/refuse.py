"""How a proof ends when it can't be completed."""

from __future__ import annotations

from adakv_compile.symbolic.expr import Expr

__all__ = ["NotProvedError"]


class NotProvedError(Exception):
    """A statement about a mask couldn't be proved; never shown to users as an error.

    Attributes:
        reason: Why, for people.
        culprit: The part of the mask that is to blame.
    """

    def __init__(self, reason: str, culprit: Expr) -> None:
        super().__init__(reason)
        self.reason = reason
        self.culprit = culprit
