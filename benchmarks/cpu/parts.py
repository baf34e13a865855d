"""The parts of the CPU benchmark, in the order in which they run, and the time that each may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["OPTIONAL", "PARTS", "Described"]


@dataclass(frozen=True)
class Described:
    """A part.

    Attributes:
        module: Of this package; it has a function ``run``.
        title: Of its section.
        seconds: What it may take on two quiet cores; all of them together less than fifteen minutes.
    """

    module: str
    title: str
    seconds: float


PARTS: Final = {
    "profile": Described("profile", "Where the time of a decode step goes", 45),
    "decode_op": Described("decode_op", "The attention operator of a step, one layer", 55),
    "step": Described("step", "A decode step behind a long prompt, budget 512", 130),
    "short": Described("short", "Prompts that fit into the budget", 85),
    "guards": Described("guards", "Guards and call boundary", 40),
    "prefill": Described("prefill", "Prompts", 165),
    "compile": Described("compilation", "Compilation", 235),
    "growth": Described("growth", "The cost of a token late in a text", 60),
    "memory": Described("memory", "Memory held", 60),
    "peers": Described("peers", "A decode step against kvpress", 600),
}
OPTIONAL: Final = ("peers",)
"""Run only if asked for: the environment of others takes minutes to make."""
