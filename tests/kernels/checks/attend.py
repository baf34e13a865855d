"""Checks of attention to a store in Triton: against dense attention in float64, and that nothing is mutated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from adakv_compile.kernels.attend import SPEC
from tests.kernels.cases import Case, dense, ragged_case
from tests.kernels.checks.draw import Draw
from tests.kernels.tolerances import assert_near

__all__ = ["CHECKS"]

TRITON = SPEC.overload_for("triton")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = [[1, 117, 2, 64], [64, 16, 40, 0]]


def _case(draw: Draw, lengths: list[list[int]] = LENGTHS, **options: object) -> Case:
    given = {"key_dim": 16, "value_dim": 16, "capacity": 70, **options}
    return ragged_case(lengths, seed=draw.seed_for(), **given)  # pyright: ignore[reportArgumentType]


def _check(draw: Draw, case: Case) -> None:
    arguments = case.to(draw.device).attend_arguments()
    before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
    output = TRITON(*arguments)
    assert output.is_contiguous()
    assert output.dtype == case.query.dtype
    assert_near(output.cpu(), dense(case).output, case.query.dtype)
    for one, other in zip(before, [value for value in arguments if isinstance(value, torch.Tensor)], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg="an argument has changed")
    assert torch.equal(output, TRITON(*arguments)), "other bits in another run"


def ragged_heads(draw: Draw) -> None:
    """Heads of all lengths, one token and several, in every dtype."""
    for index, count in enumerate((1, 2, 5, 16, 33)):
        _check(draw, _case(draw, count=count, dtype=_DTYPES[index % 3]))
    _check(draw, _case(draw, [[0, 0]], count=3, tail=0))
    _check(draw, _case(draw, [[700]], prefix_length=800, tail=40))
    _check(draw, _case(draw, [[10, 70], [0, 33]], group=7, count=33, dtype=torch.bfloat16))


def head_dims(draw: Draw) -> None:
    """Head dimensions that are no powers of two, and keys and values of different ones."""
    for index, (key_dim, value_dim) in enumerate(((64, 64), (80, 96), (256, 256), (24, 40))):
        case = _case(draw, [[3, 40]], key_dim=key_dim, value_dim=value_dim, count=index + 1, dtype=_DTYPES[index % 3])
        _check(draw, dataclasses.replace(case, scale=key_dim**-0.5))


def hidden(draw: Draw) -> None:
    """Windows, padding and masks, one token and several."""
    for count in (1, 5):
        case = _case(draw, [[1, 117], [64, 16]], count=count, tail=30)
        padding = draw.uniform(2, case.length + 5).cpu() < 0.7
        _check(draw, dataclasses.replace(case, sliding_window=1))
        for window in (3, 90):
            _check(draw, dataclasses.replace(case, sliding_window=window, padding=padding))
        seen = draw.uniform(2, 1, count, case.length - 9).cpu() < 0.6
        _check(draw, dataclasses.replace(case, mask=seen, padding=padding))
        _check(draw, dataclasses.replace(case, mask=draw.normal(1, 4, 1, case.length).cpu()))


def capped(draw: Draw) -> None:
    """Soft caps and sinks, of which some are none."""
    for index, count in enumerate((1, 3, 20)):
        case = _case(draw, count=count, dtype=_DTYPES[index])
        sinks = draw.normal(8, dtype=case.query.dtype).cpu() * 3
        sinks[::3] = -torch.inf
        _check(draw, dataclasses.replace(case, softcap=1.5, sinks=sinks))
        _check(draw, dataclasses.replace(case, sinks=sinks, sliding_window=40))


def tokens_in_the_prefix(draw: Draw) -> None:
    """Tokens of the call that are no longer in the tail are hidden from the queries before them, too."""
    for count in (2, 5, 17):
        case = _case(draw, [[30] * 3, [9] * 3], count=count, tail=0, prefix_length=40, capacity=20)
        truth = dense(case).output
        # The first new token of every head goes to the end of its prefix.
        batch, heads = case.key_new.shape[:2]
        parts = [
            [
                torch.cat((old[row, case.offsets[row, head] : case.offsets[row, head + 1]], new[row, head, :1]))
                for row in range(batch)
                for head in range(heads)
            ]
            for old, new in (
                (case.keys, case.key_new),
                (case.values, case.value_new),
                (case.positions, torch.full((batch, heads, 1), 40, dtype=torch.int32)),
            )
        ]
        slots = case.keys.shape[1] + heads
        keys, values, positions = (
            torch.stack([_filled(torch.cat(part[row * heads : row * heads + heads]), slots) for row in range(batch)])
            for part in parts
        )
        tail_keys, tail_values = case.tail_keys.clone(), case.tail_values.clone()
        tail_keys[:, :, : count - 1] = case.key_new[:, :, 1:]
        tail_values[:, :, : count - 1] = case.value_new[:, :, 1:]
        offsets = case.offsets + torch.arange(heads + 1, dtype=torch.int32)
        cursor = torch.tensor([count - 1, 41], dtype=torch.int32)
        store = (keys, values, offsets, positions, tail_keys, tail_values, cursor)
        moved = [part.to(draw.device) for part in (case.query, *store)]
        output = TRITON(*moved, None, None, None, case.scale, None, None)
        assert_near(output.cpu(), truth, torch.float32)


def _filled(part: torch.Tensor, slots: int) -> torch.Tensor:
    """Return a row of a prefix, with what no one may read in its unused slots."""
    nothing = torch.nan if part.is_floating_point() else -1
    return torch.cat((part, part.new_full((slots - part.shape[0], *part.shape[1:]), nothing)))


CHECKS: dict[str, Callable[[Draw], None]] = {
    check.__name__: check for check in (ragged_heads, head_dims, hidden, capped, tokens_in_the_prefix)
}
