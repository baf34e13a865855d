"""Decoders of one layer that keep their cache in some layout, and the truth about what compressed ones compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakv_compile import CompressedKV
from tests.backend.decoders import OneLayer, causal

__all__ = [
    "BY_HEAD",
    "HEAD_DIM",
    "KV_HEADS",
    "Form",
    "Laid",
    "Visible",
    "follow",
    "grown",
    "is_compressed",
    "only_causal",
]

HEAD_DIM, KV_HEADS = 16, 2

Cached = tuple[Tensor, ...]
Visible = Callable[[int, int], Tensor]
"""``visible(new, total)``: booleans that broadcast to ``[B, Hq, new, total]``."""
Pack = Callable[[Tensor, Tensor], Cached]
Extend = Callable[[Cached, Tensor, Tensor], Cached]
Read = Callable[[Cached, int], tuple[Tensor, Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def wide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend with the operator."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@dataclass(frozen=True)
class Form:
    """How a decoder keeps its cache.

    Attributes:
        pack: New keys and values ``[B, Hkv, T, D]`` as they are cached.
        extend: The old part of the cache and new keys and values ``[B, Hkv, T, D]`` to the whole.
        read: The whole and the number of rows of the batch to what attention reads.
        attend: Queries, keys, values and mask to ``[B, Hq, T, D]``.
        reorder: The cache and rows to the cache of these rows, as beam search does it.
        kv_heads: Heads of the cache.
        value_dim: Head dimension of the values.
    """

    pack: Pack
    extend: Extend
    read: Read
    attend: Attend = wide
    reorder: Callable[[Cached, Tensor], Cached] = lambda cache, rows: tuple(t.index_select(0, rows) for t in cache)
    kv_heads: int = KV_HEADS
    value_dim: int = HEAD_DIM


def grown(pack: Pack, dim: int, read: Read, **rest: Any) -> Form:
    """Return a form in which all tensors of a cache grow along one dimension; ``rest`` as in :class:`Form`."""

    def extend(old: Cached, k: Tensor, v: Tensor) -> Cached:
        return tuple(torch.cat([a, b], dim=dim) for a, b in zip(old, pack(k, v), strict=True))

    return Form(pack, extend, read, **rest)


BY_HEAD: Final = grown(lambda k, v: (k, v), 2, lambda kv, _: (kv[0], kv[1]))
"""``[B, Hkv, L, D]``."""


class Laid(OneLayer):
    """A decoder whose cache has a form."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.visible: Visible = causal

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        q, k, v = self.project(x)
        form = self.form
        k, v = k[:, : form.kv_heads], v[:, : form.kv_heads, :, : form.value_dim]
        whole = form.pack(k, v) if cache is None else form.extend(cache, k, v)
        k, v = form.read(whole, x.shape[0])
        return form.attend(q, k, v, self.visible(q.shape[2], k.shape[-2])).transpose(1, 2).flatten(2), whole


def only_causal(held: Tensor, heads: int) -> Visible:
    """Return a mask under which ``held`` slots ``[B, Hkv, L]`` and new ones are seen, no later than a query.

    Args:
        held: What a compressed cache still holds.
        heads: Query heads.
    """

    def visible(new: int, total: int) -> Tensor:
        fresh = held.new_ones(*held.shape[:2], total - held.shape[2])
        seen = torch.cat([held, fresh], -1).repeat_interleave(heads // held.shape[1], 1)
        return seen[:, :, None] & causal(new, total)

    return visible


def is_compressed(cache: Any) -> bool:
    """Tell whether every tensor of a cache is compressed."""
    return all(isinstance(tensor, CompressedKV) for tensor in cache)


def follow(
    compiled: nn.Module, truth: Laid, x: Tensor, lengths: tuple[int, ...], *, budget: int, rows: Tensor | None = None
) -> None:
    """Assert that a conversation is the dense one in which evicted entries are masked out.

    Args:
        compiled: The decoder, compiled.
        truth: The decoder itself; its mask is changed.
        x: ``[B, T, 64]``, all tokens.
        lengths: How many of them every call takes; the first one is the prompt.
        budget: Entries of a head after a prompt and after several tokens.
        rows: Rows that the batch goes on with after the first step.
    """
    cache: Any = None
    dense: Any = None
    truth.visible = causal
    begin = 0
    for call, count in enumerate(lengths):
        if call == 2 and rows is not None:
            x, cache, dense = x[rows], truth.form.reorder(cache, rows), truth.form.reorder(dense, rows)
        if cache is not None:
            truth.visible = only_causal(cache[0].dense()[1], 4)
        tokens = x[:, begin : begin + count]
        begin += count
        with torch.no_grad():
            found, cache = compiled(tokens, cache)
            expected, dense = truth(tokens, dense)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert is_compressed(cache)
        for compressed, whole in zip(cache, dense, strict=True):
            assert compressed.shape == whole.shape
        if count > 1:
            assert (cache[0].head_lengths.sum(-1) == truth.form.kv_heads * min(budget, begin)).all()
        _holds(truth.form, cache, dense, x.shape[0])


def _holds(form: Form, cache: Any, dense: Any, batch: int) -> None:
    """Assert that what is held is what the decoder cached, to the last bit."""
    held = cache[0].dense()[1]
    found = form.read(tuple(tensor.dense()[0] for tensor in cache), batch)
    for ours, theirs in zip(found, form.read(dense, batch), strict=True):
        assert torch.equal(ours, theirs.masked_fill(~held[..., None], 0.0))
