"""Attention to a store in Triton: the kernel of decode attention, without new tokens."""

from __future__ import annotations

import torch

from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels.attend.reference import check_attend
from adakv_compile.kernels.decode_attention.gpu import attend as attend_all
from adakv_compile.kernels.decode_attention.gpu import check_cursor

__all__ = ["attend"]


def attend(
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
    store = (keys, values, offsets, positions, tail_keys, tail_values)
    check_attend(query, *store, mask, padding, sinks, softcap)
    check_cursor("attend", cursor)
    output, _ = attend_all(
        query,
        None,
        None,
        *store,
        cursor=cursor,
        tail_length=0,
        prefix_length=0,
        mask=mask,
        padding=padding,
        softmax=Softmax(scale, softcap, sinks),
        sliding_window=sliding_window,
        want_lse=False,
    )
    return output
