"""Causal attention of a prompt that may be padded, by PyTorch's operator."""

from __future__ import annotations

import torch
from torch.nn import functional

from adakv_compile.kernels._checks import check_grouped, check_like, check_shape

__all__ = ["attend", "padded_attention", "padded_attention_cpu"]


def padded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend under a mask; see :mod:`adakv_compile.kernels.padded_attention.op`."""
    _check(query, key, value, padding)
    order = torch.arange(query.shape[2], device=query.device)
    return attend(query, key, value, (order <= order[:, None]) & padding[:, None, None, :], scale)


def padded_attention_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend, under a mask only if there is padding; see :mod:`adakv_compile.kernels.padded_attention.op`."""
    _check(query, key, value, padding)
    if padding.all():
        return attend(query, key, value, None, scale)
    return padded_attention(query, key, value, padding, scale)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Call PyTorch's operator, with its causal flag if there is no mask."""
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor) -> None:
    op = "padded_attention"
    check_shape(op, "query", query, (None, None, None, None))
    batch, heads, length, key_dim = query.shape
    check_shape(op, "key", key, (batch, None, length, key_dim))
    check_shape(op, "value", value, (batch, key.shape[1], length, None))
    check_like(op, query, key=key, value=value)
    check_grouped(op, heads, key.shape[1])
    check_shape(op, "padding", padding, (None if padding.shape[0] == 1 else batch, length))
    if padding.dtype != torch.bool:
        raise ValueError(f"{op}: padding is {padding.dtype}; expected torch.bool")
