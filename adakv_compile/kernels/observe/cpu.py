"""Scores on the CPU: those that decide nothing are not computed."""

from __future__ import annotations

import torch

from adakv_compile.kernels.observe.reference import observe
from adakv_compile.policy import Policy, keeps_all

__all__ = ["observe_cpu"]


def observe_cpu(
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
    """Return the raw scores of every entry; see :mod:`adakv_compile.kernels.observe.op`."""
    if keeps_all(Policy.decode(policy), key.shape[2]):
        return key.new_zeros(key.shape[:3], dtype=torch.float32)
    return observe(query, key, mask, padding, lse, sinks, scale, sliding_window, softcap, policy)
