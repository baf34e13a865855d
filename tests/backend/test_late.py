"""Keys that are changed after they were cached: what treats every position by itself is done once, the rest refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adakv_compile import CompressedKV
from tests.backend.decoders import Cache, OneLayer

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager"}
LENGTH, STEPS = 40, 3

Change = Callable[["Changed", Tensor, Tensor], Tensor]
"""Keys ``[B, H, L, D]`` and the positions of their entries, ``[L]``."""


class Changed(OneLayer):
    """Changes its keys after or before it caches them."""

    table: Tensor
    frequencies: Tensor

    def __init__(self, change: Change, late: bool) -> None:
        super().__init__()
        self.change, self.late = change, late
        self.register_buffer("table", torch.randn(64, 16))
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(8) / 8))
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, 16))

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        q, k, v = self.project(x)
        seen = 0 if cache is None else cache[0].shape[2]
        if not self.late:
            k = self.change(self, k, torch.arange(seen, seen + x.shape[1]))
        if cache is not None:
            k, v = self.extend(cache[0], k), self.extend(cache[1], v)
        present = k, v
        if self.late:
            k = self.change(self, k, torch.arange(k.shape[2]))
        return self.attend(q, k, v).transpose(1, 2).flatten(2), present


def rotated(k: Tensor, angles: Tensor) -> Tensor:
    first, second = k.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


SAME: dict[str, Change] = {
    "scaled": lambda m, k, at: k * 2.0,
    "by the model's own gain": lambda m, k, at: k * m.gain,
    "rotated": lambda m, k, at: rotated(k, at[:, None] * 0.1),
    "rotated by outer products": lambda m, k, at: rotated(k, torch.outer(at.float(), m.frequencies)),
    "a table by position": lambda m, k, at: k + m.table[at],
    "normalised": lambda m, k, at: nn.functional.rms_norm(k, (16,), m.gain),
}


def turns(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Cache]:
    """Feed a prompt, single tokens, and three tokens at once."""
    found, cache = list[Tensor](), None
    with torch.no_grad():
        for begin, end in (
            (0, LENGTH),
            *((i, i + 1) for i in range(LENGTH, LENGTH + STEPS)),
            (LENGTH + STEPS, x.shape[1]),
        ):
            out, cache = model(x[:, begin:end], cache)
            found.append(out)
    assert cache is not None
    return found, cache


@pytest.mark.parametrize("name", SAME)
def test_it_is_as_if_changed_before_the_cache(name: str) -> None:
    x = torch.randn(2, LENGTH + STEPS + 3, 64)
    results = []
    for late in (True, False):
        torch.manual_seed(3)
        model = Changed(SAME[name], late)
        compiled = torch.compile(model, backend="adakv", options=OPTIONS | {"strict": True}, dynamic=True)
        results.append(turns(compiled, x))
        torch.compiler.reset()
    (found, cache), (expected, other) = results
    assert isinstance(cache[0], CompressedKV)
    assert isinstance(other[0], CompressedKV)
    assert torch.equal(cache[0].store.positions, other[0].store.positions)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


OTHER: dict[str, Change] = {
    "centred": lambda m, k, at: k - k.mean(2, keepdim=True),
    "by how long the text is": lambda m, k, at: k / k.shape[2],
    "by the largest key": lambda m, k, at: k / k.abs().amax(),
    "counted from the end": lambda m, k, at: rotated(k, at.flip(0)[:, None] * 0.1),
    "frequencies by how long the text is": lambda m, k, at: rotated(k, at[:, None] * (4.0 / at.shape[0])),
    "positions by how long the text is": lambda m, k, at: rotated(k, (at - at.shape[0])[:, None] * 0.1),
    "the table's end": lambda m, k, at: k + m.table[64 - k.shape[2] :],
    "running sums": lambda m, k, at: k.cumsum(2),
    "neighbours": lambda m, k, at: k + torch.cat([k[:, :, :1], k[:, :, :-1]], 2),
    "softened over positions": lambda m, k, at: k.softmax(2),
    "normalised over positions": lambda m, k, at: nn.functional.normalize(k, dim=2),
    "exchanged with the heads": lambda m, k, at: k.roll(1, 2),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_mixes_positions_is_left_alone(name: str) -> None:
    model, x = Changed(OTHER[name], late=True), torch.randn(2, LENGTH + STEPS + 3, 64)
    expected, _ = turns(model, x)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found, cache = turns(torch.compile(model, backend="adakv", options=OPTIONS, dynamic=True), x)
    assert not isinstance(cache[0], CompressedKV)
    assert any("adakv" in str(item.message) for item in heard)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
