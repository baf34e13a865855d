"""Attention to a store that holds the call's tokens: what decode attention gives, and nothing is mutated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adakv_compile.kernels.attend.cpu import attend_cpu
from adakv_compile.kernels.attend.reference import attend
from adakv_compile.policy import Policy
from tests.kernels.cases import Case, dense, ragged_case
from tests.kernels.tolerances import assert_near

LENGTHS = {
    "skewed": [[1, 117, 2], [64, 16, 40]],
    "an empty row": [[50, 1, 49], [0, 0, 0]],
    "one head": [[97]],
    "nothing kept": [[0, 0]],
}
IMPLEMENTATIONS = [pytest.param(attend_cpu, id="cpu"), pytest.param(attend, id="portable")]
Implementation = Callable[..., torch.Tensor]
implementations = pytest.mark.parametrize("run", IMPLEMENTATIONS)


def check(case: Case, run: Implementation) -> None:
    arguments = case.attend_arguments()
    before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
    output = run(*arguments)
    assert output.is_contiguous()
    assert output.dtype == case.query.dtype
    assert_near(output, dense(case).output, case.query.dtype)
    for one, other in zip(before, [value for value in arguments if isinstance(value, torch.Tensor)], strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@implementations
@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("name", LENGTHS)
def test_ragged_heads(name: str, count: int, run: Implementation) -> None:
    check(ragged_case(LENGTHS[name], count=count, slots=130, seed=count), run)
    check(ragged_case(LENGTHS[name], count=count, tail=0, seed=count), run)


@implementations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, run: Implementation) -> None:
    for count in (1, 3):
        check(ragged_case(LENGTHS["skewed"], dtype=dtype, count=count, group=3), run)


@implementations
@pytest.mark.parametrize("count", [1, 3])
def test_everything_that_hides(count: int, run: Implementation) -> None:
    case = ragged_case(LENGTHS["skewed"], count=count)
    random = torch.manual_seed(0)
    padding = torch.rand(2, case.length + 5, generator=random) < 0.7
    mask = torch.rand(2, 6, count, case.length - 20, generator=random) < 0.7
    for window in (1, 40, 1000):
        check(dataclasses.replace(case, sliding_window=window), run)
        check(dataclasses.replace(case, sliding_window=window, padding=padding), run)
        check(dataclasses.replace(case, sliding_window=window, padding=padding, mask=mask), run)
    check(dataclasses.replace(case, mask=torch.randn(1, 6, 1, case.length, generator=random)), run)


@implementations
@pytest.mark.parametrize(("taken", "capacity"), [(0, 0), (0, 9), (2, 9)])
def test_tokens_of_the_call_that_are_in_the_prefix(taken: int, capacity: int, run: Implementation) -> None:
    """After an extension the tail is empty: a query must not see tokens behind it that the prefix holds."""
    case = ragged_case(LENGTHS["skewed"], count=7)
    truth = dense(case).output
    whole = case.extend_arguments(Policy(budget=40, window=8), evict=False)
    _, keys, values, offsets, positions = torch.ops.adakv.extend_v2(*whole)
    length = case.length
    kept = positions < length - taken
    tail_keys, tail_values = (torch.full((2, 3, capacity, part.shape[3]), torch.nan) for part in whole[1:3])
    tail_keys[:, :, :taken] = case.key_new[:, :, 7 - taken :]
    tail_values[:, :, :taken] = case.value_new[:, :, 7 - taken :]
    offsets = offsets - torch.arange(4, dtype=torch.int32) * taken
    shape = (2, keys.shape[1] - 3 * taken)
    keys, values = (part[kept].view(*shape, part.shape[2]) for part in (keys, values))
    cursor = torch.tensor([taken, length - taken], dtype=torch.int32)
    store = (keys, values, offsets.contiguous(), positions[kept].view(shape), tail_keys, tail_values, cursor)
    for count in (1, 3, 7):
        query = case.query[:, :, 7 - count :]
        output = run(query, *store, None, None, None, case.scale, None, None)
        assert_near(output, truth[:, :, 7 - count :], torch.float32)
    window = dataclasses.replace(case, sliding_window=5)
    output = run(case.query, *store, None, None, None, case.scale, 5, None)
    assert_near(output, dense(window).output, torch.float32)


def test_more_than_the_capacity_is_refused() -> None:
    arguments = list(ragged_case(LENGTHS["skewed"]).attend_arguments())
    arguments[7] = torch.tensor([25, 200], dtype=torch.int32)
    with pytest.raises(ValueError, match="attend: 25 tail entries exceed the capacity 24"):
        torch.ops.adakv.attend_v1(*arguments)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 4, 1, 8), "query heads 4 not a multiple of KV heads 3"),
        (0, torch.zeros(2, 6, 1, 9), r"keys has shape \[2, 120, 8\]; expected \[2, \*, 9\]"),
        (2, torch.zeros(2, 7, 6), r"values has shape \[2, 7, 6\]; expected \[2, 120, \*\]"),
        (6, torch.zeros(2, 3, 7, 6), "tail_values has shape"),
        (6, torch.zeros(2, 3, 24, 6, dtype=torch.float64), r"tail_values is torch\.float64"),
        (8, torch.zeros(2, 3, 1, 9), "mask has shape"),
        (9, torch.zeros(2, 9), r"padding is torch\.float32; expected torch\.bool"),
        (10, torch.zeros(3), "sinks has shape"),
        (13, 0.0, r"softcap is 0\.0"),
    ],
)
def test_arguments_are_checked(index: int, value: Any, message: str) -> None:
    arguments = list(ragged_case(LENGTHS["skewed"]).attend_arguments())
    arguments[index] = value
    with pytest.raises(ValueError, match=f"attend: {message}"):
        torch.ops.adakv.attend_v1(*arguments)
