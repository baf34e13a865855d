"""``adakv::prefill_attention_v1``: causal attention of a whole prompt, by a library that the graph can't name itself.

| argument         | shape, dtype            | meaning                                                        |
|------------------|-------------------------|----------------------------------------------------------------|
| `query`          | `[B, Hq, T, Dk]` model  | any strides                                                    |
| `key`            | `[B, Hkv, T, Dk]` model | any strides, not repeated for the query group                  |
| `value`          | `[B, Hkv, T, Dv]` model | any strides                                                    |
| `scale`          | float                   | factor on the logits                                           |
| `sliding_window` | int or None             | keys a query sees, its own included                            |
| `backend`        | str                     | a name in `BACKENDS` that runs outside of the graph           |
| result 0         | `[B, Hq, T, Dv]` model  | newly allocated; in memory `[B, T, Hq, Dv]`                    |
| result 1         | `[B, Hq, T or 0]` float32 | log-sum-exp of the scaled logits, if the backend gives it for free |

The attention of a prompt is never ours: no kernel written here would beat the libraries that exist for it. This op is
the call of one of them, and the place where its sums are passed on to `observe`.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels.prefill_attention.backends import BACKENDS, prefill_attention

__all__ = ["SPEC"]


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length = query.shape[:3]
    out = query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    columns = length if BACKENDS[backend].gives_lse else 0
    return out, query.new_empty((batch, heads, columns), dtype=torch.float32)


SPEC = OpSpec(
    schema=(
        "prefill_attention_v1(Tensor query, Tensor key, Tensor value, float scale, int? sliding_window, str backend)"
        " -> (Tensor out, Tensor lse)"
    ),
    portable=prefill_attention,
    fake=_fake,
)
register(SPEC)
