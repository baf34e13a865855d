"""What every command does with errors and warnings: a message on the screen, not a traceback."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from adakv_compile.errors import AdaKVError

__all__ = ["clear_errors"]


@contextmanager
def clear_errors(screen: Console) -> Generator[None]:
    """Show what the package raises on purpose as one message, and its warnings without their source lines.

    Args:
        screen: Where to show them.

    Raises:
        typer.Exit: With code 2, after such an error.
    """

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        screen.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True)

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    except AdaKVError as error:
        screen.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    finally:
        warnings.showwarning = before
