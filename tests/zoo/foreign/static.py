"""In the style of gpt-fast: buffers ``[B, H, L, D]`` written by ``index_put`` at ``input_pos``, attended to in full."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.foreign.parts import (
    DIM,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MAX_LENGTH,
    VOCAB,
    angles,
    feed_forward,
    rotate_pairs,
    seeded,
)
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Transformer"]

BATCH = 2


class KVCache(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(BATCH, KV_HEADS, MAX_LENGTH, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(BATCH, KV_HEADS, MAX_LENGTH, HEAD_DIM))

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        k_out = self.k_cache
        v_out = self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.kv_cache = KVCache()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        kv_size = KV_HEADS * HEAD_DIM
        q, k, v = self.wqkv(x).split([HEADS * HEAD_DIM, kv_size, kv_size], dim=-1)
        q = rotate_pairs(q.view(bsz, seqlen, HEADS, HEAD_DIM), cos, sin)
        k = rotate_pairs(k.view(bsz, seqlen, KV_HEADS, HEAD_DIM), cos, sin)
        v = v.view(bsz, seqlen, KV_HEADS, HEAD_DIM)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, DIM))


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.feed_forward = feed_forward()
        self.attention_norm = nn.RMSNorm(DIM)
        self.ffn_norm = nn.RMSNorm(DIM)

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin, mask, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """No size depends on how many tokens there were: positions are data."""

    causal_mask: Tensor
    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList([TransformerBlock() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)
        self.register_buffer("causal_mask", torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool)))
        self.register_buffer("angles", angles())

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        at = self.angles[input_pos][:, None]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, input_pos, at.cos(), at.sin(), mask)
        return self.output(self.norm(x))


def run(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    assert mask is None
    start = 0 if state is None else state[1]
    end = start + ids.shape[1]
    return model(ids, torch.arange(start, end, device=ids.device)), (model, end)


SUBJECT = Subject("static", seeded(Transformer), run, VOCAB, windows=(MAX_LENGTH,))
