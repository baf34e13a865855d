"""Keys and values of a layer in one tensor: side by side ``[B, H, L, 2 * D]``, or stacked ``[2, B, H, L, D]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.foreign.parts import (
    DIM,
    HEAD_DIM,
    HEADS,
    LAYERS,
    MAX_LENGTH,
    VOCAB,
    feed_forward,
    run_plain,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["SIDE_BY_SIDE", "STACKED", "Model", "PackedAttention", "StackedAttention"]


class PackedAttention(nn.Module):
    """Keys and values are cut apart after the cache, as GPT-BigCode does."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(DIM, 3 * DIM)
        self.c_proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, layer_past: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        fused = self.c_attn(x).view(batch, length, HEADS, 3 * HEAD_DIM).transpose(1, 2)
        query, key_value = fused.split((HEAD_DIM, 2 * HEAD_DIM), dim=3)
        key, value = key_value.chunk(2, dim=-1)
        present = torch.cat([key, value], dim=-1)
        if layer_past is not None:
            present = torch.cat((layer_past, present), dim=-2)
        key, value = present.split((HEAD_DIM, HEAD_DIM), dim=-1)
        weights = torch.matmul(query, key.transpose(-1, -2)) * HEAD_DIM**-0.5
        weights = torch.where(mask, weights, torch.finfo(weights.dtype).min)
        y = torch.matmul(F.softmax(weights, dim=-1), value)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, DIM)), present

    @staticmethod
    def length(past: Tensor) -> int:
        return past.shape[-2]


class StackedAttention(nn.Module):
    """The cache of a layer is unbound, grown and stacked again, as ports of the first GPT-2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(DIM, 3 * DIM)
        self.c_proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, past: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        if past is not None:
            pk, pv = past.unbind(dim=0)
            k = torch.cat([pk, k], dim=-2)
            v = torch.cat([pv, v], dim=-2)
        present = torch.stack([k, v])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).flatten(2)), present

    @staticmethod
    def length(past: Tensor) -> int:
        return past.shape[-2]


class Model(nn.Module):
    """Learned positions around either kind of attention."""

    def __init__(self, kind: type[PackedAttention | StackedAttention]) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, DIM)
        self.wpe = nn.Embedding(MAX_LENGTH, DIM)
        self.ln = nn.ModuleList([nn.LayerNorm(DIM) for _ in range(LAYERS)])
        self.attn = nn.ModuleList([kind() for _ in range(LAYERS)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.LayerNorm(DIM), feed_forward()) for _ in range(LAYERS)])
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.length = kind.length

    def forward(self, ids: Tensor, pasts: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        start = 0 if pasts is None else self.length(pasts[0])
        end = start + ids.shape[1]
        columns = torch.arange(end, device=ids.device)
        mask = columns[start:, None] >= columns
        x = self.wte(ids) + self.wpe(columns[start:])
        presents: list[Tensor] = []
        for i in range(LAYERS):
            y, present = self.attn[i](self.ln[i](x), None if pasts is None else pasts[i], mask)
            presents.append(present)
            x = x + y
            x = x + self.mlp[i](x)
        return self.head(F.layer_norm(x, (DIM,))), presents


SIDE_BY_SIDE = Subject("packed", seeded(lambda: Model(PackedAttention)), run_plain, VOCAB)
STACKED = Subject("stacked", seeded(lambda: Model(StackedAttention)), run_plain, VOCAB)
