"""Choose who computes what: the kernels of the ops, and the library of a prompt's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from adakv_compile.kernels import Kernels, Subject, why_unsupported
from adakv_compile.kernels.prefill_attention import BACKENDS, Request, best_backend
from adakv_compile.options import Options
from adakv_compile.passes.attention import AttentionSite
from adakv_compile.passes.nodes import same_size, static_int
from adakv_compile.symbolic.mask import MaskProof

__all__ = ["PADDED", "Implementation", "choose_attention", "choose_kernels"]

aten = torch.ops.aten

PADDED: Final = "the batch is padded, which takes the model's own mask"
"""Why an attention keeps its mask."""


@dataclass(frozen=True)
class Implementation:
    """A choice.

    Attributes:
        name: An overload of the ops, or an attention backend.
        text: What that means on the device at hand, for the report.
        unmet: Why it is not what the user asked for, None if it is.
    """

    name: str
    text: str
    unmet: str | None = None


def choose_kernels(options: Options, site: AttentionSite) -> Implementation:
    """Return which overload of the ops an attention gets.

    Triton's kernels where they serve the device, dtype and head dimensions, unless the user wants other ones; the
    portable ones, with the reason, where they don't.
    """
    asked: Kernels = options.kernels
    if asked == "portable":
        return Implementation("portable", "portable")
    key = site.query.meta["val"]
    why = why_unsupported(Subject(key.device, key.dtype, (site.key_dim, site.value_dim)))
    if why is not None:
        if asked == "triton":
            return Implementation("portable", f"portable ({why})", f"option 'kernels' is 'triton': {why}")
        return Implementation("auto", "cpu" if key.device.type == "cpu" else f"portable ({why})")
    if asked == "triton":
        return Implementation("triton", "triton")
    return Implementation("auto", "triton" if key.device.type == "cuda" else "cpu")


def choose_attention(
    options: Options, site: AttentionSite, sliding_window: int | None, needs_mask: str | None, mask: MaskProof
) -> Implementation:
    """Return the backend of a prompt's attention, whose mask is proved causal.

    Args:
        options: The user's.
        site: The attention.
        sliding_window: Keys a query sees, its own included.
        needs_mask: Why the causal rule, times padding, is not all that the model's mask says, None if it is.
        mask: What that mask was proved to be.
    """
    asked = options.attention
    if asked == "model":
        return Implementation("model", "model")
    by_flag = sliding_window is None and needs_mask is None and _can_take_flag(site, mask)
    if needs_mask is not None:
        why = needs_mask
    elif mask.padding is not None:
        if by_flag and asked in ("auto", "sdpa"):
            return Implementation("padded", "sdpa, with a mask only if a token is padding")
        why = PADDED
    elif not site.is_plain:
        why = "its logits are capped" if site.softcap is not None else "it has sinks"
    elif not same_size(site.query_length, site.key_length):
        why = "the prompt continues a dense cache"
    else:
        dims = static_int(site.key_dim), static_int(site.value_dim)
        key = site.query.meta["val"]
        if dims[0] is None or dims[1] is None:
            why = "the head dimension is not a number"
        else:
            request = Request(key.device, key.dtype, dims[0], dims[1], sliding_window)
            if asked == "auto":
                # Where the model's operator is PyTorch's, its flag gives the same bits as a mask of the same meaning.
                best = "sdpa" if by_flag else best_backend(request)
                return Implementation(best, best)
            why = BACKENDS[asked].why_not(request)
            if why is None:
                return Implementation(asked, asked)
    unmet = None if asked == "auto" else f"option 'attention' is {asked!r}: {why}"
    return Implementation("model", f"model ({why})", unmet)


def _can_take_flag(site: AttentionSite, mask: MaskProof) -> bool:
    """Whether the model calls PyTorch's operator on a CPU with a mask in whose place its causal flag could stand.

    The operator leaves out then what is hidden from a whole block of queries, and computes everything else as with a
    boolean mask. A mask that is added may hide a little less than all.
    """
    return (
        site.node.target is aten.scaled_dot_product_attention.default
        and site.query.meta["val"].device.type == "cpu"
        and site.mask is not None
        and not mask.additive
        and same_size(site.query_length, site.key_length)
    )
