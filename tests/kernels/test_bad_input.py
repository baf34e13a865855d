"""What the Triton kernels don't serve falls back, with a reason; what fits no implementation names the argument."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adakv_compile.kernels import SPECS, Subject, decode_attention, why_unsupported
from adakv_compile.kernels import _support as support
from adakv_compile.policy import Policy
from tests.kernels.cases import ragged_case

OPS = torch.ops.adakv
POLICY = Policy(budget=12, window=4)
CASE = ragged_case([[4, 20, 0], [9, 9, 6]], prefix_length=40, poison=False)
META = torch.device("meta")


def arguments(**changes: Any) -> list[Any]:
    """The arguments of a call, some of them others, as they are."""
    names = [field.name for field in dataclasses.fields(CASE)]
    return [changes.get(name, value) for name, value in zip(names, CASE.arguments(), strict=True)]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not support.interpreting():
        pytest.skip("the cases are CPU tensors")


@pytest.mark.parametrize("name", ["keys", "values", "offsets", "positions", "tail_keys", "tail_values"])
def test_a_store_that_is_not_contiguous_is_named(name: str) -> None:
    given = getattr(CASE, name)
    strided = given.repeat_interleave(2, -1)[..., ::2]
    assert not strided.is_contiguous()
    with pytest.raises(ValueError, match=f"decode_attention: {name} has strides .* expected contiguous"):
        OPS.decode_attention_v2.triton(*arguments(**{name: strided}))


@pytest.mark.parametrize("name", ["key_new", "value_new", "positions", "offsets", "tail_values"])
def test_another_device_is_named(name: str) -> None:
    # Called without the dispatcher, which would take the meta kernel for tensors of two devices.
    with pytest.raises(ValueError, match=f"decode_attention: {name} is on meta; expected cpu"):
        decode_attention.SPEC.run_triton(*arguments(**{name: getattr(CASE, name).to(META)}))


@pytest.mark.parametrize("name", ["mask", "padding"])
def test_a_mask_on_another_device_is_named(name: str) -> None:
    shape = (2, 1, 1, CASE.length) if name == "mask" else (2, CASE.length)
    table = torch.ones(shape, dtype=torch.bool, device=META)
    with pytest.raises(ValueError, match=f"decode_attention: {name} is on meta; expected cpu"):
        decode_attention.SPEC.run_triton(*arguments(**{name: table}))


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (Subject(torch.device("cpu"), torch.float64), "dtype torch.float64 is not one of bfloat16, float16, float32"),
        (Subject(torch.device("cpu"), torch.float32, (64, 320)), "head dimension 320 is above 256"),
        (Subject(torch.device("meta"), torch.float32, (64,)), "device type meta of this PyTorch is not CUDA"),
    ],
)
def test_what_is_not_served(subject: Subject, reason: str) -> None:
    assert why_unsupported(subject) == reason


def test_an_old_gpu_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "target_of", lambda device: support.Target((7, 5), 40))
    # A device that no other test asks about: answers are kept.
    why = why_unsupported(Subject(torch.device("cuda", 77), torch.float16, (64,)))
    assert why == "compute capability 7.5 is below 8.0"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_has_triton", lambda: False)
    why = why_unsupported(Subject(torch.device("cuda", 78), torch.float16, (64,)))
    assert why == "the package triton is not installed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_not_served_falls_back_and_is_refused_by_name(dtype: torch.dtype) -> None:
    """Float64, and a head dimension beyond the largest."""
    dim = 8 if dtype == torch.float64 else 320
    key, value = torch.randn(1, 2, 30, dim, dtype=dtype), torch.randn(1, 2, 30, 8, dtype=dtype)
    query = torch.randn(1, 4, 30, dim, dtype=dtype)
    positions, offsets = OPS.select_v1(torch.rand(1, 2, 30), None, None, POLICY.encode())
    calls = {
        "observe_v3": (query, key, None, None, None, None, 0.3, None, None, POLICY.encode()),
        "compact_v1": (key, value, positions, offsets),
    }
    for spec in SPECS:
        if spec.name not in calls:
            continue
        arguments = calls[spec.name]
        with pytest.raises(RuntimeError, match=rf"adakv::{spec.name}\.triton: (dtype|head dimension)"):
            spec.overload_for("triton")(*arguments)
        # What a CUDA device would run.
        found, expected = spec.run_on_cuda(*arguments), spec.portable(*arguments)
        torch.testing.assert_close(found, expected)
