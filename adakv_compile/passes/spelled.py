"""Read what an attention means that is written out as two products around a softmax, in any layout and order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import fx

from adakv_compile.passes.axes import Axes, Dims, Step, climb
from adakv_compile.passes.gates import find_gate
from adakv_compile.passes.literals import NotUnderstoodError, tensor_of
from adakv_compile.passes.logits import Logits, read_baddbmm, read_logits
from adakv_compile.passes.nodes import arg, is_cast, same_size, shape_of, static_int
from adakv_compile.passes.products import PRODUCTS, Product, label

__all__ = ["SOFTMAXES", "Meaning", "understand"]

aten = torch.ops.aten

SOFTMAXES: Final = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@dataclass
class Meaning:
    """An attention in the terms of :mod:`adakv_compile.kernels.attention.op`.

    Attributes:
        product: The node whose value it is.
        axes: The axes that all dimensions are written in.
        query: Queries before any repetition.
        key: Keys before they are repeated for grouped queries.
        value: Values likewise.
        dims: Dimensions of ``product``.
        batch: The axes of the batch.
        heads: The axes of the KV heads.
        groups: The axes of the queries that share a KV head.
        row: The axes of the queries' sequence.
        column: The axes of the keys' sequence.
        inner: The head dimension of queries and keys.
        outer: That of values.
        logits: What is done between the two products.
    """

    product: fx.Node
    axes: Axes
    query: Step
    key: Step
    value: Step
    dims: Dims
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    groups: tuple[str, ...]
    row: tuple[str, ...]
    column: tuple[str, ...]
    inner: tuple[str, ...]
    outer: tuple[str, ...]
    logits: Logits


def understand(softmax: fx.Node) -> Meaning:
    """Return what an attention means.

    Args:
        softmax: A node of :data:`SOFTMAXES`.

    Raises:
        NotUnderstoodError: It is no attention, or one that can't be expressed.
    """
    axes = Axes()
    weighing = _product_of(softmax)
    summed = label(axes, weighing)
    if summed is None:
        raise NotUnderstoodError(f"the weights go into a product that is not understood, {weighing.args[0]}")
    weights = _weights_side(summed, softmax)
    dims, sink = _dims_of_softmax(axes, softmax, weights)
    over = arg(softmax, 1, "dim")
    over = over % len(dims) if isinstance(over, int) else -1
    if over < 0 or len(dims[over]) != 1 or (sink and over != len(dims) - 1):
        raise NotUnderstoodError(f"a softmax over dimension {arg(softmax, 1, 'dim')} of {len(dims)}")
    column = dims[over]
    values = (summed.right, summed.right_dims) if weights[0] is summed.left else (summed.left, summed.left_dims)
    if column[0] not in _names(axes, values[1]) or column[0] in _names(axes, summed.dims):
        raise NotUnderstoodError("the weights are not what the values are summed with")
    logits = Logits()
    gate = None if sink or over != len(dims) - 1 else find_gate(axes, softmax, weighing, dims)
    if gate is not None:
        weighing, logits.sinks = gate
    scored, scored_dims = read_logits(
        axes, tensor_of(softmax.args[0]), dims, logits, sink, above_all=over == len(dims) - 1
    )
    product = label(axes, scored)
    if product is None or not axes.identify(product.dims, scored_dims):
        raise NotUnderstoodError("the logits come from a product that is not understood")
    if scored.target is aten.baddbmm.default:
        read_baddbmm(scored, scored_dims, logits)
    return _assemble(axes, weighing, summed, product, values, dims, column, logits)


# -- the shape of it -------------------------------------------------------------------------------------------------


def _assemble(
    axes: Axes,
    weighing: fx.Node,
    summed: Product,
    product: Product,
    values: tuple[fx.Node, Dims],
    dims: Dims,
    column: tuple[str, ...],
    logits: Logits,
) -> Meaning:
    """Tell the axes apart.

    Args:
        axes: The axes.
        weighing: The second product.
        summed: Its dimensions.
        product: The first product.
        values: The values in the second product and their dimensions.
        dims: Dimensions of the softmax.
        column: The one that it is over.
        logits: What is done between the products.
    """
    sides = [(product.left, product.left_dims), (product.right, product.right_dims)]
    with_column = [column[0] in _names(axes, side) for _, side in sides]
    if with_column == [True, False]:
        sides.reverse()
    elif with_column != [False, True]:
        raise NotUnderstoodError("queries and keys can't be told apart")
    query, key = (_before_repeat(axes, node, side) for node, side in sides)
    value = _before_repeat(axes, *values)
    query, key, value = _of_one_dtype(axes, query, key, value)
    column = axes.flat(column)
    inner = _shared_inner(axes, product, sides)
    out = axes.resolve(summed.dims)
    weights_dims = summed.left_dims if values[0] is summed.right else summed.right_dims
    outer = tuple(a for a in _names(axes, values[1]) if a not in column and a not in _names(axes, weights_dims))
    query_axes, key_axes, value_axes = (_names(axes, step.dims) for step in (query, key, value))
    rows = [a for a in query_axes if a not in inner and a not in key_axes and a not in value_axes]
    row = _row_of(axes, dims, column, rows)
    outside = {*column, *inner, *row, *outer}
    free = [a for dim in out for a in dim if a not in outside]
    repeated = [
        [a for a in free if a not in side and static_int(axes.sizes[a]) != 1] for side in (key_axes, value_axes)
    ]
    if repeated[0] != repeated[1]:
        raise NotUnderstoodError("keys and values are repeated in different ways")
    held = [a for a in free if a not in repeated[0]]
    batch, heads = _batch_and_heads(axes, held, key)
    groups = tuple(a for a in free if a not in held)
    known = {*batch, *heads, *groups, *outside}
    for step in (query, key, value):
        strangers = [a for a in _names(axes, step.dims) if a not in known and a not in axes.picked]
        if any(static_int(axes.sizes[a]) != 1 for a in strangers):
            raise NotUnderstoodError(f"{step.node.name} has a dimension of its own")
    return Meaning(
        product=weighing,
        axes=axes,
        query=query,
        key=key,
        value=value,
        dims=out,
        batch=batch,
        heads=heads,
        groups=groups,
        row=row,
        column=column,
        inner=inner,
        outer=outer,
        logits=logits,
    )


def _batch_and_heads(axes: Axes, held: Sequence[str], key: Step) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tell the batch from the heads: it comes first, unless its dimension was dropped because its size is one."""
    if len(held) == 1:
        for step in climb(axes, key.node, key.dims):
            dims = axes.resolve(step.dims)
            if len(dims) == 4 and not dims[0] and static_int(shape_of(step.node)[0]) == 1:
                return (), tuple(held)
    return tuple(held[:1]), tuple(held[1:])


