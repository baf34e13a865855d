"""What is not understood runs as under plain Inductor, with a true reason; it is never compressed by mistake."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import adakv_compile
from adakv_compile import CompilationRefusedError, CompressedKV, Reason
from tests.backend.decoders import Cache, Mask, OneLayer, causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager"}
LENGTH = 40


def _bidirectional(new: int, total: int) -> Tensor:
    return torch.ones(new, total, dtype=torch.bool)


def _prefix(new: int, total: int) -> Tensor:
    return causal(new, total) | (torch.arange(total) < 8)


def _too_late(new: int, total: int) -> Tensor:
    return torch.arange(total) < torch.arange(total - new, total)[:, None].clamp(min=1)


def _too_early(new: int, total: int) -> Tensor:
    return torch.arange(total) <= torch.arange(total - new, total)[:, None] + 1


def _top_left(new: int, total: int) -> Tensor:
    return torch.arange(total) <= torch.arange(new)[:, None] + 3


def _dilated(new: int, total: int) -> Tensor:
    distance = torch.arange(total - new, total)[:, None] - torch.arange(total)
    return (distance >= 0) & (distance % 2 == 0)


def _anticausal(new: int, total: int) -> Tensor:
    return torch.arange(total) >= torch.arange(total - new, total)[:, None]


def _random(new: int, total: int) -> Tensor:
    return (torch.rand(new, total) > 0.5) | causal(new, total)


def _soft(new: int, total: int) -> Tensor:
    return torch.where(causal(new, total), 0.0, -3.0)


MASKS: dict[str, Mask] = {
    "none": lambda new, total: None,
    "bidirectional": _bidirectional,
    "prefix": _prefix,
    "one too few": _too_late,
    "one too many": _too_early,
    "offset": _top_left,
    "dilated": _dilated,
    "anticausal": _anticausal,
    "random": _random,
    "soft": _soft,
}


class _TwoReaders(OneLayer):
    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        y, (k, v) = super().forward(x, cache)
        return y + k.mean(), (k, v)


class _SharedCache(OneLayer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One attention that is understood beside one that is not.
        other = torch.softmax((q @ k.repeat_interleave(2, 1).mT).masked_fill(~causal(q.shape[2], k.shape[2]), -9.0), -1)
        return super().attend(q, k, v) + other.square() @ v.repeat_interleave(2, 1)


class _Centred(OneLayer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k - k.mean(2, keepdim=True), v)


class _Swapped(OneLayer):
    def extend(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, old], dim=2)


class _Dropping(OneLayer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.5, enable_gqa=True)


class _ValuesOnly(OneLayer):
    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        y, (_, v) = super().forward(x, cache)
        return y, (v, v)


class _OneTensor(OneLayer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, k)


class _Reversed(OneLayer):
    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        y, (k, v) = super().forward(x, cache)
        return y, (k.flip(2), v.flip(2))


class _WrongRepeat(OneLayer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat(1, 2, 1, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q.shape[2], k.shape[2]))


STRUCTURES: dict[str, type[OneLayer]] = {
    "two readers": _TwoReaders,
    "an attention beside one that is not understood": _SharedCache,
    "keys centred after the cache": _Centred,
    "keys returned for values": _ValuesOnly,
    "keys used as values": _OneTensor,
    "cache returned reversed": _Reversed,
    "heads repeated in the wrong order": _WrongRepeat,
    "dropout": _Dropping,
}


def _run(model: nn.Module, x: Tensor, **options: Any) -> tuple[tuple[Tensor, Cache], list[str]]:
    compiled = torch.compile(model, backend="adakv", options={**OPTIONS, **options})
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        torch.manual_seed(1)
        result = compiled(x)
    return result, [str(item.message) for item in heard if "adakv" in str(item.message)]


def _assert_left_alone(model: nn.Module, x: Tensor) -> None:
    (y, cache), said = _run(model, x)
    torch.manual_seed(1)
    with torch.no_grad():
        expected, dense = model(x)
    assert torch.equal(y, expected)
    for ours, theirs in zip(cache, dense, strict=True):
        assert not isinstance(ours, CompressedKV)
        assert torch.equal(ours, theirs)
    assert len(said) == 1, said
    assert any(reason.name in said[0] for reason in Reason)
    with pytest.raises(BackendCompilerFailed, match="can't be compressed") as raised:
        _run(model, x, strict=True)
    assert isinstance(raised.value.inner_exception, CompilationRefusedError)


def test_the_causal_one_is_compressed() -> None:
    (_, cache), said = _run(OneLayer(), torch.randn(2, LENGTH, 64))
    assert not said
    assert all(isinstance(tensor, CompressedKV) for tensor in cache)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_is_not_causal_is_refused(name: str) -> None:
    _assert_left_alone(OneLayer(MASKS[name]), torch.randn(2, LENGTH, 64))


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_that_is_not_a_cache_is_refused(name: str) -> None:
    _assert_left_alone(STRUCTURES[name](), torch.randn(2, LENGTH, 64))


def test_prepended_entries_are_refused() -> None:
    # The first call can't show it: nothing is concatenated yet. Its cache is compressed, and the second call says no.
    model = _Swapped()
    compiled = torch.compile(model, backend="adakv", options=OPTIONS)
    with torch.no_grad():
        _, cache = compiled(torch.randn(1, LENGTH, 64))
        with pytest.warns(UserWarning, match="CACHE_FORM"), pytest.raises(Exception, match=r"CompressedKV|cat"):
            compiled(torch.randn(1, 1, 64), cache)


def test_training_is_left_alone() -> None:
    model = OneLayer()
    compiled = torch.compile(model, backend="adakv", options={**OPTIONS, "inner": "aot_eager"})
    x = torch.randn(2, LENGTH, 64)
    y, cache = compiled(x)
    assert not isinstance(cache[0], CompressedKV)
    y.sum().backward()
    assert model.q.weight.grad is not None


def test_a_wrong_option_reaches_the_user() -> None:
    with pytest.raises(Exception, match="unknown option 'budgt'; did you mean 'budget'"):
        torch.compile(OneLayer(), backend="adakv", options={"budgt": 3})(torch.randn(1, 8, 64))


def test_every_refusal_names_a_line_of_the_model() -> None:
    report = adakv_compile.explain(OneLayer(_prefix), torch.randn(1, LENGTH, 64), options=OPTIONS)
    (refusal,) = report.refusals
    assert refusal.reason is Reason.MASK_NOT_CAUSAL
    assert refusal.where is not None
    assert refusal.where.file.endswith("test_refusals.py")
    assert "8" in refusal.where.code
