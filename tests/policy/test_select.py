"""What is kept: against the paper's algorithms, and the promises that hold for every input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_compile.policy import Method, Policy, layer_budget, select
from adakv_compile.policy.select import top_mask
from tests.oracles import paper
from tests.policy.cases import (
    Case,
    cases,
    kept_positions,
    left_padding,
    policies,
    ragged,
    scores_like,
)

METHODS: tuple[Method, ...] = ("ada-snapkv", "snapkv", "ada-pyramid", "pyramidkv", "streamingllm")
WINDOWED = METHODS[:-1]


def oracle(policy: Policy, scores: torch.Tensor, valid: torch.Tensor, total: int) -> list[set[int]]:
    """Return what the paper keeps of one row, ``[H, L]``."""
    if policy.method == "streamingllm":
        return paper.streaming(valid.tolist(), total=total, sinks=policy.sinks)
    return paper.algorithm_2(
        scores.tolist(),
        valid.tolist(),
        total=total,
        window=policy.window,
        alpha=policy.uniform_share,
        pool_kind=policy.pool,
        kernel_size=policy.kernel_size,
        safeguard=policy.safeguard,
        ties=policy.ties,
    )


@settings(deadline=None, max_examples=200)
@given(cases, policies(METHODS))
def test_prefill_keeps_what_the_paper_keeps(case: Case, policy: Policy) -> None:
    scores, padding = case.scores, left_padding(case.batch, case.length, case.seed)
    kept = kept_positions(select(policy, scores, padding[:, None]))
    for row, real in enumerate(padding):
        total = case.num_heads * layer_budget(policy, int(real.sum()))
        valid = real.expand(case.num_heads, -1)
        assert kept[row] == oracle(policy, scores[row], valid, total)


@settings(deadline=None, max_examples=200)
@given(cases, policies(METHODS), st.data())
def test_ragged_heads_keep_what_the_paper_keeps(case: Case, policy: Policy, data: st.DataObject) -> None:
    valid = ragged(case.batch, case.num_heads, case.length, case.seed)
    always = valid.sum(-1).clamp(max=policy.window).sum(-1)
    if policy.method == "streamingllm":
        always = torch.zeros_like(always)
    totals = torch.tensor([data.draw(st.integers(int(low), case.num_heads * case.length + 2)) for low in always])
    kept = kept_positions(select(policy, case.scores, valid, total=totals))
    for row in range(case.batch):
        expected = oracle(policy, case.scores[row], valid[row], int(totals[row]))
        assert kept[row] == expected


@settings(deadline=None, max_examples=150)
@given(cases, policies(METHODS))
def test_totals_are_exact(case: Case, policy: Policy) -> None:
    padding = left_padding(case.batch, case.length, case.seed)
    keep = select(policy, case.scores, padding[:, None])
    expected = case.num_heads * layer_budget(policy, padding.sum(-1))
    assert torch.equal(keep.sum((1, 2)), expected)
    assert not (keep & ~padding[:, None]).any()


@settings(deadline=None, max_examples=100)
@given(cases, policies(WINDOWED))
def test_the_window_is_always_kept(case: Case, policy: Policy) -> None:
    padding = left_padding(case.batch, case.length, case.seed)
    keep = select(policy, case.scores, padding[:, None])
    window = padding & (torch.arange(case.length) >= case.length - policy.window)
    assert (keep | ~window[:, None]).all()


@settings(deadline=None, max_examples=100)
@given(cases, policies(METHODS))
def test_a_row_of_a_batch_is_that_row_alone(case: Case, policy: Policy) -> None:
    padding = left_padding(case.batch, case.length, case.seed)
    # What the padding's columns score, were they counted, would win every place.
    scores = case.scores.masked_fill(~padding[:, None], 100.0)
    together = select(policy, scores, padding[:, None])
    for row, real in enumerate(padding.sum(-1).tolist()):
        alone = select(policy, scores[row : row + 1, :, case.length - real :])
        assert torch.equal(together[row : row + 1, :, case.length - real :], alone)


@settings(deadline=None, max_examples=60)
@given(cases, policies(METHODS), st.integers(0, 9))
def test_padding_at_the_end_changes_nothing(case: Case, policy: Policy, extra: int) -> None:
    valid = ragged(case.batch, case.num_heads, case.length, case.seed)
    total = valid.sum((1, 2)) * 2 // 3
    expected = select(policy, case.scores, valid, total=total)
    padded = torch.nn.functional.pad(case.scores, (0, extra), value=100.0)
    longer = torch.nn.functional.pad(valid, (0, extra))
    keep = select(policy, padded, longer, total=total)
    assert torch.equal(keep[..., : case.length], expected)
    assert not keep[..., case.length :].any()


def brute_force(scores: torch.Tensor, window: int, kept: int) -> torch.Tensor:
    """Return the ``kept`` best of each row and the window, ties to the lower index."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row, values in enumerate(scores[:, : scores.shape[1] - window].tolist()):
        order = sorted(range(len(values)), key=lambda index: (-values[index], index))
        keep[row, order[:kept]] = True
    keep[:, scores.shape[1] - window :] = True
    return keep


