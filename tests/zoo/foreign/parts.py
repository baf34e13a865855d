"""What the decoders share because every code base has it: sizes, a feed-forward part, rotations, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = [
    "DIM",
    "HEADS",
    "HEAD_DIM",
    "KV_HEADS",
    "LAYERS",
    "MAX_LENGTH",
    "VOCAB",
    "Past",
    "angles",
    "feed_forward",
    "rotate_half",
    "rotate_pairs",
    "run_masked",
    "run_plain",
    "seeded",
]

VOCAB: Final = 97
DIM: Final = 64
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 16
LAYERS: Final = 2
MAX_LENGTH: Final = 512

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, the most common form of a cache."""


def seeded(kind: Callable[[], nn.Module], gain: float = 1.6) -> Callable[[], nn.Module]:
    """Return a function that builds ``kind()`` with the same weights every time.

    Args:
        kind: The class of the decoder.
        gain: What a matrix multiplies the size of its input by. Logits of attention grow with its square; at 1 all
            entries would look alike.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind().eval()
            for weight in model.parameters():
                if weight.dim() >= 2:
                    nn.init.normal_(weight, std=gain * weight.shape[-1] ** -0.5)
        return model

    return build


def run_plain(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    """Run a decoder that takes its cache and returns the next one."""
    assert mask is None, "this decoder knows no padding"
    return model(ids, state)


def run_masked(model: nn.Module, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
    """Run a decoder that takes its cache and a padding mask and returns the next cache."""
    return model(ids, state, mask)


def feed_forward(dim: int = DIM) -> nn.Sequential:
    """Return the part of a block that is not attention."""
    return nn.Sequential(nn.Linear(dim, 2 * dim, bias=False), nn.GELU(), nn.Linear(2 * dim, dim, bias=False))


def angles(length: int = MAX_LENGTH, dim: int = HEAD_DIM) -> Tensor:
    """Return the angles of RoPE (Su et al., 2021), ``[length, dim / 2]`` in radians."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2).float() / dim)
    return torch.outer(torch.arange(length).float(), rates)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first half of the last dimension against the second; ``cos`` and ``sin`` have half its size."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbours in the last dimension against each other; ``cos`` and ``sin`` have half its size."""
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