def _row_of(axes: Axes, dims: Dims, column: tuple[str, ...], rows: Sequence[str]) -> tuple[str, ...]:
    """Return the sequence among the axes that only queries have; the others group queries on a head."""
    if not rows:
        raise NotUnderstoodError("the queries have no sequence")
    order = [a for a in _names(axes, dims) if a in rows]
    beside = dims[-1] if axes.flat(dims[-1]) != axes.flat(column) else dims[-2]
    return tuple(([a for a in axes.flat(beside) if a in rows] or order)[-1:])


def _shared_inner(axes: Axes, product: Product, sides: Sequence[tuple[fx.Node, Dims]]) -> tuple[str, ...]:
    outside = _names(axes, product.dims)
    left, right = (_names(axes, dims) for _, dims in sides)
    inner = tuple(a for a in left if a in right and a not in outside)
    if not inner:
        raise NotUnderstoodError("queries and keys share no head dimension")
    return inner


def _names(axes: Axes, dims: Dims) -> tuple[str, ...]:
    return tuple(axis for dim in axes.resolve(dims) for axis in dim)


def _before_repeat(axes: Axes, node: fx.Node, dims: Dims) -> Step:
    """Return the value nearest to the product that has no repeated dimension any more."""
    steps = list(climb(axes, node, dims, casts=True))
    chosen = 0
    for position in range(1, len(steps)):
        if len(_names(axes, steps[position].dims)) < len(_names(axes, steps[position - 1].dims)):
            chosen = position
    return Step(steps[chosen].node, axes.resolve(steps[chosen].dims))


def _of_one_dtype(axes: Axes, *operands: Step) -> tuple[Step, ...]:
    """Take off casts to a wider type, which the operators make by themselves."""
    wanted = operands[-1].node.meta["val"].dtype
    found: list[Step] = []
    for operand in operands:
        steps = climb(axes, operand.node, operand.dims, casts=True)
        narrow = next((step for step in steps if step.node.meta["val"].dtype == wanted), None)
        if narrow is None:
            raise NotUnderstoodError("queries, keys and values have different dtypes")
        found.append(Step(narrow.node, axes.resolve(narrow.dims)))
    return tuple(found)


# -- from the softmax to the sum of values ---------------------------------------------------------------------------


def _product_of(softmax: fx.Node) -> fx.Node:
    """Return the product that the weights go into."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise NotUnderstoodError("the weights are used more than once, or returned")
        (user,) = users
        if user.target in PRODUCTS and user.target is not aten.baddbmm.default:
            return user
        if user.op != "call_function" or not user.args or user.args[0] is not node:
            raise NotUnderstoodError(f"the weights go through {user.target}")
        node = user


def _weights_side(summed: Product, softmax: fx.Node) -> tuple[fx.Node, Dims]:
    """Return the operand of the second product that is made from the softmax."""
    for operand, dims in ((summed.left, summed.left_dims), (summed.right, summed.right_dims)):
        node = operand
        while node is not softmax and node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if node is softmax:
            return operand, dims
    raise NotUnderstoodError("the weights are not what the values are summed with")


def _dims_of_softmax(axes: Axes, softmax: fx.Node, weights: tuple[fx.Node, Dims]) -> tuple[Dims, bool]:
    """Return the dimensions of the softmax, and whether its last entry, a sink, is dropped."""
    (node, dims), sink = weights, False
    while node is not softmax:
        if _is_inactive_dropout(node):
            node = tensor_of(node.args[0])
        elif _drops_last(node):
            if sink:
                raise NotUnderstoodError("more than one entry of the weights is dropped")
            sink, node = True, tensor_of(node.args[0])
        elif is_cast(node):
            node = tensor_of(node.args[0])
        else:
            steps = climb(axes, node, dims)
            next(steps)
            above = next(steps, None)
            if above is None or not above.whole or (sink and above.dims != axes.resolve(dims)):
                raise NotUnderstoodError(f"the weights go through {node.target}")
            node, dims = above.node, above.dims
    return axes.resolve(dims), sink


def _is_inactive_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and not (node.args[1] and node.args[2])


def _drops_last(node: fx.Node) -> bool:
    """Whether a node is ``x[..., :-1]``."""
    if (
        node.target is not aten.slice.Tensor
        or arg(node, 4, "step", 1) != 1
        or arg(node, 2, "start", 0) not in (0, None)
    ):
        return False
    rank = len(shape_of(node))
    if cast("int", arg(node, 1, "dim", 0)) % rank != rank - 1:
        return False
    return same_size(shape_of(tensor_of(node.args[0]))[-1], shape_of(node)[-1] + 1)
