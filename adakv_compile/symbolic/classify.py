"""From a predicate over ``(b, h, q, kv)`` to the kind of mask that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from adakv_compile.symbolic.expr import (
    AXES,
    BATCH,
    HEAD,
    KEY,
    QUERY,
    And,
    Bool,
    Compare,
    Expr,
    FloorDiv,
    Iota,
    Mod,
    Or,
    Size,
    add,
    axes_of,
    children,
    integer,
    kind_of,
    linear,
    loads_of,
    scale,
    show,
    total,
)
from adakv_compile.symbolic.mask import MaskKind, MaskProof, Offset, PaddingFact
from adakv_compile.symbolic.padding import read_padding
from adakv_compile.symbolic.read import Leaf
from adakv_compile.symbolic.refuse import NotProvedError
from adakv_compile.symbolic.sizes import Sizes

__all__ = ["Geometry", "classify"]

_ONE = sympy.Integer(1)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a mask, as far as they matter, and what is known about them.

    Attributes:
        batch: Size of the mask's batch dimension; one when it has none.
        queries: Number of queries of the attention.
        keys: Number of keys of the attention.
        sizes: What is known about symbolic sizes.
    """

    batch: int | torch.SymInt
    queries: sympy.Expr
    keys: sympy.Expr
    sizes: Sizes

    @property
    def has_one_query(self) -> bool:
        """Whether there is statically one query."""
        return self.queries == 1


@dataclass(frozen=True, slots=True)
class _Chunks:
    """``(c + shift) // length`` equals ``(t + query_shift) // length``, or for a single query the number ``index``.

    Both shifts may differ between the rows of a batch: chunks are counted from a row's first token behind its padding.
    """

    length: int
    shift: Expr
    query_shift: Expr | None
    index: int | None


@dataclass(slots=True)
class _Facts:
    """What the conjuncts said, before they are put together. Bounds are index expressions without ``q`` and ``kv``."""

    upper: list[Expr] = field(default_factory=list[Expr])
    lower: list[Expr] = field(default_factory=list[Expr])
    chunks: list[_Chunks] = field(default_factory=lambda: list[_Chunks]())
    prefixes: list[tuple[sympy.Expr, Expr | None]] = field(default_factory=list[tuple[sympy.Expr, Expr | None]])
    padding: list[Expr] = field(default_factory=list[Expr])
    steps: list[str] = field(default_factory=list[str])


def classify(
    predicate: Expr,
    geometry: Geometry,
    leaves: Mapping[str, Leaf],
    holders: Callable[[Expr], Sequence[fx.Node]],
) -> MaskProof:
    """Prove what a predicate means.

    Args:
        predicate: True where a key is visible; simplified.
        geometry: The sizes of the mask.
        leaves: The unknown tensors, by name.
        holders: Finds values in the graph whose elements are an expression.

    Raises:
        NotProvedError: The predicate is none of the known kinds, or what would make it one can't be shown.
    """
    facts = _Facts()
    for part in predicate.operands if isinstance(predicate, And) else (predicate,):
        _collect(part, geometry, facts)
    paddings: list[PaddingFact] = []
    for part in facts.padding:
        paddings.append(read_padding(part, geometry.batch, geometry.keys, geometry.sizes, leaves, holders))
        facts.steps.append(f"{show(part)}  is padding")
    if len(paddings) > 1:
        raise NotProvedError("two different padding conditions", facts.padding[1])
    proof = _combine(facts, geometry, predicate)
    return MaskProof(
        kind=proof.kind,
        offset=proof.offset,
        window=proof.window,
        chunk=proof.chunk,
        chunk_shift=proof.chunk_shift,
        prefix=proof.prefix,
        padding=paddings[0] if paddings else None,
        predicate=predicate,
        steps=tuple(facts.steps),
        sizes=geometry.sizes,
    )


def _collect(part: Expr, geometry: Geometry, facts: _Facts) -> None:
    """Understand one conjunct."""
    axes = axes_of(part)
    match part:
        case Bool(True):
            facts.steps.append("nothing is hidden")
        case Bool(False):
            raise NotProvedError("everything is hidden", part)
        case _ if HEAD in axes:
            raise NotProvedError(f"{show(part)} differs between heads", part)
        case _ if loads_of(part) and not _positions(part) & {QUERY, KEY}:
            facts.padding.append(part)
        case Compare("le", difference, _) if kind_of(difference) == "int":
            _bound(part, difference, geometry, facts)
        case Compare("eq", difference, _) if kind_of(difference) == "int":
            _equality(part, difference, geometry, facts)
        case Or(operands):
            _alternatives(part, operands, geometry, facts)
        case _:
            raise NotProvedError(_unknown(part), part)


def _positions(part: Expr) -> frozenset[int]:
    """Return the axes a predicate uses other than to index an unknown tensor."""
    if isinstance(part, Iota):
        return frozenset((part.axis,))
    inner = () if part in loads_of(part) else children(part)
    return frozenset[int]().union(*(_positions(operand) for operand in inner))


