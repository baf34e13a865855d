"""In the style of BLOOM: biases by ``baddbmm``, keys cached as ``[B * H, D, L]`` and values as ``[B * H, L, D]``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.foreign.parts import DIM, HEAD_DIM, HEADS, LAYERS, VOCAB, Past, run_masked, seeded
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "Model"]


def build_alibi(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of every head for every key, ``[B * H, 1, L]`` (Press et al., 2021)."""
    batch_size, seq_length = attention_mask.shape
    base = torch.tensor(2 ** (-(2 ** -(math.log2(HEADS) - 3))), device=attention_mask.device, dtype=torch.float32)
    powers = torch.arange(1, 1 + HEADS, device=attention_mask.device, dtype=torch.int32)
    slopes = torch.pow(base, powers)
    arange_tensor = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    alibi = slopes[..., None] * arange_tensor
    return alibi.reshape(batch_size * HEADS, 1, seq_length).to(dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inv_norm_factor = 1.0 / math.sqrt(HEAD_DIM)
        self.query_key_value = nn.Linear(DIM, 3 * DIM, bias=True)
        self.dense = nn.Linear(DIM, DIM)
        self.attention_dropout = nn.Dropout(0.1)

    def forward(
        self, hidden: Tensor, past: tuple[Tensor, Tensor] | None, alibi: Tensor, causal_mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = hidden.shape
        fused = self.query_key_value(hidden).view(batch, length, HEADS, 3, HEAD_DIM)
        query, key, value = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        query = query.transpose(1, 2).reshape(batch * HEADS, length, HEAD_DIM)
        key = key.permute(0, 2, 3, 1).reshape(batch * HEADS, HEAD_DIM, length)
        value = value.transpose(1, 2).reshape(batch * HEADS, length, HEAD_DIM)
        if past is not None:
            key = torch.cat((past[0], key), dim=2)
            value = torch.cat((past[1], value), dim=1)
        matmul_result = alibi.baddbmm(batch1=query, batch2=key, beta=1.0, alpha=self.inv_norm_factor)
        scores = matmul_result.view(batch, HEADS, length, key.shape[-1])
        scores = scores.to(torch.float) + causal_mask
        probs = self.attention_dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(hidden.dtype))
        context = torch.bmm(probs.view(batch * HEADS, length, key.shape[-1]), value)
        context = context.view(batch, HEADS, length, HEAD_DIM).permute(0, 2, 1, 3).reshape(batch, length, DIM)
        return self.dense(context), (key, value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(DIM)
        self.self_attention = Attention()
        self.post_attention_layernorm = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(approximate="tanh"), nn.Linear(4 * DIM, DIM))

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, alibi: Tensor, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, present = self.self_attention(self.input_layernorm(x), past, alibi, mask)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Model(nn.Module):
    """No positions but the biases."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, DIM)
        self.word_embeddings_layernorm = nn.LayerNorm(DIM)
        self.h = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.ln_f = nn.LayerNorm(DIM)

    def forward(
        self, input_ids: Tensor, past: Past | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        batch, length = input_ids.shape
        past_length = 0 if past is None else past[0][0].shape[2]
        total = past_length + length
        hidden = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        if attention_mask is None:
            attention_mask = torch.ones((batch, total), dtype=torch.long, device=input_ids.device)
        alibi = build_alibi(attention_mask, hidden.dtype)
        lowest = torch.finfo(hidden.dtype).min
        rows = torch.arange(past_length, total, device=input_ids.device)
        future = rows[:, None] < torch.arange(total, device=input_ids.device)[None, :]
        hidden_entries = future[None, None] | (attention_mask == 0)[:, None, None, :]
        causal_mask = torch.zeros_like(hidden_entries, dtype=hidden.dtype).masked_fill(hidden_entries, lowest)
        presents: Past = []
        for i, block in enumerate(self.h):
            hidden, present = block(hidden, None if past is None else past[i], alibi, causal_mask)
            presents.append(present)
        return nn.functional.linear(self.ln_f(hidden), self.word_embeddings.weight), presents


SUBJECT = Subject("alibi", seeded(Model), run_masked, VOCAB, supports_padding=True)
