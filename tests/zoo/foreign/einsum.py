"""Everything by ``einsum``, in the style of ports from JAX: ``[B, L, H, D]`` throughout, softmax in float32."""

from __future__ import annotations

import math
from typing import NamedTuple

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
    rotate_pairs,
    run_masked,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Transformer"]


class KV(NamedTuple):
    k: Tensor
    v: Tensor


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Parameter(torch.empty(DIM, HEADS, HEAD_DIM))
        self.k_proj = nn.Parameter(torch.empty(DIM, KV_HEADS, HEAD_DIM))
        self.v_proj = nn.Parameter(torch.empty(DIM, KV_HEADS, HEAD_DIM))
        self.o_proj = nn.Parameter(torch.empty(HEADS, HEAD_DIM, DIM))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, memory: KV | None) -> tuple[Tensor, KV]:
        # The weights are drawn for an input of HEAD_DIM, DIM is twice its root.
        q = torch.einsum("btm,mhd->bthd", x / 2, self.q_proj)
        k = torch.einsum("btm,mhd->bthd", x / 2, self.k_proj)
        v = torch.einsum("btm,mhd->bthd", x / 2, self.v_proj)
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        if memory is not None:
            k = torch.cat((memory.k, k), dim=1)
            v = torch.cat((memory.v, v), dim=1)
        memory = KV(k, v)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=2)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(HEAD_DIM)
        logits = torch.where(mask, logits, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return torch.einsum("bqhd,hdm->bqm", out, self.o_proj), memory


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.RMSNorm(DIM), feed_forward())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, memory: KV | None) -> tuple[Tensor, KV]:
        y, grown = self.attention(self.norm(x), cos, sin, mask, memory)
        x = x + y
        return x + self.mlp(x), grown


class Transformer(nn.Module):
    """Rotation of neighbouring pairs; the cache is a tuple of named tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(VOCAB, DIM))
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(DIM)

    def forward(
        self, tokens: Tensor, memory: tuple[KV, ...] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[KV, ...]]:
        past = 0 if memory is None else memory[0].k.shape[1]
        length = past + tokens.shape[1]
        keys = torch.arange(length, device=tokens.device)
        queries = keys[past:]
        visible = (queries[:, None] >= keys[None, :])[None, None]
        if mask is not None:
            visible = torch.logical_and(visible, (mask != 0)[:, None, None])
        at = angles(length)[past:, None].to(tokens.device)
        x = self.embedding[tokens]
        grown: list[KV] = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, at.cos(), at.sin(), visible, None if memory is None else memory[i])
            grown.append(kv)
        return torch.einsum("btm,vm->btv", self.norm(x), self.embedding), tuple(grown)


SUBJECT = Subject("einsum", seeded(Transformer), run_masked, VOCAB, supports_padding=True)
