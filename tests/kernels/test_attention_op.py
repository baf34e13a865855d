"""What a written-out attention means, as an operator: against the definition in float64, one query at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv_compile.kernels import attention
from tests.kernels.tolerances import assert_near

BATCH, NEW, LENGTH, KEY_DIM, VALUE_DIM = 2, 5, 9, 8, 6


@dataclass(frozen=True)
class Call:
    """Arguments of one call, as the operator takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    is_causal: bool = False
    scale: float = 0.3
    softcap: float | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.key,
            self.value,
            self.mask,
            self.sinks,
            self.is_causal,
            self.scale,
            self.softcap,
        )


def call(heads: int = 6, kv_heads: int = 2, dtype: torch.dtype = torch.float32, **rest: Any) -> Call:
    """Return a call with random operands."""
    random = torch.Generator().manual_seed(heads * 7 + kv_heads)
    shapes = (
        (BATCH, heads, NEW, KEY_DIM),
        (BATCH, kv_heads, LENGTH, KEY_DIM),
        (BATCH, kv_heads, LENGTH, VALUE_DIM),
    )
    return Call(*(2 * torch.randn(shape, generator=random).to(dtype) for shape in shapes), **rest)


def naive(given: Call) -> Tensor:
    """Return the result in float64, from the definition."""
    batch, heads, new, _ = given.query.shape
    length = given.key.shape[2]
    out = torch.zeros(batch, heads, new, given.value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h * given.key.shape[1] // heads
            for t in range(new):
                logits: list[float] = []
                for c in range(length):
                    logit = float(given.query[b, h, t].double() @ given.key[b, kv, c].double()) * given.scale
                    if given.softcap is not None:
                        logit = given.softcap * math.tanh(logit / given.softcap)
                    logits.append(logit + _added(given, b, h, t, c))
                extra = [] if given.sinks is None else [float(given.sinks[h])]
                peak = max([*logits, *extra])
                if peak == -math.inf:
                    continue
                weights = [math.exp(logit - peak) for logit in logits]
                total = sum(weights) + sum(math.exp(sink - peak) for sink in extra)
                for weight, entry in zip(weights, given.value[b, kv].double(), strict=True):
                    out[b, h, t] += weight / total * entry
    return out


def _added(given: Call, b: int, h: int, t: int, c: int) -> float:
    """Return what mask and flag add to one logit."""
    added = -math.inf if given.is_causal and c > t else 0.0
    if given.mask is not None:
        wide = given.mask.expand(BATCH, given.query.shape[1], NEW, LENGTH)
        element = wide[b, h, t, c]
        added += float(element) if element.dtype.is_floating_point else 0.0 if element else -math.inf
    return added


def some(*shape: int) -> Tensor:
    """Return random booleans, the first column true."""
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[..., 0] = True
    return visible


def bias(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))


def hidden(*shape: int) -> Tensor:
    return torch.where(some(*shape), bias(*shape), -torch.inf)


SINKS = torch.tensor([0.5, -torch.inf, 2.0, -40.0, 40.0, 0.0])

