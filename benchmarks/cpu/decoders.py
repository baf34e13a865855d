"""The decoders that are timed, all of random weights, compiled in one way or another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adakv_compile.backend import adakv

__all__ = ["LARGE", "SMALL", "TINY", "Shape", "build", "compiled", "many_layers"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        layers: Decoder layers.
        query_heads: ``Hq``.
        kv_heads: ``Hkv``.
        dim: Of a head.
        intermediate: Of the feed-forward part.
        vocabulary: Tokens, the embedding tied to the output.
    """

    layers: int
    query_heads: int
    kv_heads: int
    dim: int
    intermediate: int
    vocabulary: int

    def kv_bytes(self, entries: float) -> int:
        """Return the float32 bytes of keys and values of all layers with ``entries`` in each KV head."""
        return int(2 * 4 * self.layers * self.kv_heads * self.dim * entries)


SMALL = Shape(12, 12, 4, 64, 2048, 16_000)
"""88M parameters."""
LARGE = Shape(4, 32, 8, 64, 8192, 16_000)
"""Four of the sixteen layers of a Llama of 1B parameters, and a smaller vocabulary: 276M, 1.1 GB in float32."""
TINY = Shape(2, 4, 2, 16, 64, 128)


def many_layers(layers: int) -> Shape:
    """Return a decoder of little width: its time is that of Python and guards."""
    return replace(TINY, layers=layers)


def build(shape: Shape) -> LlamaForCausalLM:
    """Return a decoder in float32, the same weights every time."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.query_heads * shape.dim,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=1 << 18,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def compiled(model: Any, backend: str, **options: Any) -> Callable[..., Any]:
    """Compile a decoder in place, for prompts and caches of any length.

    Args:
        model: The decoder.
        backend: ``"adakv"``, or another one's name, which takes no options.
        options: Of this backend; a refusal is an error.
    """
    if backend == "adakv":
        model.compile(backend=adakv, options={"strict": True, **options}, dynamic=True)
    else:
        model.compile(backend=backend, dynamic=True)
    return model
