"""Random inputs of the policy tests, all from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from adakv_compile.policy import Method, Policy

__all__ = ["Case", "cases", "kept_positions", "left_padding", "policies", "ragged", "scores_like"]

KINDS = ("smooth", "tied", "flat", "peaked", "signed")


@dataclass(frozen=True)
class Case:
    """Raw scores ``[B, H, L]`` of a kind, from a seed."""

    seed: int
    batch: int
    num_heads: int
    length: int
    kind: str

    @property
    def scores(self) -> torch.Tensor:
        """The scores."""
        return scores_like(self.kind, (self.batch, self.num_heads, self.length), self.seed)


def scores_like(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return scores of a kind; sums of a few are exact in float32, so that pooling is, too."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "flat":
        return torch.zeros(shape)
    if kind == "tied":
        return torch.randint(0, 3, shape, generator=generator) / 4
    if kind == "signed":
        return torch.randint(-5, 6, shape, generator=generator) / 8
    values = torch.randint(0, 1 << 20, shape, generator=generator) / (1 << 20)
    return (values > 0.9) * values if kind == "peaked" else values


def left_padding(batch: int, length: int, seed: int) -> torch.Tensor:
    """Return which tokens are real ``[B, L]``: the last ones of every row, at least one."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return torch.arange(length) >= length - real


def ragged(batch: int, num_heads: int, length: int, seed: int) -> torch.Tensor:
    """Return which slots hold an entry ``[B, H, L]``: the first ones of every head, maybe none."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.randint(0, length + 1, (batch, num_heads, 1), generator=generator)
    return torch.arange(length) < held


def kept_positions(keep: torch.Tensor) -> list[list[set[int]]]:
    """Return the kept positions of ``[B, H, L]`` as sets per row and head."""
    return [[set(head.nonzero().flatten().tolist()) for head in row] for row in keep]


cases = st.builds(
    Case,
    seed=st.integers(0, 1 << 16),
    batch=st.integers(1, 3),
    num_heads=st.integers(1, 5),
    length=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
)


@st.composite
def policies(draw: st.DrawFn, methods: tuple[Method, ...] = ("ada-snapkv", "snapkv")) -> Policy:
    """Draw a policy whose sizes suit :data:`cases`."""
    window = draw(st.integers(1, 8))
    num_layers = draw(st.integers(1, 6))
    sinks = draw(st.integers(0, 6))
    floor = max(window, sinks) + 1
    return Policy(
        method=draw(st.sampled_from(methods)),
        budget=draw(st.one_of(st.integers(floor, floor + 30), st.sampled_from((0.1, 0.25, 0.7)))),
        window=window,
        pool=draw(st.sampled_from(("max", "avg"))),
        kernel_size=draw(st.sampled_from((1, 3, 7))),
        alpha=draw(st.sampled_from((0.0, 0.05, 0.2, 0.5, 0.9, 1.0))),
        safeguard=draw(st.sampled_from(("soft", "hard"))),
        ties=draw(st.sampled_from(("position", "score"))),
        beta=draw(st.integers(1, 20)),
        sinks=sinks,
        layer=draw(st.integers(0, num_layers - 1)),
        num_layers=num_layers,
    )
