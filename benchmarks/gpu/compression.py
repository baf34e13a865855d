"""The three ops that compress one layer behind a prefill: scores, selection, compaction; each beside floor and rivals.

Selection is timed at ``8 * 131,072`` scores, about a million, against ``torch.topk`` on the flattened scores; scores
against the portable op and plain eager attention weights; compaction against ``index_select`` of keys and values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adakv_compile.policy import Policy
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Attention, Budget, shapes
from benchmarks.gpu.timing import Contender, compare, copies_for, copy_bandwidth, launches

__all__ = ["run"]

BUDGETS = (Budget(0.1), Budget(0.2), Budget(1024))
WINDOW = 32


def run(run: Run) -> None:
    """Write one row for every op, context and budget."""
    attention = shapes(run.smoke)
    bandwidth = copy_bandwidth(run)
    budgets = (Budget(0.5),) if run.smoke else BUDGETS
    for context in attention.contexts:
        what = f"scores of {context} keys"
        if run.has_time(what, 4):
            with run.attempt(what):
                _scores(run, attention, context, bandwidth)
        for budget in budgets:
            what = f"selection and compaction, {budget} of {context}"
            if run.has_time(what, 4):
                with run.attempt(what):
                    _select_and_compact(run, attention, context, budget, bandwidth)


def _policy(run: Run, budget: Budget) -> Policy:
    return Policy(budget=budget.value, window=8 if run.smoke else WINDOW)


def _measure(
    run: Run,
    op: str,
    contenders: dict[str, Contender],
    size: int,
    bandwidth: float,
    **case: Any,
) -> None:
    """Time an op and its rivals, and write the row.

    Args:
        run: The part.
        op: Name in the results.
        contenders: ``"adakv"`` and the rivals.
        size: Bytes that must move.
        bandwidth: Of a copy, GB/s.
        **case: What tells this row from the others.
    """
    times = compare(run, contenders)
    row: dict[str, Any] = {"op": op, **case, "bytes": size, "floor_us": size / bandwidth / 1e3, "times": times}
    if "us" in times["adakv"]:
        row["gb_per_s"] = size / times["adakv"]["us"] / 1e3
        row["launches"] = launches(run, contenders["adakv"].calls[0])
    run.write("case", **row)


def _each(call: Callable[..., object], *lists: Sequence[Tensor], rest: tuple[Any, ...] = ()) -> Contender:
    """Return calls on the first, second, ... tensors of the lists."""
    return Contender([functools.partial(call, *tensors, *rest) for tensors in zip(*lists, strict=True)])


def _random(run: Run, copies: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=run.dtype, device=run.device) for _ in range(copies)]


def _scores(run: Run, attention: Attention, context: int, bandwidth: float) -> None:
    heads, dim = attention.kv_heads, attention.dim
    policy = _policy(run, Budget(0.5))
    size = heads * context * (dim * run.dtype.itemsize + 4)
    copies = copies_for(run, size)
    queries = _random(run, copies, 1, attention.query_heads, policy.window, dim)
    keys = _random(run, copies, 1, heads, context, dim)
    # Of normal numbers; what exactly it is does not matter for the time.
    lse = torch.full(queries[0].shape[:3], math.log(context) + 0.5, device=run.device)
    op, portable = run.op("observe_v3"), torch.ops.adakv.observe_v3.portable
    rest = (None, dim**-0.5, None, None, policy.encode())
    contenders = {
        "adakv": _each(op, queries, keys, rest=(None, None, None, *rest)),
        "adakv, sums given": _each(op, queries, keys, rest=(None, None, lse, *rest)),
        "portable": _each(portable, queries, keys, rest=(None, None, None, *rest)),
        "eager": _each(_eager_scores, queries, keys),
    }
    _measure(run, "observe", contenders, size, bandwidth, context=context)


def _eager_scores(query: Tensor, key: Tensor) -> Tensor:
    """Return what the reference code of Ada-KV computes, line by line."""
    group = query.shape[1] // key.shape[1]
    window, length = query.shape[2], key.shape[2]
    logits = query @ key.repeat_interleave(group, 1).mT * query.shape[3] ** -0.5
    visible = torch.ones(window, window, dtype=torch.bool, device=key.device).tril()
    logits[..., length - window :].masked_fill_(~visible, -torch.inf)
    weights = torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype)
    return weights.mean(2).unflatten(1, (-1, group)).mean(2)


def _select_and_compact(run: Run, attention: Attention, context: int, budget: Budget, bandwidth: float) -> None:
    heads, dim = attention.kv_heads, attention.dim
    policy = _policy(run, budget)
    kept = heads * budget.entries(context)
    size = 4 * (heads * context + kept)
    # As a softmax gives them: positive and of very different magnitude.
    scores = [
        torch.randn(1, heads, context, device=run.device).mul(3).softmax(-1) for _ in range(copies_for(run, size))
    ]
    flat = [part.flatten() for part in scores]
    select = run.op("select_v1")
    contenders = {
        "adakv": _each(select, scores, rest=(None, None, policy.encode())),
        "topk, unsorted": _each(lambda part: torch.topk(part, kept, sorted=False), flat),
        "topk": _each(lambda part: torch.topk(part, kept), flat),
    }
    case = {"context": context, "budget": str(budget), "entries": kept // heads}
    _measure(run, "select", contenders, size, bandwidth, scores=heads * context, **case)

    positions, offsets = select(scores[0], None, None, policy.encode())
    size = 2 * kept * attention.entry_bytes(run.dtype)
    copies = copies_for(run, size)
    if not run.has_memory(
        f"compaction, {budget} of {context}", copies * heads * context * attention.entry_bytes(run.dtype)
    ):
        return
    keys, values = (_random(run, copies, 1, heads, context, dim) for _ in range(2))
    head = torch.searchsorted(
        offsets[0, 1:].contiguous(), torch.arange(kept, dtype=torch.int32, device=run.device), right=True
    )
    index = head * context + positions[0]

    def gather(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key.view(-1, dim).index_select(0, index), value.view(-1, dim).index_select(0, index)

    contenders = {
        "adakv": _each(run.op("compact_v1"), keys, values, rest=(positions, offsets)),
        "index_select": _each(gather, keys, values),
    }
    _measure(run, "compact", contenders, size, bandwidth, **case)
