"""Keys cached before their rotation: all are rotated in every step, by positions counted from the first entry."""

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
    Past,
    feed_forward,
    rotate_half,
    run_masked,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Model"]


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.arange(k.shape[-2], device=k.device, dtype=self.inv_freq.dtype)
        freqs = torch.outer(t, self.inv_freq)
        cos, sin = freqs.cos(), freqs.sin()
        return rotate_half(q, cos[-q.shape[-2] :], sin[-q.shape[-2] :]), rotate_half(k, cos, sin)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(DIM, 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.rotary = RotaryEmbedding()

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = self.to_q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = (part.unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2) for part in self.to_kv(x).chunk(2, dim=-1))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=-2), torch.cat((past[1], v), dim=-2)
        present = k, v
        q, k = self.rotary(q, k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.to_out(out.transpose(1, 2).flatten(2)), present


class Model(nn.Module):
    """Pre-norm blocks; the mask hides padding."""

    def __init__(self) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(VOCAB, DIM)
        self.norms = nn.ModuleList([nn.LayerNorm(DIM) for _ in range(LAYERS)])
        self.attns = nn.ModuleList([Attention() for _ in range(LAYERS)])
        self.ffs = nn.ModuleList([nn.Sequential(nn.LayerNorm(DIM), feed_forward()) for _ in range(LAYERS)])
        self.to_logits = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB, bias=False))

    def forward(self, x: Tensor, past: Past | None = None, mask: Tensor | None = None) -> tuple[Tensor, Past]:
        n = x.shape[1]
        m = n + (0 if past is None else past[0][0].shape[-2])
        visible = ~torch.ones((n, m), dtype=torch.bool, device=x.device).triu(m - n + 1)[None, None]
        if mask is not None:
            visible = visible & (mask > 0)[:, None, None, :]
        h = self.token_emb(x)
        presents: Past = []
        for i, (norm, attn, ff) in enumerate(zip(self.norms, self.attns, self.ffs, strict=True)):
            out, present = attn(norm(h), None if past is None else past[i], visible)
            presents.append(present)
            h = h + out
            h = h + ff(h)
        return self.to_logits(h), presents


SUBJECT = Subject("late_rotary", seeded(Model), run_masked, VOCAB, supports_padding=True)
