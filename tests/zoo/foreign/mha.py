"""``nn.MultiheadAttention`` over the whole sequence in every step, as in a first tutorial: there is no cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.foreign.parts import DIM, HEADS, LAYERS, MAX_LENGTH, VOCAB, feed_forward, seeded
from tests.zoo.subject import Subject

__all__ = ["SUBJECT", "LanguageModel"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.ff = nn.Sequential(nn.LayerNorm(DIM), feed_forward())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        h, _ = self.attention(h, h, h, attn_mask=mask, need_weights=False)
        x = x + h
        return x + self.ff(x)


class LanguageModel(nn.Module):
    """Learned positions; the caller appends tokens and calls again."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Embedding(MAX_LENGTH, DIM)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool, device=ids.device), diagonal=1)
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def run(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    assert mask is None
    tokens = ids if state is None else torch.cat((state, ids), dim=1)
    return model(tokens)[:, -ids.shape[1] :], tokens


SUBJECT = Subject("mha", seeded(LanguageModel), run, VOCAB)
