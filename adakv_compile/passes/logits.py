"""Read what is done to the logits of a written-out attention between its first product and its softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast

import torch
from torch import fx

from adakv_compile.passes.axes import Axes, Dims, Step, climb
from adakv_compile.passes.literals import (
    Factor,
    NotUnderstoodError,
    factor_of,
    is_factor,
    is_zero,
    number_of,
    tensor_of,
)
from adakv_compile.passes.nodes import arg, is_cast, same_size, shape_of, skip_no_ops, static_int
from adakv_compile.passes.products import PRODUCTS
from adakv_compile.symbolic.mask import NEGLIGIBLE

__all__ = ["Logits", "Part", "read_baddbmm", "read_logits", "scale_of"]

aten = torch.ops.aten

_WHERE: Final = (aten.where.self, aten.where.ScalarOther)
_FILL: Final = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_TIMES: Final = (aten.mul.Tensor, aten.mul.Scalar)
_OVER: Final = (aten.div.Tensor, aten.div.Scalar)
_FLOORS: Final = (aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp.default)
_SUMS: Final = (aten.add.Tensor, aten.sub.Tensor)


@dataclass(frozen=True)
class Part:
    """One mask or bias.

    Attributes:
        node: What is added, or a condition.
        dims: Its dimensions.
        yes: For a condition, what is added where it holds; None for what is added itself.
        no: Likewise where it doesn't hold.
        factors: What is multiplied with what is added.
    """

    node: fx.Node
    dims: Dims
    yes: float | None
    no: float | None
    factors: tuple[Factor, ...] = ()


@dataclass
class Logits:
    """What was peeled off the logits on the way from the softmax to the product.

    Attributes:
        parts: Masks and biases, the outermost first.
        factors: What the logits are scaled with, below any cap.
        cap: What the hyperbolic tangent's result is multiplied with, if there is one.
        sinks: Logits of the heads that take part in the softmax only.
        exact: Whether this is all only if the masks add nothing but zero and what hides.
    """

    parts: list[Part] = field(default_factory=list[Part])
    factors: list[Factor] = field(default_factory=list[Factor])
    cap: float | None = None
    sinks: Step | None = None
    exact: bool = False


def read_logits(
    axes: Axes, node: fx.Node, dims: Dims, logits: Logits, sink: bool, above_all: bool
) -> tuple[fx.Node, Dims]:
    """Peel everything off the logits, down to the product; return it and its dimensions.

    Args:
        axes: Learns how axes are split.
        node: The operand of the softmax.
        dims: Its dimensions; if there are sinks, the last one without them.
        logits: Collects what is found.
        sink: Whether the softmax has one entry more than there are keys.
        above_all: Whether the softmax is over the last dimension, so that it does not feel what is taken off its rows.

    Raises:
        NotUnderstoodError: Something else is done to the logits.
    """
    while node.target not in PRODUCTS:
        first = node.args[0] if node.args else None
        if sink and (parts := _with_sink(node)):
            node, logits.sinks, sink = parts[0], _sinks(axes, parts[1], dims), False
            if logits.parts or logits.factors:
                raise NotUnderstoodError("sinks are masked or scaled with the logits")
        elif (
            is_cast(node)
            or (above_all and logits.cap is None and logits.sinks is None and _subtracts_maximum(node))
            or _is_floor(node)
        ):
            node = tensor_of(first)
        elif node.target is aten.tanh.default:
            _read_cap(logits)
            node = tensor_of(first)
        elif (kept := _blended(node, logits)) is not None:
            node, logits.exact = kept, True
        elif node.target in _TIMES or node.target in _OVER:
            node = _read_factor(node, logits)
        elif node.target in (*_SUMS, *_WHERE, *_FILL):
            if logits.cap is not None:
                raise NotUnderstoodError("a mask is added before the soft cap")
            node = _read_mask(node, dims, logits)
        else:
            steps = climb(axes, node, dims)
            next(steps)
            above = next(steps, None)
            if above is None or not above.whole:
                raise NotUnderstoodError(f"the logits go through {node.target}")
            node, dims = above.node, above.dims
    if sink:
        raise NotUnderstoodError("an entry of the weights is dropped that is no sink")
    return node, axes.resolve(dims)


def _with_sink(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return logits and sinks of ``cat([logits, sinks], -1)``."""
    if node.target is not aten.cat.default:
        return None
    parts = cast("list[fx.Node]", node.args[0])
    rank = len(shape_of(node))
    if len(parts) != 2 or cast("int", arg(node, 1, "dim", 0)) % rank != rank - 1:
        return None
    return (parts[0], parts[1]) if static_int(shape_of(parts[1])[-1]) == 1 else None