@dataclass(frozen=True, slots=True)
class _Band:
    """``key * kv + query * q + rest <= 0`` with a rest that depends on neither."""

    key: sympy.Expr
    query: sympy.Expr
    rest: Expr


def _band(part: Expr, difference: Expr, *, free: tuple[int, ...] = ()) -> _Band:
    """Split a difference; its rest may depend on the axes ``free``."""
    terms, constant = linear(difference)
    key, query = (terms.pop(Iota(axis), sympy.Integer(0)) for axis in (KEY, QUERY))
    rest = total(terms.items(), constant)
    for axis in (KEY, QUERY, BATCH):
        if axis not in free and axis in axes_of(rest):
            raise NotProvedError(_unknown(part), part)
    return _Band(key, query, rest)


def _bound(part: Expr, difference: Expr, geometry: Geometry, facts: _Facts) -> None:
    """Understand ``difference <= 0``."""
    band = _band(part, difference)
    single = geometry.has_one_query
    if band.key == 1 and (band.query == -1 or single):
        facts.upper.append(scale(band.rest, -_ONE))
        facts.steps.append(f"{show(part)}  is causal with offset {show(facts.upper[-1])}")
    elif band.key == -1 and (band.query == 1 or single):
        facts.lower.append(band.rest)
        facts.steps.append(f"{show(part)}  hides keys older than offset {show(band.rest)}")
    elif _always(band, geometry):
        facts.steps.append(f"{show(part)}  always holds")
    elif band.key == 1 and band.query == 0 and isinstance(band.rest, Size):
        facts.prefixes.append((geometry.sizes.canonical(1 - band.rest.value), None))
        facts.steps.append(f"{show(part)}  shows the first {facts.prefixes[-1][0]} columns")
    else:
        raise NotProvedError(_unknown(part), part)


def _always(band: _Band, geometry: Geometry) -> bool:
    """Tell whether a bound holds at all positions, from its value in the worst corner."""
    if not isinstance(band.rest, Size):
        return False
    worst = band.rest.value
    for factor, size in ((band.key, geometry.keys), (band.query, geometry.queries)):
        if not factor.is_number:
            return False
        if factor > 0:  # pyright: ignore[reportOperatorIssue]
            worst = worst + factor * (size - 1)
    return geometry.sizes.at_most(worst, 0)


def _equality(part: Expr, difference: Expr, geometry: Geometry, facts: _Facts) -> None:
    """Understand ``difference == 0``: a diagonal, or two positions in one chunk."""
    terms, constant = linear(difference)
    divisions = [(term, factor) for term, factor in terms.items() if isinstance(term, FloorDiv)]
    if not divisions:
        band = _band(part, difference)
        if {band.key, band.query} != {sympy.Integer(1), sympy.Integer(-1)}:
            raise NotProvedError(_unknown(part), part)
        offset = scale(band.rest, -band.key)
        facts.upper.append(offset)
        facts.lower.append(offset)
        facts.steps.append(f"{show(part)}  is a diagonal")
        return
    index: int | None = None
    match divisions:
        case [(first, one), (second, other)] if {one, other} == {1, -1} and len(terms) == 2 and constant == 0:
            key, query = (first, second) if KEY in axes_of(first) else (second, first)
        case [(key, sign)] if geometry.has_one_query and sign in (1, -1) and len(terms) == 1 and constant.is_Integer:
            query, index = None, int(-sign * constant)  # pyright: ignore[reportArgumentType]
        case _:
            raise NotProvedError(_unknown(part), part)
    columns = _band(part, key.numerator, free=(BATCH,))
    if columns.key != 1 or columns.query != 0:
        raise NotProvedError(_unknown(part), part)
    rows = None if query is None else _band(part, query.numerator, free=(BATCH,))
    if rows is not None and (rows.key != 0 or (rows.query != 1 and not geometry.has_one_query)):
        raise NotProvedError(_unknown(part), part)
    if query is not None and query.divisor != key.divisor:
        raise NotProvedError(_unknown(part), part)
    facts.chunks.append(_Chunks(key.divisor, columns.rest, None if rows is None else rows.rest, index))
    facts.steps.append(f"{show(part)}  keeps to chunks of {key.divisor}")


def _alternatives(part: Expr, operands: Sequence[Expr], geometry: Geometry, facts: _Facts) -> None:
    """Understand a disjunction: what is causal, or in a prefix that everyone sees."""
    offsets: list[Expr] = []
    prefixes: list[Expr] = []
    for operand in operands:
        if not (isinstance(operand, Compare) and operand.relation == "le" and kind_of(operand.left) == "int"):
            raise NotProvedError(_unknown(part), part)
        band = _band(part, operand.left)
        if band.key != 1:
            raise NotProvedError(_unknown(part), part)
        if band.query == -1 or geometry.has_one_query:
            offsets.append(scale(band.rest, -_ONE))
        elif band.query == 0:
            prefixes.append(add(integer(1), band.rest, -1))
        else:
            raise NotProvedError(_unknown(part), part)
    offset = _extreme(part, offsets, geometry.sizes, largest=True) if offsets else None
    if not prefixes:
        facts.upper.extend(() if offset is None else (offset,))
        return
    sizes = geometry.sizes
    prefix = _extreme(part, prefixes, sizes, largest=True)
    if not isinstance(prefix, Size):
        raise NotProvedError(f"the prefix is read from a tensor: {show(part)}", part)
    if isinstance(offset, Size) and sizes.at_most(prefix.value - 1, offset.value):
        # The first query sees the prefix anyway, and so does every later one.
        facts.upper.append(offset)
        facts.steps.append(f"{show(part)}  is causal with offset {show(offset)}")
        return
    facts.prefixes.append((prefix.value, offset))
    facts.steps.append(f"{show(part)}  shows a prefix to everyone")


