"""``adakv::padded_attention_v1``: causal attention of a whole prompt whose tokens may be padding.

| argument  | shape, dtype            | meaning                                                       |
|-----------|-------------------------|---------------------------------------------------------------|
| `query`   | `[B, Hq, T, Dk]` model  | any strides                                                   |
| `key`     | `[B, H, T, Dk]` model   | any strides; `H` is `Hq`, or divides it                       |
| `value`   | `[B, H, T, Dv]` model   | any strides                                                   |
| `padding` | `[B or 1, T]` bool      | True for real tokens                                          |
| `scale`   | float                   | factor on the logits                                          |
| result    | `[B, Hq, T, Dv]` model  | newly allocated; in memory `[B, T, Hq, Dv]`                   |

PyTorch's `scaled_dot_product_attention` with the boolean mask `causal & padding`. A graph can't know whether the tokens
of a call are padded, so it always makes that mask, `T * T` numbers, and always reads it. On a CPU it costs nothing to
look: where all tokens are real the mask is not made, and the operator's causal flag says the same, to the last bit, at
half of the products.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels.padded_attention.reference import padded_attention, padded_attention_cpu

__all__ = ["SPEC"]


def _fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor, scale: float
) -> torch.Tensor:
    batch, heads, length = query.shape[:3]
    return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)


SPEC = OpSpec(
    schema="padded_attention_v1(Tensor query, Tensor key, Tensor value, Tensor padding, float scale) -> Tensor out",
    portable=padded_attention,
    fake=_fake,
    cpu=padded_attention_cpu,
)
register(SPEC)
