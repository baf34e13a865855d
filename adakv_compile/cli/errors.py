"""What a user of the command line reads instead of a traceback."""

from __future__ import annotations

import importlib.util

from adakv_compile.errors import AdaKVError

__all__ = ["CommandError", "require"]


class CommandError(AdaKVError):
    """Something on the command line can't be done; the message says what and how to mend it."""


def require(package: str, extra: str) -> None:
    """Check for an optional package before any long work starts.

    Args:
        package: Import name.
        extra: The extra of this distribution that installs it.

    Raises:
        CommandError: The package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise CommandError(f"{package} is not installed; install it with: pip install 'adakv_compile[{extra}]'")
