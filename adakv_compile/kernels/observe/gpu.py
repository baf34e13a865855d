"""Scores of the observation window in Triton."""

from __future__ import annotations

import math
from typing import Final

import torch
import triton

from adakv_compile.kernels._launch import factors_of, launch
from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels._support import Target, target_of
from adakv_compile.kernels.observe.reference import check_observation
from adakv_compile.kernels.observe.triton import observe_combine, observe_lse, observe_scores
from adakv_compile.kernels.observe.tuning import COMBINE, Config, config_of, lse_constants, score_constants, split
from adakv_compile.policy import Policy

__all__ = ["observe", "observe_with"]

_LOG2_E: Final = math.log2(math.e)


def observe(
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
    """Return the raw scores of every entry; see :mod:`adakv_compile.kernels.observe.op`."""
    check_observation(query, key, mask, padding, lse, sinks, softcap)
    target = target_of(key.device)
    config = config_of(target, key.element_size(), key.shape[3], masked=mask is not None)
    softmax = Softmax(scale, softcap, sinks)
    return observe_with(config, target, query, key, mask, padding, lse, softmax, sliding_window, Policy.decode(policy))


def observe_with(
    config: Config,
    target: Target,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    lse: torch.Tensor | None,
    softmax: Softmax,
    sliding_window: int | None,
    rules: Policy,
) -> torch.Tensor:
    """Observe with blocks of the caller's choice; the arguments are those of :func:`observe`, checked."""
    batch, num_heads, length, head_dim = key.shape
    # Window row ``r`` sits at key ``length - window + r``; queries before the first key see nothing that is held.
    window = min(rules.window, query.shape[2], length)
    if rules.method == "streamingllm" or window == 0:
        return query.new_zeros((batch, num_heads, length), dtype=torch.float32)
    scores = torch.empty((batch, num_heads, length), dtype=torch.float32, device=key.device)
    if scores.numel() == 0:
        return scores
    group = query.shape[1] // num_heads
    pairs = batch * num_heads
    query = query[:, :, query.shape[2] - window :]
    marks = None if padding is None else padding.expand(batch, length).view(torch.uint8)
    mark_strides = (0, 0) if marks is None else marks.stride()
    # A mask stands for all rules.
    reach = length if sliding_window is None or mask is not None else max(0, min(sliding_window, length))
    kind, mask_strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        rows, columns = mask.shape[2:]
        mask = mask[:, :, max(0, rows - window) :, columns - length :].expand(*query.shape[:2], window, length)
        mask_strides = mask.stride()
    factors = factors_of(softmax.scale, softmax.softcap)
    to_base_2 = _LOG2_E
    if lse is None:
        blocks, constants = lse_constants(config, group, window, head_dim)
        splits, tiles = split(target, blocks, pairs, length)
        row_blocks = triton.cdiv(group, constants["ROWS"] // constants["SPAN"]) * triton.cdiv(window, constants["SPAN"])
        partials = torch.empty((splits, batch, group * num_heads, window), dtype=torch.float32, device=key.device)
        launch(
            observe_lse,
            (row_blocks * splits * pairs,),
            query,
            key,
            mask,
            marks,
            partials,
            *query.stride(),
            *key.stride(),
            *mask_strides,
            *mark_strides,
            length,
            window,
            num_heads,
            pairs,
            row_blocks,
            splits,
            tiles,
            reach,
            *factors,
            device=key.device,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            MASK=kind,
            **constants,
        )
        lse = partials[0]
        if splits > 1:
            lse = torch.empty_like(lse)
            rows = lse.numel()
            grid = (triton.cdiv(rows, COMBINE["ROWS"]),)
            launch(observe_combine, grid, partials, lse, splits, rows, device=key.device, **COMBINE)
        to_base_2 = 1.0
    else:
        lse = lse[:, :, lse.shape[2] - window :]
    if softmax.sinks is not None:
        sinks = softmax.sinks.float()[:, None]
        in_base_2 = to_base_2 == 1.0
        lse = torch.logaddexp2(lse, sinks * _LOG2_E) if in_base_2 else torch.logaddexp(lse, sinks)
    blocks, constants = score_constants(config, group, window, head_dim)
    splits, tiles = split(target, blocks, pairs, length)
    launch(
        observe_scores,
        (splits * pairs,),
        query,
        key,
        mask,
        marks,
        lse,
        scores,
        *query.stride(),
        *key.stride(),
        *mask_strides,
        *mark_strides,
        *lse.stride(),
        length,
        window,
        num_heads,
        splits,
        tiles,
        reach,
        *factors,
        to_base_2,
        device=key.device,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        MASK=kind,
        LARGEST=rules.gqa == "max",
        **constants,
    )
    return scores
