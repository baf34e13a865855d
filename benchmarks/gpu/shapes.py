"""The shapes that are timed: Llama-3.1-8B's attention, and what smoke mode has in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LLAMA", "SMOKE", "Attention", "Budget", "head_lengths", "shapes"]


@dataclass(frozen=True)
class Attention:
    """One attention layer, and the layers of the model that it is from.

    Attributes:
        query_heads: ``Hq``.
        kv_heads: ``Hkv``.
        dim: Of keys and values.
        layers: Of the model.
        contexts: Prompt lengths, the most telling first.
    """

    query_heads: int
    kv_heads: int
    dim: int
    layers: int
    contexts: tuple[int, ...]

    def entry_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one entry of one KV head, key and value."""
        return 2 * self.dim * dtype.itemsize


LLAMA = Attention(32, 8, 128, 32, (131_072, 32_768, 8_192))
SMOKE = Attention(4, 2, 16, 1, (64,))


def shapes(smoke: bool) -> Attention:
    """Return what to time."""
    return SMOKE if smoke else LLAMA


@dataclass(frozen=True)
class Budget:
    """Entries that a KV head keeps on average: a number, or a share of the context.

    Attributes:
        value: As the option ``budget`` of the backend takes it.
    """

    value: int | float

    def __str__(self) -> str:
        return f"{self.value:.0%}" if isinstance(self.value, float) else str(self.value)

    def entries(self, context: int) -> int:
        """Return the mean of the heads' lengths."""
        return int(context * self.value) if isinstance(self.value, float) else min(self.value, context)


def head_lengths(mean: int, heads: int, skew: int) -> list[int]:
    """Return lengths that sum to ``mean * heads`` and of which the longest is ``skew * mean``.

    The others share the rest evenly: of all ways to have this ratio, the one that leaves most to a single head. With a
    ``skew`` of ``heads`` they are empty.

    Raises:
        ValueError: No lengths have this ratio.
    """
    if not 1 <= skew <= heads:
        raise ValueError(f"head_lengths: the longest of {heads} heads has 1 to {heads} times the mean, not {skew}")
    rest, others = (heads - skew) * mean, heads - 1
    each = [rest // others + (index < rest % others) for index in range(others)] if others else []
    return [skew * mean, *each]
