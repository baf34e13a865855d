"""Conversations held twice: as compressed views, and as dense tensors with a mask of what was kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv_compile.runtime.boundary import wrap_prefill
from adakv_compile.runtime.compressed import CompressedKV

__all__ = ["Conversation", "attention", "check", "conversation", "random_entries"]

HEADS, KEY_DIM, VALUE_DIM = 3, 8, 8


@dataclass(frozen=True)
class Conversation:
    """A layer's views and their dense model.

    Attributes:
        key: Key view.
        value: Value view.
        dense_key: ``[B, H, L, Dk]``.
        dense_value: ``[B, H, L, Dv]``.
        held: ``[B, H, L]`` bool.
        evicted_before: Logical slots from here on were appended after the eviction.
    """

    key: CompressedKV
    value: CompressedKV
    dense_key: Tensor
    dense_value: Tensor
    held: Tensor
    evicted_before: int

    @property
    def batch(self) -> int:
        return self.held.shape[0]

    @property
    def length(self) -> int:
        return self.held.shape[2]

    def dense(self, key: Tensor, value: Tensor, held: Tensor, evicted_before: int | None = None) -> Conversation:
        """Return this conversation with another dense model, the views still to be changed."""
        before = self.evicted_before if evicted_before is None else evicted_before
        return replace(self, dense_key=key, dense_value=value, held=held, evicted_before=before)


def random_entries(batch: int, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[B, H, T, D]`` of new tokens."""
    key = torch.randn(batch, HEADS, tokens, KEY_DIM, generator=generator, dtype=torch.float64)
    value = torch.randn(batch, HEADS, tokens, VALUE_DIM, generator=generator, dtype=torch.float64)
    return key.to(dtype), value.to(dtype)


def conversation(
    seed: int = 0, *, batch: int = 2, length: int = 17, kept: float = 0.5, shorter_rows: bool = True
) -> Conversation:
    """Return a conversation after an eviction of random entries, unevenly over heads, some rows holding fewer."""
    generator = torch.Generator().manual_seed(seed)
    key, value = random_entries(batch, length, torch.float64, generator)
    total = HEADS * length
    entries = round(total * kept)
    held = torch.zeros(batch, HEADS, length, dtype=torch.bool)
    keys, values = torch.zeros(batch, entries, KEY_DIM).double(), torch.zeros(batch, entries, VALUE_DIM).double()
    positions = torch.zeros(batch, entries, dtype=torch.int32)
    offsets = torch.zeros(batch, HEADS + 1, dtype=torch.int32)
    for row in range(batch):
        count = max(entries - row, 0) if shorter_rows else entries
        chosen = torch.randperm(total, generator=generator)[:count].sort().values
        held[row].view(-1)[chosen] = True
        keys[row, :count] = key[row].reshape(total, -1)[chosen]
        values[row, :count] = value[row].reshape(total, -1)[chosen]
        positions[row, :count] = (chosen % length).int()
        offsets[row, 1:] = held[row].sum(-1).cumsum(0)
    views = wrap_prefill(keys, values, offsets, positions, length)
    return Conversation(*views, key, value, held, length)


def attention(query: Tensor, talk: Conversation, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Return dense attention in which evicted slots are masked out, computed without SDPA."""
    group = query.shape[1] // HEADS
    key, value = (t.repeat_interleave(group, dim=1).double() for t in (talk.dense_key, talk.dense_value))
    scores = query.double() @ key.mT / query.shape[-1] ** 0.5
    hidden = ~talk.held.repeat_interleave(group, dim=1)[:, :, None, :].expand_as(scores)
    if is_causal:
        hidden = hidden | ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask.expand_as(scores)
    elif mask is not None:
        scores = scores + mask
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).to(query.dtype)


def check(talk: Conversation, query: Tensor | None = None) -> None:
    """Assert that the views are what the dense model says: shape, entries, positions, and attention for a query."""
    for view, dense in ((talk.key, talk.dense_key), (talk.value, talk.dense_value)):
        assert type(view) is CompressedKV
        assert view.shape == dense.shape
        assert view.dtype == dense.dtype
        found, held = view.dense(fill=7.0)
        assert torch.equal(held, talk.held)
        torch.testing.assert_close(found, dense.masked_fill(~held[..., None], 7.0), rtol=0, atol=0)
        assert torch.equal(view.head_lengths, talk.held.sum(-1))
        for row in range(talk.batch):
            for head in range(HEADS):
                assert torch.equal(view.positions(row, head), talk.held[row, head].nonzero()[:, 0])
    if query is not None:
        out = F.scaled_dot_product_attention(query, talk.key, talk.value, enable_gqa=True)
        torch.testing.assert_close(out, attention(query, talk), rtol=2e-4, atol=2e-5)
