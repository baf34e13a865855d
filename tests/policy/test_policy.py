"""The policy's text form, its checks, and its exact rationals."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings

from adakv_compile.policy import Method, Policy
from tests.policy.cases import policies

METHODS: tuple[Method, ...] = ("ada-snapkv", "snapkv", "ada-pyramid", "pyramidkv", "streamingllm")


@settings(deadline=None, max_examples=100)
@given(policies(METHODS))
def test_text_form_gives_the_policy_back(policy: Policy) -> None:
    decoded = Policy.decode(policy.encode())
    assert decoded == policy
    assert type(decoded.budget) is type(policy.budget)
    assert decoded.encode() == policy.encode()
    assert hash(decoded) == hash(policy)


def test_text_form_is_stable() -> None:
    assert Policy(budget=0.25, layer=2, num_layers=4).encode() == (
        "method=ada-snapkv;budget=0.25;window=32;pool=max;kernel_size=7;alpha=0.2;safeguard=soft;ties=position;beta=20;"
        "gqa=mean;sinks=4;layer=2;num_layers=4"
    )


def test_equal_policies_have_one_text() -> None:
    assert Policy(alpha=1).encode() == Policy(alpha=1.0).encode()


def test_tiny_shares_survive_the_text_form() -> None:
    policy = Policy(budget=1e-5, alpha=1e-7)  # written as 1e-05 and 1e-07
    assert Policy.decode(policy.encode()) == policy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "method=ada-snapkv",
        Policy().encode() + ";extra=1",
        Policy().encode().replace("window=32", "window=wide"),
        Policy().encode().replace("budget=1024", "budget=32"),
        Policy().encode().replace("ada-snapkv", "h2o"),
    ],
)
def test_other_texts_are_refused_and_named(text: str) -> None:
    with pytest.raises(ValueError, match="not an encoded policy"):
        Policy.decode(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 32}, "budget is 32 but window=32 .* at least 33"),
        ({"budget": 40, "window": 64}, "budget is 40 but window=64 .* at least 65"),
        ({"budget": 4, "method": "streamingllm"}, "budget is 4 but sinks=4 .* at least 5"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"kernel_size": 4}, "kernel_size is 4; it must be odd"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"alpha": 1.2}, "alpha is 1.2"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"beta": 0}, "beta is 0"),
        ({"layer": 4, "num_layers": 4}, "layer is 4 of num_layers=4; give 0 to 3"),
        ({"method": "h2o"}, "method is 'h2o'; allowed: 'ada-snapkv'"),
        ({"pool": "min"}, "pool is 'min'"),
        ({"gqa": "sum"}, "gqa is 'sum'"),
        ({"safeguard": "none"}, "safeguard is 'none'"),
        ({"ties": "first"}, "ties is 'first'"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**values)  # pyright: ignore[reportArgumentType]


def test_smallest_budgets_are_allowed() -> None:
    assert Policy(budget=33).floor == 33
    assert Policy(method="streamingllm", budget=5).floor == 5


def test_shares_are_the_rationals_the_user_wrote() -> None:
    assert Policy(alpha=0.2).uniform_share == Fraction(1, 5)
    assert Policy(budget=0.1).share == Fraction(1, 10)
    assert Policy(budget=1 / 3).share == Fraction(1, 3)
    assert Policy(budget=100).share is None


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adaptive_methods_use_alpha(method: str) -> None:
    adaptive = method.startswith("ada-")
    policy = Policy(method=method, alpha=0.5)  # pyright: ignore[reportArgumentType]
    assert policy.uniform_share == (Fraction(1, 2) if adaptive else 1)
