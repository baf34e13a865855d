"""The attention that a model really computes, caught while it computes it: read, or with entries hidden from it.

Nothing here knows the package. The uncompressed model runs in eager mode; attention is found where every spelling of it
has to pass: PyTorch's operator, or a softmax over as many numbers as there are keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Interception"]


class Interception(TorchFunctionMode):
    """While it is active, every attention is read and can be kept from seeing entries.

    Args:
        batch: Number of rows.
        new: Number of queries of a call.
        lengths: Numbers of keys by which an attention is recognised; one more is recognised, too, as the logit of an
            attention sink behind the others.
        kept: For each attention in the order of the calls, ``[B, Hkv, n]`` booleans over the last ``n`` tokens, True
            for those that stay visible, or None where all do. None: nothing is changed.
        read: Whether to fill :attr:`weights`.

    Attributes:
        weights: ``[B, Hq, T, L]`` float64 of every attention so far: true weights, without the column of a sink.
        count: Number of attentions so far.
    """

    def __init__(
        self,
        batch: int,
        new: int,
        lengths: Collection[int],
        *,
        kept: Sequence[Tensor | None] | None = None,
        read: bool = False,
    ) -> None:
        super().__init__()
        self.batch, self.new, self.lengths = batch, new, lengths
        self.kept, self.read = kept, read
        self.weights: list[Tensor] = []
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``; an attention is read, or computed here under the entries that stay visible."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._operator(func, args, kwargs)
        if name == "multi_head_attention_forward":
            return self._module(func, args, kwargs)
        if name == "softmax":
            logits: Tensor = args[0]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, logits.dim() - 1) and self._is_attention(logits):
                return self._softmax(lambda rows: func(rows, *args[1:], **kwargs), logits)
            if dim in (-2, logits.dim() - 2) and self._is_attention(logits.mT):
                # Keys by queries.
                return self._softmax(lambda rows: func(rows.mT, *args[1:], **kwargs).mT, logits.mT).mT
        summed: Tensor | None = args[0] if name == "logsumexp" and args else None
        if summed is not None and self._is_attention(summed):
            # A gate that stands for sinks is computed from the same logits, before their softmax.
            return func(self._hidden(summed), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _hidden(self, logits: Tensor) -> Tensor:
        """Return ``[..., T, L]`` without what is hidden of the next attention."""
        by_head = logits.reshape(self.batch, -1, *logits.shape[-2:])
        keep = self._visible(by_head)
        return logits if keep is None else by_head.masked_fill(~keep, -torch.inf).view_as(logits)

    def _operator(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given["key"].shape[-2] not in self.lengths:
            return func(*args, **kwargs)
        value = given["value"].double()
        logits = _logits(**given)
        keep = self._visible(logits)
        self.count += 1
        if keep is not None:
            logits = logits.masked_fill(~keep, -torch.inf)
        # A query that sees nothing gets nothing, as from the operator.
        weights = logits.softmax(-1).nan_to_num(0.0)
        if self.read:
            self.weights.append(weights)
        if keep is None:
            return func(*args, **kwargs)
        return (weights @ _per_query_head(value, weights.shape[1])).to(given["query"].dtype)

    def _module(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read the weights that PyTorch's attention module gives away; it has no cache to hide entries of."""
        out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        if weights.shape[-1] in self.lengths:
            self.count += 1
            if self.read:
                self.weights.append(weights.double())
        if not kwargs.get("need_weights", True):
            return out, None
        return out, weights.mean(-3) if kwargs.get("average_attn_weights", True) else weights

    def _is_attention(self, logits: Tensor) -> bool:
        if logits.dim() < 3 or logits.shape[-2] != self.new:
            return False
        return logits.shape[-1] in self.lengths or logits.shape[-1] - 1 in self.lengths

    def _softmax(self, softmax: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        """Take the softmax over the last dimension of ``logits [..., T, L]``, of what stays visible."""
        has_sink = logits.shape[-1] not in self.lengths
        # [B * H, T, L], [B, H, T, L] and [B, Hkv, G, T, L] are the same numbers in the same order.
        by_head = logits.reshape(self.batch, -1, *logits.shape[-2:])
        keep = self._visible(by_head[..., :-1] if has_sink else by_head)
        self.count += 1
        if keep is not None:
            keep = F.pad(keep, (0, 1), value=True) if has_sink else keep
            logits = by_head.masked_fill(~keep, -torch.inf).view_as(logits)
        weights = softmax(logits)
        if self.read:
            real = weights.reshape(by_head.shape).double()
            self.weights.append(real[..., :-1] if has_sink else real)
        return weights

    def _visible(self, logits: Tensor) -> Tensor | None:
        """Return ``[B, Hq, 1, L]``: which keys of this attention stay visible, None for all of them."""
        keep = None if self.kept is None or self.count >= len(self.kept) else self.kept[self.count]
        if keep is None:
            return None
        heads, length = logits.shape[1], logits.shape[-1]
        # A sliding cache has dropped its oldest entries; a preallocated one has room at its end, hidden by its mask.
        keep = keep[..., -length:] if keep.shape[-1] > length else F.pad(keep, (0, length - keep.shape[-1]), value=True)
        return keep.repeat_interleave(heads // keep.shape[1], dim=1)[:, :, None]


def _logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Return what PyTorch's operator hands to softmax, ``[B, Hq, T, L]`` float64."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query.double() @ _per_query_head(key.double(), query.shape[1]).transpose(-1, -2) * factor
    if is_causal:
        rows, columns = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(rows, columns, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is None:
        return logits
    return logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask


def _per_query_head(entries: Tensor, heads: int) -> Tensor:
    return entries.repeat_interleave(heads // entries.shape[1], dim=1)
