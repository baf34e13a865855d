"""Select and compact: what a prefill keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adakv_compile.kernels.compact.reference import compact
from adakv_compile.kernels.select.cpu import select_cpu
from adakv_compile.kernels.select.reference import select
from adakv_compile.policy import Policy, layer_budget

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
