"""What is wrong with an evaluation, told before it runs."""

from __future__ import annotations

import importlib.util

from adakv_compile.errors import AdaKVError

__all__ = ["EvaluationError", "need"]


class EvaluationError(AdaKVError):
    """An evaluation can't be run as asked; the message says what is wrong and how to mend it."""


def need(package: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: Import name.

    Raises:
        EvaluationError: It is not.
    """
    if importlib.util.find_spec(package) is None:
        raise EvaluationError(f"{package} is not installed; install it with: pip install 'adakv_compile[eval]'")
