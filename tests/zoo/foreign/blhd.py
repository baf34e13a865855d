"""Caches that keep the sequence before the heads, ``[B, L, H, D]``; transposed only for the operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.foreign.parts import (
    DIM,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    angles,
    feed_forward,
    rotate_half,
    run_masked,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Decoder"]

LayerCache = dict[str, Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: LayerCache) -> Tensor:
        batch, length, _ = x.shape
        q = rotate_half(self.wq(x).view(batch, length, HEADS, HEAD_DIM), *rope)
        k = rotate_half(self.wk(x).view(batch, length, KV_HEADS, HEAD_DIM), *rope)
        v = self.wv(x).view(batch, length, KV_HEADS, HEAD_DIM)
        if "k" in cache:
            k = torch.cat([cache["k"], k], dim=1)
            v = torch.cat([cache["v"], v], dim=1)
        cache["k"], cache["v"] = k, v
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
        )
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(DIM)
        self.attention = Attention()
        self.ffn_norm = nn.RMSNorm(DIM)
        self.feed_forward = feed_forward()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: LayerCache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    """Rotary positions counted over columns; padding is hidden by the mask."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.register_buffer("angles", angles(), persistent=False)

    def forward(
        self, ids: Tensor, caches: list[LayerCache] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[LayerCache]]:
        past = 0 if caches is None else caches[0]["k"].shape[1]
        caches = [{} for _ in self.layers] if caches is None else [dict(cache) for cache in caches]
        position = torch.arange(past, past + ids.shape[1], device=ids.device)
        visible = (position[:, None] >= torch.arange(past + ids.shape[1], device=ids.device))[None, None]
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, :]
        at = self.angles[position][:, None]
        x = self.embed(ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, (at.cos(), at.sin()), visible, cache)
        return self.head(self.norm(x)), caches


SUBJECT = Subject("blhd", seeded(Decoder), run_masked, VOCAB, supports_padding=True)