def _extreme(part: Expr, bounds: Sequence[Expr], sizes: Sizes, *, largest: bool) -> Expr:
    """Return the bound that is provably the largest, or the smallest."""
    for candidate in bounds:
        gaps = [add(candidate, bound, -1) for bound in bounds]
        signed = [scale(gap, -_ONE) if largest else gap for gap in gaps]
        if all(isinstance(gap, Size) and sizes.at_most(gap.value, 0) for gap in signed):
            return candidate
    raise NotProvedError(f"bounds that can't be compared: {', '.join(show(bound) for bound in bounds)}", part)


def _combine(facts: _Facts, geometry: Geometry, predicate: Expr) -> MaskProof:
    """Put the facts of all conjuncts together, or find that they are no known kind."""
    if facts.prefixes:
        if len(facts.prefixes) > 1 or facts.upper or facts.lower or facts.chunks:
            raise NotProvedError("a prefix together with another bound", predicate)
        prefix, offset = facts.prefixes[0]
        return MaskProof(MaskKind.PREFIX, offset=None if offset is None else _plain(offset), prefix=prefix)
    if not facts.upper:
        if not facts.lower and not facts.chunks:
            return MaskProof(MaskKind.FULL)
        if not geometry.has_one_query:
            raise NotProvedError("keys after the query's own are visible, and some before it are not", predicate)
        # A single query that sees the newest key sees no later one.
        facts.upper.append(Size(geometry.keys - 1))
    upper = _extreme(predicate, facts.upper, geometry.sizes, largest=False)
    if facts.chunks:
        return _chunked(facts, upper, geometry, predicate)
    if not facts.lower:
        return MaskProof(MaskKind.CAUSAL, offset=_plain(upper))
    lower = _extreme(predicate, facts.lower, geometry.sizes, largest=True)
    window = add(add(upper, lower, -1), integer(1))
    if not isinstance(window, Size):
        raise NotProvedError(f"the window is read from a tensor: {show(window)}", predicate)
    length = geometry.sizes.canonical(window.value)
    if not geometry.sizes.at_most(1, length):
        raise NotProvedError(f"a window of {length} keys may be empty", predicate)
    facts.steps.append(f"together a window of {length} keys")
    return MaskProof(
        MaskKind.SLIDING_WINDOW,
        offset=_plain(upper),
        window=int(length) if length.is_Integer else length,  # pyright: ignore[reportArgumentType]
    )


def _chunked(facts: _Facts, upper: Expr, geometry: Geometry, predicate: Expr) -> MaskProof:
    if len(facts.chunks) > 1 or facts.lower:
        raise NotProvedError("chunks together with another bound", predicate)
    chunks = facts.chunks[0]
    first = add(upper, chunks.shift)
    if chunks.query_shift is None:
        position = first.value if isinstance(first, Size) else sympy.nan
        aligned = position.is_Integer and int(position) // chunks.length == chunks.index  # pyright: ignore[reportArgumentType]
    else:
        difference = add(first, chunks.query_shift, -1)
        aligned = isinstance(difference, Size) and geometry.sizes.equal(difference.value, 0)
    if not aligned:
        raise NotProvedError("chunks are counted from different positions for queries and keys", predicate)
    return MaskProof(MaskKind.CHUNKED, offset=_plain(upper), chunk=chunks.length, chunk_shift=_plain(chunks.shift))


def _plain(offset: Expr) -> Offset:
    return offset.value if isinstance(offset, Size) else offset


def _unknown(part: Expr) -> str:
    """Say what is special about a conjunct that is none of the known forms."""
    text, axes, loads = show(part), axes_of(part), loads_of(part)
    if _contains(part, Mod):
        return f"{text} depends on a remainder (dilated?)"
    if loads:
        used = " and ".join(AXES[axis] for axis in sorted(axes) if axis < len(AXES))
        return f"{text} reads {', '.join(dict.fromkeys(load.leaf for load in loads))} at {used or 'one place'}"
    if axes <= {KEY, BATCH}:
        return f"{text} hides keys by their column alone"
    return f"{text} is no known form"


def _contains(expr: Expr, kind: type) -> bool:
    return isinstance(expr, kind) or any(_contains(operand, kind) for operand in children(expr))
