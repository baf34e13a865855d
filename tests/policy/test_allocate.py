"""Head budgets: exact, and as the oracle deals them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_compile.policy import Policy, head_budgets, uniform_budgets
from tests.oracles import paper

ALPHAS = (0.0, 0.05, 0.2, 1 / 3, 0.5, 0.123456, 0.999, 1.0)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Draw what heads have, how much of it is in the global top, and the sum of the latter."""
    available = draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))
    counts = [draw(st.integers(0, have)) for have in available]
    return available, counts, sum(counts)


@settings(deadline=None, max_examples=300)
@given(rows(), st.sampled_from(ALPHAS))
def test_budgets_are_the_oracles_and_sum_exactly(row: tuple[list[int], list[int], int], alpha: float) -> None:
    available, counts, total = row
    budgets = head_budgets(
        Policy(alpha=alpha),
        torch.tensor([counts]),
        torch.tensor([total]),
        torch.tensor([available]),
    )[0].tolist()
    exact = Fraction(str(alpha)).limit_denominator(1_000_000)
    assert budgets == paper.mix(exact, paper.uniform(total, available), counts)
    assert sum(budgets) == total
    assert all(0 <= budget <= have for budget, have in zip(budgets, available, strict=True))


@settings(deadline=None, max_examples=200)
@given(rows())
def test_uniform_budgets_are_dealt_in_turn(row: tuple[list[int], list[int], int]) -> None:
    available, _, total = row
    budgets = uniform_budgets(torch.tensor([total]), torch.tensor([available]))
    assert budgets[0].tolist() == paper.uniform(total, available)


@settings(deadline=None, max_examples=50)
@given(st.lists(rows(), min_size=2, max_size=4), st.sampled_from(ALPHAS))
def test_rows_are_independent(several: list[tuple[list[int], list[int], int]], alpha: float) -> None:
    heads = min(len(available) for available, _, _ in several)
    available = torch.tensor([row[0][:heads] for row in several])
    counts = torch.tensor([row[1][:heads] for row in several])
    policy = Policy(alpha=alpha)
    together = head_budgets(policy, counts, counts.sum(-1), available)
    for row in range(len(several)):
        one = slice(row, row + 1)
        alone = head_budgets(policy, counts[one], counts[one].sum(-1), available[one])
        assert torch.equal(together[one], alone)


def test_alpha_is_the_uniform_share() -> None:
    """The code's meaning; the formula printed in the paper would give 56, 44, 44, 56 and so on."""
    counts = torch.tensor([[80, 20, 20, 80]])
    total, available = torch.tensor([200]), torch.full((1, 4), 100)
    small = head_budgets(Policy(alpha=0.2), counts, total, available)
    assert small.tolist() == [[74, 26, 26, 74]]
    assert head_budgets(Policy(alpha=1), counts, total, available).tolist() == [[50] * 4]
    assert torch.equal(head_budgets(Policy(alpha=0), counts, total, available), counts)
    snapkv = replace(Policy(alpha=0), method="snapkv")
    assert head_budgets(snapkv, counts, total, available).tolist() == [[50] * 4]


def test_remainders_go_to_the_lower_head() -> None:
    counts = torch.tensor([[3, 0, 0, 0]])
    total, available = counts.sum(-1), torch.full((1, 4), 9)
    # 0.5 * (1, 1, 1, 0) + 0.5 * (3, 0, 0, 0) = 2, 1/2, 1/2, 0
    assert head_budgets(Policy(alpha=0.5), counts, total, available).tolist() == [[2, 1, 0, 0]]


def test_totals_beyond_float_precision_stay_exact() -> None:
    counts = torch.tensor([[(1 << 27) + 1, (1 << 27) - 1, 1]])
    total, available = counts.sum(-1), torch.full((1, 3), 1 << 28)
    budgets = head_budgets(Policy(alpha=0.123457), counts, total, available)
    size = sum(counts[0].tolist())
    even = [size // 3 + (head < size % 3) for head in range(3)]
    expected = paper.mix(Fraction(123457, 1_000_000), even, counts[0].tolist())
    assert budgets[0].tolist() == expected
