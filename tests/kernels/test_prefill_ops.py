"""Select and compact: what a prefill keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adakv_compile.kernels.compact.reference import compact
from adakv_compile.kernels.select.cpu import select_cpu
from adakv_compile.kernels.select.reference import select
from adakv_compile.policy import Policy, layer_budget, layer_capacity

OPS = torch.ops.adakv


@pytest.mark.parametrize("method", ["ada-snapkv", "snapkv", "ada-pyramid", "pyramidkv", "streamingllm"])
@pytest.mark.parametrize("budget", [9, 17, 200, 0.3])
@pytest.mark.parametrize("layer", [0, 2])
def test_select_keeps_the_budget(method: Any, budget: float, layer: int) -> None:
    policy = Policy(method=method, budget=budget, window=4, layer=layer, num_layers=3)
    scores = torch.rand(2, 3, 60, generator=torch.manual_seed(0))
    positions, offsets = OPS.select_v1(scores, None, None, policy.encode())
    kept = 3 * layer_budget(policy, 60)
    assert positions.shape == (2, kept)
    assert offsets[:, -1].tolist() == [kept, kept]
    for row in range(2):
        for head in range(3):
            part = positions[row, offsets[row, head] : offsets[row, head + 1]]
            assert (part.diff() > 0).all()
            assert part.min() >= 0
            assert part.max() < 60


@pytest.mark.parametrize("method", ["ada-snapkv", "ada-pyramid", "streamingllm"])
def test_padding_is_not_kept_and_not_counted(method: Any) -> None:
    policy = Policy(method=method, budget=20, window=4, layer=2, num_layers=3)
    scores = torch.rand(4, 3, 60, generator=torch.manual_seed(0))
    lengths = [60, 41, 15, 0]
    padding = torch.arange(60) >= 60 - torch.tensor(lengths)[:, None]
    positions, offsets = OPS.select_v1(scores, padding, None, policy.encode())
    assert positions.shape[1] == 3 * layer_capacity(policy, 60)
    assert offsets[:, -1].tolist() == [3 * layer_budget(policy, n) for n in lengths]
    for row, length in enumerate(lengths):
        end = int(offsets[row, -1])
        assert (positions[row, :end] >= 60 - length).all()
        assert not positions[row, end:].any()
        if length:
            alone = scores[row : row + 1, :, 60 - length :].contiguous()
            single, bounds = OPS.select_v1(alone, None, None, policy.encode())
            assert torch.equal(bounds[0], offsets[row])
            assert torch.equal(single[0, :end] + 60 - length, positions[row, :end])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sliding_window", [2, 10, 60, 61])
def test_select_drops_what_no_later_query_sees(sliding_window: int, padded: bool) -> None:
    policy = Policy(budget=12, window=4)
    scores = torch.rand(2, 3, 60, generator=torch.manual_seed(0))
    padding = torch.ones(2, 60, dtype=torch.bool) if padded else None
    positions, offsets = OPS.select_v1(scores, padding, sliding_window, policy.encode())
    live = min(60, sliding_window - 1)
    assert positions.shape[1] == 3 * min(12, live)
    assert offsets[0, -1] == positions.shape[1]
    assert positions.min() >= 60 - live
    sliced, bounds = OPS.select_v1(scores[:, :, 60 - live :].contiguous(), None, sliding_window, policy.encode())
    assert torch.equal(sliced + 60 - live, positions)
    assert torch.equal(bounds, offsets)


@pytest.mark.parametrize("overload", ["default", "portable"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_compact(contiguous: bool, overload: str) -> None:
    random = torch.manual_seed(0)
    policy = Policy(budget=12, window=4).encode()
    scores = torch.rand(2, 3, 60, generator=random)
    padding = torch.ones(2, 60, dtype=torch.bool)
    padding[1, :53] = False
    positions, offsets = OPS.select_v1(scores, padding, None, policy)
    key, value = torch.randn(2, 60, 3, 8, generator=random), torch.randn(2, 60, 3, 6, generator=random)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if contiguous:
        key, value = key.contiguous(), value.contiguous()
    keys, values = getattr(OPS.compact_v1, overload)(key, value, positions, offsets)
    assert keys.is_contiguous()
    for row in range(2):
        for head in range(3):
            begin, end = offsets[row, head : head + 2].tolist()
            places = positions[row, begin:end].long()
            assert torch.equal(keys[row, begin:end], key[row, head, places])
            assert torch.equal(values[row, begin:end], value[row, head, places])
    assert offsets[1, -1] == 21
    assert not keys[1, 21:].any()
    assert not values[1, 21:].any()


def test_arguments_are_checked() -> None:
    policy = Policy(budget=12, window=4).encode()
    key = torch.rand(2, 3, 20, 8)
    with pytest.raises(ValueError, match=r"select: scores has shape \[2, 3\]; expected \[\*, \*, \*\]"):
        OPS.select_v1(torch.rand(2, 3), None, None, policy)
    with pytest.raises(ValueError, match=r"select: padding is torch\.float32; expected torch\.bool"):
        OPS.select_v1(torch.rand(2, 3, 9), torch.ones(2, 9), None, policy)
    with pytest.raises(ValueError, match="compact: value has shape"):
        OPS.compact_v1(key, key[:, :2], torch.zeros(2, 6).int(), torch.zeros(2, 4).int())
    with pytest.raises(ValueError, match="not an encoded policy"):
        OPS.select_v1(torch.rand(2, 3, 9), None, None, "nothing")


@pytest.mark.parametrize("method", ["ada-snapkv", "ada-pyramid", "snapkv", "pyramidkv", "streamingllm"])
@pytest.mark.parametrize("budget", [9, 20, 64, 0.5])
@pytest.mark.parametrize("sliding_window", [None, 12])
@pytest.mark.parametrize("padded", ["no", "none is", "some are"])
def test_a_prompt_within_the_budget_is_kept_as_the_general_selection_keeps_it(
    method: Any, budget: float, sliding_window: int | None, padded: str
) -> None:
    for length in (1, 7, 20, 21, 64, 65):
        for layer in (0, 3):
            policy = Policy(method=method, budget=budget, window=4, layer=layer, num_layers=4)
            scores = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(length))
            padding = None if padded == "no" else torch.ones(2, length, dtype=torch.bool)
            if padded == "some are" and padding is not None:
                padding[1, : length // 3] = False
            arguments = (scores, padding, sliding_window, policy.encode())
            for found, expected in zip(select_cpu(*arguments), select(*arguments), strict=True):
                assert torch.equal(found, expected)
                assert found.dtype == expected.dtype
                assert found.is_contiguous()


def test_nothing_is_ranked_where_everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(budget=20, window=4).encode()
    monkeypatch.setattr("adakv_compile.kernels.select.cpu.select", lambda *_: pytest.fail("ranked"))
    select_cpu(torch.rand(1, 2, 20), torch.ones(1, 20, dtype=torch.bool), None, policy)
    with pytest.raises(pytest.fail.Exception):
        select_cpu(torch.rand(1, 2, 21), None, None, policy)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_whole_is_copied_as_it_is_gathered(transposed: bool) -> None:
    key, value = torch.rand(2, 3, 20, 8), torch.rand(2, 3, 20, 5)
    if transposed:
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    scores = torch.rand(2, 3, 20)
    for budget in (19, 20):
        kept = OPS.select_v1(scores, None, None, Policy(budget=budget, window=4).encode())
        for found, expected in zip(OPS.compact_v1(key, value, *kept), compact(key, value, *kept), strict=True):
            assert torch.equal(found, expected)
            assert found.is_contiguous()
            assert found.data_ptr() not in (key.data_ptr(), value.data_ptr())
