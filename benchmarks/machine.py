"""On what results were measured: processor, GPU, versions and commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe"]

_PACKAGES = ("transformers", "triton", "flash-attn")


def describe(commit: str | None = None) -> dict[str, Any]:
    """Return what a reader must know of the machine and the code to judge a figure.

    Args:
        commit: Of the code, where git can't tell: a copy of a working tree without its history.
    """
    machine: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "commit": commit or _commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return machine


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit of the working tree, with a mark if it has changes that are not committed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
