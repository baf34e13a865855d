"""Observe, select and compact: what a prefill keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adakv_compile.policy import Policy, layer_budget, layer_capacity
from tests.kernels.tolerances import assert_near

OPS = torch.ops.adakv


def inputs(queries: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(queries * 1000 + length)
    query = torch.randn(2, 6, queries, 8, generator=random, dtype=torch.float64)
    key = torch.randn(2, 3, length, 8, generator=random, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def observed(
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    policy: Policy,
) -> torch.Tensor:
    """Loop over rows, heads and queries in float64."""
    batch, num_heads, length = key.shape[:3]
    group, count = query.shape[1] // num_heads, query.shape[2]
    scores = torch.zeros(batch, num_heads, length, dtype=torch.float64)
    for row in range(batch):
        for head in range(num_heads):
            members: list[torch.Tensor] = []
            for member in range(group):
                found: list[torch.Tensor] = []
                for step in range(max(0, count - policy.window), count):
                    place = length - count + step
                    if place < 0 or (padding is not None and not padding[row, place]):
                        continue
                    first = 0 if sliding_window is None else max(0, place - sliding_window + 1)
                    seen = torch.zeros(length, dtype=torch.bool)
                    seen[first : place + 1] = True
                    if padding is not None:
                        seen &= padding[row]
                    logits = key[row, head].double() @ query[row, head * group + member, step].double()
                    found.append((logits * scale).masked_fill(~seen, -torch.inf).softmax(-1))
                if found:
                    members.append(torch.stack(found).mean(0))
            if members:
                stacked = torch.stack(members)
                scores[row, head] = stacked.amax(0) if policy.gqa == "max" else stacked.mean(0)
    return scores


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 3, 21])
@pytest.mark.parametrize(("queries", "length"), [(20, 20), (3, 20), (1, 20), (1, 1), (40, 20), (40, 2)])
def test_observe(queries: int, length: int, sliding_window: int | None, padded: bool) -> None:
    query, key = inputs(queries, length)
    padding = torch.ones(2, length, dtype=torch.bool) if padded else None
    if padding is not None:
        padding[0, : length // 2] = False
        padding[1, -1] = False
    for gqa in ("mean", "max"):
        policy = Policy(budget=16, window=8, gqa=gqa)
        scores = OPS.observe_v2(query, key, padding, None, 0.4, sliding_window, policy.encode())
        assert scores.dtype == torch.float32
        truth = observed(query, key, padding, 0.4, sliding_window, policy)
        assert_near(scores, truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_observe_in_half_precision(dtype: torch.dtype) -> None:
    query, key = inputs(20, 20, dtype)
    policy = Policy(budget=16, window=8)
    scores = OPS.observe_v2(query, key, None, None, 0.4, None, policy.encode())
    assert_near(scores, observed(query, key, None, 0.4, None, policy), torch.float32)


def test_streaming_needs_no_scores() -> None:
    query, key = inputs(20, 20)
    policy = Policy(method="streamingllm", budget=16, window=8).encode()
    assert not OPS.observe_v2(query * torch.nan, key, None, None, 0.4, None, policy).any()


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


@pytest.mark.parametrize("contiguous", [True, False])
def test_compact(contiguous: bool) -> None:
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
    keys, values = OPS.compact_v1(key, value, positions, offsets)
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
    query, key = inputs(5, 20)
    with pytest.raises(ValueError, match="observe: query heads 4 not a multiple of KV heads 3"):
        OPS.observe_v2(query[:, :4], key, None, None, 1.0, None, policy)
    with pytest.raises(ValueError, match=r"observe: key is torch\.float64; expected torch\.float32"):
        OPS.observe_v2(query, key.double(), None, None, 1.0, None, policy)
    with pytest.raises(ValueError, match=r"observe: padding has shape \[2, 19\]; expected \[2, 20\]"):
        OPS.observe_v2(query, key, torch.ones(2, 19, dtype=torch.bool), None, 1.0, None, policy)
    with pytest.raises(ValueError, match=r"select: scores has shape \[2, 3\]; expected \[\*, \*, \*\]"):
        OPS.select_v1(torch.rand(2, 3), None, None, policy)
    with pytest.raises(ValueError, match=r"select: padding is torch\.float32; expected torch\.bool"):
        OPS.select_v1(torch.rand(2, 3, 9), torch.ones(2, 9), None, policy)
    with pytest.raises(ValueError, match="compact: value has shape"):
        OPS.compact_v1(key, key[:, :2], torch.zeros(2, 6).int(), torch.zeros(2, 4).int())
    with pytest.raises(ValueError, match="not an encoded policy"):
        OPS.select_v1(torch.rand(2, 3, 9), None, None, "nothing")
