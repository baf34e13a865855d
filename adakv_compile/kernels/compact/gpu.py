"""Gathering of the kept entries in Triton."""

from __future__ import annotations

import torch
import triton

from adakv_compile.kernels._launch import launch
from adakv_compile.kernels._support import target_of
from adakv_compile.kernels.compact.reference import check_compaction
from adakv_compile.kernels.compact.triton import compact_kernel
from adakv_compile.kernels.compact.tuning import config_of, constants_of

__all__ = ["compact"]


def compact(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the kept rows; see :mod:`adakv_compile.kernels.compact.op`."""
    check_compaction(key, value, positions, offsets)
    batch, num_heads, _, key_dim = key.shape
    slots, value_dim = positions.shape[1], value.shape[3]
    keys, values = key.new_empty((batch, slots, key_dim)), value.new_empty((batch, slots, value_dim))
    config = config_of(target_of(key.device), key.element_size(), key_dim, value_dim, num_heads)
    launch(
        compact_kernel,
        (triton.cdiv(slots, config.slots), batch),
        key,
        value,
        positions.contiguous(),
        offsets.contiguous(),
        keys,
        values,
        *key.stride(),
        *value.stride(),
        slots,
        num_heads,
        device=key.device,
        num_warps=config.num_warps,
        num_stages=1,
        **constants_of(config, key_dim, value_dim, num_heads),
    )
    return keys, values
