"""Extension attends like decode attention and then keeps exactly what the policy selects of everything held."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from adakv_compile.policy import Policy, layer_budget, select
from tests.kernels.cases import Case, Dense, dense, ragged_case
from tests.kernels.tolerances import assert_near

LENGTHS = [[1, 117, 2], [64, 16, 40]]
METHODS = ["ada-snapkv", "snapkv", "ada-pyramid", "pyramidkv", "streamingllm"]


def policy_of(method: str = "ada-snapkv", **options: object) -> Policy:
    given = {"budget": 40, "window": 8, "layer": 1, "num_layers": 3, **options}
    return Policy(method=method, **given)  # pyright: ignore[reportArgumentType]


def expected_keep(case: Case, policy: Policy, truth: Dense) -> torch.Tensor:
    """Select on the dense layout with the oracle's weights."""
    batch, num_heads = truth.held.shape[:2]
    count, length = case.query.shape[2], case.length
    real = torch.ones(batch, length, dtype=torch.bool)
    if case.padding is not None:
        known = min(length, case.padding.shape[1])
        real[:, : length - known] = False
        real[:, length - known :] = case.padding[:, case.padding.shape[1] - known :]
    live = torch.ones(length, dtype=torch.bool)
    if case.sliding_window is not None:
        live[: max(0, length - case.sliding_window + 1)] = False
    window = min(policy.window, count)
    weights = truth.weights[:, :, count - window :]
    rows = real[:, None, length - window :, None]
    mean = (weights * rows).sum(2) / rows.sum(2).clamp(min=1)
    grouped = mean.unflatten(1, (num_heads, -1))
    scores = grouped.amax(2) if policy.gqa == "max" else grouped.mean(2)
    recent = torch.arange(length) >= length - policy.window
    return select(
        policy,
        scores.float(),
        truth.held & real[:, None] & live,
        protected=recent.expand(batch, 1, length),
        total=num_heads * layer_budget(policy, (real & live).sum(-1)),
    )


