"""Dense attention with everything that the dialect knows, in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_grouped, check_mask, check_shape

__all__ = ["attention"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attend; see :mod:`adakv_compile.kernels.attention.op`."""
    check_shape("attention", "query", query, (None, None, None, None))
    batch, num_heads, count, dim = query.shape
    check_shape("attention", "key", key, (batch, None, None, dim))
    check_shape("attention", "value", value, (batch, key.shape[1], key.shape[2], None))
    check_grouped("attention", num_heads, key.shape[1])
    check_mask("attention", query, mask, None)
    group = num_heads // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(wide) @ key.to(wide).repeat_interleave(group, 1).mT * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if is_causal:
        future = torch.ones(count, key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    peak = logits.amax(-1, keepdim=True)
    extra: torch.Tensor | None = None
    if sinks is not None:
        extra = sinks.to(wide).view(1, -1, 1, 1)
        peak = torch.maximum(peak, extra)
    weights = (logits - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
    mass = weights.sum(-1, keepdim=True)
    if extra is not None:
        mass = mass + (extra - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
    out = weights @ value.to(wide).repeat_interleave(group, 1) / mass.masked_fill(mass == 0, 1.0)
    return out.to(query.dtype)
