"""Gathering of the kept entries in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch

from adakv_compile.kernels._checks import check_like, check_shape

__all__ = ["check_compaction", "compact", "compact_cpu", "head_of_slots"]


def check_compaction(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor) -> None:
    """Check the tensors of a call.

    Raises:
        ValueError: A shape, dtype or device does not fit the others.
    """
    check_shape("compact", "key", key, (None, None, None, None))
    batch, num_heads, length = key.shape[:3]
    check_shape("compact", "value", value, (batch, num_heads, length, None))
    check_like("compact", key, value=value)
    check_shape("compact", "positions", positions, (batch, None))
    check_shape("compact", "offsets", offsets, (batch, num_heads + 1))
    for name, tensor in (("positions", positions), ("offsets", offsets)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"compact: {name} is {tensor.dtype}; expected torch.int32")
        if tensor.device != key.device:
            raise ValueError(f"compact: {name} is on {tensor.device}; expected {key.device}")


def head_of_slots(offsets: torch.Tensor, slots: int) -> torch.Tensor:
    """Return the KV head of every slot, ``[B, N]`` int64; unused slots get the number of heads."""
    slot = torch.arange(slots, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(
        offsets[:, 1:].contiguous(), slot.expand(offsets.shape[0], slots).contiguous(), right=True
    )


def compact(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the kept rows; see :mod:`adakv_compile.kernels.compact.op`."""
    check_compaction(key, value, positions, offsets)
    batch, num_heads = key.shape[:2]
    head = head_of_slots(offsets, positions.shape[1])
    unused = (head == num_heads)[..., None]
    head = head.clamp_(max=num_heads - 1)
    row = torch.arange(batch, device=key.device)[:, None]
    where = (row, head, positions.long())
    return key[where].masked_fill_(unused, 0), value[where].masked_fill_(unused, 0)


def compact_cpu(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the kept rows of one head after the other, whose bounds a CPU can read at no cost; copy what is whole."""
    check_compaction(key, value, positions, offsets)
    batch, num_heads, length = key.shape[:3]
    rows = offsets.tolist()
    if positions.shape[1] == num_heads * length and all(bounds[-1] == num_heads * length for bounds in rows):
        # Positions differ inside a head: with as many as there are, they are all of them, in order.
        whole = [
            entries.clone(memory_format=torch.contiguous_format).view(batch, num_heads * length, entries.shape[3])
            for entries in (key, value)
        ]
        return whole[0], whole[1]
    kept = [entries.new_empty((*positions.shape, entries.shape[3])) for entries in (key, value)]
    for row, bounds in enumerate(rows):
        for entries, into in zip((key, value), kept, strict=True):
            for head, (begin, end) in enumerate(pairwise(bounds)):
                torch.index_select(entries[row, head], 0, positions[row, begin:end], out=into[row, begin:end])
            into[row, bounds[-1] :].zero_()
    return kept[0], kept[1]