@pytest.mark.parametrize("kind", ["smooth", "tied", "peaked", "signed"])
@pytest.mark.parametrize("method", ["ada-snapkv", "snapkv"])
def test_alpha_one_is_uniform_snapkv(kind: str, method: Any) -> None:
    policy = Policy(method=method, budget=20, window=4, kernel_size=5, alpha=1.0)
    if method == "snapkv":
        policy = replace(policy, alpha=0.0)  # not used
    for seed in range(20):
        scores = scores_like(kind, (3, 90), seed)
        pooled = scores.clone()
        pooled[:, :86] = torch.stack([torch.tensor(paper.pool(head, "max", 5)) for head in scores[:, :86].tolist()])
        keep = select(policy, scores[None])
        assert torch.equal(keep[0], brute_force(pooled, 4, 16))


@pytest.mark.parametrize("kind", ["smooth", "tied", "peaked", "signed"])
def test_alpha_zero_is_the_global_top(kind: str) -> None:
    policy = Policy(budget=20, window=4, kernel_size=1, alpha=0.0)
    for seed in range(20):
        scores = scores_like(kind, (3, 90), seed)
        keep = select(policy, scores[None])[0]
        ranked = sorted((-float(scores[head, at]), at, head) for head in range(3) for at in range(86))
        expected = torch.zeros(3, 90, dtype=torch.bool)
        expected[:, 86:] = True
        for _, at, head in ranked[:48]:
            expected[head, at] = True
        assert torch.equal(keep, expected)


def test_ties_on_a_max_pool_plateau_go_to_the_lower_position() -> None:
    scores = torch.zeros(1, 2, 30)
    scores[0, 0, 10] = 1.0
    uniform = Policy(method="snapkv", budget=6, window=2, kernel_size=7)
    kept = kept_positions(select(uniform, scores))[0]
    assert kept == [{7, 8, 9, 10, 28, 29}, {0, 1, 2, 3, 28, 29}]
    # Globally: the plateau 7..13 is seven entries; the eighth is the lowest zero of the lower head.
    kept = kept_positions(select(replace(uniform, method="ada-snapkv", alpha=0.0), scores))[0]
    assert kept == [{0, *range(7, 14), 28, 29}, {28, 29}]


def test_equal_scores_alternate_between_heads() -> None:
    """The lower position first, in every head, then the lower head."""
    policy = Policy(budget=4, window=1, alpha=0.0)
    kept = kept_positions(select(policy, torch.ones(1, 3, 20)))[0]
    assert kept == [{0, 1, 2, 19}] * 3
    total = torch.tensor([3 + 7])
    kept = kept_positions(select(policy, torch.ones(1, 3, 20), total=total))[0]
    assert kept == [{0, 1, 2, 19}, {0, 1, 19}, {0, 1, 19}]


