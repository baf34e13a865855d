"""Attention over ragged heads, in a fixed number of batched ATen calls and without reading a length on the host.

The heads of all rows lie back to back in flat storage. It is cut into equal chunks, which ordinary batched products
take as views, each for the queries of the head that owns it. A chunk that holds more than one head is discarded: every
head has the two pieces at its ends, at most a chunk each, gathered instead. The partial results are merged by their
softmax sums, like the splits of flash decoding. So nothing but those pieces is copied, skewed heads cost what their
entries cost, and both cores stay busy; entries that a head doesn't own are never combined with its weights, so that
what unused slots or other rows hold (NaN, say) can't reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from adakv_compile.kernels._softmax import Softmax
from adakv_compile.kernels._visibility import Visibility

__all__ = ["Attended", "Entries", "attend", "ragged_entries", "rows_per_block", "tail_entries", "weights"]

_MIN_CHUNK: Final = 16
_MAX_CHUNK: Final = 256
# Elements of the largest transient of a block of queries.
_MAX_BLOCK_ELEMENTS: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Entries:
    """Some entries in pieces of equal length, each piece of one head.

    Attributes:
        owner: Int64 ``[n]``, the index ``b * H + h`` of each piece's head.
        keys: ``[n, C, Dk]``.
        values: ``[n, C, Dv]``.
        positions: Integer ``[n | 1, C]``.
        used: Bool ``[n, C]``, ``[n, 1]`` or ``[1, C]``, what of it counts. None: all.
        past: Whether all of it precedes the tokens of this call.
        complete: Whether piece ``i`` is that of head ``i``, for all heads.
    """

    owner: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    used: torch.Tensor | None
    past: bool
    complete: bool


@dataclass(frozen=True, slots=True)
class Attended:
    """The attention of some queries.

    Attributes:
        output: ``[B * H, R, Dv]`` float32 (float64 for float64 inputs); zeros where nothing is visible.
        peak: ``[B * H, R]``, the largest visible logit or sink, or a finite number where there is none.
        mass: ``[B * H, R]``, sum of ``exp(logit - peak)``, that of the sink included.
    """

    output: torch.Tensor
    peak: torch.Tensor
    mass: torch.Tensor


def ragged_entries(
    keys: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, positions: torch.Tensor, *, past: bool = True
) -> list[Entries]:
    """Cut the kept entries ``[B, N, D]`` into pieces; ``past`` as in :class:`Entries`."""
    batch, slots = positions.shape
    num_heads = offsets.shape[1] - 1
    device = keys.device
    flat = batch * slots
    if flat == 0:
        return []
    chunk = max(_MIN_CHUNK, min(_MAX_CHUNK, slots // (8 * num_heads)))
    first_slot = torch.arange(0, flat, slots, device=device)[:, None]
    begin = (first_slot + offsets[:, :-1]).flatten()
    end = (first_slot + offsets[:, 1:]).flatten()
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    flat_positions = positions.flatten()
    found: list[Entries] = []
    count = flat // chunk
    if count:
        start = torch.arange(0, count * chunk, chunk, device=device)
        owner = torch.searchsorted(end, start, right=True).clamp_(max=batch * num_heads - 1)
        inside = (begin[owner] <= start) & (start + chunk <= end[owner])
        found.append(
            Entries(
                owner=owner,
                keys=flat_keys[: count * chunk].unflatten(0, (count, chunk)),
                values=flat_values[: count * chunk].unflatten(0, (count, chunk)),
                positions=flat_positions[: count * chunk].unflatten(0, (count, chunk)),
                used=inside[:, None],
                past=past,
                complete=False,
            )
        )
    # Up to the first chunk border inside the head, and from the last one on.
    border = (begin + (chunk - 1)) // chunk * chunk
    middle = torch.minimum(border, end)
    last = torch.maximum(end // chunk * chunk, middle)
    step = torch.arange(chunk, device=device)
    index = torch.cat((begin[:, None] + step, last[:, None] + step), 1)
    used = index < torch.cat((middle[:, None], end[:, None]), 1).repeat_interleave(chunk, 1)
    # A piece repeats its head's own entry rather than reading another's.
    index = torch.minimum(index, end[:, None] - 1).clamp_(min=0).flatten()
    shape = (batch * num_heads, 2 * chunk)
    found.append(
        Entries(
            owner=torch.arange(batch * num_heads, device=device),
            keys=flat_keys.index_select(0, index).unflatten(0, shape),
            values=flat_values.index_select(0, index).unflatten(0, shape),
            positions=flat_positions.index_select(0, index).unflatten(0, shape),
            used=used,
            past=past,
            complete=True,
        )
    )
    return found


def tail_entries(
    keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, used: torch.Tensor | None
) -> Entries:
    """Take the dense tail ``[B, H, C, D]``, at positions ``[C]``, as one piece per head."""
    return Entries(
        owner=torch.arange(keys.shape[0] * keys.shape[1], device=keys.device),
        keys=keys.flatten(0, 1),
        values=values.flatten(0, 1),
        positions=positions[None],
        used=None if used is None else used[None],
        past=False,
        complete=True,
    )


def rows_per_block(entries: list[Entries], group: int, count: int) -> int:
    """Return how many queries to take at once so that transients stay bounded."""
    widths = [part.keys.shape[0] * max(part.keys.shape[1], part.values.shape[2]) for part in entries]
    return max(1, min(count, _MAX_BLOCK_ELEMENTS // max(1, sum(widths) * group)))


def logits_of(part: Entries, query: torch.Tensor, softmax: Softmax, visibility: Visibility) -> torch.Tensor:
    """Return the logits ``[n, R, C]`` of scaled queries ``[B * H, R, D]``, ``-inf`` where not visible or not used."""
    rows = query if part.complete else query.index_select(0, part.owner)
    logits = torch.bmm(rows, part.keys.mT)
    logits = softmax.cap(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    visibility.hide(logits, part.owner, part.positions, part.past)
    if part.used is not None and part.used.shape[1] > 1:
        logits.masked_fill_(~part.used[:, None], -torch.inf)
    return logits


def attend(entries: list[Entries], query: torch.Tensor, softmax: Softmax, visibility: Visibility) -> Attended:
    """Attend to all entries.

    Args:
        entries: Every visible entry of every head once.
        query: ``[B * H, R, Dk]``, scaled; ``R = G * T`` rows, heads of the group outermost.
        softmax: What becomes of its products with the keys.
        visibility: What the rows see.
    """
    peaks: list[torch.Tensor] = []
    masses: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for part in entries:
        logits = logits_of(part, query, softmax, visibility)
        # The lowest float stands for "nothing visible": differences to it are finite.
        peak = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
        logits.sub_(peak[..., None]).exp_()
        mass = logits.sum(-1)
        summed = torch.bmm(logits.to(part.values.dtype), part.values).to(logits.dtype)
        if part.used is not None:
            unused = ~part.used.any(-1)[:, None]
            peak.masked_fill_(unused, torch.finfo(logits.dtype).min)
            mass.masked_fill_(unused, 0.0)
            summed = summed.masked_fill_(unused[..., None], 0.0)
        peaks.append(peak)
        masses.append(mass)
        sums.append(summed)
    return _merge([part.owner for part in entries], peaks, masses, sums, query.shape[0], softmax, visibility)


def _merge(
    owners: list[torch.Tensor],
    peaks: list[torch.Tensor],
    masses: list[torch.Tensor],
    sums: list[torch.Tensor],
    num_heads: int,
    softmax: Softmax,
    visibility: Visibility,
) -> Attended:
    owner, peak = torch.cat(owners), torch.cat(peaks)
    rows = peak.shape[1]
    lowest = torch.finfo(peak.dtype).min
    top = peak.new_full((num_heads, rows), lowest)
    top.scatter_reduce_(0, owner[:, None].expand(-1, rows), peak, "amax")
    sinks = softmax.sinks_of_rows(visibility.num_heads, visibility.rows, top)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    factor = (peak - top.index_select(0, owner)).exp_()
    mass = peak.new_zeros((num_heads, rows)).index_add_(0, owner, torch.cat(masses) * factor)
    if sinks is not None:
        mass += (sinks - top).exp_()
    output = sums[0].new_zeros((num_heads, *sums[0].shape[1:]))
    output.index_add_(0, owner, torch.cat(sums).mul_(factor[..., None]))
    # At least one term is exp(0), of a visible entry or the sink: a smaller sum means that there is neither.
    output /= mass.clamp(min=0.5)[..., None]
    return Attended(output, top, mass)


def weights(
    part: Entries, query: torch.Tensor, softmax: Softmax, visibility: Visibility, attended: Attended
) -> torch.Tensor:
    """Return the attention weights ``[n, R, C]`` of a part, 0 where not visible or not used."""
    logits = logits_of(part, query, softmax, visibility)
    peak, mass = attended.peak[part.owner], attended.mass[part.owner].clamp(min=0.5)
    found = logits.sub_(peak[..., None]).exp_().div_(mass[..., None])
    return found if part.used is None else found.masked_fill_(~part.used[:, None], 0.0)
