"""Attention to a store on the CPU, where lengths are at hand."""

from __future__ import annotations

import torch

from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels.attend.reference import check_attend
from adakv_compile.kernels.decode_attention.cpu import attend_store

__all__ = ["attend_cpu"]


def attend_cpu(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    cursor: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend; see :mod:`adakv_compile.kernels.attend.op`."""
    prefix = (keys, values, offsets, positions)
    check_attend(query, *prefix, tail_keys, tail_values, mask, padding, sinks, softcap)
    length, start = cursor[:2].tolist()
    if length > tail_keys.shape[2]:
        raise ValueError(f"attend: {length} tail entries exceed the capacity {tail_keys.shape[2]}")
    tail = (tail_keys[:, :, :length], tail_values[:, :, :length])
    return attend_store(query, *prefix, *tail, start, mask, padding, Softmax(scale, softcap, sinks), sliding_window)
