"""Prove what the attention masks of a captured graph mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import sympy
import torch
from torch import fx

from adakv_compile.passes.constants import Constants
from adakv_compile.passes.nodes import is_cast, skip_no_ops, source_line
from adakv_compile.symbolic.classify import Geometry, classify
from adakv_compile.symbolic.expr import (
    BATCH,
    KEY,
    QUERY,
    And,
    Bool,
    Expr,
    Float,
    Load,
    Where,
    axes_of,
    loads_of,
    show,
    substitute,
)
from adakv_compile.symbolic.mask import NEGLIGIBLE, MaskKind, MaskProof, PaddingFact
from adakv_compile.symbolic.read import Reader, shape_of
from adakv_compile.symbolic.refuse import NotProvedError
from adakv_compile.symbolic.sizes import Sizes
from adakv_compile.symbolic.vocabulary import VOCABULARY

__all__ = ["NEGLIGIBLE", "MaskKind", "MaskProof", "MaskProver", "PaddingFact", "prove_mask"]

aten = torch.ops.aten

_MASK_RANK: Final = 4


def prove_mask(
    node: fx.Node | None, *, is_causal: bool, q_len: int | torch.SymInt, kv_len: int | torch.SymInt
) -> MaskProof:
    """Prove what the mask of one attention means; see :meth:`MaskProver.prove`."""
    return MaskProver(None if node is None else node.graph).prove(node, is_causal=is_causal, q_len=q_len, kv_len=kv_len)


class MaskProver:
    """Proves the masks of one graph; what attentions share is read once.

    Args:
        graph: A captured graph; it is only read. ``None`` when no attention has a mask.
        constants: What the model keeps.
        given: What is known of other inputs; see :class:`~adakv_compile.symbolic.read.Reader`.
    """

    def __init__(
        self,
        graph: fx.Graph | None,
        constants: Constants | None = None,
        given: Mapping[fx.Node, Expr] | None = None,
    ) -> None:
        self._sizes = Sizes() if graph is None else Sizes.of(_sizes_in(graph))
        self._constants = Constants({}) if constants is None else constants
        self._reader = Reader(self._sizes, VOCABULARY, self._constants.expression, given)
        self._memo: dict[tuple[fx.Node | None, bool, sympy.Expr, sympy.Expr], MaskProof] = {}

    @property
    def reader(self) -> Reader:
        """What reads the values of the graph."""
        return self._reader

    def prove(
        self, node: fx.Node | None, *, is_causal: bool, q_len: int | torch.SymInt, kv_len: int | torch.SymInt
    ) -> MaskProof:
        """Prove what the mask of one attention means.

        Args:
            node: A boolean mask (true = visible) or an additive one, broadcastable to ``[B, Hq, q_len, kv_len]``, or
                ``None``.
            is_causal: The attention operator's own flag: aligned at the first query and the first key.
            q_len: Number of queries.
            kv_len: Number of keys.
        """
        sizes = Sizes.of((q_len, kv_len)) if self._sizes.is_empty else self._sizes
        queries, keys = sizes.expr(q_len), sizes.expr(kv_len)
        memo = (node, is_causal, queries, keys)
        if memo not in self._memo:
            if node is None:
                self._memo[memo] = _without_mask(is_causal, sizes)
            else:
                self._memo[memo] = self._prove(node, is_causal, queries, keys)
        proof = self._memo[memo]
        if node is not None and proof.bias is not None and not proof.is_self_causal(q_len, kv_len):
            # Numbers of which nothing is known may hide what the rest shows: only "not the future" is of any use then.
            return self._unproven(node, proof.bias, None)
        return proof

    def _prove(self, node: fx.Node, is_causal: bool, queries: sympy.Expr, keys: sympy.Expr) -> MaskProof:
        expr = self._reader.read(node)
        masked: float | None = None
        predicate: Expr | None = None
        bias: list[NotProvedError] = []
        try:
            if is_causal:
                raise NotProvedError("a mask together with is_causal", expr)
            geometry = self._geometry(node, expr, queries, keys)
            predicate, masked = self._predicate(node, expr, bias)
            try:
                proof = classify(predicate, geometry, self._reader.leaves, self._reader.holders)
            except NotProvedError as failure:
                known = _known_part(predicate)
                if known is None:
                    raise
                proof = classify(known, geometry, self._reader.leaves, self._reader.holders)
                predicate = known
                bias.append(failure)
        except NotProvedError as failure:
            return self._unproven(node, failure, predicate)
        return dataclasses.replace(
            proof,
            additive=masked is not None,
            masked_value=masked,
            bias=bias[0] if bias else None,
            node=node,
            where=source_line(node),
        )

    def _geometry(self, node: fx.Node, expr: Expr, queries: sympy.Expr, keys: sympy.Expr) -> Geometry:
        """Return the mask's sizes, which must be the attention's or one."""
        shape = shape_of(node)
        padded = (*(1 for _ in range(_MASK_RANK - len(shape))), *shape)
        fits = len(shape) <= _MASK_RANK and all(
            size == 1 if isinstance(size, int) and size == 1 else self._sizes.equal(size, expected)
            for size, expected in ((padded[-1 - KEY], keys), (padded[-1 - QUERY], queries))
        )
        if not fits:
            raise NotProvedError(f"a mask of shape {tuple(shape)} for {queries} queries and {keys} keys", expr)
        return Geometry(padded[-1 - BATCH], queries, keys, self._sizes)

    def _predicate(self, node: fx.Node, expr: Expr, bias: list[NotProvedError]) -> tuple[Expr, float | None]:
        """Return where keys are visible, and what an additive mask adds where they are not.

        Args:
            node: The mask.
            expr: Its element.
            bias: Takes what else an additive mask adds.
        """
        dtype = node.meta["val"].dtype
        if dtype is torch.bool:
            return expr, None
        if not dtype.is_floating_point:
            raise NotProvedError(f"a mask of {dtype}", expr)
        hidden: list[float] = []
        predicate = self._reader.simplify(self._visible(expr, hidden, bias))
        return predicate, max(hidden, default=-math.inf)

    def _visible(self, expr: Expr, hidden: list[float], bias: list[NotProvedError], factor: float = 1.0) -> Expr:
        """Return where an additive mask hides nothing; see :meth:`_predicate`.

        Args:
            expr: What the mask adds, divided by ``factor``.
            hidden: Takes what it adds where it hides.
            bias: Takes what else it adds.
            factor: A positive number.
        """
        match expr:
            case Where(condition, yes, no):
                first, second = (self._visible(branch, hidden, bias, factor) for branch in (yes, no))
                return Where(condition, first, second)
            case Float(value) if value == 0:
                return Bool(True)
            case Float(value) if value * factor <= NEGLIGIBLE:
                hidden.append(value * factor)
                return Bool(False)
            case Float(value) if math.isinf(value):
                raise NotProvedError(f"it adds {value:g}", expr)
            case Float(value):
                reason = f"it adds {value * factor:g}, neither zero nor so little that an entry is hidden"
                bias.append(NotProvedError(reason, expr))
                return Bool(True)
            case Load(name, index):
                node = self._reader.leaves[name].node
                scaled = self._scale_of(node)
                terms = self._at(node.args[:1], index) if scaled is not None else self._terms(node, index)
                if terms is not None:
                    factor = factor * (1.0 if scaled is None else scaled)
                    return And(tuple(self._visible(term, hidden, bias, factor) for term in terms))
            case _:
                pass
        bias.append(NotProvedError(f"it adds numbers that aren't known: {show(expr)}", expr))
        return Bool(True)

    def _scale_of(self, node: fx.Node) -> float | None:
        """Return the positive number that a value is its first operand times."""
        scales = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
        if node.target not in scales or len(node.args) != 2:
            return None
        factor: object = node.args[1]
        if isinstance(factor, fx.Node):
            factor = self._constants.number(skip_no_ops(factor))
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            return None
        return 1.0 / factor if node.target in scales[2:] else float(factor)

    def _terms(self, node: fx.Node, index: tuple[Expr, ...]) -> list[Expr] | None:
        """Return what a value that isn't known is the sum of, at a position."""
        if node.target is aten.add.Tensor and node.args[2:] == () and node.kwargs.get("alpha", 1) == 1:
            return self._at(node.args[:2], index)
        return self._at(node.args[:1], index) if is_cast(node) else None

    def _at(self, values: Sequence[object], index: tuple[Expr, ...]) -> list[Expr] | None:
        """Return some values at a position of what they broadcast to."""
        positions = {len(index) - 1 - dim: at for dim, at in enumerate(index)}
        found: list[Expr] = []
        for value in values:
            if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
                return None
            found.append(substitute(self._reader.read(value), positions))
        return found

    def _unproven(self, node: fx.Node, failure: NotProvedError, predicate: Expr | None) -> MaskProof:
        loads = loads_of(failure.culprit)
        leaf = self._reader.leaves[loads[0].leaf] if loads else None
        reason = failure.reason if leaf is None else f"{failure.reason}; {leaf.node.name} is {leaf.why}"
        culprit = node if leaf is None or leaf.node.op == "placeholder" else leaf.node
        return MaskProof(
            MaskKind.UNPROVEN,
            predicate=predicate,
            additive=node.meta["val"].dtype.is_floating_point,
            reason=reason,
            node=culprit,
            where=source_line(culprit) or source_line(node),
            sizes=self._sizes,
        )


def _known_part(predicate: Expr) -> Expr | None:
    """Return a conjunction without what unknown tensors hide from some queries; ``None`` if there is no such part."""
    if not isinstance(predicate, And):
        return None
    known = tuple(term for term in predicate.operands if not loads_of(term) or QUERY not in axes_of(term))
    if len(known) in (0, len(predicate.operands)):
        return None
    return known[0] if len(known) == 1 else And(known)


def _without_mask(is_causal: bool, sizes: Sizes) -> MaskProof:
    if not is_causal:
        return MaskProof(MaskKind.FULL, predicate=Bool(True), steps=("there is no mask",), sizes=sizes)
    step = "is_causal aligns the first query with the first key"
    return MaskProof(MaskKind.CAUSAL, offset=sympy.Integer(0), steps=(step,), sizes=sizes)


def _sizes_in(graph: fx.Graph) -> list[object]:
    """Return the sizes of a graph's inputs."""
    found: list[object] = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.append(value)
        elif isinstance(value, torch.Tensor):
            found.extend(value.shape)
    return found
