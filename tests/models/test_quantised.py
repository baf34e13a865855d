"""Caches that hold numbers in another form than attention reads are left alone, with a reason, and stay right."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

import adakv_compile
from adakv_compile import Reason
from tests.models.families import VOCAB, build


class Bytes(QuantizedLayer):
    """Eight bits and one scale a row, in plain PyTorch: no library of quantisers is needed."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Any:
        return q_tensor[0].to(q_tensor[1].dtype) * q_tensor[1]


def quantised() -> Cache:
    return Cache(layers=[Bytes(residual_length=4) for _ in range(2)])


def steps(model: Any, ids: Tensor, count: int) -> tuple[list[Tensor], Cache]:
    """Return the logits of a prompt and of the greedy tokens after it."""
    cache, found = quantised(), list[Tensor]()
    with torch.no_grad():
        for _ in range(count):
            logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            found.append(logits)
            ids = logits.argmax(-1, keepdim=True)
    return found, cache


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_quantised_cache_is_left_alone(inner: str) -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    options = {"budget": 24, "window": 8, "inner": inner}
    ids = torch.randint(2, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    expected, _ = steps(plain, ids, 8)
    model.compile(backend="adakv", options=options, dynamic=True)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found, cache = steps(model, ids, 8)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not any(stats.compressed for stats in adakv_compile.cache_stats(cache).layers)
    said = [str(item.message) for item in heard if "uncompressed" in str(item.message)]
    assert said
    assert all(any(reason.name in text for reason in (Reason.NO_CACHE, Reason.CACHE_FORM)) for text in said), said
