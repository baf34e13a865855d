"""Compaction in Triton: the same bits as the portable op."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adakv_compile.kernels.compact import SPEC
from tests.kernels.checks.draw import Draw

__all__ = ["CHECKS"]

TRITON, PORTABLE = SPEC.overload_for("triton"), SPEC.overload_for("portable")


def _kept(draw: Draw, counts: list[list[int]], length: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and offsets of rows whose heads keep ``counts``; unused slots point nowhere."""
    positions = torch.full((len(counts), slots), 2**31 - 1, dtype=torch.int32)
    offsets = torch.zeros(len(counts), len(counts[0]) + 1, dtype=torch.int32)
    for row, heads in enumerate(counts):
        offsets[row, 1:] = torch.tensor(heads).cumsum(0)
        positions[row, : sum(heads)] = torch.cat([draw.choice(count, length) for count in heads]).int()
    return positions.to(draw.device), offsets.to(draw.device)


def _compare(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor, what: str) -> None:
    results = TRITON(key, value, positions, offsets)
    # The portable op reads every slot's position, so it gets one that exists.
    used = torch.arange(positions.shape[1]) < offsets.cpu()[:, -1:]
    expected = PORTABLE(key.cpu(), value.cpu(), positions.cpu().where(used, 0), offsets.cpu())
    for name, result, truth in zip(("keys", "values"), results, expected, strict=True):
        assert result.is_contiguous(), f"{what}: {name} are not contiguous"
        assert result.dtype == truth.dtype, f"{what}: {name} are {result.dtype}"
        integer = torch.int16 if truth.element_size() == 2 else torch.int32
        assert torch.equal(result.cpu().view(integer), truth.view(integer)), f"{what}: {name} differ"


def same_bits(draw: Draw) -> None:
    """Every dtype and head dimension; one head has half of all entries, one none."""
    dims = ((32, 32), (64, 48), (80, 80), (96, 128), (112, 40), (128, 128), (256, 192), (8, 6))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for key_dim, value_dim in dims:
            counts = [[41, 0, 90, 49], [90, 3, 1, 0]]
            key = draw.normal(2, 4, 97, key_dim, dtype=dtype)
            value = draw.normal(2, 4, 97, value_dim, dtype=dtype)
            positions, offsets = _kept(draw, counts, 97, 183)
            _compare(key, value, positions, offsets, f"{dtype} {key_dim} {value_dim}")


def strided(draw: Draw) -> None:
    """Keys and values as models make them: transposed, parts of one projection, expanded, every other column."""
    projected = draw.normal(2, 50, 3 * (16 + 24), dtype=torch.bfloat16)
    key, value = projected.view(2, 50, 3, 40).transpose(1, 2).split((16, 24), 3)
    positions, offsets = _kept(draw, [[5, 20, 7], [30, 1, 1]], 50, 33)
    _compare(key, value, positions, offsets, "one projection")
    _compare(key[:1].expand(2, 3, 50, 16), value.flip(0), positions, offsets, "expanded")
    columns = draw.normal(2, 3, 24, 50).transpose(2, 3)
    _compare(columns, columns[..., ::2], positions, offsets, "every other column")


def what_is_not_kept(draw: Draw) -> None:
    """Not-a-numbers and infinities move as bits and do not spread; unused slots are zeros."""
    key, value = draw.normal(1, 2, 40, 16), draw.normal(1, 2, 40, 16)
    key[:, :, ::2], value[:, :, 1::2] = float("nan"), float("inf")
    positions, offsets = _kept(draw, [[7, 30]], 40, 64)
    _compare(key, value, positions, offsets, "poisoned")
    keys, values = TRITON(key, value, positions, offsets)
    assert not keys[:, 37:].any(), "unused keys are not zeros"
    assert not values[:, 37:].any(), "unused values are not zeros"


def many_heads_and_rows(draw: Draw) -> None:
    """More heads than one block of slots, rows of different lengths, rows and heads that keep nothing."""
    for num_heads, batch in ((1, 5), (3, 3), (40, 2), (65, 1)):
        sizes = draw.integers(0, 9, batch, num_heads).tolist()
        sizes[0] = [0] * num_heads
        sizes[-1][0] = 30
        positions, offsets = _kept(draw, sizes, 31, max(2, *map(sum, sizes)) if batch > 1 else sum(sizes[0]))
        shape = (batch, num_heads, 31, 16)
        key, value = draw.normal(*shape), draw.normal(*shape)
        _compare(key, value, positions, offsets, f"{num_heads} heads, {batch} rows")


def far_apart(draw: Draw) -> None:
    """A head past 2**31 elements, of storage in which few are ever touched."""
    # Untouched pages take no memory on the CPU; a GPU pins down all of 4 GiB.
    if draw.device.type == "cuda" and torch.cuda.mem_get_info()[0] < 2**33:
        return
    away = 2**31 + 7 * 16
    storage = torch.empty(away + 30 * 16, dtype=torch.bfloat16, device=draw.device)
    key = storage.as_strided((1, 2, 30, 16), (0, away, 16, 1))
    key.copy_(draw.normal(1, 2, 30, 16, dtype=torch.bfloat16))
    positions, offsets = _kept(draw, [[10, 30]], 30, 40)
    keys, values = TRITON(key, key, positions, offsets)
    expected = torch.cat((key[0, 0][positions[0, :10].long()], key[0, 1][positions[0, 10:].long()]))
    assert torch.equal(keys[0], expected), "keys differ"
    assert torch.equal(values[0], expected), "values differ"


def the_same_twice(draw: Draw) -> None:
    """The same bits in every run."""
    key, value = draw.normal(1, 2, 64, 32), draw.normal(1, 2, 64, 32)
    arguments = (key, value, *_kept(draw, [[30, 20]], 64, 50))
    first, second = (TRITON(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


CHECKS: dict[str, Callable[[Draw], None]] = {
    check.__name__: check
    for check in (same_bits, strided, what_is_not_kept, many_heads_and_rows, far_apart, the_same_twice)
}
