"""Scores of the observation window in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_device, check_grouped, check_like, check_shape
from adakv_compile.policy import Policy, window_scores

__all__ = ["check_observation", "observe"]


def observe(
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None,
    lse: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    policy: str,
) -> torch.Tensor:
    """Return the raw scores of every entry; see :mod:`adakv_compile.kernels.observe.op`.

    The sums that ``lse`` would save are made anyway.
    """
    check_observation(query, key, padding, lse)
    batch, num_heads, length, _ = key.shape
    rules = Policy.decode(policy)
    # Window row ``r`` sits at key ``length - window + r``; queries before the first key see nothing that is held.
    window = min(rules.window, query.shape[2], length)
    if rules.method == "streamingllm" or window == 0:
        return query.new_zeros((batch, num_heads, length), dtype=torch.float32)
    keys = torch.arange(length, device=key.device)
    queries = keys[length - window :, None]
    visible = keys <= queries
    if sliding_window is not None:
        visible &= keys > queries - sliding_window
    visible = visible[None, None]
    counted = None
    if padding is not None:
        padding = padding.expand(batch, length)
        visible = visible & padding[:, None, None, :]
        counted = padding[:, length - window :]
    return window_scores(
        query[:, :, query.shape[2] - window :],
        key,
        scale=scale,
        visible=visible,
        gqa=rules.gqa,
        query_valid=counted,
    )


def check_observation(
    query: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | None, lse: torch.Tensor | None
) -> None:
    """Check the tensors of a call.

    Raises:
        ValueError: A shape, dtype or device does not fit the others.
    """
    check_shape("observe", "query", query, (None, None, None, None))
    check_shape("observe", "key", key, (query.shape[0], None, None, query.shape[3]))
    check_like("observe", query, key=key)
    check_grouped("observe", query.shape[1], key.shape[1])
    check_device("observe", query, padding=padding, lse=lse)
    if padding is not None:
        check_shape("observe", "padding", padding, (None if padding.shape[0] == 1 else query.shape[0], key.shape[2]))
        if padding.dtype != torch.bool:
            raise ValueError(f"observe: padding is {padding.dtype}; expected torch.bool")
    if lse is not None:
        check_shape("observe", "lse", lse, tuple(query.shape[:3]))
        if lse.dtype != torch.float32:
            raise ValueError(f"observe: lse is {lse.dtype}; expected torch.float32")
