"""``adakv::observe_v3``: how much the observation window attends to every entry.

| argument         | shape, dtype             | meaning                                                      |
|------------------|--------------------------|--------------------------------------------------------------|
| `query`          | `[B, Hq, T, Dk]` model   | the call's queries; the last `min(window, T)` are used       |
| `key`            | `[B, Hkv, L, Dk]` model  | entries that can be kept; query `t` sits at key `L - T + t`  |
| `mask`           | `[B or 1, 1 or Hq, T or 1, M]`, or None | bool, True for what is seen, or float to be added |
| `padding`        | `[B or 1, L]` bool, or None | True for real tokens                                      |
| `lse`            | `[B, Hq, T]` float32, or None | log-sum-exp of each query's logits over the keys it sees |
| `sinks`          | `[Hq]` floating, or None | a logit of each query head, as in `decode_attention_v2`      |
| `scale`          | float                    | factor on the products of queries and keys                   |
| `sliding_window` | int or None              | a query sees its own and the `sliding_window - 1` keys before |
| `softcap`        | float above 0, or None   | logits are `softcap * tanh(scale * product / softcap)`       |
| `policy`         | str                      | `Policy.encode()`                                            |
| result           | `[B, Hkv, L]` float32    | contiguous, raw (not pooled), newly allocated                |

Softmax over the visible keys, mean over the window, mean or max over the query group (Ada-KV, Algorithm 2, lines 1-3).
Scores are those of the attention itself: a sliding-window layer passes all keys that its queries saw, and cuts the
scores to what its cache keeps. Queries that lie before the first key (`L < T`) or are padding are not counted.
A mask replaces the causal and the sliding rule; padding comes on top. Its last column belongs to the last key, its
last row to the last query, and `M` is `L` or more. A float mask is added to the capped logits; what is below
`policy.HIDDEN_LOGIT`, as the lowest float is, hides a key like `-inf`, so that a query that sees no others scores
nothing, though models let it attend to all alike. A sink is one more term of its head's softmax, so that scores sum to
less. What the attention itself returns for free may be given as `lse`, if its queries saw exactly these keys, sinks
left out: the op adds them. It saves a pass over the keys and changes nothing else. `"streamingllm"` needs no scores and
gets zeros; so does on the CPU a row that is kept whole whatever its scores are (`policy.keeps_all`). Cost:
`Hq * min(window, T) * L * Dk` products, each key read once (twice without `lse`).
"""

from __future__ import annotations

import torch

from adakv_compile.kernels._registration import OpSpec, register
from adakv_compile.kernels._support import Subject
from adakv_compile.kernels.observe.cpu import observe_cpu
from adakv_compile.kernels.observe.reference import observe

__all__ = ["SPEC"]


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    policy: str,
) -> torch.Tensor:
    return key.new_empty(key.shape[:3], dtype=torch.float32)


def _subject(query: torch.Tensor, key: torch.Tensor, *_: object) -> Subject:
    return Subject(key.device, key.dtype, (key.shape[3],))


SPEC = OpSpec(
    schema=(
        "observe_v3(Tensor query, Tensor key, Tensor? mask, Tensor? padding, Tensor? lse, Tensor? sinks, float scale,"
        " int? sliding_window, float? softcap, str policy) -> Tensor scores"
    ),
    portable=observe,
    fake=_fake,
    triton="adakv_compile.kernels.observe.gpu:observe",
    subject=_subject,
    cpu=observe_cpu,
)
register(SPEC)