def _sinks(axes: Axes, node: fx.Node, dims: Dims) -> Step:
    """Return the sinks before they are repeated for rows and queries."""
    *_, top = climb(axes, node, _broadcast(node, (*dims[:-1], ())), casts=True)
    return Step(top.node, axes.resolve(top.dims))


def _is_floor(node: fx.Node) -> bool:
    """Whether a node is ``max(x, lowest)``, which changes nothing."""
    if node.target not in _FLOORS or len(node.args) != 2 or node.kwargs:
        return False
    return number_of(node.args[1]) <= torch.finfo(node.meta["val"].dtype).min


def _subtracts_maximum(node: fx.Node) -> bool:
    """Whether a node is ``x - max(x)`` along the last dimension, which a softmax does not feel."""
    if node.target is not aten.sub.Tensor or arg(node, 2, "alpha", 1) != 1:
        return False
    shift = node.args[1]
    if not isinstance(shift, fx.Node):
        return False
    shift = skip_no_ops(shift)
    if shift.target is operator.getitem:
        shift = cast("fx.Node", shift.args[0])
    last = len(shape_of(node)) - 1
    if shift.target is aten.max.dim:
        return arg(shift, 1, "dim") in (-1, last) and arg(shift, 2, "keepdim", False) is True
    return (
        shift.target is aten.amax.default and arg(shift, 1, "dim") in ([-1], [last]) and bool(arg(shift, 2, "keepdim"))
    )


def _read_cap(logits: Logits) -> None:
    if logits.cap is not None:
        raise NotUnderstoodError("logits are capped twice")
    logits.cap = scale_of(logits.factors)
    if not logits.cap > 0:
        raise NotUnderstoodError(f"logits are capped at {logits.cap}")
    logits.factors.clear()


def scale_of(factors: Sequence[Factor]) -> float:
    """Return the product of some factors.

    Raises:
        NotUnderstoodError: One of them is a tensor.
    """
    scale = 1.0
    for factor, divides in factors:
        if isinstance(factor, fx.Node):
            raise NotUnderstoodError(f"{factor.name} is not a number")
        scale = scale / factor if divides else scale * factor
    return scale


def _blended(node: fx.Node, logits: Logits) -> fx.Node | None:
    """Return the logits of ``logits * mask + low * (1 - mask)``, as GPT writes it, if the last mask is the second term.

    Where that adds zero, the mask is one, and nothing is multiplied; where it hides, what else is there doesn't matter.
    """
    if node.target is not aten.mul.Tensor or not logits.parts or logits.parts[-1].yes is not None:
        return None
    mask = _complement(logits.parts[-1].node)
    for inner, factor in (node.args[:2], node.args[1::-1]):
        same = mask is not None and isinstance(factor, fx.Node) and _uncast(factor) is mask
        if same and isinstance(inner, fx.Node) and _fits(inner, node):
            return inner
    return None


def _complement(node: fx.Node) -> fx.Node | None:
    """Return the mask in ``number * (1 - mask)``."""
    node = skip_no_ops(node)
    while node.target in (*_TIMES, *_OVER, aten.neg.default):
        numbers = [arg for arg in node.args[1:2] if isinstance(arg, fx.Node)]
        if numbers or not isinstance(node.args[0], fx.Node):
            return None
        node = skip_no_ops(node.args[0])
    if node.target is aten.rsub.Scalar and tuple(node.args[1:]) == (1,):
        return _uncast(tensor_of(node.args[0]))
    return None


def _uncast(node: fx.Node) -> fx.Node:
    """Return what was cast, a condition perhaps."""
    node = skip_no_ops(node)
    while node.target is aten._to_copy.default:
        node = skip_no_ops(tensor_of(node.args[0]))
    return node


