"""Learned logits that take part in the softmax and have no value, as in GPT-OSS; the cache is an object that grows."""

from __future__ import annotations

import torch
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

__all__ = ["SUBJECT", "KVCache", "Model"]


class KVCache:
    """Keys and values of all layers, ``[B, H, L, D]`` each."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __len__(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], k), dim=2)
            self.values[layer] = torch.cat((self.values[layer], v), dim=2)
        return self.keys[layer], self.values[layer]


class AttentionBlock(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.RMSNorm(DIM)
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(b, n, -1, HEAD_DIM).transpose(1, 2)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        k, v = cache.extend(self.layer, rotate_half(k, cos, sin), v)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        qk = torch.matmul(rotate_half(q, cos, sin), k.transpose(2, 3)) * HEAD_DIM**-0.5
        qk = qk + mask
        s = self.sinks.reshape(1, -1, 1, 1).expand(b, -1, n, -1)
        w = torch.softmax(torch.cat([qk, s], dim=-1), dim=-1)
        w = w[..., :-1]
        return x + self.out(torch.matmul(w, v).transpose(1, 2).reshape(b, n, -1))


class Model(nn.Module):
    """Rotary positions; masks are added."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.attention = nn.ModuleList([AttentionBlock(i) for i in range(LAYERS)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.RMSNorm(DIM), feed_forward()) for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(DIM)
        self.unembedding = nn.Linear(DIM, VOCAB, bias=False)
        self.register_buffer("angles", angles(), persistent=False)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        cache = KVCache() if cache is None else cache
        past, n = len(cache), x.shape[1]
        ones = torch.ones(n, past + n, dtype=torch.bool, device=x.device)
        visible = ones.tril(diagonal=past)[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :].to(torch.bool)
        mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, float("-inf"))
        at = self.angles[past : past + n]
        h = self.embedding(x)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            h = attention(h, at.cos(), at.sin(), mask, cache)
            h = h + mlp(h)
        return self.unembedding(self.norm(h)), cache


SUBJECT = Subject("sinks", seeded(Model), run_masked, VOCAB, supports_padding=True)
