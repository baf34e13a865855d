"""Memory for the entries appended since the last eviction: preallocated, written in place, grown by doubling."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from adakv_compile.kernels.decode_attention import CURSOR_SIZE
from adakv_compile.runtime.errors import TailGrowthError

__all__ = ["FIRST_TAIL_CAPACITY", "Tail", "new_cursor", "new_tail", "roomy"]

Tail = tuple[Tensor, Tensor]
"""Tail keys and tail values, ``[B, Hkv, C, Dk]`` and ``[B, Hkv, C, Dv]``."""

FIRST_TAIL_CAPACITY: Final = 64
"""Tail entries of the first allocation; later ones double."""


def new_tail(prefix: Tensor, heads: int, capacity: int) -> Tensor:
    """Return ``[B, heads, capacity, D]`` zeros for entries like those of a prefix ``[B, ..., D]``."""
    # Ordinary tensors even under inference_mode: the tail of a conversation is written in later calls, in any mode.
    with torch.inference_mode(False):
        return prefix.new_zeros(prefix.shape[0], heads, capacity, prefix.shape[-1])


def new_cursor(tail_length: int, prefix_length: int, device: torch.device) -> Tensor:
    """Return ``[CURSOR_SIZE]`` int32: tail entries in use, the position of tail entry 0, and the kernels' counters."""
    # Filled by kernels: a tensor made from a list would be copied to the device, which waits for it.
    with torch.inference_mode(False):
        cursor = torch.zeros(CURSOR_SIZE, dtype=torch.int32, device=device)
        cursor[0].fill_(tail_length)
        cursor[1].fill_(prefix_length)
    return cursor


def roomy(used: Tail, extra: int) -> Tail:
    """Copy a tail's used entries into new tensors that have room for ``extra`` more."""
    keys, values = used
    count = keys.shape[2]
    needed = count + extra
    capacity = FIRST_TAIL_CAPACITY
    while capacity < needed:
        capacity *= 2
    new_keys, new_values = _allocated(keys, values, capacity, needed)
    with torch.no_grad():
        new_keys[:, :, :count].copy_(keys)
        new_values[:, :, :count].copy_(values)
    return new_keys, new_values


def _allocated(keys: Tensor, values: Tensor, capacity: int, needed: int) -> Tail:
    heads = keys.shape[1]
    # A failed allocation is an OutOfMemoryError on accelerators and a plain RuntimeError on the CPU.
    try:
        return new_tail(keys, heads, capacity), new_tail(values, heads, capacity)
    except (RuntimeError, MemoryError):
        pass
    try:
        return new_tail(keys, heads, needed), new_tail(values, heads, needed)
    except (RuntimeError, MemoryError) as error:
        entry_bytes = keys.shape[0] * heads * (keys.shape[-1] + values.shape[-1]) * keys.itemsize
        raise TailGrowthError(
            f"No memory on {keys.device} for the {needed} tokens appended since the last eviction"
            f" ({needed * entry_bytes / 2**20:.1f} MiB for one layer). The cache is as it was before this call: free"
            " memory (another conversation, a smaller batch) and repeat it, or start a new conversation."
        ) from error
