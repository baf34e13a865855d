"""The command line ``adakv``; it needs the extra ``cli``, and ``transformers`` to run models."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["main"]

_NEEDED: Final = ("rich", "typer")


def main() -> None:
    """Run the command line, or say what has to be installed for it."""
    try:
        from adakv_compile.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        sys.exit(
            f"adakv: {error.name} is not installed; install the command line with: pip install 'adakv_compile[cli]'"
        )
    app()
