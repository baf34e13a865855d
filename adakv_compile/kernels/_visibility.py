"""What a query sees of entries whose positions are data: the causal and sliding rules, or a mask that is looked up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

__all__ = ["Visibility"]


@dataclass(frozen=True, slots=True)
class Visibility:
    """The rule of one attention call.

    A column of ``mask`` and ``padding`` belongs to a position: the last one to the newest token. Positions before the
    first column are invisible.

    Attributes:
        first: Position of the first query of the call; an int, or an integer tensor of one element on the device.
        count: Queries of the call, ``T``.
        group: Query heads per KV head, ``G``.
        num_heads: KV heads.
        mask: Bool or additive float ``[B | 1, 1 | Hq, T | 1, M]``; replaces the causal and sliding rules.
        padding: Bool ``[B | 1, M]``, True for real tokens; comes on top of the rules or the mask.
        sliding_window: Keys a query sees, its own included.
        start: First query this rule is applied to, counted in the call.
        rows: Queries it is applied to.
    """

    first: int | torch.Tensor
    count: int
    group: int
    num_heads: int
    mask: torch.Tensor | None
    padding: torch.Tensor | None
    sliding_window: int | None
    start: int
    rows: int

    @property
    def looked_up(self) -> bool:
        """Whether the positions of entries before the call's first token matter."""
        return not (self.mask is None and self.padding is None and self.sliding_window is None)

    def block(self, start: int, rows: int) -> Visibility:
        """Return the same rule for ``rows`` queries from ``start`` on."""
        return dataclasses.replace(self, start=start, rows=rows)

    def hide(self, logits: torch.Tensor, owner: torch.Tensor, positions: torch.Tensor, past: bool) -> torch.Tensor:
        """Give what a query does not see the logit ``-inf``, in place.

        Args:
            logits: ``[n, G * T, C]``, heads of the group outermost.
            owner: Int64 ``[n]``, the index ``b * H + h`` that the entries of each row belong to.
            positions: Integer ``[n | 1, C]``.
            past: Whether all positions are before the call's first token.

        Returns:
            ``logits``.
        """
        causal = self.mask is None and not past and self.count > 1
        if not (self.looked_up or causal):
            return logits
        grouped = logits.unflatten(1, (self.group, self.rows))
        if self.mask is None and (causal or self.sliding_window is not None):
            offset = torch.arange(self.start, self.start + self.rows, device=logits.device)
            query = (offset + self.first)[:, None]
            key = positions[:, None, :]
            if causal:
                grouped.masked_fill_((key > query)[:, None], -torch.inf)
            if self.sliding_window is not None:
                grouped.masked_fill_((key <= query - self.sliding_window)[:, None], -torch.inf)
        if self.padding is not None:
            batch = self._batch(owner, self.padding)[:, None]
            column, outside = self._columns(positions, self.padding.shape[-1])
            seen = self.padding[batch, column]
            grouped.masked_fill_((~seen | outside)[:, None, None], -torch.inf)
        if self.mask is not None:
            self._hide_by_mask(self.mask, grouped, owner, positions)
        return logits

    def _hide_by_mask(
        self, mask: torch.Tensor, grouped: torch.Tensor, owner: torch.Tensor, positions: torch.Tensor
    ) -> None:
        device = mask.device
        column, outside = self._columns(positions, mask.shape[-1])
        batch = self._batch(owner, mask)[:, None, None, None]
        if mask.shape[1] == 1:
            head = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        else:
            member = torch.arange(self.group, device=device)
            head = ((owner % self.num_heads)[:, None] * self.group + member)[:, :, None, None]
        if mask.shape[2] == 1:
            query = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        else:
            query = torch.arange(self.start, self.start + self.rows, device=device)[:, None]
        found = mask[batch, head, query, column[:, None, None, :]]
        if mask.dtype == torch.bool:
            grouped.masked_fill_(~found | outside[:, None, None], -torch.inf)
        else:
            grouped.add_(found).masked_fill_(outside[:, None, None], -torch.inf)

    def _batch(self, owner: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return owner.new_zeros(1) if table.shape[0] == 1 else owner // self.num_heads

    def _columns(self, positions: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mask column of each entry, clamped, and whether it lies outside the mask."""
        column = positions.long() - (self.first + (self.count - columns))
        return column.clamp(0, columns - 1), (column < 0) | (column >= columns)
