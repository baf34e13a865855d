"""Decode attention agrees with dense attention in which evicted entries are masked out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from adakv_compile.kernels.decode_attention.cpu import decode_attention_cpu
from adakv_compile.kernels.decode_attention.reference import decode_attention
from tests.kernels.cases import Case, dense, ragged_case
from tests.kernels.tolerances import assert_near

LENGTHS = {
    "even": [[40, 40, 40], [40, 40, 40]],
    "skewed": [[1, 117, 2], [64, 16, 40]],
    "an empty head": [[0, 90, 30], [120, 0, 0]],
    "a row that is shorter": [[60, 30, 30], [5, 0, 9]],
    "an empty row": [[50, 1, 49], [0, 0, 0]],
    "shorter than a chunk": [[3, 4, 1]],
    "chunk borders": [[16, 32, 48], [48, 32, 16]],
    "one head": [[97]],
    "nothing kept": [[0, 0]],
}

# The op as dispatched, and the implementation for any device, which on the CPU is not otherwise reached.
IMPLEMENTATIONS = [
    pytest.param(decode_attention_cpu, id="cpu"),
    pytest.param(decode_attention, id="portable"),
]
Implementation = Callable[..., torch.Tensor]


def check(case: Case, run: Implementation, dtype: torch.dtype = torch.float32) -> None:
    arguments = case.arguments()
    inputs = [value.clone() for value in arguments[:7]]
    output = run(*arguments)
    assert_near(output, dense(case).output, dtype)
    assert output.dtype == dtype
    assert output.is_contiguous()
    tail, count = int(case.cursor[0]), case.query.shape[2]
    tail_keys, tail_values, cursor = arguments[7:10]
    assert cursor.tolist() == [tail + count, int(case.cursor[1])]
    for after, before, new in (
        (tail_keys, case.tail_keys, case.key_new),
        (tail_values, case.tail_values, case.value_new),
    ):
        expected = before.clone()
        expected[:, :, tail : tail + count] = new
        assert torch.equal(after.nan_to_num(7.0), expected.nan_to_num(7.0))
    for before, after in zip(inputs, arguments[:7], strict=True):
        assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("name", LENGTHS)
def test_ragged_heads(name: str, count: int, run: Implementation) -> None:
    check(ragged_case(LENGTHS[name], count=count, slots=130, seed=count), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, run: Implementation) -> None:
    check(ragged_case(LENGTHS["skewed"], dtype=dtype, count=3), run, dtype)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("group", [1, 5])
def test_groups_and_an_empty_tail(group: int, run: Implementation) -> None:
    check(ragged_case(LENGTHS["skewed"], group=group, tail=0), run)
    check(ragged_case(LENGTHS["skewed"], group=group, tail=0, count=24), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("window", [1, 2, 40, 1000])
def test_sliding_window(window: int, count: int, run: Implementation) -> None:
    case = ragged_case(LENGTHS["skewed"], count=count)
    check(dataclasses.replace(case, sliding_window=window), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("columns", [-60, 0, 9])
@pytest.mark.parametrize("shared", [True, False])
def test_padding(shared: bool, columns: int, count: int, run: Implementation) -> None:
    case = ragged_case(LENGTHS["skewed"], count=count)
    width = case.length + columns
    padding = torch.rand(1 if shared else 2, width, generator=torch.manual_seed(0)) < 0.7
    check(dataclasses.replace(case, padding=padding), run)
    check(dataclasses.replace(case, padding=padding, sliding_window=90), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("columns", [-60, 0, 9])
@pytest.mark.parametrize("kind", ["bool", "float", "lowest"])
@pytest.mark.parametrize("shape", ["111", "bht", "b1t", "1h1"])
def test_mask(shape: str, kind: str, columns: int, count: int, run: Implementation) -> None:
    case = ragged_case(LENGTHS["skewed"], count=count)
    sizes = [size if letter in shape else 1 for letter, size in zip("bht", (2, 6, count), strict=True)]
    random = torch.manual_seed(3)
    allowed = torch.rand(*sizes, case.length + columns, generator=random) < 0.6
    if kind == "bool":
        mask = allowed
    else:
        hidden = -torch.inf if kind == "float" else torch.finfo(torch.float32).min
        mask = torch.randn(allowed.shape, generator=random).masked_fill(~allowed, hidden)
    check(dataclasses.replace(case, mask=mask), run)
    padding = torch.rand(2, case.length, generator=random) < 0.8
    check(dataclasses.replace(case, mask=mask, padding=padding), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_a_mask_replaces_causality(run: Implementation) -> None:
    case = ragged_case(LENGTHS["even"], count=3)
    everything = torch.ones(1, 1, 3, case.length, dtype=torch.bool)
    check(dataclasses.replace(case, mask=everything, sliding_window=4), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_what_sees_nothing_is_zero(run: Implementation) -> None:
    case = ragged_case(LENGTHS["even"], count=3)
    mask = torch.ones(2, 1, 3, case.length, dtype=torch.bool)
    mask[1, :, 1] = False
    padding = torch.ones(2, case.length, dtype=torch.bool)
    padding[0] = False
    case = dataclasses.replace(case, mask=mask, padding=padding)
    output = run(*case.arguments())
    assert not output[0].any()
    assert not output[1, :, 1].any()
    assert output[1, :, 0].all()
    check(case, run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_rows_are_independent(run: Implementation) -> None:
    case = ragged_case(LENGTHS["skewed"], count=2)
    expected = run(*case.arguments())[0]
    for name in ("query", "key_new", "value_new", "keys", "values", "tail_keys", "tail_values"):
        getattr(case, name)[1] = float("nan")
    output = run(*case.arguments())
    torch.testing.assert_close(output[0], expected, rtol=0, atol=0)
    assert output[1].isnan().all()


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_strided_arguments(run: Implementation) -> None:
    case = ragged_case(LENGTHS["skewed"], count=3)
    strided = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in case.arguments()[:3]]
    check(dataclasses.replace(case, query=strided[0], key_new=strided[1], value_new=strided[2]), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_large_blocks_are_cut(run: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adakv_compile.kernels._ragged._MAX_BLOCK_ELEMENTS", 1 << 13)
    case = ragged_case(LENGTHS["skewed"], count=17)
    check(case, run)
    mask = torch.rand(2, 6, 17, case.length, generator=torch.manual_seed(1)) < 0.6
    check(dataclasses.replace(case, mask=mask), run)
    check(dataclasses.replace(case, sliding_window=100), run)


def test_random_shapes() -> None:
    random = torch.manual_seed(5)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    for seed in range(40):
        batch, heads = pick(1, 4), pick(1, 5)
        lengths = [[pick(0, 200) if pick(0, 4) else 0 for _ in range(heads)] for _ in range(batch)]
        case = ragged_case(
            lengths,
            group=pick(1, 4),
            count=pick(1, 5),
            tail=pick(0, 6),
            slots=max(map(sum, lengths)) + pick(0, 3) * pick(0, 40),
            seed=seed,
        )
        check(case, decode_attention_cpu)
        check(case, decode_attention)


def test_more_than_the_capacity_is_refused() -> None:
    case = ragged_case(LENGTHS["even"], count=3, tail=22)
    with pytest.raises(ValueError, match="22 tail entries and 3 new ones exceed the capacity 24"):
        torch.ops.adakv.decode_attention_v2(*case.arguments())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(2, 4, 1, 8), "query heads 4 not a multiple of KV heads 3"),
        ("query", torch.zeros(2, 6, 1, 8, dtype=torch.float64), "key_new is torch.float32; expected torch.float64"),
        ("key_new", torch.zeros(2, 3, 2, 8), r"key_new has shape \[2, 3, 2, 8\]; expected \[2, 3, 1, 8\]"),
        ("values", torch.zeros(2, 7, 6), r"values has shape \[2, 7, 6\]; expected \[2, 120, \*\]"),
        ("tail_values", torch.zeros(2, 3, 7, 6), "tail_values has shape"),
        ("positions", torch.zeros(2, 3, dtype=torch.int32), "positions has shape"),
        ("mask", torch.zeros(2, 3, 1, 9), "mask has shape"),
        ("mask", torch.zeros(1, 1, 1, 9, dtype=torch.int32), "mask is torch.int32; expected bool or a float"),
        ("padding", torch.zeros(3, 9, dtype=torch.bool), "padding has shape"),
        ("padding", torch.zeros(2, 9), "padding is torch.float32; expected torch.bool"),
    ],
)
def test_arguments_are_checked(name: str, value: torch.Tensor, message: str) -> None:
    case = dataclasses.replace(ragged_case(LENGTHS["even"]), **{name: value})
    with pytest.raises(ValueError, match=f"decode_attention: {message}"):
        torch.ops.adakv.decode_attention_v2(*case.arguments())
