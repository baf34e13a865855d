"""The attention operator of a decode step against a copy of the bytes that it reads.

As in a model, the layers' calls follow each other, so that a layer's entries are no longer in the nearest caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv_compile.kernels.decode_attention import SPEC
from adakv_compile.runtime.store import LayerStore
from benchmarks.cpu import caches
from benchmarks.cpu.decoders import LARGE, SMALL, TINY, Shape, build
from benchmarks.cpu.run import Run, ratios
from benchmarks.cpu.steps import time_steps
from benchmarks.cpu.timing import flat

__all__ = ["run"]


def run(run: Run) -> None:
    """Time the operator from few entries to many."""
    for name, shape in {"tiny": TINY}.items() if run.smoke else {"12/4 heads": SMALL, "32/8 heads": LARGE}.items():
        counts = (16, 48) if run.smoke else (128, 512, 2048, 8192)
        seen = [
            _compare(run, f"{name} of {shape.dim}, {entries} entries a head", shape, entries)
            for entries in counts
            if run.has_time(f"{name}, {entries} entries", 0 if run.smoke else 5)
        ]
        run.series("op", f"{name} of {shape.dim}, over a copy", counts[: len(seen)], seen)


def _compare(run: Run, what: str, shape: Shape, entries: int) -> list[float]:
    model = build(TINY)  # for its configuration's class alone: the caches are of the other shape
    model.config.num_hidden_layers = shape.layers
    cache: Any = caches.compressed(model, shape, 4 * entries, entries, tail=1)
    stores: list[LayerStore] = [layer.keys.store for layer in cache.layers]
    dense = [torch.randn(2, 1, shape.kv_heads, entries, shape.dim) for _ in stores]
    targets = [(torch.empty_like(store.keys), torch.empty_like(store.values)) for store in stores]
    query = torch.randn(1, shape.query_heads, 1, shape.dim)
    contenders: dict[str, Callable[[], Any]] = {
        "operator": lambda: [_attend(store, query) for store in stores],
        "copy": lambda: [
            (key.copy_(store.keys), value.copy_(store.values))
            for (key, value), store in zip(targets, stores, strict=True)
        ],
        "dense SDPA": lambda: [
            F.scaled_dot_product_attention(query, pair[0], pair[1], enable_gqa=True) for pair in dense
        ],
    }
    times = time_steps(run, contenders, rounds=16, calls=3, share=0.3)
    for name, rounds in times.items():
        run.figure(f"{what}: {name}, a layer", "us", flat(rounds, 1e6 / shape.layers), entries=entries)
    over = ratios(times["operator"], times["copy"])
    run.figure(f"{what}: operator over a copy", "x", over, "copy of keys and values", entries=entries)
    against = "dense SDPA of as many entries"
    run.figure(f"{what}: operator over SDPA", "x", ratios(times["operator"], times["dense SDPA"]), against)
    return over


def _attend(store: LayerStore, query: Tensor) -> Tensor:
    """Attend with one token, which is appended, and forget it again: the tail keeps its length."""
    new = query[:, : store.num_kv_heads]
    prefix = (store.keys, store.values, store.offsets, store.positions)
    tail = (store.tail_keys, store.tail_values, store.cursor)
    softmax = (query.shape[-1] ** -0.5, None, None)
    result = SPEC.overload(query, new, new, *prefix, *tail, None, None, None, *softmax)
    store.cursor[0] = store.tail_length
    return result
