"""What the command line is tested on: the packaged model, a document of its words, and a runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from adakv_compile.cli.commands import app

__all__ = ["FACT", "RETRIEVER", "document", "run"]

RETRIEVER = Path(__file__).parents[2] / "adakv_compile" / "data" / "retriever"
FACT = "amber canyon velvet"


def document(filler: int) -> str:
    """Return a document of ``filler`` words with one fact at its middle, and the question about it at its end."""
    words = ["the"] * (filler // 2)
    return " ".join([*words, f"remember alice {FACT} .", *words, "recall alice"])


def run(*arguments: object) -> Any:
    """Run the command line and return click's result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
