"""``adakv::observe_v1``: how much the observation window attends to every entry.

| argument         | shape, dtype             | meaning                                                      |
|------------------|--------------------------|--------------------------------------------------------------|
| `query`          | `[B, Hq, T, Dk]` model   | the call's queries; the last `min(window, T)` are used       |
| `key`            | `[B, Hkv, L, Dk]` model  | entries that can be kept; query `t` sits at key `L - T + t`  |
| `padding`        | `[B or 1, L]` bool, or None | True for real tokens                                      |
| `scale`          | float                    | factor on the logits                                         |
| `sliding_window` | int or None              | a query sees its own and the `sliding_window - 1` keys before |
| `policy`         | str                      | `Policy.encode()`                                            |
| result           | `[B, Hkv, L]` float32    | contiguous, raw (not pooled), newly allocated                |

Softmax over the visible keys, mean over the window, mean or max over the query group (Ada-KV, Algorithm 2, lines 1-3).
A sliding-window layer passes the slice of keys that its cache keeps: scores are normalised over what can be kept, and
queries that lie before the slice (`L < T`) are not counted. Queries that are padding are not counted either.
`"streamingllm"` needs no scores and gets zeros. Cost: `Hq * min(window, T) * L * Dk` products, each key read once.
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels.observe.reference import observe

__all__ = ["SPEC"]


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    padding: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    policy: str,
) -> torch.Tensor:
    return key.new_empty(key.shape[:3], dtype=torch.float32)


SPEC = OpSpec(
    schema=(
        "observe_v1(Tensor query, Tensor key, Tensor? padding, float scale, int? sliding_window, str policy)"
        " -> Tensor scores"
    ),
    portable=observe,
    fake=_fake,
)
register(SPEC)
