"""What the attention of a decoder computes on a text when nothing is evicted, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DenseLayer", "attend"]


@dataclass(frozen=True, eq=False, slots=True)
class DenseLayer:
    """The attention of one layer on one text, in float64.

    Attributes:
        weights: ``[Hq, T, L]``, what the last ``T`` queries of the text give to each of its ``L`` entries.
        values: ``[Hkv, L, D]``.
        output: ``[Hq, D, hidden]``, the part of the output projection that belongs to each query head (``W_i^O``).
    """

    weights: Tensor
    values: Tensor
    output: Tensor


@torch.no_grad()
def attend(network: Any, ids: Sequence[int], queries: int) -> list[DenseLayer]:
    """Run a decoder of the Llama type on a text and return what its layers attend to.

    Args:
        network: The decoder; its attention must be ``"eager"``, which alone hands out weights.
        ids: The text.
        queries: How many of the last queries are wanted.

    Raises:
        ValueError: The attention is not ``"eager"``.
    """
    if network.config._attn_implementation != "eager":
        raise ValueError("the weights are needed: call set_attn_implementation('eager') first")
    out = network(torch.tensor([ids]), use_cache=True, output_attentions=True, logits_to_keep=1)
    layers: list[DenseLayer] = []
    for layer, weights, cached in zip(network.model.layers, out.attentions, out.past_key_values.layers, strict=True):
        matrix = layer.self_attn.o_proj.weight
        heads = weights.shape[1]
        exact = weights[0, :, -queries:].double()
        layers.append(
            DenseLayer(
                # The model's float32 weights add up to 1 only nearly, and the bound is a difference of such sums.
                weights=exact / exact.sum(-1, keepdim=True),
                values=cached.values[0].double(),
                output=matrix.view(matrix.shape[0], heads, -1).permute(1, 2, 0).double(),
            )
        )
    return layers
