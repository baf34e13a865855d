"""Relative positions as T5 has them: a learned bias per bucket of distances, added to logits that aren't scaled."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.foreign.parts import DIM, HEAD_DIM, HEADS, LAYERS, VOCAB, Past, feed_forward, run_masked, seeded
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Decoder"]

BUCKETS, MAX_DISTANCE = 16, 40


def relative_position_bucket(distance: Tensor) -> Tensor:
    """Return the bucket of every distance to the past: one each for small ones, then ever wider ones (Raffel, 2020)."""
    distance = distance.clamp(min=0)
    exact = BUCKETS // 2
    ratio = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (ratio * (BUCKETS - exact)).to(torch.long)).clamp(max=BUCKETS - 1)
    return torch.where(distance < exact, distance, far)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.o = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)

    def shape(self, states: Tensor) -> Tensor:
        return states.view(states.shape[0], -1, HEADS, HEAD_DIM).transpose(1, 2)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, position_bias: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        # The root of the head size is in the queries' weights, as T5's initialisation has it.
        q, k, v = self.shape(self.q(x) * 0.25), self.shape(self.k(x)), self.shape(self.v(x))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += position_bias
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        weights = nn.functional.dropout(weights, p=0.1, training=self.training)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous().view(x.shape[0], -1, HEADS * HEAD_DIM)
        return self.o(out), (k, v)


class Decoder(nn.Module):
    """The bias is made once and serves every layer, with the mask in it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCAB, DIM)
        self.relative_attention_bias = nn.Embedding(BUCKETS, HEADS)
        self.norms = nn.ModuleList([nn.RMSNorm(DIM) for _ in range(LAYERS)])
        self.attention = nn.ModuleList([Attention() for _ in range(LAYERS)])
        self.ff = nn.ModuleList([nn.Sequential(nn.RMSNorm(DIM), feed_forward()) for _ in range(LAYERS)])
        self.final_layer_norm = nn.RMSNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def compute_bias(self, past: int, total: int) -> Tensor:
        columns = torch.arange(total, device=self.shared.weight.device)
        bucket = relative_position_bucket(columns[past:, None] - columns[None, :])
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, ids: Tensor, past: Past | None = None, mask: Tensor | None = None) -> tuple[Tensor, Past]:
        past_length = 0 if past is None else past[0][0].shape[2]
        total = past_length + ids.shape[1]
        columns = torch.arange(total, device=ids.device)
        visible = (columns[None, :] <= columns[past_length:, None]).to(torch.float32)[None, None]
        if mask is not None:
            visible = visible * mask[:, None, None, :].to(torch.float32)
        position_bias = self.compute_bias(past_length, total) + (1.0 - visible) * torch.finfo(torch.float32).min
        x = self.shared(ids)
        presents: Past = []
        for i, (norm, attention, ff) in enumerate(zip(self.norms, self.attention, self.ff, strict=True)):
            y, present = attention(norm(x), None if past is None else past[i], position_bias)
            presents.append(present)
            x = x + y
            x = x + ff(x)
        return self.lm_head(self.final_layer_norm(x)), presents


SUBJECT = Subject("t5bias", seeded(Decoder), run_masked, VOCAB, supports_padding=True)
