"""The decoder of an encoder-decoder: a cache that grows, and keys and values of the source that are made only once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.foreign.parts import DIM, HEAD_DIM, HEADS, LAYERS, MAX_LENGTH, VOCAB, feed_forward, seeded
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Seq2Seq"]

SOURCE = 37

LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values of the own tokens, then those of the source."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM)
        self.k_proj = nn.Linear(DIM, DIM)
        self.v_proj = nn.Linear(DIM, DIM)
        self.out_proj = nn.Linear(DIM, DIM)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, HEAD_DIM).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.scaled_dot_product_attention(self.heads(self.q_proj(x)), k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).reshape(x.shape))


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.self_attn_norm = nn.LayerNorm(DIM)
        self.cross_attn = Attention()
        self.cross_attn_norm = nn.LayerNorm(DIM)
        self.ff = nn.Sequential(nn.LayerNorm(DIM), feed_forward())

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor, past: LayerPast | None) -> tuple[Tensor, LayerPast]:
        h = self.self_attn_norm(x)
        k, v = self.self_attn.project(h)
        if past is None:
            source_k, source_v = self.cross_attn.project(memory)
        else:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            source_k, source_v = past[2], past[3]
        x = x + self.self_attn(h, k, v, mask)
        x = x + self.cross_attn(self.cross_attn_norm(x), source_k, source_v)
        return x + self.ff(x), (k, v, source_k, source_v)


class Seq2Seq(nn.Module):
    """The forward is the decoder's; the source is one and the same for every row."""

    source: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Embedding(MAX_LENGTH, DIM)
        self.encoder = nn.Sequential(nn.LayerNorm(DIM), feed_forward(), nn.LayerNorm(DIM))
        self.layers = nn.ModuleList([DecoderLayer() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(DIM)
        self.register_buffer("source", torch.arange(2, 2 + SOURCE)[None])

    def encode(self, batch: int) -> Tensor:
        """Return what the decoder attends to, ``[batch, SOURCE, DIM]``."""
        at = torch.arange(SOURCE, device=self.source.device)
        return self.encoder(self.embed(self.source) + self.positions(at)).expand(batch, -1, -1)

    def forward(
        self, ids: Tensor, memory: Tensor, past: tuple[LayerPast, ...] | None = None
    ) -> tuple[Tensor, tuple[LayerPast, ...]]:
        start = 0 if past is None else past[0][0].shape[2]
        at = torch.arange(start + ids.shape[1], device=ids.device)
        mask = at[start:, None] >= at[None, :]
        x = self.embed(ids) + self.positions(at[start:])
        presents: list[LayerPast] = []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, memory, mask, None if past is None else past[i])
            presents.append(present)
        return F.linear(self.norm(x), self.embed.weight), tuple(presents)


def run(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    assert mask is None
    assert isinstance(model, Seq2Seq)
    with torch.no_grad():
        memory, past = (model.encode(ids.shape[0]), None) if state is None else state
    logits, past = model(ids, memory, past)
    return logits, (memory, past)


SUBJECT = Subject("cross", seeded(Seq2Seq), run, VOCAB, windows=(SOURCE,))
