"""What an attention mask was proved to mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

import sympy
import torch
from torch import fx

from adakv_compile.report import SourceLine
from adakv_compile.symbolic.expr import Expr, show
from adakv_compile.symbolic.refuse import NotProvedError
from adakv_compile.symbolic.sizes import Sizes

__all__ = ["NEGLIGIBLE", "MaskKind", "MaskProof", "Offset", "PaddingFact", "PaddingRelation"]

NEGLIGIBLE: Final = -1e4
"""Adding this or less hides an entry: its weight is exactly zero unless logits differ by almost as much."""

Offset = sympy.Expr | Expr
"""A size, or an index expression that reads a tensor (a position that is only known at run time)."""

PaddingRelation = Literal["eq", "ne", "lt", "le", "gt", "ge"]


class MaskKind(Enum):
    """Which keys a query sees, apart from padding; ``c`` is the key's column, ``t`` the query's row, both from zero."""

    FULL = "every key"
    CAUSAL = "c <= t + offset"
    SLIDING_WINDOW = "t + offset - window < c <= t + offset"
    CHUNKED = "c <= t + offset and both in one chunk: (c + shift) // chunk == (t + offset + shift) // chunk"
    PREFIX = "c < prefix, or also c <= t + offset when there is an offset"
    UNPROVEN = "unknown"


@dataclass(frozen=True, slots=True)
class PaddingFact:
    """Which columns are real tokens: ``padding[b, c + column_offset] <relation> value``.

    Attributes:
        node: The padding tensor, of any dtype, columns in its last real dimension: ``reshape([B, -1])`` when it
            has rows, else ``reshape([1, -1])``, puts it into the form that is indexed above.
        has_rows: Whether there is a row for every row of the batch; if not, the only one holds for all.
        column_offset: Column ``c`` of the mask reads column ``c + column_offset`` of the tensor; never negative.
        relation: How an element is compared.
        value: What it is compared with. A boolean padding has ``eq`` and ``True`` (``False`` when it is inverted).
        holder: A boolean value in the graph that already is this fact, ``True`` = real token: ``[B or 1, 1, 1, kv]``,
            or ``[kv]`` behind up to two dimensions of size one; ``None`` when there is none.
    """

    node: fx.Node
    has_rows: bool
    column_offset: sympy.Expr
    relation: PaddingRelation
    value: bool | int | float
    holder: fx.Node | None = None

    @property
    def is_inverted(self) -> bool:
        """Whether zero, or ``False``, marks a real token."""
        return (self.relation, self.value) in (("eq", False), ("le", 0))

    def __str__(self) -> str:
        offset = "" if self.column_offset == 0 else f" + {self.column_offset}"
        return f"{self.node.name}[{'b' if self.has_rows else '0'}, c{offset}] {self.relation} {self.value}"


@dataclass(frozen=True, slots=True)
class MaskProof:
    """A mask's meaning; every statement is exact, for all sizes the graph serves.

    Attributes:
        kind: Which keys are seen, apart from padding.
        offset: See :class:`MaskKind`. Not ``None`` for ``CAUSAL``, ``SLIDING_WINDOW`` and ``CHUNKED``.
        window: Keys that a query sees in a sliding window, itself included.
        chunk: Length of a chunk.
        chunk_shift: Distance of column zero from the start of its chunk; may differ between the rows of a batch.
        prefix: Columns that every query sees.
        padding: What hides padding, and-ed to the rest.
        additive: Whether the mask is added to the logits, instead of being boolean.
        bias: For an additive mask that adds other numbers as well, what was found of them. The proof then says what is
            hidden at least.
        masked_value: The largest number that an additive mask adds at hidden keys: ``-inf``, ``finfo.min`` or what a
            model's author took for low enough. With a number a query that sees nothing averages all values, with
            ``-inf`` its result is NaN or zero.
        predicate: The mask as an index expression, true where visible, if it could be read.
        steps: How the proof went, for people.
        reason: Why there is none, for ``UNPROVEN``.
        node: The value that was proved, or that stopped the proof.
        where: The line of the user's program which made that value.
        sizes: What the proof knows about symbolic sizes.
    """

    kind: MaskKind
    offset: Offset | None = None
    window: int | sympy.Expr | None = None
    chunk: int | None = None
    chunk_shift: Offset | None = None
    prefix: sympy.Expr | None = None
    padding: PaddingFact | None = None
    additive: bool = False
    masked_value: float | None = None
    bias: NotProvedError | None = None
    predicate: Expr | None = None
    steps: tuple[str, ...] = ()
    reason: str | None = None
    node: fx.Node | None = None
    where: SourceLine | None = None
    sizes: Sizes = field(default_factory=Sizes, repr=False, compare=False)

    @property
    def biased(self) -> bool:
        """Whether the mask adds numbers to what is visible."""
        return self.bias is not None

    @property
    def proved(self) -> bool:
        """Whether the mask's meaning is known."""
        return self.kind is not MaskKind.UNPROVEN

    def is_self_causal(self, q_len: int | torch.SymInt, kv_len: int | torch.SymInt) -> bool:
        """Tell whether every query provably sees itself and what came before, up to a sliding window and padding.

        The newest key is the newest query's own: ``offset == kv_len - q_len``. A single query that sees everything
        does just that, so ``FULL`` counts when ``q_len`` is statically one.
        """
        if self.kind is MaskKind.FULL:
            return isinstance(q_len, int) and q_len == 1
        return self.kind in (MaskKind.CAUSAL, MaskKind.SLIDING_WINDOW) and self._ends_at_newest(q_len, kv_len)

    def is_causal_in_chunks(self, q_len: int | torch.SymInt, kv_len: int | torch.SymInt) -> bool:
        """Tell whether every query provably sees itself and what came before in its chunk, up to padding."""
        return self.kind is MaskKind.CHUNKED and self._ends_at_newest(q_len, kv_len)

    def _ends_at_newest(self, q_len: int | torch.SymInt, kv_len: int | torch.SymInt) -> bool:
        newest = self.sizes.expr(kv_len) - self.sizes.expr(q_len)
        return isinstance(self.offset, sympy.Expr) and self.sizes.equal(self.offset, newest)

    def why_not_self_causal(self, q_len: int | torch.SymInt, kv_len: int | torch.SymInt) -> str | None:
        """Say why :meth:`is_self_causal` is false, or return ``None`` when it is true."""
        if self.is_self_causal(q_len, kv_len):
            return None
        if self.reason is not None:
            return self.reason
        if self.kind not in (MaskKind.CAUSAL, MaskKind.SLIDING_WINDOW):
            return f"the mask is {self}"
        if not isinstance(self.offset, sympy.Expr):
            return f"the position of the queries is read from a tensor: {_show(self.offset)}"
        return (
            f"the last query sees keys up to its row + {self.offset}, but there are {kv_len} keys for {q_len} queries"
        )

    def __str__(self) -> str:
        """Return one line: the kind with its numbers."""
        parts = [self.kind.name.lower().replace("_", " ")]
        named = {
            "offset": None if self.offset is None else _show(self.offset),
            "window": self.window,
            "chunk": self.chunk,
            "prefix": self.prefix,
        }
        parts += [f"{name} {value}" for name, value in named.items() if value is not None]
        if self.padding is not None:
            parts.append(f"padding {self.padding}")
        if self.reason is not None:
            parts.append(self.reason)
        return ", ".join(parts)


def _show(offset: Offset | None) -> str:
    return str(offset) if offset is None or isinstance(offset, sympy.Expr) else show(offset)
