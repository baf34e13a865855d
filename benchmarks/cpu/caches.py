"""Caches as a prompt of any length would leave them, without the prompt.

The time of a step depends on how many entries there are and how the heads share them, not on their values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from adakv_compile.runtime.boundary import wrap_grown, wrap_prefill
from benchmarks.cpu.decoders import Shape
from benchmarks.gpu.shapes import head_lengths

__all__ = ["SKEW", "compressed", "dense", "static"]

SKEW = 2
"""Longest head over mean: one head of four holds half of a layer's entries, the others a sixth each."""


def dense(model: Any, shape: Shape, length: int) -> DynamicCache:
    """Return a full cache that grows by copying, as transformers makes it by default."""
    cache = DynamicCache(config=model.config)
    for layer in range(shape.layers):
        keys, values = (torch.randn(1, shape.kv_heads, length, shape.dim) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def static(model: Any, shape: Shape, length: int, room: int) -> StaticCache:
    """Return a full cache in buffers with ``room`` more entries."""
    cache: Any = StaticCache(config=model.config, max_cache_len=length + room)
    cache.early_initialization(1, shape.kv_heads, shape.dim, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        layer.keys[:, :, :length].normal_()
        layer.values[:, :, :length].normal_()
        layer.cumulative_length.fill_(length)
    return cache


def compressed(model: Any, shape: Shape, length: int, budget: int, tail: int = 0, skew: int = SKEW) -> DynamicCache:
    """Return a compressed cache of ``length`` tokens.

    Args:
        model: For its configuration.
        shape: Its sizes.
        length: Tokens seen, the tail included.
        budget: Entries that a KV head keeps on average, no more than the prompt had.
        tail: Tokens of these that were appended since the prompt.
        skew: Longest head over mean. The longest heads of the layers are different ones.
    """
    prompt = length - tail
    budget = min(budget, prompt)
    skew = min(skew, shape.kv_heads, prompt // budget)
    cache: Any = DynamicCache(config=model.config)
    empty = torch.empty(1, shape.kv_heads, 0, shape.dim)
    for number, layer in enumerate(cache.layers):
        layer.lazy_initialization(empty, empty)
        lengths = head_lengths(budget, shape.kv_heads, skew)
        turn = number % shape.kv_heads
        prefix = _prefix(shape, lengths[-turn:] + lengths[:-turn] if turn else lengths, prompt)
        layer.keys, layer.values = wrap_prefill(*prefix, prompt)
        if tail:
            store = layer.keys.store
            store.append(*(torch.randn(1, shape.kv_heads, tail, shape.dim) for _ in range(2)))
            layer.keys, layer.values = wrap_grown(store, length)
    return cache


def _prefix(shape: Shape, lengths: list[int], prompt: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keys, values, offsets and positions of what an eviction could have kept."""
    entries = sum(lengths)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    # Spread over the prompt, ascending and distinct within a head.
    positions = [(torch.arange(count) * prompt).div(max(count, 1), rounding_mode="floor") for count in lengths]
    keys, values = (torch.randn(1, entries, shape.dim) for _ in range(2))
    return keys, values, ends[None], torch.cat(positions).to(torch.int32)[None]
