"""Which rewritten graphs a CUDA graph can replay (``mode="reduce-overhead"``), and what must not be copied then."""

from __future__ import annotations

import torch

from adakv_compile import _torch
from adakv_compile.call import Made, Passed, StorePart
from adakv_compile.passes.rewrite import Rewritten

__all__ = ["makes_cache", "origins", "static_inputs", "why_not_replayed"]


def why_not_replayed(rewritten: Rewritten) -> str | None:
    """Return why a graph must not be recorded as a CUDA graph, None if it can be.

    A recording holds for one set of sizes and integers, and the memory of its results is used again by the next replay.
    """
    boundary = rewritten.boundary
    if makes_cache(rewritten):
        return "it makes a cache, which outlives the replay"
    passed = [
        example
        for source, example in zip(boundary.inputs, rewritten.inputs, strict=True)
        if not isinstance(source, StorePart)
    ]
    # A batch is as large in the next step; whatever else is symbolic grows with the text.
    tensors = [example for example in passed if isinstance(example, torch.Tensor)]
    batch = frozenset[object]().union(*(_torch.symbols_of(tensor.shape[:1]) for tensor in tensors))
    growing = [example for example in passed if _torch.symbols_of(_sizes(example)) - batch]
    if growing:
        sizes = ", ".join(str(list(_sizes(example))) for example in growing)
        return f"inputs of sizes {sizes} change with every token (an attention mask of a padded batch, say)"
    return None


def makes_cache(rewritten: Rewritten) -> bool:
    """Whether a graph makes a store, as that of a prompt does; such graphs are long enough not to need replaying."""
    return any(isinstance(output, Made) for output in rewritten.boundary.outputs)


def static_inputs(rewritten: Rewritten) -> tuple[int, ...]:
    """Return the inputs that keep their memory from step to step: the parts of the stores, which the graph writes to.

    The parameters among the others are known to Dynamo.
    """
    return tuple(i for i, source in enumerate(rewritten.boundary.inputs) if isinstance(source, StorePart))


def origins(rewritten: Rewritten) -> tuple[int | None, ...]:
    """Return for each input the placeholder of Dynamo's graph that it is, None for those that are ours."""
    return tuple(source.index if isinstance(source, Passed) else None for source in rewritten.boundary.inputs)


def _sizes(example: object) -> tuple[int | torch.SymInt, ...]:
    if isinstance(example, torch.Tensor):
        return tuple(example.shape)
    return (example,) if isinstance(example, torch.SymInt) else ()
