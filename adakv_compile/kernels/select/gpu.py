"""Launches the selection: ten kernels for an adaptive policy, seven for a uniform one, none of which waits."""

from __future__ import annotations

import torch

from adakv_compile.kernels._checks import check_shape
from adakv_compile.kernels._launch import launch
from adakv_compile.kernels._support import target_of
from adakv_compile.kernels.select.reference import capacity, pack
from adakv_compile.kernels.select.triton import SLOT, rank_keys, refine
from adakv_compile.kernels.select.triton_share import allocate, emit
from adakv_compile.kernels.select.tuning import MAX_HEADS, tuning_of
from adakv_compile.policy import Policy, layer_budget
from adakv_compile.policy import select as select_entries

__all__ = ["choose", "select"]

# Second axis of a CUDA grid.
_MAX_GRID = 65535
# Of a row: they are counted with 32 bits.
_MAX_SCORES = 2**30


def select(
    scores: torch.Tensor, padding: torch.Tensor | None, sliding_window: int | None, policy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and offsets of what is kept; see :mod:`adakv_compile.kernels.select.op`."""
    check_shape("select", "scores", scores, (None, None, None))
    batch, num_heads, length = scores.shape
    rules = Policy.decode(policy)
    first_live = 0 if sliding_window is None else max(0, length - sliding_window + 1)
    slots = capacity(rules, num_heads, length, sliding_window, padding is not None)
    if padding is None:
        return choose(
            rules,
            scores,
            slots,
            valid=None,
            first_live=first_live,
            protected_from=length - rules.window,
            total=num_heads * layer_budget(rules, length - first_live),
        )
    if padding.dtype != torch.bool:
        raise ValueError(f"select: padding is {padding.dtype}; expected torch.bool")
    check_shape("select", "padding", padding, (None if padding.shape[0] == 1 else batch, length))
    rank = padding[:, first_live:].cumsum(-1)
    num_tokens = padding[:, first_live:].sum(-1)
    # Behind it are the last `window` tokens.
    protected_from = first_live + (num_tokens[:, None] - rank >= rules.window).sum(-1)
    return choose(
        rules,
        scores,
        slots,
        valid=padding.expand(batch, length)[:, None],
        first_live=first_live,
        protected_from=protected_from.expand(batch).contiguous(),
        total=(num_heads * layer_budget(rules, num_tokens)).expand(batch).contiguous(),
    )


def choose(
    policy: Policy,
    scores: torch.Tensor,
    slots: int,
    *,
    valid: torch.Tensor | None,
    first_live: int,
    protected_from: int | torch.Tensor,
    total: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and offsets of what :func:`adakv_compile.policy.select` keeps, bit for bit.

    ``"streamingllm"`` goes by order alone: it has no scores to rank, and counting in plain PyTorch is no slower. What
    is too large for the kernels goes there, too, and so do a hard safeguard and ties by the raw score.

    Args:
        policy: What to keep.
        scores: ``[B, H, L]``, not pooled.
        slots: ``N``, at least what a row keeps.
        valid: Bool ``[B, H | 1, L]``, False where there is no entry. None: all are.
        first_live: Positions below it are never kept.
        protected_from: Entries at this position of a row and behind it always stay; one number, or int ``[B]``.
        total: Entries to keep over all heads of a row, the protected ones included; one number, or int ``[B]``. It is
            raised to the number of protected entries and lowered to that of all where need be.

    Returns:
        Positions ``[B, N]`` int32, heads back to back, ascending inside a head, 0 in unused slots; offsets
        ``[B, H + 1]`` int32.
    """
    batch, num_heads, length = scores.shape
    if (
        policy.method == "streamingllm"
        or (policy.safeguard == "hard" and policy.adaptive)
        or policy.ties == "score"
        or not 1 <= num_heads <= MAX_HEADS
        or batch * num_heads > _MAX_GRID
        or not 1 <= num_heads * length < _MAX_SCORES
    ):
        return _choose_portable(policy, scores, slots, valid, first_live, protected_from, total)
    device = scores.device
    scores = scores.to(torch.float32).contiguous()
    tuning = tuning_of(target_of(device))
    tiles = -(-length // tuning.tile)
    groups = batch * num_heads
    joint = policy.uniform_share != 1 and num_heads > 1
    strides = (0, 0, 0) if valid is None else valid.expand(scores.shape).stride()

    descent = 4 * SLOT.value
    counters = torch.zeros(batch * descent + groups * (descent + 2), dtype=torch.int32, device=device)
    row_descents, head_descents, num_entries, num_protected = counters.split(
        (batch * descent, groups * descent, groups, groups)
    )
    keys = torch.empty((groups, tiles, tuning.tile), dtype=torch.int32, device=device)
    reached = torch.empty((groups, tiles, SLOT.value), dtype=torch.int32, device=device)
    above = torch.empty((groups, tiles), dtype=torch.int32, device=device)
    offsets = torch.empty((batch, num_heads + 1), dtype=torch.int32, device=device)
    positions = torch.empty((batch, slots), dtype=torch.int32, device=device)

    grid = (tiles, groups)
    launch(
        rank_keys,
        grid,
        scores,
        valid,
        keys,
        row_descents,
        head_descents,
        num_entries,
        num_protected,
        total,
        protected_from,
        length,
        num_heads,
        first_live,
        *strides,
        device=device,
        num_warps=tuning.num_warps,
        HAS_VALID=valid is not None,
        TOTAL_PER_ROW=isinstance(total, torch.Tensor),
        PROTECTED_PER_ROW=isinstance(protected_from, torch.Tensor),
        JOINT=joint,
        MAX_POOL=policy.pool == "max",
        KERNEL_SIZE=policy.kernel_size,
        TILE=tuning.tile,
    )

    def descend(descents: torch.Tensor, group_heads: int) -> None:
        for step in range(3):
            launch(
                refine,
                grid,
                keys,
                descents,
                num_protected,
                reached,
                above,
                group_heads,
                step,
                device=device,
                num_warps=tuning.num_warps,
                HEADS=tuning.heads(group_heads),
                TILE=tuning.tile,
            )

    if joint:
        descend(row_descents, num_heads)
    launch(
        allocate,
        (batch,),
        keys,
        row_descents,
        head_descents,
        num_entries,
        num_protected,
        reached,
        above,
        offsets,
        num_heads,
        tiles,
        device=device,
        num_warps=tuning.row_warps(num_heads),
        JOINT=joint,
        ALPHA_NUMERATOR=policy.uniform_share.numerator,
        ALPHA_DENOMINATOR=policy.uniform_share.denominator,
        HEADS=tuning.heads(num_heads),
        COLUMNS=tuning.columns(num_heads),
        TILE=tuning.tile,
    )
    descend(head_descents, 1)
    launch(
        emit,
        grid,
        keys,
        head_descents,
        reached,
        above,
        offsets,
        positions,
        num_heads,
        slots,
        device=device,
        num_warps=tuning.num_warps,
        COLUMNS=tuning.columns(1),
        TILE=tuning.tile,
    )
    return positions, offsets


def _choose_portable(
    policy: Policy,
    scores: torch.Tensor,
    slots: int,
    valid: torch.Tensor | None,
    first_live: int,
    protected_from: int | torch.Tensor,
    total: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, length = scores.shape
    position = torch.arange(length, device=scores.device)
    live = (position >= first_live).expand(batch, 1, length)
    if isinstance(protected_from, torch.Tensor):
        protected_from = protected_from[:, None, None]
    if not isinstance(total, torch.Tensor):
        total = torch.full((batch,), total, device=scores.device)
    keep = select_entries(
        policy,
        scores,
        live if valid is None else live & valid,
        protected=(position >= protected_from).expand(batch, 1, length),
        total=total,
    )
    return pack(keep, slots)
