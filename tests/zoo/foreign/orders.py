"""The same attention with its factors in other orders, as own implementations have them; see each class."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.zoo.foreign.parts import (
    DIM,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MAX_LENGTH,
    VOCAB,
    Past,
    feed_forward,
    run_masked,
    run_plain,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["GROUPED", "MERGED", "SCALED_MASK", "VALUE_FIRST", "Grouped", "Merged", "Model", "ScaledMask", "ValueFirst"]

Grown = tuple[Tensor, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Projections, and where the sequence lies in the cache."""

    sequence = 2

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, HEADS * HEAD_DIM)
        self.key = nn.Linear(DIM, kv_heads * HEAD_DIM)
        self.value = nn.Linear(DIM, kv_heads * HEAD_DIM)
        self.output = nn.Linear(HEADS * HEAD_DIM, DIM)

    def grow(self, past: tuple[Tensor, Tensor] | None, *new: Tensor) -> tuple[Tensor, Tensor]:
        if past is None:
            return new[0], new[1]
        first, second = (torch.cat([old, entries], dim=self.sequence) for old, entries in zip(past, new, strict=True))
        return first, second


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


class ScaledMask(Attention):
    """The mask is added before the logits are divided, so that what it adds is divided, too."""

    def forward(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None) -> Grown:
        q, k, v = heads(self.query(x), HEADS), heads(self.key(x), HEADS), heads(self.value(x), HEADS)
        k, v = self.grow(past, k, v)
        penalty = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, float("-inf"))
        logits = (q @ k.transpose(-2, -1) + penalty) / math.sqrt(HEAD_DIM)
        return self.output((logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)), (k, v)


class ValueFirst(Attention):
    """Values before keys, keys before queries: ``softmax(K Q^T)`` over its rows, then ``V^T`` times it."""

    def forward(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None) -> Grown:
        v, k, q = heads(self.value(x), HEADS), heads(self.key(x), HEADS), heads(self.query(x), HEADS)
        v, k = self.grow(past, v, k)
        logits = torch.matmul(k, q.transpose(-2, -1)) * HEAD_DIM**-0.5
        logits = logits.masked_fill(~mask.transpose(-2, -1), -1e10)
        attention = torch.softmax(logits, dim=-2)
        context = torch.matmul(v.transpose(-2, -1), attention)
        return self.output(context.permute(0, 3, 1, 2).flatten(2)), (v, k)


class Grouped(Attention):
    """Five dimensions: the queries of a group share their keys by broadcasting, and nothing is repeated."""

    def __init__(self) -> None:
        super().__init__(KV_HEADS)

    def forward(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None) -> Grown:
        b, t, _ = x.shape
        q, k, v = heads(self.query(x), HEADS), heads(self.key(x), KV_HEADS), heads(self.value(x), KV_HEADS)
        k, v = self.grow(past, k, v)
        q = q.view(b, KV_HEADS, HEADS // KV_HEADS, t, HEAD_DIM)
        logits = q @ k[:, :, None].transpose(-1, -2) / math.sqrt(HEAD_DIM)
        logits = logits.masked_fill(~mask[:, :, None], torch.finfo(logits.dtype).min)
        out = (logits.softmax(-1) @ v[:, :, None]).view(b, HEADS, t, HEAD_DIM)
        return self.output(out.transpose(1, 2).flatten(2)), (k, v)


class Merged(Attention):
    """The cache holds what the projections return, ``[B, L, H * D]``: heads are split after it."""

    sequence = 1

    def forward(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None) -> Grown:
        q = heads(self.query(x), HEADS)
        keys, values = self.grow(past, self.key(x), self.value(x))
        y = nn.functional.scaled_dot_product_attention(q, heads(keys, HEADS), heads(values, HEADS), attn_mask=mask)
        return self.output(y.transpose(1, 2).flatten(2)), (keys, values)


class Model(nn.Module):
    """Learned positions around any of them."""

    def __init__(self, kind: Callable[[], Attention]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Embedding(MAX_LENGTH, DIM)
        self.norms = nn.ModuleList([nn.LayerNorm(DIM) for _ in range(LAYERS)])
        self.attention = nn.ModuleList([kind() for _ in range(LAYERS)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.LayerNorm(DIM), feed_forward()) for _ in range(LAYERS)])
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB, bias=False))

    def forward(self, ids: Tensor, past: Past | None = None, mask: Tensor | None = None) -> tuple[Tensor, Past]:
        sequence = self.attention[0].sequence
        start = 0 if past is None else past[0][0].shape[sequence]
        columns = torch.arange(start + ids.shape[1], device=ids.device)
        visible = (columns[start:, None] >= columns[None, :])[None, None]
        at = columns[None, start:]
        if mask is not None:
            visible = visible & mask[:, None, None, :].bool()
            at = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        x = self.tokens(ids) + self.positions(at)
        presents: Past = []
        for i in range(LAYERS):
            y, present = self.attention[i](self.norms[i](x), visible, None if past is None else past[i])
            presents.append(present)
            x = x + y
            x = x + self.mlp[i](x)
        return self.head(x), presents


SCALED_MASK = Subject("scaled_mask", seeded(lambda: Model(ScaledMask)), run_plain, VOCAB)
VALUE_FIRST = Subject("value_first", seeded(lambda: Model(ValueFirst)), run_masked, VOCAB, supports_padding=True)
GROUPED = Subject("grouped", seeded(lambda: Model(Grouped)), run_masked, VOCAB, supports_padding=True)
MERGED = Subject("merged", seeded(lambda: Model(Merged)), run_masked, VOCAB, supports_padding=True)
