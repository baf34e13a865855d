"""One-layer decoders whose attention differs in exactly one respect from one that can be compressed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Cache", "Mask", "OneLayer"]

Mask = Callable[[int, int], Tensor | None]
"""``mask(new, total)``: ``[new, total]`` booleans or additive floats."""
Cache = tuple[Tensor, Tensor]


def causal(new: int, total: int) -> Tensor:
    """Every token sees itself and what came before."""
    return torch.arange(total) <= torch.arange(total - new, total)[:, None]


class OneLayer(nn.Module):
    """``forward(x, cache) -> (y, cache)`` with single-head-size 16, 4 query heads on 2 KV heads."""

    def __init__(self, mask: Mask = causal) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.mask = mask

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[B, 4, T, 16]``, keys and values ``[B, 2, T, 16]``."""
        heads = [layer(x).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        return heads[0], heads[1], heads[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention's output ``[B, 4, T, 16]``."""
        mask = self.mask(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def extend(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the grown cache."""
        return torch.cat([old, new], dim=2)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Attend over ``x`` ``[B, T, 64]`` and what the cache holds."""
        q, k, v = self.project(x)
        if cache is not None:
            k, v = self.extend(cache[0], k), self.extend(cache[1], v)
        return self.attend(q, k, v).transpose(1, 2).flatten(2), (k, v)
