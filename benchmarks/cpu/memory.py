"""What a cache holds, step by step, and whether conversations leave anything behind."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import adakv_compile
from adakv_compile.kernels.decode_attention import CURSOR_SIZE
from adakv_compile.runtime.store import LayerStore
from adakv_compile.runtime.tail import FIRST_TAIL_CAPACITY
from benchmarks.cpu.decoders import TINY, Shape, build, compiled
from benchmarks.cpu.run import Run, at_most
from benchmarks.cpu.steps import stepper

__all__ = ["bytes_of", "run"]

_CONVERSATIONS: Final = 200


def run(run: Run) -> None:
    """Follow the bytes of one generation, then have many conversations."""
    shape = TINY if run.smoke else Shape(4, 8, 4, 64, 512, 1000)
    budget, prompt = (48, 128) if run.smoke else (512, 4096)
    model = build(shape)
    ours = compiled(model, "adakv", budget=budget)
    ids = torch.randint(shape.vocabulary, (1, prompt))
    with torch.no_grad():
        cache = ours(ids, use_cache=True, logits_to_keep=1).past_key_values
    _steps(run, shape, budget, cache, stepper(ours, cache), (0, 1, 70) if run.smoke else (0, 1, 64, 65, 500, 1000))
    del cache
    _conversations(run, shape, ours, ids[:, :128], 12 if run.smoke else _CONVERSATIONS)


def bytes_of(shape: Shape, budget: int, tokens: int) -> int:
    """Return the bytes of a cache by its description: entries, positions, offsets, cursor, and a tail that doubles."""
    capacity = FIRST_TAIL_CAPACITY if tokens else 0
    while capacity < tokens:
        capacity *= 2
    entries = shape.kv_bytes(budget + capacity)
    integers = shape.kv_heads * budget + shape.kv_heads + 1 + CURSOR_SIZE
    return entries + 4 * shape.layers * integers


def _steps(run: Run, shape: Shape, budget: int, cache: Any, step: Callable[[], object], moments: Sequence[int]) -> None:
    done = 0
    for moment in moments:
        for _ in range(moment - done):
            step()
        done = moment
        held = adakv_compile.cache_stats(cache).bytes_held
        described = bytes_of(shape, budget, moment)
        run.figure(f"token {moment}: cache held", "MiB", held / 2**20)
        run.figure(f"token {moment}: held over the description", "x", held / described, "description", at_most(1.0))
        least = shape.kv_bytes(budget + moment)
        run.figure(f"token {moment}: held over keys and values of its entries", "x", held / least, "entries alone")


def _conversations(run: Run, shape: Shape, model: Callable[..., Any], ids: Tensor, count: int) -> None:
    """Have conversations one after the other, each dropped; what the first tenth left is what all may leave."""

    def converse() -> None:
        with torch.no_grad():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        step = stepper(model, cache)
        for _ in range(4):
            step()

    first = max(count // 10, 1)
    for _ in range(first):
        converse()
    before = _alive()
    for _ in range(count - first):
        converse()
    after = _alive()
    what = f"{count} conversations, from {first} on"
    for name, unit in (("tensors", ""), ("tensor bytes", "B"), ("stores", "")):
        run.figure(f"{what}: more {name} alive", unit, after[name] - before[name], target=at_most(0))
    run.figure(f"{what}: more resident memory", "MiB", (after["resident"] - before["resident"]) / 2**20)


def _alive() -> dict[str, int]:
    gc.collect()
    found = gc.get_objects()
    tensors = [one for one in found if type(one) is Tensor]
    status = Path("/proc/self/statm")
    if status.exists():
        resident = int(status.read_text().split()[1]) * resource.getpagesize()
    else:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {
        "tensors": len(tensors),
        "tensor bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        "stores": sum(type(one) is LayerStore for one in found),
        "resident": resident,
    }