def test_negative_zero_ties_with_zero() -> None:
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, 0.0]]])
    policy = Policy(budget=3, window=1, kernel_size=1)
    assert kept_positions(select(policy, scores)) == [[{0, 1, 4}]]


def test_the_window_does_not_leak_into_the_pooled_scores() -> None:
    scores = torch.zeros(1, 1, 20)
    scores[..., 2] = 1.0
    scores[..., 16:] = 100.0
    policy = Policy(budget=5, window=4, kernel_size=7)
    assert kept_positions(select(policy, scores)) == [[{0, 16, 17, 18, 19}]]
    average = replace(policy, pool="avg")
    assert kept_positions(select(average, scores)) == [[{0, 16, 17, 18, 19}]]


def test_dead_entries_are_not_pooled_over_and_not_kept() -> None:
    scores = torch.ones(1, 1, 20)
    scores[..., :6] = 100.0
    valid = torch.arange(20)[None, None] >= 6  # a sliding window has passed the others
    scores[..., 15] = 2.0
    keep = select(Policy(budget=3, window=2, kernel_size=3), scores, valid)
    assert kept_positions(keep) == [[{14, 18, 19}]]


def test_explicit_protection_replaces_the_window() -> None:
    scores = torch.arange(10.0).expand(1, 2, 10)
    protected = torch.zeros(1, 2, 10, dtype=torch.bool)
    protected[0, 0, :3] = True
    policy = Policy(budget=5, window=4, kernel_size=1, alpha=0.0)
    kept = kept_positions(select(policy, scores, protected=protected))[0]
    assert kept == [{0, 1, 2, 6, 7, 8, 9}, {7, 8, 9}]
    nothing = torch.zeros(1, 1, 10, dtype=torch.bool)
    kept = kept_positions(select(policy, scores, protected=nothing))[0]
    assert kept == [{5, 6, 7, 8, 9}] * 2


def test_invalid_entries_cannot_be_protected() -> None:
    valid = torch.arange(10)[None, None] < 6
    everything = torch.ones(1, 1, 10, dtype=torch.bool)
    keep = select(Policy(budget=8, window=1), torch.ones(1, 1, 10), valid, protected=everything)
    assert torch.equal(keep, valid)


def test_a_total_below_the_protected_entries_keeps_those() -> None:
    keep = select(Policy(budget=8, window=3), torch.ones(2, 2, 10), total=torch.tensor([0, 4]))
    assert kept_positions(keep) == [[{7, 8, 9}] * 2] * 2


def test_streaming_keeps_sinks_and_the_latest_whatever_the_scores() -> None:
    policy = Policy(method="streamingllm", budget=7, sinks=3, window=32)
    scores = torch.rand(2, 2, 30)
    padding = torch.arange(30) >= torch.tensor([[0], [12]])
    kept = kept_positions(select(policy, scores, padding[:, None]))
    assert kept[0] == [{0, 1, 2, 26, 27, 28, 29}] * 2
    assert kept[1] == [{12, 13, 14, 26, 27, 28, 29}] * 2
    everything = torch.ones(2, 1, 30, dtype=torch.bool)
    again = select(policy, scores, padding[:, None], protected=everything)
    assert kept_positions(again) == kept


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_nan_ranks_lowest_and_spreads_to_nobody(pool: Any, alpha: float) -> None:
    policy = Policy(budget=10, window=2, kernel_size=3, pool=pool, alpha=alpha)
    scores = scores_like("smooth", (2, 2, 30), 0) + 1
    broken = scores.clone()
    broken[0, :, 5:12] = torch.nan
    broken[1, 1] = torch.nan
    keep = select(policy, broken)
    assert keep.sum((1, 2)).tolist() == [20, 20]
    assert not keep[0, :, 5:12].any()
    absent = torch.ones(2, 2, 30, dtype=torch.bool)
    absent[0, :, 5:12] = False
    assert torch.equal(keep[0], select(policy, scores, absent, total=torch.tensor([20, 20]))[0])
    # A head of NaNs only: what the uniform share gives it, lowest positions first.
    uniform_share = {0.0: 0, 0.2: 2, 1.0: 8}[alpha]
    assert kept_positions(keep)[1][1] == {*range(uniform_share), 28, 29}


