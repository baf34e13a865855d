"""Options: every mistake gets an answer that says what was given, what is allowed, and the nearest name."""

from __future__ import annotations

from typing import Any

import pytest

from adakv_compile import Options, OptionsError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budgt": 4}, r"unknown option 'budgt'; did you mean 'budget'\?"),
        ({"zzz": 4}, r"unknown option 'zzz'\. Known options: method, budget"),
        ({"method": "ada-snap"}, r"'ada-snap'; did you mean 'ada-snapkv'\? Allowed"),
        ({"method": 3}, r"option 'method' is 3\. Allowed: 'ada-snapkv'"),
        ({"budget": "1024"}, r"'1024' of type str; it must be an int"),
        ({"budget": True}, r"True of type bool"),
        ({"budget": 0}, r"is 0; it must be at least 1"),
        ({"budget": 32}, r"budget' is 32 but the observation window of 32 .* at least 33"),
        ({"budget": 1.5}, r"1.5; a float is a share of the prompt .* strictly between 0 and 1"),
        ({"budget": 4, "method": "streamingllm"}, r"sinks=4 .* at least 5"),
        ({"window": 0}, r"option 'window' is 0; it must be at least 1"),
        ({"kernel_size": 6}, r"kernel_size' is 6; it must be odd"),
        ({"alpha": -0.1}, r"alpha' is -0.1; it must be a number from 0"),
        ({"alpha": float("nan")}, r"alpha' is nan"),
        ({"strict": 1}, r"strict' is 1; it must be True or False"),
        ({"inner": "nvfuser"}, r"'nvfuser'\. Allowed: 'inductor', 'aot_eager', 'eager'"),
        ({"gqa": "sum"}, r"gqa' is 'sum'"),
        ({"inductor": 3}, r"it must be a dictionary of Inductor settings"),
        ({"inductor": {"freezing": True}}, r"set torch._inductor.config.freezing before compiling"),
    ],
)
def test_a_wrong_option_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        Options.parse(None, given)


def test_options_are_values() -> None:
    first = Options.parse(None, {"budget": 64, "inductor": {"max_autotune": False}})
    second = Options.parse(None, {"inductor": {"max_autotune": False}, "budget": 64})
    assert first == second
    assert hash(first) == hash(second)
    assert Options.parse(None, None) == Options()


def test_the_callers_dictionary_is_left_alone() -> None:
    given: dict[str, Any] = {"budget": 64, "inductor": {"max_autotune": False}}
    Options.parse("default", given)
    assert given == {"budget": 64, "inductor": {"max_autotune": False}}


def test_a_small_budget_suits_a_small_window() -> None:
    assert Options.parse(None, {"budget": 9, "window": 8}).policy(1, 4).layer == 1