CALLS: dict[str, Callable[[], Call]] = {
    "plain": call,
    "a head for each": lambda: call(4, 4),
    "one head for all": lambda: call(4, 1),
    "causal": lambda: call(is_causal=True),
    "negative scale": lambda: call(scale=-0.5),
    "booleans for all": lambda: call(mask=some(1, 1, 1, LENGTH)),
    "booleans by row of the batch": lambda: call(mask=some(BATCH, 1, 1, LENGTH)),
    "booleans by head": lambda: call(mask=some(1, 6, NEW, LENGTH)),
    "booleans by everything": lambda: call(mask=some(BATCH, 6, NEW, LENGTH)),
    "numbers by head": lambda: call(mask=bias(1, 6, NEW, LENGTH)),
    "numbers for all queries": lambda: call(mask=bias(BATCH, 1, 1, LENGTH)),
    "numbers and minus infinity": lambda: call(mask=hidden(BATCH, 1, NEW, LENGTH)),
    "the lowest number": lambda: call(mask=torch.where(some(1, 1, NEW, LENGTH), 0.0, torch.finfo(torch.float32).min)),
    "a mask and the flag": lambda: call(mask=some(1, 1, NEW, LENGTH), is_causal=True),
    "a cap": lambda: call(softcap=1.5),
    "a cap below a mask": lambda: call(softcap=0.5, mask=hidden(BATCH, 6, NEW, LENGTH)),
    "a cap and the flag": lambda: call(softcap=2.0, is_causal=True),
    "a high cap": lambda: call(softcap=1e6),
    "sinks": lambda: call(sinks=SINKS),
    "sinks and a mask": lambda: call(sinks=SINKS, mask=hidden(1, 1, NEW, LENGTH)),
    "everything": lambda: call(sinks=SINKS, softcap=3.0, is_causal=True, mask=hidden(BATCH, 6, NEW, LENGTH)),
    "nothing to be seen": lambda: call(mask=torch.zeros(1, 1, NEW, LENGTH, dtype=torch.bool)),
    "nothing to be seen but sinks": lambda: call(mask=torch.full((1, 1, NEW, LENGTH), -torch.inf), sinks=SINKS),
    "large logits": lambda: call(scale=60.0),
    "large sinks": lambda: call(sinks=torch.full((6,), 300.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_the_definition(name: str) -> None:
    given = CALLS[name]()
    result = torch.ops.adakv.attention_v1(*given.arguments)
    assert result.is_contiguous()
    # Logits of several hundred are rounded to what float32 has there.
    loose = {"rtol": 1e-2, "atol": 1e-3} if name == "large logits" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(result.double(), naive(given), **loose)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["everything", "plain", "causal"])
def test_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    like = CALLS[name]()
    mask = None if like.mask is None else like.mask.to(dtype)
    given = call(dtype=dtype, mask=mask, sinks=like.sinks, softcap=like.softcap, is_causal=like.is_causal)
    result = torch.ops.adakv.attention_v1(*given.arguments)
    assert result.dtype == dtype
    assert_near(result, naive(given), dtype)


def test_any_strides() -> None:
    given = call(mask=hidden(BATCH, 6, NEW, LENGTH), sinks=SINKS)
    moved = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in given.arguments[:4]]
    expected = torch.ops.adakv.attention_v1(*given.arguments)
    torch.testing.assert_close(torch.ops.adakv.attention_v1(*moved, *given.arguments[4:]), expected)


@pytest.mark.parametrize("name", ["plain", "booleans by head", "sinks and a mask", "everything"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(attention.SPEC.overload, CALLS[name]().arguments)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda: call(5, 2), "multiple of KV heads"),
        (lambda: call(mask=torch.zeros(1, 2, 1, LENGTH)), "mask has shape"),
        (lambda: call(mask=torch.zeros(NEW, LENGTH)), "mask has shape"),
        (lambda: call(mask=torch.zeros(1, 1, 1, LENGTH, dtype=torch.int64)), "mask is torch.int64"),
        (lambda: Call(*(torch.zeros(shape) for shape in ((1, 2, 3, 8), (1, 2, 4, 6), (1, 2, 4, 8)))), "key has shape"),
        (lambda: Call(*(torch.zeros(shape) for shape in ((1, 2, 3, 8), (1, 2, 4, 8), (1, 2, 5, 8)))), "value has"),
        (lambda: Call(*(torch.zeros(shape) for shape in ((1, 2, 3, 8), (2, 2, 4, 8), (2, 2, 4, 8)))), "key has shape"),
        (lambda: Call(*(torch.zeros(4, 8) for _ in range(3))), "query has shape"),
    ],
)
def test_operands_that_do_not_fit_are_told(bad: Callable[[], Call], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        torch.ops.adakv.attention_v1(*bad().arguments)
