"""How products of queries and keys become weights: scale, soft cap, and sinks in the denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Softmax"]


@dataclass(frozen=True, slots=True)
class Softmax:
    """The softmax of one attention call.

    With ``l_j`` the logits of what a query sees, its weights are ``exp(l_j) / (exp(sink) + sum_j exp(l_j))``.

    Attributes:
        scale: Factor on the products.
        softcap: Logits are ``softcap * tanh(scale * product / softcap)`` (Gemma 2, section 2), to which a float mask
            is added. None: they are not capped.
        sinks: Floating ``[Hq]``, a logit of each query head without a key and a value, neither scaled nor capped nor
            masked (GPT-OSS). ``-inf`` is none. None: there are none.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Cap scaled products in place, if there is a cap, and return them."""
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def sinks_of_rows(self, num_heads: int, rows: int, like: torch.Tensor) -> torch.Tensor | None:
        """Repeat the sinks for the rows of every KV head.

        Args:
            num_heads: KV heads, ``H``.
            rows: Queries of each query head.
            like: ``[B * H, G * rows]``, heads of the group outermost.

        Returns:
            The same shape and dtype as ``like``; None if there are no sinks.
        """
        if self.sinks is None:
            return None
        sinks = self.sinks.to(like.dtype).view(1, num_heads, -1, 1)
        return sinks.expand(like.shape[0] // num_heads, -1, -1, rows).reshape(like.shape)
