"""The dispatcher's own way to the C++ kernel: the same bits as through Python, and Python for all that is unusual."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from adakv_compile.kernels.decode_attention import native
from adakv_compile.kernels.decode_attention.cpu import decode_attention_cpu
from tests.kernels.cases import Case, ragged_case

OP = torch.ops.adakv.decode_attention_v2
SKEWED = [[1, 700, 2], [300, 16, 40]]


@pytest.fixture(autouse=True, scope="module")
def taken_over() -> None:
    assert native.kernel() is not None, "the machines that run these tests have a C++ compiler"
    assert native.building_entry().result() is not None
    native.take_over()


@pytest.fixture
def in_python() -> Iterator[mock.Mock]:
    """Count the calls that come to Python."""
    with mock.patch.object(native, "take_over", mock.Mock(side_effect=native.take_over)) as found:
        yield found


def case_of(**changed: Any) -> Case:
    values: dict[str, Any] = {"prefix_length": 900, "key_dim": 64, "value_dim": 48, "tail": 40, "capacity": 64}
    return ragged_case(SKEWED, **{"group": 2, **values, **changed})


def agrees(case: Case) -> None:
    """Compare results and everything that is written with a call of the implementation in Python."""
    ours, theirs = case.arguments(), case.arguments()
    assert torch.equal(OP(*ours), decode_attention_cpu(*theirs))
    for mine, other in zip(ours[7:10], theirs[7:10], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def usual() -> dict[str, Case]:
    case = case_of()
    cases = {str(dtype): case_of(dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    cases["window"] = dataclasses.replace(case, sliding_window=300)
    cases["no padding"] = dataclasses.replace(case, padding=torch.ones(2, case.length, dtype=torch.bool))
    cases["no padding in any row"] = dataclasses.replace(case, padding=torch.ones(1, case.length, dtype=torch.bool))
    cases["sinks and softcap"] = dataclasses.replace(case, sinks=torch.linspace(-2, 2, 6), softcap=5.0)
    cases["strides"] = dataclasses.replace(case, query=case.query.mT.contiguous().mT)
    return cases


def unusual() -> dict[str, Case]:
    case = case_of()
    random = torch.Generator().manual_seed(0)
    padding = torch.ones(2, case.length, dtype=torch.bool)
    padding[1, 3] = False
    return {
        "padding": dataclasses.replace(case, padding=padding),
        "mask": dataclasses.replace(case, mask=torch.rand(2, 1, 1, case.length, generator=random) > 0.5),
        "bias": dataclasses.replace(case, mask=torch.randn(2, 6, 1, case.length, generator=random)),
        "half-precision sinks": dataclasses.replace(case, sinks=torch.zeros(6, dtype=torch.bfloat16)),
        "float64": case_of(dtype=torch.float64),
        "two tokens": case_of(count=2),
        "64-bit offsets": dataclasses.replace(case, offsets=case.offsets.long()),
    }


@pytest.mark.parametrize("name", list(usual()))
def test_usual_arguments_never_come_to_python(name: str, in_python: mock.Mock) -> None:
    case = usual()[name]
    OP(*case.arguments())
    assert in_python.call_count == 0
    agrees(case)


@pytest.mark.parametrize("name", list(unusual()))
def test_unusual_arguments_come_to_python_once(name: str, in_python: mock.Mock) -> None:
    case = unusual()[name]
    with mock.patch.object(native, "decode", mock.Mock(side_effect=native.decode)) as decode:
        OP(*case.arguments())
    assert in_python.call_count + (case.key_new.shape[2] > 1) == 1
    assert decode.call_count == (name in ("padding", "mask", "half-precision sinks", "float64", "64-bit offsets"))
    agrees(case)


@pytest.mark.parametrize("change", ["query", "key_new", "keys", "tail_values", "offsets", "positions", "sinks"])
def test_wrong_shapes_are_refused_in_the_words_of_python(change: str) -> None:
    case = dataclasses.replace(case_of(), sinks=torch.zeros(6))
    wrong = dataclasses.replace(case, **{change: getattr(case, change)[..., :-1].contiguous()})
    with pytest.raises(ValueError, match="decode_attention") as told:
        OP(*wrong.arguments())
    with pytest.raises(ValueError, match="decode_attention") as expected:
        decode_attention_cpu(*wrong.arguments())
    assert str(told.value) == str(expected.value)


def test_a_full_tail_is_refused_and_nothing_is_written() -> None:
    case = case_of(tail=64, capacity=64)
    arguments = case.arguments()
    with pytest.raises(ValueError, match="64 tail entries and 1 new ones exceed the capacity 64"):
        OP(*arguments)
    torch.testing.assert_close(arguments[7], case.tail_keys, rtol=0, atol=0, equal_nan=True)
    assert arguments[9].tolist() == case.cursor.tolist()


def test_offsets_that_lead_out_of_the_store_are_never_read_by() -> None:
    wrong = torch.tensor([[0, 1, 701, 99_999], [0, 300, 316, 356]], dtype=torch.int32)
    with pytest.raises((RuntimeError, ValueError)):
        OP(*dataclasses.replace(case_of(), offsets=wrong).arguments())


def test_bits_do_not_depend_on_threads() -> None:
    case, threads = case_of(), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(OP(*case.arguments()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
