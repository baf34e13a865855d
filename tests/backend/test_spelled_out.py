"""Attention written out with matmul and softmax is the operator's where it means the same, and left alone where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adakv_compile
from adakv_compile import CompressedKV, Reason
from adakv_compile.testing import assert_compressed
from tests.backend.decoders import Cache, OneLayer, causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager"}
LENGTH, STEPS = 40, 3
LOWEST = torch.finfo(torch.float32).min

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values with as many heads, and where keys are visible."""


def weigh(logits: Tensor, v: Tensor) -> Tensor:
    return logits.softmax(-1) @ v


def additive(seen: Tensor, hidden: float = LOWEST) -> Tensor:
    return torch.where(seen, 0.0, hidden)


MEANT: dict[str, Attend] = {
    "filled where hidden": lambda q, k, v, seen: weigh((q @ k.mT / 4).masked_fill(~seen, -torch.inf), v),
    "filled with the lowest number": lambda q, k, v, seen: weigh((q @ k.mT / 4).masked_fill(~seen, LOWEST), v),
    "chosen by where": lambda q, k, v, seen: weigh(torch.where(seen, q @ k.mT * 0.25, -torch.inf), v),
    "chosen, the number in a tensor": lambda q, k, v, seen: weigh(
        torch.where(seen, q @ k.mT * 0.25, torch.tensor(LOWEST)), v
    ),
    "added on the right": lambda q, k, v, seen: weigh(q @ k.transpose(-1, -2) * 0.25 + additive(seen), v),
    "added on the left": lambda q, k, v, seen: weigh(additive(seen) + q @ k.transpose(2, 3) / 4, v),
    "queries scaled": lambda q, k, v, seen: weigh((q * 0.25) @ k.mT + additive(seen), v),
    "two factors": lambda q, k, v, seen: weigh(q @ k.mT * 0.5 / 2.0 + additive(seen), v),
    "added and chosen": lambda q, k, v, seen: weigh(torch.where(seen, q @ k.mT / 4, LOWEST) + additive(seen), v),
    "softmax in float64": lambda q, k, v, seen: (
        torch.softmax(q @ k.mT / 4 + additive(seen), -1, dtype=torch.float64).to(q.dtype) @ v
    ),
    "inactive dropout": lambda q, k, v, seen: (
        nn.functional.dropout((q @ k.mT / 4 + additive(seen)).softmax(-1), 0.5, False) @ v
    ),
    "mask scaled with the logits": lambda q, k, v, seen: weigh((q @ k.mT + additive(seen)) * 0.25, v),
    "a floor": lambda q, k, v, seen: weigh((q @ k.mT / 4 + additive(seen)).clamp(min=LOWEST), v),
    "a billion for infinity": lambda q, k, v, seen: weigh(q @ k.mT / 4 + additive(seen, -1e9), v),
    "the maximum taken off": lambda q, k, v, seen: weigh(
        (w := q @ k.mT / 4 + additive(seen)) - w.amax(-1, keepdim=True), v
    ),
    "by einsum": lambda q, k, v, seen: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) / 4 + additive(seen)).softmax(-1), v
    ),
    "by bmm over merged heads": lambda q, k, v, seen: torch.bmm(
        (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) / 4 + additive(seen)).softmax(-1), v.flatten(0, 1)
    ).unflatten(0, q.shape[:2]),
    "over the first of two dimensions": lambda q, k, v, seen: (
        (v.mT @ (k @ q.mT / 4 + additive(seen).mT).softmax(-2)).mT
    ),
    "blended with a mask": lambda q, k, v, seen: weigh((q @ k.mT / 4) * seen.float() + -1e4 * (1 - seen.float()), v),
    "blended as GPT-2 did": lambda q, k, v, seen: weigh((b := seen.float()) * (q @ k.mT / 4) - 1e10 * (1 - b), v),
    "the last dimension by its number": lambda q, k, v, seen: (q @ k.mT / 4 + additive(seen)).softmax(3) @ v,
}


