"""The observation window's scores against plain loops, and their pooling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adakv_compile.policy import pool_scores, scores, window_scores
from tests.oracles import paper

SHAPES = [(1, 1, 1, 1, 1, 2), (2, 4, 2, 3, 9, 4), (3, 6, 1, 5, 17, 8), (2, 3, 3, 4, 4, 2)]


def inputs(shape: tuple[int, int, int, int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``query [B, Hq, W, D]`` and ``key [B, Hkv, L, D]``."""
    batch, num_query_heads, num_kv_heads, window, length, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, num_query_heads, window, dim, generator=generator)
    return query, torch.randn(batch, num_kv_heads, length, dim, generator=generator)


def causal(window: int, length: int) -> torch.Tensor:
    """Return ``[W, L]``: query ``w`` sits at ``L - W + w``."""
    return torch.ones(window, length, dtype=torch.bool).tril(length - window)


@pytest.mark.parametrize("gqa", ["mean", "max"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_the_papers(shape: tuple[int, int, int, int, int, int], gqa: Any) -> None:
    query, key = inputs(shape)
    window, length = shape[3:5]
    real = torch.arange(length) >= torch.tensor([0, length // 2, 1])[: shape[0], None]
    visible = causal(window, length)[None, None] & real[:, None, None]
    counted = real[:, length - window :]
    actual = window_scores(query, key, scale=0.7, visible=visible, gqa=gqa, query_valid=counted)
    for row in range(shape[0]):
        expected = paper.observe(
            query[row].double().tolist(),
            key[row].double().tolist(),
            0.7,
            visible[row, 0].tolist(),
            counted[row].tolist(),
            gqa,
        )
        torch.testing.assert_close(actual[row], torch.tensor(expected))


@pytest.mark.parametrize("gqa", ["mean", "max"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_causal_rule_is_a_mask_of_the_same_meaning(shape: tuple[int, int, int, int, int, int], gqa: Any) -> None:
    query, key = inputs(shape)
    window, length = shape[3:5]
    real = (torch.arange(length) >= length // 3)[None, None, None]
    for visible, mask in ((None, causal(window, length)[None, None]), (real, real & causal(window, length))):
        ruled = window_scores(query, key, scale=0.7, visible=visible, causal=True, gqa=gqa)
        assert torch.equal(ruled, window_scores(query, key, scale=0.7, visible=mask, gqa=gqa))
        assert not torch.equal(ruled, window_scores(query, key, scale=0.7, visible=visible, gqa=gqa)) or window == 1


def test_a_row_of_mean_scores_is_a_distribution() -> None:
    query, key = inputs((2, 8, 2, 5, 40, 16))
    summed = window_scores(query, key, scale=0.25).sum(-1)
    torch.testing.assert_close(summed, torch.ones(2, 2))


@pytest.mark.parametrize("limit", [1, 4 * 9 * 6, 4 * 9 * 6 * 2, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_do_not_change_the_scores(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 4, 2, 3, 9, 4)
    query, key = (part.to(dtype) for part in inputs(shape))
    visible = torch.rand(3, 4, 3, 9) > 0.3
    bias = torch.randn(1, 2, 1, 9)
    counted = torch.tensor([[True] * 3, [False, True, True], [False] * 3])
    expected = window_scores(query, key, scale=0.5, visible=visible, bias=bias, query_valid=counted)
    monkeypatch.setattr(scores, "_MAX_BLOCK_BYTES", limit)
    actual = window_scores(query, key, scale=0.5, visible=visible, bias=bias, query_valid=counted)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_masks_of_one_kv_or_query_head_each(heads: int) -> None:
    query, key = inputs((2, 6, 2, 3, 11, 4))
    visible = torch.rand(2, heads, 3, 11, generator=torch.Generator().manual_seed(1)) > 0.4
    actual = window_scores(query, key, scale=0.5, visible=visible)
    dense = visible.repeat_interleave(6 // heads, 1)
    logits = (query @ key.repeat_interleave(3, 1).mT * 0.5).masked_fill(~dense, -torch.inf)
    expected = logits.softmax(-1).nan_to_num(0).mean(2).unflatten(1, (2, 3)).mean(2)
    torch.testing.assert_close(actual, expected)
    hidden = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(window_scores(query, key, scale=0.5, bias=hidden), actual)


def test_bias_is_added_to_the_logits() -> None:
    query, key = inputs((1, 2, 2, 3, 7, 4))
    bias = torch.randn(2, 3, 7)
    expected = (query @ key.mT * 0.5 + bias).softmax(-1).mean(2)
    torch.testing.assert_close(window_scores(query, key, scale=0.5, bias=bias), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gqa", ["mean", "max"])
def test_the_lowest_float_hides_as_infinity_does(gqa: Any, dtype: torch.dtype) -> None:
    query, key = inputs((1, 4, 2, 3, 7, 4))
    hidden = torch.rand(1, 1, 3, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[:, :, 1] = True  # a query that sees nothing: its logits differ by rounding, if at all
    lowest, infinite = (
        torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, low) for low in (torch.finfo(dtype).min, -torch.inf)
    )
    result = window_scores(query, key, scale=0.5, bias=lowest, gqa=gqa)
    assert torch.equal(result, window_scores(query, key, scale=0.5, bias=infinite, gqa=gqa))
    if gqa == "mean":
        torch.testing.assert_close(result.sum(-1), torch.full((1, 2), 2 / 3))


def test_half_precision_is_scored_in_float32() -> None:
    query, key = (part.bfloat16() for part in inputs((1, 4, 2, 3, 50, 8)))
    actual = window_scores(query, key, scale=0.3)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, window_scores(query.float(), key.float(), scale=0.3))
    assert not torch.equal(actual, actual.bfloat16().float())


def test_what_nobody_sees_scores_zero() -> None:
    query, key = inputs((2, 2, 1, 3, 8, 4))
    visible = torch.ones(2, 1, 3, 8, dtype=torch.bool)
    visible[0, :, :, 2] = False
    visible[1] = False
    result = window_scores(query, key, scale=1.0, visible=visible)
    assert result[0, 0, 2] == 0
    assert (result[0, 0, 3:] > 0).all()
    assert (result[1] == 0).all()


def test_padding_queries_do_not_count_whatever_they_hold() -> None:
    query, key = inputs((1, 2, 1, 4, 8, 4))
    expected = window_scores(query[:, :, 2:], key, scale=1.0)
    query[:, :, :2] = torch.nan
    counted = torch.tensor([[False, False, True, True]])
    torch.testing.assert_close(window_scores(query, key, scale=1.0, query_valid=counted), expected)
    nobody = window_scores(query, key, scale=1.0, query_valid=torch.zeros_like(counted))
    assert (nobody == 0).all()


def test_nan_stays_in_its_head() -> None:
    query, key = inputs((1, 4, 2, 3, 8, 4))
    clean = window_scores(query, key, scale=1.0)
    key[0, 1, 5] = torch.nan
    result = window_scores(query, key, scale=1.0)
    assert result[0, 1].isnan().all()
    assert torch.equal(result[0, 0], clean[0, 0])


def test_large_logits_do_not_overflow() -> None:
    query, key = inputs((1, 2, 2, 3, 8, 4))
    result = window_scores(query * 1e4, key * 1e4, scale=1.0)
    torch.testing.assert_close(result.sum(-1), torch.ones(1, 2))


def test_heads_must_divide() -> None:
    query, key = inputs((1, 3, 2, 1, 4, 2))
    with pytest.raises(ValueError, match="3 query heads do not divide over 2 KV heads"):
        window_scores(query, key, scale=1.0)


class Largest(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_keys_are_not_expanded_over_the_group() -> None:
    query, key = inputs((1, 8, 1, 2, 100, 64))
    with Largest() as largest:
        window_scores(query, key, scale=0.1, visible=causal(2, 100))
    assert largest.numel == key.numel()  # a view of the keys; the logits are 8 * 2 * 100


def test_blocks_bound_the_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = inputs((2, 16, 4, 8, 100, 2))
    monkeypatch.setattr(scores, "_MAX_BLOCK_BYTES", 4 * 32 * 100)
    with Largest() as largest:
        window_scores(query, key, scale=0.1)
    assert largest.numel == 32 * 100


def test_max_pooling() -> None:
    values = torch.tensor([[[0.0, 5.0, 1.0, 1.0, -3.0, -4.0]]])
    pooled = pool_scores(values, kind="max", kernel_size=3)
    assert pooled.tolist() == [[[5.0, 5.0, 5.0, 1.0, 1.0, -3.0]]]


def test_average_pooling_counts_the_outside_as_zero() -> None:
    values = torch.tensor([[[3.0, 6.0, 0.0, 9.0]]])
    assert pool_scores(values, kind="avg", kernel_size=3).tolist() == [[[3.0, 3.0, 5.0, 3.0]]]


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_pooling_is_the_oracles(kind: Any, kernel_size: int) -> None:
    for length in (1, 2, 6, 30):
        values = torch.randint(-8, 8, (2, 3, length)).float()
        pooled = pool_scores(values, kind=kind, kernel_size=kernel_size)
        for row, head in ((0, 0), (1, 2)):
            expected = paper.pool(values[row, head].tolist(), kind, kernel_size)
            assert pooled[row, head].tolist() == pytest.approx(expected)


def test_scale_is_a_factor() -> None:
    query, key = inputs((1, 2, 2, 3, 8, 4))
    torch.testing.assert_close(
        window_scores(query, key, scale=1 / math.sqrt(4)),
        window_scores(query / 2, key, scale=1.0),
    )