def check(case: Case, policy: Policy, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    arguments = case.extend_arguments(policy)
    before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
    output, keys, values, offsets, positions = torch.ops.adakv.extend_v2(*arguments)
    truth = dense(case)
    assert_near(output, truth.output, dtype)
    portable = torch.ops.adakv.extend_v2.portable(*arguments)
    assert_near(portable[0], truth.output, dtype)
    # Who attends does not change what is kept.
    for kept_here, kept_there in zip((keys, values, offsets, positions), portable[1:], strict=True):
        assert torch.equal(kept_here, kept_there)
    keep = expected_keep(case, policy, truth)
    kept = torch.zeros_like(keep)
    for row in range(keep.shape[0]):
        for head in range(keep.shape[1]):
            begin, end = offsets[row, head : head + 2].tolist()
            places = positions[row, begin:end].long()
            assert torch.equal(places, places.sort().values)
            kept[row, head, places] = True
            assert int(kept[row, head].sum()) == end - begin
            assert torch.equal(keys[row, begin:end].double(), truth.keys[row, head, places])
            assert torch.equal(values[row, begin:end].double(), truth.values[row, head, places])
        end = int(offsets[row, -1])
        assert not keys[row, end:].any()
        assert not values[row, end:].any()
    # Scores that differ in the last bit may swap two entries; counts can't change.
    assert torch.equal(kept.sum((1, 2)), keep.sum((1, 2)))
    assert (kept != keep).sum() <= 2
    assert offsets[:, -1].max() <= positions.shape[1]
    for one, other in zip(before, [x for x in arguments if isinstance(x, torch.Tensor)], strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    return kept


@pytest.mark.parametrize("count", [2, 5, 17, 60])
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, count: int) -> None:
    policy = policy_of(method)
    case = ragged_case(LENGTHS, count=count)
    kept = check(case, policy)
    assert (kept.sum((1, 2)) == 3 * layer_budget(policy, case.length)).all()
    if method == "streamingllm":
        first = case.positions[0, 0]
        assert kept[0, 0, first]
    else:
        assert torch.equal(kept[:, :, -8:], dense(case).held[:, :, -8:])


@pytest.mark.parametrize("gqa", ["mean", "max"])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_reductions(pool: str, gqa: str) -> None:
    check(ragged_case(LENGTHS, count=11, group=3), policy_of(pool=pool, gqa=gqa))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    check(ragged_case(LENGTHS, count=5, dtype=dtype), policy_of(), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_budget(dtype: torch.dtype) -> None:
    case, policy = ragged_case(LENGTHS, count=5, dtype=dtype), policy_of()
    output, keys, _, offsets, _ = torch.ops.adakv.extend_v2(*case.extend_arguments(policy))
    assert_near(output, dense(case).output, dtype)
    assert keys.dtype == dtype
    assert offsets[:, -1].tolist() == [120, 120]


@pytest.mark.parametrize("count", [1, 20, 64, 150])
@pytest.mark.parametrize("dim", [6, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_shorter_and_longer_than_the_past(count: int, dim: int, padded: bool) -> None:
    case = ragged_case(LENGTHS, count=count, value_dim=dim)
    if padded:
        case = dataclasses.replace(case, padding=torch.ones(2, case.length, dtype=torch.bool))
    check(case, policy_of())


def test_less_than_the_budget_is_kept_whole() -> None:
    case = ragged_case([[3, 9, 0], [0, 1, 1]], count=4, tail=2)
    kept = check(case, policy_of(budget=100))
    assert torch.equal(kept, dense(case).held)


@pytest.mark.parametrize("columns", [-90, 0, 9])
@pytest.mark.parametrize("method", ["ada-snapkv", "ada-pyramid", "streamingllm"])
def test_padding(method: str, columns: int) -> None:
    case = ragged_case(LENGTHS, count=12)
    padding = torch.rand(2, case.length + columns, generator=torch.manual_seed(0)) < 0.8
    kept = check(dataclasses.replace(case, padding=padding), policy_of(method, layer=2))
    new = kept[:, :, -12:]
    assert not (new & ~padding[:, None, -12:]).any()


def test_a_short_row_of_a_pyramid_is_kept_whole() -> None:
    case = ragged_case([[20, 10, 0], [60, 30, 30]], count=4, tail=2, slots=120)
    padding = torch.ones(2, case.length, dtype=torch.bool)
    padding[0, : case.length - 30] = False
    case.positions[0, :20] = torch.arange(180, 200)
    case.positions[0, 20:30] = torch.arange(185, 195)
    policy = policy_of("ada-pyramid", layer=2)
    kept = check(dataclasses.replace(case, padding=padding), policy)
    assert int(kept[0].sum()) == 30 + 3 * 6
    assert int(kept[1].sum()) == 3 * layer_budget(policy, case.length)


@pytest.mark.parametrize("window", [6, 30, 100])
def test_sliding_window(window: int) -> None:
    case = dataclasses.replace(ragged_case(LENGTHS, count=12), sliding_window=window)
    kept = check(case, policy_of())
    assert not kept[..., : case.length - window + 1].any()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask(kind: str) -> None:
    case = ragged_case(LENGTHS, count=12)
    random = torch.manual_seed(2)
    mask = torch.rand(2, 6, 12, case.length, generator=random) < 0.7
    if kind == "float":
        mask = torch.randn(mask.shape, generator=random).masked_fill(~mask, -torch.inf)
    check(dataclasses.replace(case, mask=mask), policy_of())


@pytest.mark.parametrize("gqa", ["mean", "max"])
def test_a_query_that_a_float_mask_leaves_nothing_decides_nothing(gqa: str) -> None:
    """Uniform attention over what a head happens to hold would favour heads that hold little."""
    case, policy = ragged_case(LENGTHS, count=12), policy_of(gqa=gqa)
    hidden = torch.rand(2, 6, 12, case.length, generator=torch.manual_seed(2)) < 0.3
    hidden[0, :, -3] = True
    hidden[1, 2:, -5:-1] = True
    kept = [
        torch.ops.adakv.extend_v2(
            *dataclasses.replace(case, mask=torch.zeros(hidden.shape).masked_fill(hidden, low)).extend_arguments(policy)
        )[1:]
        for low in (torch.finfo(torch.float32).min, -torch.inf)
    ]
    for lowest, infinite in zip(*kept, strict=True):
        assert torch.equal(lowest, infinite)


def test_without_eviction_everything_stays() -> None:
    case = ragged_case(LENGTHS, count=5)
    arguments = case.extend_arguments(policy_of(), evict=False)
    _, keys, values, offsets, positions = torch.ops.adakv.extend_v2(*arguments)
    assert keys.shape[1] == 120 + 3 * 8
    assert (offsets[:, -1] == 120 + 3 * 8).all()
    truth = dense(case)
    held = [truth.held[row, head].nonzero().flatten() for row in range(2) for head in range(3)]
    assert torch.equal(positions.flatten(), torch.cat(held).int())
    truth_keys = [truth.keys[row, head][truth.held[row, head]] for row in range(2) for head in range(3)]
    assert torch.equal(keys.flatten(0, 1).double(), torch.cat(truth_keys))
    assert values.isfinite().all()


def test_rows_are_independent() -> None:
    case, policy = ragged_case(LENGTHS, count=9), policy_of()
    both = torch.ops.adakv.extend_v2(*case.extend_arguments(policy))
    for row in range(2):
        fields = {
            field.name: getattr(case, field.name)[row : row + 1]
            for field in dataclasses.fields(case)
            if isinstance(getattr(case, field.name), torch.Tensor) and field.name != "cursor"
        }
        alone = dataclasses.replace(case, **fields)
        single = torch.ops.adakv.extend_v2(*alone.extend_arguments(policy))
        for one, other in zip(both, single, strict=True):
            torch.testing.assert_close(one[row : row + 1], other)


def test_decode_after_extension() -> None:
    case = ragged_case(LENGTHS, count=9)
    arguments = case.extend_arguments(policy_of())
    _, keys, values, offsets, positions = torch.ops.adakv.extend_v2(*arguments)
    step = dataclasses.replace(
        ragged_case(LENGTHS, count=1, tail=0, prefix_length=case.length, seed=9),
        keys=keys,
        values=values,
        offsets=offsets,
        positions=positions,
    )
    output = torch.ops.adakv.decode_attention_v2(*step.arguments())
    assert_near(output, dense(step).output, torch.float32)


def test_arguments_are_checked() -> None:
    case = dataclasses.replace(ragged_case(LENGTHS), query=torch.zeros(2, 4, 1, 8))
    with pytest.raises(ValueError, match="extend: query heads 4 not a multiple of KV heads 3"):
        torch.ops.adakv.extend_v2(*case.extend_arguments(policy_of()))
