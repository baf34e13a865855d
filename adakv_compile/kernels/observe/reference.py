"""Scores of the observation window in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import (
    check_device,
    check_grouped,
    check_like,
    check_mask,
    check_shape,
    check_softmax,
)
from adakv_compile.policy import Policy, window_scores

__all__ = ["check_observation", "observe"]


def observe(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    policy: str,
) -> torch.Tensor:
    """Return the raw scores of every entry; see :mod:`adakv_compile.kernels.observe.op`.

    The sums that ``lse`` would save are made anyway.
    """
    check_observation(query, key, mask, padding, lse, sinks, softcap)
    batch, num_heads, length, _ = key.shape
    rules = Policy.decode(policy)
    # Window row ``r`` sits at key ``length - window + r``; queries before the first key see nothing that is held.
    window = min(rules.window, query.shape[2], length)
    if rules.method == "streamingllm" or window == 0:
        return query.new_zeros((batch, num_heads, length), dtype=torch.float32)
    visible = bias = None
    if mask is None:
        if sliding_window is not None:
            keys = torch.arange(length, device=key.device)
            visible = (keys > keys[length - window :, None] - sliding_window)[None, None]
    else:
        rows = mask if mask.shape[2] == 1 else mask[:, :, mask.shape[2] - window :]
        rows = rows[..., mask.shape[3] - length :]
        visible, bias = (rows, None) if mask.dtype == torch.bool else (None, rows)
    counted = None
    if padding is not None:
        padding = padding.expand(batch, length)
        real = padding[:, None, None, :]
        visible = real if visible is None else visible & real
        counted = padding[:, length - window :]
    return window_scores(
        query[:, :, query.shape[2] - window :],
        key,
        scale=scale,
        visible=visible,
        causal=mask is None,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        gqa=rules.gqa,
        query_valid=counted,
    )


def check_observation(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> None:
    """Check the tensors of a call.

    Raises:
        ValueError: A shape, dtype or device does not fit the others.
    """
    check_shape("observe", "query", query, (None, None, None, None))
    check_shape("observe", "key", key, (query.shape[0], None, None, query.shape[3]))
    check_like("observe", query, key=key)
    check_grouped("observe", query.shape[1], key.shape[1])
    check_device("observe", query, lse=lse)
    check_mask("observe", query, mask, padding)
    check_softmax("observe", query, sinks, softcap)
    if mask is not None and mask.shape[3] < key.shape[2]:
        raise ValueError(f"observe: mask has {mask.shape[3]} columns; expected {key.shape[2]} or more")
    if padding is not None:
        check_shape("observe", "padding", padding, (None if padding.shape[0] == 1 else query.shape[0], key.shape[2]))
    if lse is not None:
        check_shape("observe", "lse", lse, tuple(query.shape[:3]))
        if lse.dtype != torch.float32:
            raise ValueError(f"observe: lse is {lse.dtype}; expected torch.float32")
