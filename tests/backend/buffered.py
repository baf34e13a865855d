"""A layer's attention to two preallocated buffers, and the truth about what compressed ones compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

import adakv_compile
from adakv_compile import Reason
from adakv_compile.runtime.side import attached
from adakv_compile.runtime.store import LayerStore

__all__ = [
    "BATCH",
    "BUDGET",
    "DIM",
    "HEADS",
    "KV_HEADS",
    "LENGTH",
    "OPTIONS",
    "SLOTS",
    "STEPS",
    "Attention",
    "at",
    "attend",
    "buffers",
    "causal",
    "compiled",
    "follow",
    "leave",
    "masked",
    "place",
    "store_of",
    "tokens",
]

BATCH, HEADS, KV_HEADS, SLOTS, DIM = 2, 4, 2, 64, 8
LENGTH, STEPS, BUDGET = 40, 4, 12

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Any], Tensor]
"""``attention(k_cache, v_cache, q, k, v, position)``; caches are written in place."""

OPTIONS: Final[dict[str, Any]] = {"budget": BUDGET, "window": 4, "inner": "eager"}


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def at(count: int, position: Tensor) -> Tensor:
    return torch.arange(count) + position


def causal(index: Tensor) -> Tensor:
    return torch.arange(SLOTS)[None, :] <= index[:, None]


def buffers(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, KV_HEADS, SLOTS, DIM), torch.zeros(batch, KV_HEADS, SLOTS, DIM)


def tokens(count: int, seed: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(batch, HEADS, count, DIM, generator=generator)
    k, v = (torch.randn(batch, KV_HEADS, count, DIM, generator=generator) for _ in range(2))
    return q, k, v


def compiled(attention: Attention, budget: int = BUDGET) -> Attention:
    torch.compiler.reset()
    return torch.compile(attention, backend="adakv", options={**OPTIONS, "budget": budget})


def place(position: int, *, by_tensor: bool) -> Any:
    """Return a position as an attention takes it."""
    return torch.tensor(position) if by_tensor else position


def store_of(kc: Tensor, vc: Tensor) -> LayerStore | None:
    side = attached(kc, vc)
    return None if side is None else side.store


def masked(store: LayerStore, kc: Tensor, vc: Tensor, q: Tensor, length: int, first: int = 0) -> Tensor:
    """Return attention of one query to the dense buffers: what a store holds is seen, if not before ``first``."""
    seen = torch.zeros(q.shape[0], KV_HEADS, SLOTS, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(KV_HEADS):
            begin, end = store.offsets[b, h], store.offsets[b, h + 1]
            seen[b, h, store.positions[b, begin:end].long()] = True
    seen[:, :, store.prefix_length : length] = True
    seen[:, :, :first] = False
    return attend(q, kc, vc, seen.repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None])


@torch.no_grad()
def follow(attention: Attention, *, by_tensor: bool, prompt: Attention | None = None) -> None:
    """Assert that a conversation attends to what was kept, and that its buffers are those of the uncompressed one.

    Args:
        attention: Writes and attends.
        by_tensor: Whether it takes its position as a tensor.
        prompt: Does so for the prompt, if that is not the same.
    """
    prompt = prompt or attention
    (kc, vc), (dense_k, dense_v), start = buffers(), buffers(), place(0, by_tensor=by_tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = compiled(prompt)(kc, vc, *tokens(LENGTH), start)
        torch.testing.assert_close(out, prompt(dense_k, dense_v, *tokens(LENGTH), start))
        run = compiled(attention)
        for step in range(STEPS):
            q, k, v = tokens(1, seed=step + 1)
            position = place(LENGTH + step, by_tensor=by_tensor)
            out = run(kc, vc, q, k, v, position)
            attention(dense_k, dense_v, q, k, v, position)
            store = store_of(kc, vc)
            assert store is not None
            assert (store.length, store.tail_length) == (LENGTH + step + 1, step + 1)
            assert store.offsets[:, -1].tolist() == [KV_HEADS * BUDGET] * BATCH
            torch.testing.assert_close(out, masked(store, dense_k, dense_v, q, LENGTH + step + 1))
            assert torch.equal(kc, dense_k)
            assert torch.equal(vc, dense_v)


@torch.no_grad()
def leave(attention: Attention, reason: Reason, *, by_tensor: bool, counts: tuple[int, ...] = (LENGTH, 1)) -> None:
    """Assert that an attention is refused, and computes what it would.

    Args:
        attention: Writes and attends.
        reason: Why it is left alone.
        by_tensor: Whether it takes its position as a tensor.
        counts: Tokens of the calls.
    """
    torch.compiler.reset()
    start = place(0, by_tensor=by_tensor)
    report = adakv_compile.explain(attention, *buffers(), *tokens(counts[0]), start, options=OPTIONS)
    assert [site.refusal.reason for site in report.sites if site.refusal] == [reason]
    (kc, vc), (dense_k, dense_v) = buffers(), buffers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, begin = compiled(attention), 0
        for count in counts:
            new, position = tokens(count, seed=begin), place(begin, by_tensor=by_tensor)
            out = run(kc, vc, *new, position)
            torch.testing.assert_close(out, attention(dense_k, dense_v, *new, position))
            torch.testing.assert_close((kc, vc), (dense_k, dense_v))
            begin += count
    assert store_of(kc, vc) is None
