"""Layer budgets: exact sums, one formula for ints, tensors and SymInts."""

from __future__ import annotations

import dataclasses
import itertools
import random
from fractions import Fraction

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adakv_compile.policy import Method, Policy, keeps_all, layer_budget, layer_capacity
from tests.oracles import paper
from tests.policy.cases import policies

PYRAMIDS: tuple[Method, ...] = ("ada-pyramid", "pyramidkv")
METHODS: tuple[Method, ...] = ("ada-snapkv", "snapkv", *PYRAMIDS, "streamingllm")


def layers(policy: Policy, length: int) -> list[int]:
    """Return the budgets of all layers."""
    return [layer_budget(dataclasses.replace(policy, layer=layer), length) for layer in range(policy.num_layers)]


@st.composite
def pyramids(draw: st.DrawFn) -> tuple[Policy, int]:
    window = draw(st.integers(1, 64))
    budget = draw(st.integers(window + 1, 2048))
    policy = Policy(
        method=draw(st.sampled_from(PYRAMIDS)),
        budget=budget,
        window=window,
        beta=draw(st.integers(1, 40)),
        num_layers=draw(st.integers(1, 80)),
    )
    near = st.integers(max(1, budget - 3), 2 * budget + 3)
    return policy, draw(st.one_of(near, st.integers(1, 1 << 20)))


@settings(deadline=None, max_examples=300)
@given(pyramids())
def test_pyramid_sums_exactly_and_never_grows_with_depth(case: tuple[Policy, int]) -> None:
    policy, length = case
    budgets = layers(policy, length)
    assert sum(budgets) == policy.num_layers * min(int(policy.budget), length)
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] <= length
    assert budgets[-1] >= min(policy.window, length)


@settings(deadline=None, max_examples=200)
@given(pyramids())
def test_pyramid_is_the_line_rounded(case: tuple[Policy, int]) -> None:
    policy, length = case
    line = paper.pyramid_layers(int(policy.budget), policy.window, policy.beta, policy.num_layers, length)
    for budget, exact in zip(layers(policy, length), line, strict=True):
        assert abs(budget - exact) <= Fraction(1, 2)


def test_pyramid_does_not_depend_on_earlier_prompts() -> None:
    policy = Policy(method="pyramidkv", budget=128, num_layers=32)
    lengths = [100, 128, 129, 150, 200, 4000, 100_000]
    first = {length: layers(policy, length) for length in lengths}
    assert len({tuple(budgets) for budgets in first.values()}) == 6  # only 4,000 and 100,000 agree
    random.Random(0).shuffle(lengths)
    assert {length: layers(policy, length) for length in lengths} == first


def test_known_pyramid() -> None:
    policy = Policy(method="pyramidkv", budget=132, window=32, beta=20, num_layers=5)
    assert layers(policy, 1000) == [227, 179, 132, 85, 37]
    assert layers(policy, 140) == [140, 136, 132, 128, 124]  # the first layer has 140 at most
    assert layers(policy, 132) == [132] * 5


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_evicted_up_to_the_budget(method: str) -> None:
    for budget, length in itertools.product((33, 64, 100), range(34)):
        policy = Policy(method=method, budget=budget, num_layers=3)  # pyright: ignore[reportArgumentType]
        assert layers(policy, length) == [length] * 3
        assert layers(policy, budget) == [budget] * 3


@pytest.mark.parametrize(
    ("share", "length", "kept"),
    [
        (0.25, 1000, 250),
        (0.1, 1000, 100),  # 0.1 * 1000 is 100 exactly; binary 0.1 alone would not promise it
        (0.29, 100, 33),  # the window and one entry more
        (0.29, 1000, 290),  # 0.29 * 1000 is 290 - 6e-14 in binary
        (0.7, 31, 31),
        (1 / 3, 999, 333),
        (0.999999, 1_000_000, 999_999),
        (1e-9, 100_000, 33),
    ],
)
def test_shares_of_the_length(share: float, length: int, kept: int) -> None:
    assert layer_budget(Policy(budget=share), length) == kept


def test_streaming_shares_leave_one_entry_after_the_sinks() -> None:
    policy = Policy(method="streamingllm", budget=0.01, sinks=4)
    assert layer_budget(policy, 100) == 5
    assert layer_budget(policy, 3) == 3


def symbolic(length: int) -> tuple[torch.SymInt, sympy.Symbol, ShapeEnv]:
    """Return a backed symbol, as a graph's input size is one."""
    shape_env = ShapeEnv()
    fake = FakeTensorMode(shape_env=shape_env).from_tensor(torch.empty(length))
    size = fake.shape[0]
    assert isinstance(size, torch.SymInt)
    return size, size.node.expr, shape_env


@settings(deadline=None, max_examples=25)
@given(policies(METHODS), st.lists(st.integers(2, 4000), min_size=3, max_size=3))
def test_ints_tensors_and_symints_agree(policy: Policy, lengths: list[int]) -> None:
    size, symbol, shape_env = symbolic(777)
    for function in (layer_budget, layer_capacity):
        expected = [function(policy, length) for length in lengths]
        assert function(policy, torch.tensor(lengths)).tolist() == expected
        assert function(policy, torch.tensor(lengths, dtype=torch.int32)).tolist() == expected
        value = function(policy, size)
        assert isinstance(value, torch.SymInt)
        assert [int(value.node.expr.subs(symbol, length)) for length in lengths] == expected
    assert not shape_env.guards


@settings(deadline=None, max_examples=40)
@given(policies((*PYRAMIDS, "ada-snapkv")))
@example(Policy(method="pyramidkv", budget=0.53, window=1, layer=1, num_layers=2))
@example(Policy(method="pyramidkv", budget=0.3, window=4, layer=1, num_layers=2))
def test_capacity_covers_every_shorter_row(policy: Policy) -> None:
    most = 0
    for length in range(1, 200):
        most = max(most, layer_budget(policy, length))
        capacity = layer_capacity(policy, length)
        slack = 0 if isinstance(policy.budget, int) or not policy.pyramid else 1
        assert most <= capacity <= most + slack
        assert capacity <= length


def test_upper_pyramid_layers_keep_more_of_a_short_row() -> None:
    """Why the capacity is not the budget of the longest row."""
    policy = Policy(method="pyramidkv", budget=128, layer=31, num_layers=32)
    assert layer_budget(policy, 128) == 128
    assert layer_budget(policy, 4000) == 36
    assert layer_capacity(policy, 4000) == 128


@settings(deadline=None, max_examples=200)
@given(policies(), st.integers(1, 200))
def test_what_is_said_to_be_kept_whole_is_in_every_layer_and_at_every_shorter_length(
    policy: Policy, length: int
) -> None:
    whole = all(layers(policy, shorter) == [shorter] * policy.num_layers for shorter in range(1, length + 1))
    assert whole or not keeps_all(policy, length)
    # The other way round, too, but where rounding gives the upper layers of a pyramid what they lack.
    assert keeps_all(policy, length) or not whole or policy.pyramid
