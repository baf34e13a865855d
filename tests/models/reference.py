"""An independent reference: the uncompressed model, with evicted entries masked out in every layer and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

__all__ = ["kept_mask", "masked_decode", "register"]

NAME = "adakv_test_reference"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Plain attention in float64 on dense keys and values, under ``module.adakv_kept`` ``[B, Hkv, L]``."""
    repeat = query.shape[1] // key.shape[1]
    keep = module.adakv_kept
    module.adakv_kept = keep = torch.cat([keep, keep.new_ones(*keep.shape[:2], query.shape[2])], dim=2)
    # A sliding cache has dropped its oldest entries by now.
    keep = keep[:, :, -key.shape[2] :]
    keep = keep.repeat_interleave(repeat, dim=1)[:, :, None]
    if attention_mask is not None:
        keep = keep & attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query.double() @ key.double().repeat_interleave(repeat, dim=1).transpose(-1, -2) * scale
    weights = logits.masked_fill(~keep, -torch.inf).softmax(-1)
    out = weights @ value.double().repeat_interleave(repeat, dim=1)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the reference attention known to transformers."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def kept_mask(cached: Any) -> Tensor:
    """Return ``[B, Hkv, L]`` booleans: the logical positions a ``CompressedKV`` holds."""
    batch, heads, length, _ = cached.shape
    keep = torch.zeros(batch, heads, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            keep[b, h, cached.positions(b, h).long()] = True
    return keep


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the attention modules in layer order."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "config")]
    modules = {module.layer_idx: module for module in found if "attention" in type(module).__name__.lower()}
    return [modules[i] for i in sorted(modules)]


def masked_decode(
    model: PreTrainedModel, cache: Any, kept: list[Tensor], tokens: Tensor, attention_mask: Tensor
) -> Tensor:
    """Feed ``tokens [B, n]`` one by one to the uncompressed model over a dense cache; return logits ``[B, n, V]``.

    Args:
        model: The uncompressed model.
        cache: Its dense cache after the prompt.
        kept: For each layer, which entries of the prompt are visible.
        tokens: The tokens to feed.
        attention_mask: ``[B, prompt]``.
    """
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    for module, keep in zip(attention_modules(model), kept, strict=True):
        module.adakv_kept = keep
    logits: list[Tensor] = []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1)
            position = attention_mask.sum(-1, keepdim=True) - 1
            out = model(
                tokens[:, t : t + 1], past_key_values=cache, attention_mask=attention_mask, position_ids=position
            )
            logits.append(out.logits[:, -1])
    model.set_attn_implementation(before)
    return torch.stack(logits, dim=1)
