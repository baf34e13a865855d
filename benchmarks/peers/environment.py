"""The peers' own virtual environment: kvpress wants a transformers that this project is past."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

__all__ = ["Environment", "PeersMissingError", "default_folder", "prepare"]

_STAMP: Final = "adakv-peers.json"
_OPTIONAL: Final = ("optimum-quanto",)
"""What one of the rows needs, and the others do without."""

Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class PeersMissingError(RuntimeError):
    """The peers can't be installed; the message says what would install them."""


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment with kvpress in it.

    Attributes:
        python: Its interpreter.
        missing: Optional packages that could not be installed, and why.
    """

    python: Path
    missing: dict[str, str]


def default_folder() -> Path:
    """Return the folder in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or (Path.home() / ".cache")
    return Path(cache) / "adakv-compile-peers"


def prepare(folder: Path, torch_version: str | None = None, run: Runner | None = None) -> Environment:
    """Make the environment if it isn't there yet, and return it.

    PyTorch comes first and in the version of this process, so that one build computes on both sides, and a CPU build
    where pip knows an index of them; where that version can't be had, pip takes the newest that works.

    Args:
        folder: Where it is, or shall be: outside of the repository.
        torch_version: Version of PyTorch; by default that of this process.
        run: Runs a command; for tests.

    Raises:
        PeersMissingError: Something that all peers need can't be installed.
    """
    run = run or _run
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = folder / _STAMP
    pin = f"torch=={(torch_version or torch.__version__).split('+')[0]}"
    if stamp.exists():
        known = json.loads(stamp.read_text())
        if known["torch"] == pin:
            return Environment(python, known["missing"])
    if not python.exists():
        _need(run([sys.executable, "-m", "venv", str(folder)]), folder, pin)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    pinned = run([*pip, pin])
    if pinned.returncode:
        _need(run([*pip, "torch"]), folder, pin)
    _need(run([*pip, *([] if pinned.returncode else [pin]), "kvpress"]), folder, pin)
    missing: dict[str, str] = {}
    for name in _OPTIONAL:
        done = run([*pip, *([] if pinned.returncode else [pin]), name])
        if done.returncode:
            missing[name] = _reason(done)
    stamp.write_text(json.dumps({"torch": pin, "missing": missing}) + "\n")
    return Environment(python, missing)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _need(done: subprocess.CompletedProcess[str], folder: Path, pin: str) -> None:
    if done.returncode:
        raise PeersMissingError(
            f"the peers' environment in {folder} could not be made: {_reason(done)}\n"
            "kvpress and its PyTorch come from PyPI. With a network, run this again, or make the environment by hand:\n"
            f"  python -m venv {folder}\n"
            f"  {folder}/bin/python -m pip install {pin}    # on a machine without a GPU, from an index of CPU builds\n"
            f"  {folder}/bin/python -m pip install {pin} kvpress {' '.join(_OPTIONAL)}"
        )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that says what went wrong."""
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]
