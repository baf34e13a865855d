"""The C++ kernel of decode attention: that it serves, what it must not serve, and bits that nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from adakv_compile import _torch
from adakv_compile.kernels.decode_attention import native
from adakv_compile.kernels.decode_attention.cpu import decode_attention_cpu
from tests.kernels.cases import Case, dense, ragged_case
from tests.kernels.tolerances import assert_near

SKEWED = [[1, 700, 2], [300, 16, 40]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def served() -> Iterator[mock.Mock]:
    """Count the calls that reach the kernel."""
    assert native.kernel() is not None, "the machines that run these tests have a C++ compiler"
    with mock.patch.object(native, "kernel", mock.Mock(return_value=mock.Mock(side_effect=native.kernel()))) as found:
        yield found.return_value


def large(**changed: Any) -> Case:
    values: dict[str, Any] = {"prefix_length": 900, "key_dim": 64, "value_dim": 64, "tail": 40, "capacity": 64}
    return ragged_case(SKEWED, **{**values, **changed})


def agrees(case: Case, dtype: torch.dtype = torch.float32) -> None:
    assert_near(decode_attention_cpu(*case.arguments()), dense(case).output, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
def test_groups_and_dtypes(group: int, dtype: torch.dtype, served: mock.Mock) -> None:
    agrees(large(group=group, dtype=dtype), dtype)
    assert served.call_count == 1


@pytest.mark.parametrize("dims", [(1, 1), (7, 40), (33, 15), (80, 80), (128, 64), (96, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions_that_are_not_whole_vectors(
    dims: tuple[int, int], dtype: torch.dtype, served: mock.Mock
) -> None:
    # Keys of the last entry are the last of their memory but for poison: a load behind them would show.
    agrees(large(key_dim=dims[0], value_dim=dims[1], dtype=dtype, group=3), dtype)
    assert served.call_count == 1


@pytest.mark.parametrize("window", [1, 30, 41, 300, 5000])
def test_a_sliding_window_cuts_prefix_and_tail(window: int, served: mock.Mock) -> None:
    agrees(dataclasses.replace(large(), sliding_window=window))
    assert served.call_count == 1


def test_sinks_caps_and_padding_together(served: mock.Mock) -> None:
    case = large(group=4)
    padding = torch.rand(2, case.length, generator=torch.Generator().manual_seed(1)) > 0.3
    sinks = torch.tensor([-torch.inf, 0.0, 1.0, 40.0] * 3)
    agrees(dataclasses.replace(case, padding=padding, sinks=sinks, softcap=5.0, sliding_window=500))
    mask = torch.rand(2, 1, 1, case.length - 100, generator=torch.Generator().manual_seed(2)) > 0.5
    agrees(dataclasses.replace(case, mask=mask, sinks=sinks.double()))
    agrees(dataclasses.replace(case, mask=torch.zeros_like(mask), sinks=sinks))
    assert served.call_count == 3


def test_a_query_that_sees_nothing_gets_zeros(served: mock.Mock) -> None:
    case = large()
    output = decode_attention_cpu(*dataclasses.replace(case, padding=torch.zeros(2, case.length) > 0).arguments())
    assert (output == 0).all()
    assert served.call_count == 1


def test_large_logits_stay_exact(served: mock.Mock) -> None:
    case = large()
    agrees(dataclasses.replace(case, scale=30.0))
    agrees(dataclasses.replace(case, scale=1e-6))
    assert served.call_count == 2


def test_a_nan_in_what_is_seen_shows_in_the_result(served: mock.Mock) -> None:
    case = large(group=1)
    case.values[0, 5] = torch.nan
    output = decode_attention_cpu(*case.arguments())
    # Entry 5 is one of the second head's, of row 0.
    assert output[0, 1].isnan().all()
    assert not output[0, 0].isnan().any()
    assert not output[1].isnan().any()
    assert served.call_count == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_threads_nor_on_the_other_rows(dtype: torch.dtype, served: mock.Mock) -> None:
    case = large(group=4, dtype=dtype, key_dim=128, value_dim=128)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(decode_attention_cpu(*case.arguments()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    for row in range(2):
        by_row = {
            field.name: value[row : row + 1].contiguous()
            for field in dataclasses.fields(case)
            if isinstance(value := getattr(case, field.name), torch.Tensor) and field.name != "cursor"
        }
        alone = decode_attention_cpu(*dataclasses.replace(case, **by_row).arguments())
        assert torch.equal(alone[0], results[0][row])
    assert served.call_count == 6


def test_strides_of_the_new_token_are_read(served: mock.Mock) -> None:
    case = large(group=2)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2).mT.contiguous().mT

    moved = dataclasses.replace(
        case, query=strided(case.query), key_new=strided(case.key_new), value_new=strided(case.value_new)
    )
    assert torch.equal(decode_attention_cpu(*moved.arguments()), decode_attention_cpu(*case.arguments()))
    assert served.call_count == 2


def test_what_the_kernel_does_not_serve_goes_to_the_operators(served: mock.Mock) -> None:
    case = large(group=2)
    generator = torch.Generator().manual_seed(3)
    added = torch.randn(2, 1, 1, case.length, generator=generator)
    by_head = torch.rand(2, 6, 1, case.length, generator=generator) > 0.5
    agrees(dataclasses.replace(case, mask=added))
    agrees(dataclasses.replace(case, mask=by_head))
    agrees(large(dtype=torch.float64), torch.float64)
    agrees(large(count=2))
    assert served.call_count == 0


@pytest.mark.parametrize("change", ["key_new", "keys", "tail_values", "offsets", "sinks"])
def test_wrong_shapes_reach_the_check_and_not_the_kernel(change: str, served: mock.Mock) -> None:
    case = dataclasses.replace(large(), sinks=torch.zeros(6))
    wrong = getattr(case, change)
    with pytest.raises(ValueError, match="decode_attention"):
        decode_attention_cpu(*dataclasses.replace(case, **{change: wrong[..., :-1].contiguous()}).arguments())
    assert served.call_count == 0


def test_offsets_that_lead_out_of_the_store_are_never_read_by(served: mock.Mock) -> None:
    for wrong in ([[0, 1, 701, 99_999], [0, 300, 316, 356]], [[0, 701, 1, 703], [0, 300, 316, 356]]):
        case = dataclasses.replace(large(), offsets=torch.tensor(wrong, dtype=torch.int32))
        arguments = case.arguments()
        with pytest.raises((RuntimeError, ValueError)):
            decode_attention_cpu(*arguments)
    assert served.call_count == 2


def test_other_integers_and_devices_reach_the_operators(served: mock.Mock) -> None:
    case = large()
    agrees(dataclasses.replace(case, offsets=case.offsets.long()))
    agrees(dataclasses.replace(case, positions=case.positions.long()))
    with pytest.raises(ValueError, match="meta"):
        decode_attention_cpu(*dataclasses.replace(case, sinks=torch.zeros(6, device="meta")).arguments())
    assert served.call_count == 0


def test_a_full_tail_is_refused_and_nothing_is_written(served: mock.Mock) -> None:
    case = large(tail=64, capacity=64)
    arguments = case.arguments()
    with pytest.raises(ValueError, match="64 tail entries and 1 new ones exceed the capacity 64"):
        decode_attention_cpu(*arguments)
    assert arguments[9].tolist() == case.cursor.tolist()
    assert torch.equal(arguments[7], case.tail_keys)
    assert served.call_count == 1


@pytest.fixture
def _built_again() -> Iterator[None]:
    for cached in (native.building, native.building_entry, native.kernel):
        cached.cache_clear()
    yield
    for cached in (native.building, native.building_entry, native.kernel):
        cached.cache_clear()


@pytest.mark.usefixtures("_built_again")
def test_without_a_compiler_the_operators_serve_and_the_log_says_why(caplog_of: list[str]) -> None:
    broken = mock.Mock(side_effect=RuntimeError("no C++ compiler\nlong output"))
    with mock.patch.object(_torch, "load_cpp", broken):
        agrees(large())
        agrees(large())
    assert broken.call_count == 1, "what failed once is not tried at every step, and the entry is nothing without it"
    assert len(caplog_of) == 1
    assert "native.cpp can't be built, PyTorch's operators serve: no C++ compiler" in caplog_of[0]


@pytest.mark.usefixtures("_built_again")
def test_without_its_entry_the_kernel_is_called_by_python(caplog_of: list[str]) -> None:
    load = _torch.load_cpp

    def without_headers(source: str) -> Any:
        if "torch/library.h" in source:
            raise RuntimeError("no such file")
        return load(source)

    with mock.patch.object(_torch, "load_cpp", without_headers):
        assert native.building_entry().result() is None
        native.take_over()
        agrees(large())
    assert "entry.cpp can't be built, Python calls the kernel at every step: no such file" in caplog_of[0]


@pytest.fixture
def caplog_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the kernel's warnings; pytest's own capture of logs is off."""
    told: list[str] = []
    monkeypatch.setattr(native.log, "warning", lambda text, *args: told.append(text % args))
    return told
