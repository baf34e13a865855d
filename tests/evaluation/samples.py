"""What the harness is tested on: facts among filler words that the packaged model answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adakv_compile.evaluation.sample import Sample

__all__ = ["FACT", "RETRIEVER", "fact", "record"]

RETRIEVER = Path(__file__).parents[2] / "adakv_compile" / "data" / "retriever"
FACT = "amber canyon velvet"


def fact(index: int = 0, filler: int = 60, **changed: Any) -> Sample:
    """Return a question about a fact in the middle of ``filler`` words."""
    words = ["the"] * (filler // 2 + index)
    values: dict[str, Any] = {
        "task": "facts",
        "index": index,
        "context": " ".join([*words, f"remember alice {FACT} .", *words]),
        "question": " recall alice",
        "answer_prefix": "",
        "answers": (FACT,),
        "metric": "exact",
        "max_new_tokens": 5,
        "meta": (("length", 128), ("depth", 50)),
    }
    return Sample(**{**values, **changed})


def record(**changed: Any) -> dict[str, Any]:
    """Return a record as the runner writes it."""
    values: dict[str, Any] = {
        "method": "snapkv",
        "budget": 16,
        "protocol": "question-aware",
        "seed": 0,
        "task": "facts",
        "length": None,
        "index": 0,
        "meta": {},
        "error": None,
        "score": 1.0,
        "kept": 64,
        "dense_entries": 256,
        "heads": [[16, 16], [16, 16]],
    }
    return {**values, **changed}