def test_nothing_but_nan_still_fills_the_budget() -> None:
    scores = torch.full((1, 2, 20), torch.nan)
    kept = kept_positions(select(Policy(budget=5, window=2), scores))
    assert kept == [[{0, 1, 2, 18, 19}] * 2]


@pytest.mark.parametrize("method", ["ada-snapkv", "snapkv"])
def test_nan_still_ranks_above_padding(method: Method) -> None:
    scores = torch.full((1, 2, 20), torch.nan)
    padding = torch.arange(20)[None, None] >= 9
    keep = select(Policy(method=method, budget=5, window=2), scores, padding)
    assert kept_positions(keep) == [[{9, 10, 11, 18, 19}] * 2]


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_infinite_scores_keep_the_totals(pool: Any) -> None:
    scores = scores_like("smooth", (1, 2, 20), 0)
    scores[0, 0, 3], scores[0, 0, 5], scores[0, 1] = torch.inf, -torch.inf, -torch.inf
    keep = select(Policy(budget=6, window=2, kernel_size=3, pool=pool, alpha=0.0), scores)
    assert keep.sum().item() == 12
    assert keep[0, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_dtypes_are_ranked_in_float32(dtype: torch.dtype) -> None:
    scores = scores_like("tied", (2, 3, 40), 3)
    policy = Policy(budget=10, window=2)
    assert torch.equal(select(policy, scores.to(dtype)), select(policy, scores))


def test_scores_are_left_alone() -> None:
    scores = scores_like("smooth", (1, 2, 40), 0)
    before = scores.clone()
    select(Policy(budget=10, window=2), scores)
    assert torch.equal(scores, before)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 1 << 16), st.integers(1, 300), st.sampled_from(("wide", "narrow", "extreme")))
def test_top_mask_is_a_stable_sort(seed: int, length: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = {"wide": (-(1 << 31), 1 << 31), "narrow": (-3, 3), "extreme": (0, 3)}[kind]
    keys = torch.randint(low, high, (3, 2, length), generator=generator)
    if kind == "extreme":
        keys = torch.tensor([-(1 << 31), (1 << 31) - 1, -1])[keys]
    counts = torch.randint(0, length + 1, (3, 2), generator=generator)
    counts[0, 0], counts[0, 1] = 0, length
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices
    ranks = order.argsort(-1)
    assert torch.equal(top_mask(keys.to(torch.int32), counts), ranks < counts[..., None])


def test_16k_entries_like_a_stable_sort() -> None:
    """Sizes beyond the other tests': 8 heads of 16k entries with plenty of ties."""
    scores = torch.randint(0, 4096, (1, 8, 16384), generator=torch.Generator().manual_seed(0)) / 8
    keep = select(Policy(budget=512, window=32, alpha=0.0, kernel_size=1), scores)
    assert keep.sum().item() == 8 * 512
    position_major = scores[0, :, :-32].T.flatten()
    order = torch.sort(position_major, descending=True, stable=True).indices[: 8 * 480]
    expected = torch.zeros_like(position_major, dtype=torch.bool)
    expected[order] = True
    assert torch.equal(keep[0, :, :-32], expected.view(-1, 8).T)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_of_nothing(method: Method) -> None:
    policy = Policy(method=method, budget=40)
    assert select(policy, torch.zeros(2, 3, 0)).shape == (2, 3, 0)
    keep = select(policy, torch.zeros(2, 3, 5), torch.zeros(2, 1, 5, dtype=torch.bool))
    assert not keep.any()
