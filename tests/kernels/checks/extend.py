"""Extension in Triton: attention like float64, and the entries that the portable op keeps, moved bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from adakv_compile.kernels.extend import SPEC
from adakv_compile.policy import Policy
from tests.kernels.cases import Case, dense, ragged_case
from tests.kernels.checks.draw import Draw
from tests.kernels.tolerances import assert_near

__all__ = ["CHECKS"]

TRITON, PORTABLE = SPEC.overload_for("triton"), SPEC.overload_for("portable")
POLICY = Policy(budget=24, window=5, kernel_size=5)
# One head has half of all entries, one of them none.
LENGTHS = [[1, 70, 0, 64], [33, 0, 9, 20]]


def _case(draw: Draw, lengths: list[list[int]] = LENGTHS, **options: object) -> Case:
    given = {"count": 6, "prefix_length": 90, **options}
    return ragged_case(lengths, seed=draw.seed_for(), **given)  # pyright: ignore[reportArgumentType]


def _check(draw: Draw, case: Case, policy: Policy, *, evict: bool = True, swapped: int = 2) -> None:
    """Compare a call with float64 and with the portable op.

    Args:
        draw: The device.
        case: The call, on the CPU.
        policy: Of the call.
        evict: Of the call.
        swapped: Entries whose rounded scores are so close that either may stay.
    """
    arguments = case.to(draw.device).extend_arguments(policy, evict)
    before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
    output, *store = TRITON(*arguments)
    for one, other in zip(before, [value for value in arguments if isinstance(value, torch.Tensor)], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg="an argument has changed")
    truth = dense(case)
    assert_near(output.cpu(), truth.output, case.query.dtype)
    _, *expected = PORTABLE(*case.extend_arguments(policy, evict))
    keys, values, offsets, positions = (part.cpu() for part in store)
    for name, part, portable in zip(("keys", "values", "offsets", "positions"), store, expected, strict=True):
        assert part.shape == portable.shape, f"{name} are {list(part.shape)}, not {list(portable.shape)}"
        assert part.dtype == portable.dtype, f"{name} are {part.dtype}"
        assert part.is_contiguous(), f"{name} are not contiguous"
    assert torch.equal(offsets[:, -1], expected[2][:, -1]), "rows keep other numbers of entries"
    mine, theirs = (_kept(part, bounds, truth.held) for part, bounds in ((positions, offsets), expected[3:1:-1]))
    differing = int((mine != theirs).sum())
    assert differing <= 2 * swapped, f"{differing // 2} other entries are kept"
    assert not (mine & ~truth.held).any(), "something is kept that is not held"
    if differing == 0:
        assert torch.equal(offsets, expected[2]), "offsets differ"
        assert torch.equal(positions, expected[3]), "positions differ"
    for row in range(offsets.shape[0]):
        bounds = offsets[row].tolist()
        for head in range(len(bounds) - 1):
            part = slice(bounds[head], bounds[head + 1])
            place = positions[row, part].long()
            assert torch.equal(place, place.sort().values), "positions do not ascend"
            assert torch.equal(keys[row, part].double(), truth.keys[row, head, place]), "keys are not those held"
            assert torch.equal(values[row, part].double(), truth.values[row, head, place]), "values are not those held"
        assert not keys[row, bounds[-1] :].any(), "unused keys are not zeros"
        assert not values[row, bounds[-1] :].any(), "unused values are not zeros"
        assert not positions[row, bounds[-1] :].any(), "unused positions are not zeros"


def _kept(positions: torch.Tensor, offsets: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(held)
    for row in range(held.shape[0]):
        for head in range(held.shape[1]):
            kept[row, head, positions[row, offsets[row, head] : offsets[row, head + 1]].long()] = True
    return kept


def _head_dims(draw: Draw, dtype: torch.dtype, dims: tuple[tuple[int, int, int], ...]) -> None:
    """Head dimensions that are no powers of two, and keys and values of different ones."""
    for key_dim, value_dim, group in dims:
        case = _case(draw, LENGTHS[:1], key_dim=key_dim, value_dim=value_dim, group=group, dtype=dtype)
        case.scale = key_dim**-0.5
        # What half precision rounds away may decide between neighbours.
        _check(draw, case, POLICY, swapped=2 if dtype == torch.float32 else 20)


def methods(draw: Draw) -> None:
    """Policies that share a budget over heads and over layers, and the one that goes by order alone."""
    for method in ("snapkv", "ada-pyramid", "streamingllm"):
        policy = dataclasses.replace(POLICY, method=method, layer=1, num_layers=3)
        _check(draw, _case(draw, LENGTHS[:1]), policy)


def reductions(draw: Draw) -> None:
    """Windows that make one block of rows, several of whole windows and several of parts, shorter calls, groups."""
    for group, window, count, gqa in ((3, 5, 9, "max"), (16, 12, 20, "mean"), (9, 20, 30, "max"), (2, 80, 70, "max")):
        policy = dataclasses.replace(POLICY, window=window, budget=window + 10, gqa=gqa, pool="avg")
        _check(draw, _case(draw, LENGTHS[1:], group=group, count=count), policy)


def hidden(draw: Draw) -> None:
    """Padding, sliding windows and masks that were not proved."""
    for kind in ("padding", "window", "bool", "float"):
        case = _case(draw, count=7)
        length = case.length
        if kind == "padding":
            case.padding = draw.uniform(2, length + 3).cpu() < 0.8
            case.padding[1, -2:] = False
        elif kind == "window":
            case.sliding_window = 40
        else:
            seen = draw.uniform(2, 1, 7, length - 5).cpu() < 0.7
            seen[0, 0, 2] = False
            hides = torch.where(seen, draw.normal(*seen.shape).cpu(), torch.finfo(torch.float32).min)
            case.mask = seen if kind == "bool" else hides
        _check(draw, case, dataclasses.replace(POLICY, gqa="max" if kind == "float" else "mean"))


def capped(draw: Draw) -> None:
    """Soft caps and sinks, of which some are none, also under what hides entries."""
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        case = _case(draw, count=7, group=3, dtype=dtype)
        case.softcap, case.sinks = (1.5, 200.0)[index], draw.normal(12, dtype=dtype).cpu() * 2
        case.sinks[::2] = -torch.inf
        swapped = 2 if dtype == torch.float32 else 20
        _check(draw, case, dataclasses.replace(POLICY, gqa="max"), swapped=swapped)
        case.mask = draw.normal(2, 12, 7, case.length).cpu() * 3
        case.padding = draw.uniform(2, case.length).cpu() < 0.8
        _check(draw, case, POLICY, swapped=swapped)
    case = _case(draw, LENGTHS[:1], count=40)
    case.sinks = draw.normal(8).cpu() + 80
    _check(draw, dataclasses.replace(case, sliding_window=50), POLICY)
    case.sinks -= 160
    _check(draw, case, POLICY)


def nothing_is_evicted(draw: Draw) -> None:
    """Without eviction all that is held stays, but for padding; so it does where the budget is larger."""
    case = _case(draw)
    case.padding = draw.uniform(1, case.length).cpu() < 0.9
    _check(draw, case, POLICY, evict=False, swapped=0)
    _check(draw, _case(draw), dataclasses.replace(POLICY, budget=500), swapped=0)


def nothing_is_kept_yet(draw: Draw) -> None:
    """No prefix, no tail, one token."""
    _check(draw, _case(draw, [[0, 0]], count=20, tail=0, prefix_length=1, slots=2), POLICY)
    _check(draw, _case(draw, [[3, 0]], count=1, tail=0, capacity=0), POLICY)


def strided(draw: Draw) -> None:
    """Tokens as models make them: transposed, and of which every other column is taken."""
    case = _case(draw, LENGTHS[1:], count=9, group=2)
    case.query, case.key_new = (
        part.transpose(1, 2).contiguous().transpose(1, 2) for part in (case.query, case.key_new)
    )
    case.value_new = case.value_new.repeat_interleave(2, -1)[..., ::2]
    _check(draw, case, POLICY)


def the_same_twice(draw: Draw) -> None:
    """The same bits in every run."""
    arguments = _case(draw, LENGTHS[:1], dtype=torch.bfloat16).to(draw.device).extend_arguments(POLICY)
    for one, other in zip(TRITON(*arguments), TRITON(*arguments), strict=True):
        assert torch.equal(one, other)


DIMS = {
    torch.bfloat16: ((32, 32, 1), (80, 96, 3), (256, 256, 1)),
    torch.float16: ((112, 64, 2), (128, 128, 4)),
    torch.float32: ((64, 80, 4), (96, 128, 2)),
}
CHECKS: dict[str, Callable[[Draw], None]] = {
    f"head_dims_{str(dtype).removeprefix('torch.')}": functools.partial(_head_dims, dtype=dtype, dims=dims)
    for dtype, dims in DIMS.items()
} | {
    check.__name__: check
    for check in (methods, reductions, hidden, capped, nothing_is_evicted, nothing_is_kept_yet, strided, the_same_twice)
}
