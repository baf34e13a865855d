"""Differential attention (Ye et al., 2024): two maps of attention over one cache, one subtracted from the other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.foreign.parts import (
    DIM,
    HEAD_DIM,
    HEADS,
    LAYERS,
    VOCAB,
    Past,
    angles,
    feed_forward,
    rotate_pairs,
    run_plain,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "DiffTransformer"]

HALF = HEAD_DIM // 2


class MultiheadDiffAttn(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM, bias=False)
        self.v_proj = nn.Linear(DIM, DIM, bias=False)
        self.out_proj = nn.Linear(DIM, DIM, bias=False)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(HALF)) for _ in range(4)
        )
        self.subln = nn.RMSNorm(HEAD_DIM, eps=1e-5)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        bsz, tgt_len, _ = x.size()
        q = rotate_pairs(self.q_proj(x).view(bsz, tgt_len, 2 * HEADS, HALF), *rope).transpose(1, 2)
        k = rotate_pairs(self.k_proj(x).view(bsz, tgt_len, 2 * HEADS, HALF), *rope).transpose(1, 2)
        v = self.v_proj(x).view(bsz, tgt_len, HEADS, HEAD_DIM).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        attn = torch.matmul(q * HALF**-0.5, k.transpose(-1, -2)) + mask
        attn = F.softmax(attn, dim=-1, dtype=torch.float32).type_as(attn)
        first = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1).float())
        second = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1).float())
        attn = attn.view(bsz, HEADS, 2, tgt_len, k.shape[2])
        attn = attn[:, :, 0] - (first - second + self.lambda_init) * attn[:, :, 1]
        out = self.subln(torch.matmul(attn, v)) * (1 - self.lambda_init)
        return self.out_proj(out.transpose(1, 2).reshape(bsz, tgt_len, DIM)), (k, v)


class DiffTransformer(nn.Module):
    """Twice as many keys as values, of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.norms = nn.ModuleList([nn.RMSNorm(DIM) for _ in range(LAYERS)])
        self.attns = nn.ModuleList([MultiheadDiffAttn(i) for i in range(LAYERS)])
        self.ffns = nn.ModuleList([nn.Sequential(nn.RMSNorm(DIM), feed_forward()) for _ in range(LAYERS)])
        self.head = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB, bias=False))

    def forward(self, ids: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        start = 0 if past is None else past[0][0].shape[2]
        end = start + ids.shape[1]
        mask = torch.triu(torch.full((ids.shape[1], end), float("-inf"), device=ids.device), 1 + start)
        at = angles(end, HALF)[start:, None].to(ids.device)
        x = self.embed(ids)
        presents: Past = []
        for i in range(LAYERS):
            y, present = self.attns[i](self.norms[i](x), (at.cos(), at.sin()), mask, past[i] if past else None)
            presents.append(present)
            x = x + y
            x = x + self.ffns[i](x)
        return self.head(x), presents


SUBJECT = Subject("differential", seeded(DiffTransformer), run_plain, VOCAB)
