"""Soft caps and sinks in decode attention, attention to a store, and extension, against dense float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adakv_compile.kernels.attend.cpu import attend_cpu
from adakv_compile.kernels.attend.reference import attend
from adakv_compile.kernels.decode_attention.cpu import decode_attention_cpu
from adakv_compile.kernels.decode_attention.reference import decode_attention
from adakv_compile.policy import Policy
from tests.kernels.cases import Case, dense, ragged_case
from tests.kernels.test_extend import check as check_extension
from tests.kernels.tolerances import assert_near

LENGTHS = [[1, 117, 2], [64, 16, 40]]
HALF = (torch.float16, torch.bfloat16)


def decode(case: Case) -> torch.Tensor:
    return decode_attention(*case.arguments())


def decode_on_cpu(case: Case) -> torch.Tensor:
    return decode_attention_cpu(*case.arguments())


def attend_to_store(case: Case) -> torch.Tensor:
    return attend(*case.attend_arguments())


def attend_to_store_on_cpu(case: Case) -> torch.Tensor:
    return attend_cpu(*case.attend_arguments())


def extend(case: Case) -> torch.Tensor:
    return torch.ops.adakv.extend_v2(*case.extend_arguments(Policy(budget=40, window=8)))[0]


RUNS = [decode, decode_on_cpu, attend_to_store, attend_to_store_on_cpu, extend]
Run = Callable[[Case], torch.Tensor]
runs = pytest.mark.parametrize("run", RUNS)


def sinks_of(case: Case, kind: str) -> torch.Tensor:
    """Return a sink for each query head, in an order that no two groups share."""
    heads = case.query.shape[1]
    drawn = torch.randn(heads, generator=torch.manual_seed(4)) * 2
    absent = torch.arange(heads) % 2 == 0
    return {
        "drawn": drawn,
        "bfloat16": drawn.bfloat16(),
        "float64": drawn.double(),
        "large": drawn + 80,
        "small": drawn - 80,
        "some": drawn.masked_fill(absent, -torch.inf),
        "none": torch.full((heads,), -torch.inf),
        "strided": drawn.repeat_interleave(3)[::3],
    }[kind]


def check(case: Case, run: Run) -> None:
    output = run(case)
    assert output.is_contiguous()
    assert not output.isnan().any()
    assert_near(output, dense(case).output, case.query.dtype)


@runs
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["drawn", "bfloat16", "float64", "large", "small", "some", "none", "strided"])
def test_sinks(kind: str, count: int, run: Run) -> None:
    case = ragged_case(LENGTHS, count=count, slots=130)
    check(dataclasses.replace(case, sinks=sinks_of(case, kind)), run)


@runs
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("softcap", [0.05, 1.0, 30.0, 1e5])
def test_soft_caps_below_and_above_the_logits(softcap: float, count: int, run: Run) -> None:
    case = ragged_case(LENGTHS, count=count, slots=130)
    check(dataclasses.replace(case, softcap=softcap, scale=3.0), run)


@runs
@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_both_in_every_dtype(dtype: torch.dtype, group: int, run: Run) -> None:
    for lengths in (LENGTHS, [[30] * 5] * 2):
        for count in (1, 17):
            case = ragged_case(lengths, dtype=dtype, count=count, group=group)
            check(dataclasses.replace(case, softcap=2.0, sinks=sinks_of(case, "some").to(dtype)), run)


@runs
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("hides", ["window", "padding", "bool", "float", "lowest", "heads", "all"])
@pytest.mark.parametrize("kind", [None, "drawn", "large", "some", "none"])
def test_with_everything_that_hides(kind: str | None, hides: str, count: int, run: Run) -> None:
    """What hides an entry does not hide a sink, and is not capped."""
    case = ragged_case(LENGTHS, count=count)
    random = torch.manual_seed(2)
    drawn = torch.rand(2, 6, count, case.length, generator=random)
    given: dict[str, Any] = {"softcap": 1.5, "sinks": None if kind is None else sinks_of(case, kind)}
    if hides in ("window", "all"):
        given["sliding_window"] = 40
    if hides in ("padding", "all"):
        given["padding"] = torch.rand(2, case.length + 9, generator=random) < 0.7
    if hides == "bool":
        given["mask"] = drawn[:, :1] < 0.5
    elif hides in ("float", "lowest"):
        hidden = -torch.inf if hides == "float" else torch.finfo(torch.float32).min
        given["mask"] = (drawn[:, :1] * 9).masked_fill(drawn[:, :1] < 0.5, hidden)
    elif hides == "heads":
        given["mask"] = drawn * 9
    check(dataclasses.replace(case, **given), run)


@runs
@pytest.mark.parametrize("kind", ["drawn", "large", "none"])
def test_what_sees_nothing_but_a_sink_is_zero(kind: str, run: Run) -> None:
    for count in (1, 3):
        case = ragged_case(LENGTHS, count=count)
        mask = torch.ones(2, 1, count, case.length, dtype=torch.bool)
        mask[1, :, -1] = False
        case = dataclasses.replace(case, mask=mask, sinks=sinks_of(case, kind))
        output = run(case)
        assert not output[1, :, -1].any()
        assert kind == "large" or output[0].all()
        check(case, run)
        padding = torch.zeros(2, case.length, dtype=torch.bool)
        assert not run(dataclasses.replace(case, mask=None, padding=padding)).any()


@runs
def test_a_sink_of_nothing_is_none(run: Run) -> None:
    for count in (1, 3):
        case = ragged_case(LENGTHS, count=count)
        torch.testing.assert_close(run(dataclasses.replace(case, sinks=sinks_of(case, "none"))), run(case))


@runs
def test_blocks_of_queries_do_not_change_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adakv_compile.kernels._ragged._MAX_BLOCK_ELEMENTS", 1 << 13)
    case = ragged_case(LENGTHS, count=17)
    check(dataclasses.replace(case, softcap=1.0, sinks=sinks_of(case, "drawn")), run)


@runs
def test_arguments_are_checked(run: Run) -> None:
    case = ragged_case(LENGTHS)
    for given, message in (
        ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\]; expected \[6\]"),
        ({"sinks": torch.zeros(6, dtype=torch.int64)}, r"sinks is torch\.int64; expected a floating dtype"),
        ({"sinks": torch.zeros(6, device="meta")}, "sinks is on meta; expected cpu"),
        ({"softcap": 0.0}, "expected a positive number"),
        ({"softcap": -2.0}, "expected a positive number"),
        ({"softcap": float("nan")}, "expected a positive number"),
    ):
        if "sinks" in given and given["sinks"].device.type == "meta" and run is extend:
            continue  # the dispatcher would take the meta kernel
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(case, **given))


@pytest.mark.parametrize("gqa", ["mean", "max"])
@pytest.mark.parametrize("kind", ["drawn", "some", "none"])
@pytest.mark.parametrize("hides", ["nothing", "window", "padding", "mask"])
def test_extension_scores_by_the_true_weights(hides: str, kind: str, gqa: Any) -> None:
    case = ragged_case(LENGTHS, count=12)
    random = torch.manual_seed(2)
    given: dict[str, Any] = {
        "nothing": {},
        "window": {"sliding_window": 60},
        "padding": {"padding": torch.rand(2, case.length, generator=random) < 0.8},
        "mask": {"mask": torch.randn(2, 6, 12, case.length, generator=random)},
    }[hides]
    case = dataclasses.replace(case, softcap=1.0, sinks=sinks_of(case, kind), **given)
    check_extension(case, Policy(budget=40, window=8, gqa=gqa))
