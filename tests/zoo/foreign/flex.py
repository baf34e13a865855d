"""``flex_attention`` with a causal block mask and a soft cap as ``score_mod``, over a cache that is concatenated."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tests.zoo.foreign.parts import (
    DIM,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    Past,
    angles,
    feed_forward,
    rotate_half,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["GIVEN", "INSIDE", "Model"]


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    # Numbers written here: a global one would be a symbol to Dynamo, and its subgraph for this function takes none.
    return 5.0 * torch.tanh(score / 5.0)


def causal_mask(start: int, end: int) -> BlockMask:
    """Return which entries the tokens from ``start`` to ``end`` see."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + start >= kv_idx

    return create_block_mask(causal, None, None, end - start, end, device="cpu")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, block_mask: BlockMask, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, t, _ = x.shape
        heads = self.wqkv(x).view(b, t, -1, HEAD_DIM).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = flex_attention(q, k, v, score_mod=soft_cap, block_mask=block_mask, enable_gqa=True)
        assert isinstance(y, Tensor)
        return self.wo(y.transpose(1, 2).reshape(b, t, -1)), (k, v)


class Model(nn.Module):
    """The block mask is made once for all layers of a call: by the caller, or inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.norms = nn.ModuleList([nn.RMSNorm(DIM) for _ in range(LAYERS)])
        self.attns = nn.ModuleList([Attention() for _ in range(LAYERS)])
        self.mlps = nn.ModuleList([nn.Sequential(nn.RMSNorm(DIM), feed_forward()) for _ in range(LAYERS)])
        self.head = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB, bias=False))

    def forward(self, ids: Tensor, past: Past | None, block_mask: BlockMask | None = None) -> tuple[Tensor, Past]:
        start = 0 if past is None else past[0][0].shape[2]
        end = start + ids.shape[1]
        if block_mask is None:
            block_mask = causal_mask(start, end)
        at = angles(end)[start:].to(ids.device)
        x = self.embed(ids)
        presents: Past = []
        for i in range(LAYERS):
            y, present = self.attns[i](
                self.norms[i](x), at.cos(), at.sin(), block_mask, None if past is None else past[i]
            )
            presents.append(present)
            x = x + y
            x = x + self.mlps[i](x)
        return self.head(x), presents


def run_inside(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    assert mask is None
    return _quietly(model, ids, state)


def run_given(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    assert mask is None
    start = 0 if state is None else state[0][0].shape[2]
    return _quietly(model, ids, state, causal_mask(start, start + ids.shape[1]))


def _quietly(model: nn.Module, *args: Any) -> tuple[Tensor, Any]:
    with warnings.catch_warnings():
        # That it is slow where it isn't compiled is known.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile", category=UserWarning)
        return model(*args)


GIVEN = Subject("flex", seeded(Model), run_given, VOCAB)
INSIDE = Subject("flex_inside", seeded(Model), run_inside, VOCAB)
