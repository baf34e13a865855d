"""Choose who computes what: the kernels of the ops, and the library of a prompt's attention."""

from __future__ import annotations

from dataclasses import dataclass

from adakv_compile.kernels import Kernels, Subject, why_unsupported
from adakv_compile.kernels.prefill_attention import BACKENDS, Request, best_backend
from adakv_compile.options import Options
from adakv_compile.passes.attention import AttentionSite
from adakv_compile.passes.nodes import same_size, static_int

__all__ = ["Implementation", "choose_attention", "choose_kernels"]


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
    options: Options, site: AttentionSite, sliding_window: int | None, needs_mask: str | None
) -> Implementation:
    """Return the backend of a prompt's attention, whose mask is proved causal.

    Args:
        options: The user's.
        site: The attention.
        sliding_window: Keys a query sees, its own included.
        needs_mask: Why the causal rule is not all that the model's mask says, None if it is.
    """
    asked = options.attention
    if asked == "model":
        return Implementation("model", "model")
    if needs_mask is not None:
        why = needs_mask
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
                best = best_backend(request)
                return Implementation(best, best)
            why = BACKENDS[asked].why_not(request)
            if why is None:
                return Implementation(asked, asked)
    unmet = None if asked == "auto" else f"option 'attention' is {asked!r}: {why}"
    return Implementation("model", f"model ({why})", unmet)
