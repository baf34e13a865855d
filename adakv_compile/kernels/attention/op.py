"""``adakv::attention_v1``: what an attention means that a model writes out, before anything is compressed.

| argument    | shape, dtype                   | meaning                                                             |
|-------------|--------------------------------|---------------------------------------------------------------------|
| `query`     | `[B, Hq, T, Dk]` model         | any strides                                                         |
| `key`       | `[B, Hkv, L, Dk]` model        | KV head `h` serves query heads `h * G` to `h * G + G - 1`           |
| `value`     | `[B, Hkv, L, Dv]` model        |                                                                     |
| `mask`      | `[B or 1, 1 or Hq, T or 1, L]` | bool, or float to be added to the (capped) logits, or None          |
| `sinks`     | `[Hq]` float, or None          | one more logit per head, without a value: it only takes weight away |
| `is_causal` | bool                           | aligned at the first query and the first key                        |
| `scale`     | float                          | factor on the logits                                                |
| `softcap`   | float or None                  | logits become `softcap * tanh(logits / softcap)`                    |
| result      | `[B, Hq, T, Dv]` model         | contiguous, newly allocated; zeros for a query that sees nothing    |

The analyses read it, and the rewrite replaces it or puts back what the model wrote; it runs in no graph that users get.
Soft caps are Gemma 2's (arXiv 2408.00118), sinks those of GPT-OSS.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels.attention.reference import attention

__all__ = ["SPEC"]


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


SPEC = OpSpec(
    schema=(
        "attention_v1(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, bool is_causal,"
        " float scale, float? softcap) -> Tensor"
    ),
    portable=attention,
    fake=_fake,
)
register(SPEC)
