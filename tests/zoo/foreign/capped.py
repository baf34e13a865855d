"""A soft cap of the logits as in Gemma 2, and a cache in attributes of the modules that ``reset()`` forgets."""

from __future__ import annotations

from typing import Any

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
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Model"]

SOFT_CAP = 3.0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.scaling = HEAD_DIM**-0.5
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def reset(self) -> None:
        self.k = self.v = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(b, n, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(b, n, KV_HEADS, HEAD_DIM).transpose(1, 2)
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        if self.k is not None and self.v is not None:
            k = torch.cat([self.k, k], dim=2)
            v = torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        k = torch.repeat_interleave(k, HEADS // KV_HEADS, dim=1)
        v = torch.repeat_interleave(v, HEADS // KV_HEADS, dim=1)
        scores = torch.matmul(q * self.scaling, k.transpose(2, 3))
        scores = scores / SOFT_CAP
        scores = torch.tanh(scores)
        scores = scores * SOFT_CAP
        scores = nn.functional.softmax((scores + mask).float(), dim=-1).type_as(q)
        return self.o_proj(torch.matmul(scores, v).transpose(1, 2).reshape(b, n, -1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(DIM) for _ in range(4)])
        self.self_attn = Attention()
        self.mlp = feed_forward()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.norms[1](self.self_attn(self.norms[0](x), cos, sin, mask))
        return x + self.norms[3](self.mlp(self.norms[2](x)))


class Model(nn.Module):
    """Norms before and after each part; embeddings scaled by the root of their size."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(DIM)
        self.past = 0
        self.register_buffer("angles", angles(), persistent=False)

    def reset(self) -> None:
        """Forget the conversation."""
        self.past = 0
        for module in self.modules():
            if isinstance(module, Attention):
                module.reset()

    def forward(self, ids: Tensor, past: int, mask: Tensor | None = None) -> Tensor:
        n = ids.shape[1]
        causal = torch.full((n, past + n), torch.finfo(torch.float32).min, device=ids.device).triu(past + 1)[None, None]
        if mask is not None:
            padding = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            causal = torch.minimum(causal, padding)
        at = self.angles[past : past + n]
        x = self.embedder(ids) * DIM**0.5
        for layer in self.layers:
            x = layer(x, at.cos(), at.sin(), causal)
        return torch.matmul(self.norm(x), self.embedder.weight.t())


def run(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    assert isinstance(model, Model)
    if state is None:
        model.reset()
    logits = model(ids, model.past, mask)
    model.past += ids.shape[1]
    return logits, model


SUBJECT = Subject("capped", seeded(Model), run, VOCAB, supports_padding=True)
