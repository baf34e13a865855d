"""What others offer for attention over heads of different lengths: one sequence per KV head."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Attention
from benchmarks.gpu.timing import Contender

__all__ = ["ragged_rivals"]


@dataclass(frozen=True)
class _Ragged:
    """A flat cache in which every KV head of every row is a sequence."""

    keys: Tensor
    values: Tensor
    starts: Tensor
    longest: int


def ragged_rivals(run: Run, attention: Attention, lengths: list[list[int]], copies: int) -> dict[str, Contender | str]:
    """Return the rivals on caches of these lengths, or why one is absent.

    The query group is given once as the heads of one query, which lets a kernel split long sequences, and once as rows
    of one head.
    """
    flat = torch.tensor([length for row in lengths for length in row])
    starts = torch.zeros(len(flat) + 1, dtype=torch.int32)
    starts[1:] = flat.cumsum(0)
    total = int(flat.sum())
    shape = (copies, total, 1, attention.dim)
    keys, values = (torch.randn(shape, dtype=run.dtype, device=run.device) for _ in range(2))
    cache = _Ragged(keys, values, starts.to(run.device), int(flat.max()))
    group = attention.query_heads // attention.kv_heads
    queries = torch.randn(len(flat), group, attention.dim, dtype=run.dtype, device=run.device)
    rivals: dict[str, Contender | str] = {}
    for name, module, function, bind in (
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", _varlen),
        ("flash-attn", "flash_attn", "flash_attn_varlen_func", _flash_attn),
    ):
        try:
            attend = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            rivals[f"{name} heads"] = rivals[f"{name} rows"] = f"{type(error).__name__}: {error}"[:200]
            continue
        rivals[f"{name} heads"] = Contender(bind(attend, queries, 1, cache, copies))
        rivals[f"{name} rows"] = Contender(bind(attend, queries.view(-1, 1, attention.dim), group, cache, copies))
    return rivals


def _query_starts(cache: _Ragged, rows: int) -> Tensor:
    return torch.arange(cache.starts.shape[0], dtype=torch.int32, device=cache.starts.device) * rows


def _varlen(
    attend: Callable[..., Any], queries: Tensor, rows: int, cache: _Ragged, copies: int
) -> list[Callable[[], object]]:
    # PyTorch 2.11 takes fewer heads of keys than of queries without being told.
    known = inspect.signature(attend).parameters
    options = {"enable_gqa": True} if "enable_gqa" in known and queries.shape[1] > 1 else {}
    starts = _query_starts(cache, rows)
    return [
        functools.partial(
            attend, queries, cache.keys[i], cache.values[i], starts, cache.starts, rows, cache.longest, **options
        )
        for i in range(copies)
    ]


def _flash_attn(
    attend: Callable[..., Any], queries: Tensor, rows: int, cache: _Ragged, copies: int
) -> list[Callable[[], object]]:
    starts = _query_starts(cache, rows)
    return [
        functools.partial(attend, queries, cache.keys[i], cache.values[i], starts, cache.starts, rows, cache.longest)
        for i in range(copies)
    ]
