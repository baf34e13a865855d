"""What stays when a compressed cache is compressed again, in plain PyTorch."""

from __future__ import annotations

import torch

from adakv_compile.policy import Policy, layer_budget, select

__all__ = ["choose"]


def choose(
    policy: Policy,
    scores: torch.Tensor,
    valid: torch.Tensor,
    real: torch.Tensor | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return which positions stay, bool ``[B, H, L]``.

    Args:
        policy: What to keep.
        scores: ``[B, H, L]`` float32, by position.
        valid: Bool ``[B, H, L]``, where an entry is held; changed in place.
        real: Bool ``[B, L]``, which positions are tokens; None: all.
        sliding_window: Keys a query sees, its own included.
    """
    batch, num_heads, length = valid.shape
    live = length if sliding_window is None else min(length, sliding_window - 1)
    valid[..., : length - live].fill_(False)
    order = torch.arange(length, device=valid.device)
    tokens = torch.full((batch,), live, device=valid.device) if real is None else real[:, length - live :].sum(-1)
    return select(
        policy,
        scores,
        valid,
        protected=(order >= length - policy.window).expand(batch, 1, length),
        total=num_heads * layer_budget(policy, tokens),
    )