class Written(OneLayer):
    """Attention by a function."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.written = attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (entries.repeat_interleave(2, dim=1) for entries in (k, v))
        return self.written(q, k, v, causal(q.shape[2], k.shape[2]))


def generate(model: nn.Module, x: Tensor, cache: Cache | None = None) -> tuple[list[Tensor], Cache]:
    """Return the outputs of a prompt and of the steps after it."""
    found: list[Tensor] = []
    with torch.no_grad():
        for begin, end in ((0, LENGTH), *((i, i + 1) for i in range(LENGTH, x.shape[1]))):
            out, cache = model(x[:, begin:end], cache)
            found.append(out)
    assert cache is not None
    return found, cache


@pytest.mark.parametrize("name", MEANT)
def test_what_means_the_same_is_compressed(name: str) -> None:
    model, x = Written(MEANT[name]), torch.randn(2, LENGTH + STEPS, 64)
    assert_compressed(adakv_compile.explain(model, x, options=OPTIONS), n_sites=1)
    outputs, cache = generate(torch.compile(model, backend="adakv", options=OPTIONS | {"strict": True}), x)
    # The operator's own model is the yardstick: tests/models hold that one against dense attention with masks.
    expected, _ = generate(torch.compile(OneLayer(), backend="adakv", options=OPTIONS | {"strict": True}), x)
    assert all(isinstance(entries, CompressedKV) for entries in cache)
    for found, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MEANT)
def test_a_prompt_is_computed_to_the_last_bit_as_it_was_written(name: str) -> None:
    model, x = Written(MEANT[name]), torch.randn(2, LENGTH, 64)
    (expected,), _ = generate(model, x)
    (found,), _ = generate(torch.compile(model, backend="adakv", options=OPTIONS), x)
    assert torch.equal(found, expected)


def test_a_prompt_by_the_operator_without_a_mask() -> None:
    model, x = Written(MEANT["added on the right"]), torch.randn(2, LENGTH + STEPS, 64)
    expected, _ = generate(torch.compile(model, backend="adakv", options=OPTIONS), x)
    found, _ = generate(torch.compile(model, backend="adakv", options=OPTIONS | {"attention": "sdpa"}), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


OTHER: dict[str, Attend] = {
    "blended with half a mask": lambda q, k, v, seen: weigh(
        (q @ k.mT / 4) * (b := torch.where(seen, 0.5, 0.0)) + -1e4 * (1 - b), v
    ),
    "blended with two masks": lambda q, k, v, seen: weigh(
        (q @ k.mT / 4) * (torch.arange(k.shape[2]) % 3).float() + -1e4 * (1 - seen.float()), v
    ),
    "blended with a mask twice as large": lambda q, k, v, seen: weigh(
        (q @ k.mT / 4) * (2 * seen.float()) + -1e4 * (1 - seen.float()), v
    ),
    "blended the other way round": lambda q, k, v, seen: weigh(
        (q @ k.mT / 4) * (1 - (b := (~seen).float())) + -1e4 * (1 - b), v
    ),
    "filled with an ordinary number": lambda q, k, v, seen: weigh(
        (q @ k.mT / 4).masked_fill(~seen, -torch.inf).masked_fill(torch.arange(k.shape[2]) % 3 == 0, -1.0), v
    ),
    "filled before the sign is turned": lambda q, k, v, seen: weigh(
        (-1.0 * (q @ k.mT / 4).masked_fill(torch.arange(k.shape[2]) % 3 == 0, -1e9)).masked_fill(~seen, -torch.inf), v
    ),
    "weights that are summed by hand": lambda q, k, v, seen: (
        (q @ k.mT / 4 + additive(seen)).softmax(-1)[..., None] * v[:, :, None]
    ).sum(-2),
    "by logarithms": lambda q, k, v, seen: (q @ k.mT / 4 + additive(seen)).log_softmax(-1).exp() @ v,
    "clamped from above": lambda q, k, v, seen: weigh(torch.clamp(q @ k.mT, LOWEST, 0.5) + additive(seen), v),
    "the maximum taken off below a cap": lambda q, k, v, seen: weigh(
        torch.tanh((w := q @ k.mT) - w.amax(-1, keepdim=True)) + additive(seen), v
    ),
    "the maximum of another dimension taken off": lambda q, k, v, seen: (
        (
            v.mT
            @ ((w := k @ q.mT / 4 + additive(seen).mT) - w.masked_fill(~seen.mT, -1e4).amax(-1, keepdim=True)).softmax(
                -2
            )
        ).mT
    ),
    "keys scaled after they were repeated": lambda q, k, v, seen: weigh(q @ (k * 0.25).mT + additive(seen), v),
    "keys centred after the cache": lambda q, k, v, seen: weigh(
        q @ (k - k.mean(2, keepdim=True)).mT / 4 + additive(seen), v
    ),
    "keys scaled by how long the text is": lambda q, k, v, seen: weigh(q @ (k / k.shape[2]).mT + additive(seen), v),
    "keys turned by how far they are from the end": lambda q, k, v, seen: weigh(
        q @ (k * torch.arange(k.shape[2]).flip(0)[:, None].cos()).mT / 4 + additive(seen), v
    ),
    "cap that differs from what it divides by, below a mask": lambda q, k, v, seen: weigh(
        torch.tanh((q @ k.mT + additive(seen)) / 8) * 2, v
    ),
    "cap of the weights": lambda q, k, v, seen: torch.tanh((q @ k.mT / 4 + additive(seen)).softmax(-1)) @ v,
    "capped twice": lambda q, k, v, seen: weigh(torch.tanh(torch.tanh(q @ k.mT / 8)) * 2 + additive(seen), v),
    "cap that turns signs": lambda q, k, v, seen: weigh(torch.tanh(q @ k.mT / 8) * -2 + additive(seen), v),
    "sink for every query": lambda q, k, v, seen: (
        torch.cat([q @ k.mT / 4 + additive(seen), torch.ones_like(q[..., :1])], -1).softmax(-1)[..., :-1] @ v
    ),
    "mask with a factor": lambda q, k, v, seen: weigh(torch.add(q @ k.mT / 4, additive(seen), alpha=0.5), v),
    "mask that hides too little": lambda q, k, v, seen: weigh(q @ k.mT / 4 + additive(seen, -3.0), v),
    "filled with too little": lambda q, k, v, seen: weigh((q @ k.mT / 4).masked_fill(~seen, -3.0), v),
    "filled where visible": lambda q, k, v, seen: weigh((q @ k.mT / 4).masked_fill(seen, LOWEST), v),
    "softmax over the queries": lambda q, k, v, seen: (q @ k.mT / 4 + additive(seen)).softmax(-2) @ v,
    "softmax over the heads": lambda q, k, v, seen: (q @ k.mT / 4 + additive(seen)).softmax(1) @ v,
    "weights squared": lambda q, k, v, seen: (q @ k.mT / 4 + additive(seen)).softmax(-1) ** 2 @ v,
    "weights used twice": lambda q, k, v, seen: (
        (w := (q @ k.mT / 4 + additive(seen)).softmax(-1)) @ v + w.sum(-1, keepdim=True)
    ),
    "two softmaxes": lambda q, k, v, seen: (q @ k.mT / 4 + additive(seen)).softmax(-1).softmax(-1) @ v,
    "logits by queries and queries": lambda q, k, v, seen: weigh(q @ q.mT / 4 + additive(seen), v),
    "a scale for every query": lambda q, k, v, seen: weigh(
        q @ k.mT * torch.arange(1.0, q.shape[2] + 1)[:, None] + additive(seen), v
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_means_something_else_is_left_alone(name: str) -> None:
    model, x = Written(OTHER[name]), torch.randn(2, LENGTH, 64)
    compiled = torch.compile(model, backend="adakv", options=OPTIONS)
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        found, cache = compiled(x)
        expected, _ = model(x)
    assert torch.equal(found, expected)
    assert not any(isinstance(entries, CompressedKV) for entries in cache)
    said = [str(item.message) for item in heard if "adakv" in str(item.message)]
    assert len(said) == 1, said
    assert any(reason.name in said[0] for reason in Reason)