def _read_factor(node: fx.Node, logits: Logits) -> fx.Node:
    divides = node.target in _OVER
    first, second = node.args[0], node.args[1]
    if not divides and isinstance(first, fx.Node) and not is_factor(second) and is_factor(first):
        first, second = second, first
    logits.factors.append((factor_of(second), divides))
    return tensor_of(first)


def _read_mask(node: fx.Node, dims: Dims, logits: Logits) -> fx.Node:
    """Take one mask off; return the logits below it."""
    factors = tuple(logits.factors)
    yes: float | None = None
    no: float | None = None
    if node.target in _SUMS:
        if arg(node, 2, "alpha", 1) != 1:
            raise NotUnderstoodError("a mask is added with a factor")
        left, right = tensor_of(node.args[0]), tensor_of(node.args[1])
        swapped = not _reaches_product(left) or (_reaches_product(right) and not _fits(left, node))
        inner, mask = (right, left) if swapped else (left, right)
        if node.target is aten.sub.Tensor:
            if swapped:
                raise NotUnderstoodError("the logits are subtracted from something")
            factors = (*factors, (-1.0, False))
        if not mask.meta["val"].dtype.is_floating_point:
            raise NotUnderstoodError(f"{mask.meta['val'].dtype} is added to the logits")
    elif node.target in _FILL:
        inner, mask = tensor_of(node.args[0]), tensor_of(node.args[1])
        yes, no = _hidden(node.args[2], factors), 0.0
    else:
        mask, inner = tensor_of(node.args[0]), tensor_of(node.args[1])
        yes, no = 0.0, _hidden(node.args[2], factors)
    if not _fits(inner, node):
        raise NotUnderstoodError("a mask is larger than the logits")
    if not (yes is None and is_zero(mask)):
        logits.parts.append(Part(mask, _broadcast(mask, dims), yes, no, factors if yes is None else ()))
    return inner


def read_baddbmm(node: fx.Node, dims: Dims, logits: Logits) -> None:
    """Add what ``beta * added + alpha * (queries @ keys)`` adds and scales to what was found.

    Raises:
        NotUnderstoodError: A mask lies below a soft cap.
    """
    beta, alpha = number_of(arg(node, 3, "beta", 1)), number_of(arg(node, 4, "alpha", 1))
    added = tensor_of(node.args[0])
    if beta != 0 and not is_zero(added):
        if logits.cap is not None:
            raise NotUnderstoodError("a mask is added before the soft cap")
        factors = (*logits.factors, (beta, False))
        logits.parts.append(Part(added, _broadcast(added, dims), None, None, tuple(factors)))
    logits.factors.append((alpha, False))


def _hidden(value: object, factors: Sequence[Factor]) -> float:
    """Return minus infinity for a number that hides what it is put in the place of.

    Raises:
        NotUnderstoodError: It is a logit like others.
    """
    filled = number_of(value) * scale_of(factors)
    if not filled <= NEGLIGIBLE:
        raise NotUnderstoodError(f"logits are filled with {filled:g}")
    return -math.inf


def _fits(inner: fx.Node, node: fx.Node) -> bool:
    ours, theirs = shape_of(inner), shape_of(node)
    return len(ours) == len(theirs) and all(same_size(a, b) for a, b in zip(ours, theirs, strict=True))


def _broadcast(node: fx.Node, dims: Dims) -> Dims:
    """Return the dimensions of what broadcasts to a value with ``dims``."""
    shape = shape_of(node)
    if len(shape) > len(dims):
        raise NotUnderstoodError("a mask is larger than the logits")
    aligned = dims[len(dims) - len(shape) :]
    return tuple(() if static_int(size) == 1 else dim for size, dim in zip(shape, aligned, strict=True))


def _reaches_product(node: fx.Node) -> bool:
    """Whether a value is made from a product, past what logits go through."""
    while node.op == "call_function":
        if node.target in PRODUCTS:
            return True
        position = 1 if node.target in _WHERE else 0
        candidates = [position, 1] if node.target in (*_SUMS, *_TIMES) else [position]
        sources = [node.args[p] for p in candidates if p < len(node.args)]
        nodes = [
            source
            for source in sources
            if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), torch.Tensor)
        ]
        if not nodes:
            return False
        if len(nodes) > 1 and _reaches_product(nodes[1]):
            return True
        node = nodes[0]
    return False
