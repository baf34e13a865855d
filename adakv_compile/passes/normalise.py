"""Give attentions that are written out with matmul and softmax the operator they mean, so that one analysis serves all.

The operator's call is added beside what it stands for, which stays in the graph: whatever the plan leaves alone is put
back by the rewrite and runs to the last bit as the model wrote it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import fx

from adakv_compile import _torch
from adakv_compile.capture import Program
from adakv_compile.passes.nodes import arg, same_size, shape_of, skip_no_ops

__all__ = ["SOFTMAXES", "normalise", "why_not_attention"]

aten = torch.ops.aten

SOFTMAXES: Final = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_WHERE: Final = (aten.where.self, aten.where.ScalarOther)
_FILL: Final = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_TIMES: Final = (aten.mul.Tensor, aten.mul.Scalar)
_OVER: Final = (aten.div.Tensor, aten.div.Scalar)
_LAST_TWO: Final = ([2, 3], [-2, -1], [-1, 2], [-2, 3])


class _NotUnderstoodError(Exception):
    """The softmax is no attention, or one whose meaning the operator can't express."""


@dataclass
class _Logits:
    """What reached the softmax, read from the outside in.

    Attributes:
        masks: Condition and what is added where it holds and where not; or a tensor that is added.
        factors: Number or tensor of one element, and whether it divides.
    """

    masks: list[tuple[fx.Node, float | None, float | None]] = dataclasses.field(
        default_factory=list[tuple[fx.Node, "float | None", "float | None"]]
    )
    factors: list[tuple[float | fx.Node, bool]] = dataclasses.field(
        default_factory=list["tuple[float | fx.Node, bool]"]
    )


@dataclass(frozen=True)
class _Found:
    product: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    logits: _Logits


def normalise(program: Program) -> Program:
    """Add the operator for every attention that is written out and understood.

    Args:
        program: The captured graph; calls are added to it.

    Returns:
        The program that knows which results stand for which.
    """
    spelled: dict[fx.Node, fx.Node] = {}
    for node in list(program.module.graph.nodes):
        if node.target in SOFTMAXES:
            try:
                found = _understand(node)
                if found.product in program.outputs:
                    continue
                spelled[_emit(program, found, node)] = found.product
            except _NotUnderstoodError:
                continue
    return dataclasses.replace(program, spelled=spelled, superseded=_only_for(spelled.values())) if spelled else program


def why_not_attention(softmax: fx.Node) -> str:
    """Say what of an attention that is written out was not understood."""
    try:
        _understand(softmax)
    except _NotUnderstoodError as failure:
        return str(failure)
    return "its result is returned as it is"


def _only_for(products: Any) -> frozenset[fx.Node]:
    """Return the nodes that nothing but ``products`` needs, themselves included."""
    found = set(products)
    pending = list(found)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source.op == "call_function" and source not in found and all(user in found for user in source.users):
                found.add(source)
                pending.append(source)
    return frozenset(found)


# -- reading ---------------------------------------------------------------------------------------------------------


def _understand(softmax: fx.Node) -> _Found:
    value_shape = shape_of(softmax)
    if len(value_shape) != 4 or arg(softmax, 1, "dim") not in (-1, 3):
        raise _NotUnderstoodError(f"a softmax over dimension {arg(softmax, 1, 'dim')} of {len(value_shape)}")
    product = _product_of(softmax)
    logits = _Logits()
    scores = _read_logits(_node(softmax.args[0]), logits)
    if not all(same_size(a, b) for a, b in zip(shape_of(scores), value_shape, strict=True)):
        raise _NotUnderstoodError("a mask is larger than the logits")
    query, transposed = skip_no_ops(_node(scores.args[0])), skip_no_ops(_node(scores.args[1]))
    value = skip_no_ops(_node(product.args[1]))
    query, key = _same_dtype(query, _untransposed(transposed), value)
    heads, key_heads = shape_of(query)[1], shape_of(key)[1]
    alike = same_size(heads, key_heads) and same_size(heads, shape_of(value)[1])
    shared = key_heads == 1 and shape_of(value)[1] == 1
    if len(shape_of(query)) != 4 or not (alike or shared):
        raise _NotUnderstoodError(f"query heads {heads} and key heads {key_heads}")
    return _Found(product, query, key, value, logits)


def _node(value: object) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise _NotUnderstoodError(f"an operand is {value}")
    return value


def _product_of(softmax: fx.Node) -> fx.Node:
    """Follow the weights to the product with the values."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise _NotUnderstoodError("the weights are used more than once, or returned")
        (user,) = users
        if user.target is aten.matmul.default and user.args[0] is node:
            return user
        if user.target is aten.dropout.default and user.args[0] is node:
            if user.args[1] != 0 and user.args[2]:
                raise _NotUnderstoodError("weights are dropped")
        elif not (_is_cast(user) or skip_no_ops(user) is skip_no_ops(node)):
            raise _NotUnderstoodError(f"the weights go through {user.target}")
        node = user


def _read_logits(node: fx.Node, logits: _Logits) -> fx.Node:
    """Peel masks and factors off the logits, down to the product of queries and keys."""
    while True:
        node = skip_no_ops(node)
        first = node.args[0] if node.args else None
        if node.target is aten.matmul.default:
            return node
        if _is_cast(node):
            node = _node(first)
        elif node.target in _TIMES or node.target in _OVER:
            logits.factors.append((_factor(node.args[1]), node.target in _OVER))
            node = _node(first)
        elif node.target in (aten.add.Tensor, *_WHERE, *_FILL):
            if logits.factors:
                raise _NotUnderstoodError("the mask is scaled with the logits")
            node = _read_mask(node, logits)
        else:
            raise _NotUnderstoodError(f"the logits go through {node.target}")


def _read_mask(node: fx.Node, logits: _Logits) -> fx.Node:
    """Take one mask off; return the logits below it."""
    if node.target is aten.add.Tensor:
        if arg(node, 2, "alpha", 1) != 1:
            raise _NotUnderstoodError("a mask is added with a factor")
        left, right = _node(node.args[0]), _node(node.args[1])
        inner, mask = (left, right) if _reaches_product(left) else (right, left)
        if not mask.meta["val"].dtype.is_floating_point:
            raise _NotUnderstoodError(f"{mask.meta['val'].dtype} is added to the logits")
        logits.masks.append((mask, None, None))
        return inner
    if node.target in _FILL:
        inner, hidden, fill = _node(node.args[0]), _node(node.args[1]), node.args[2]
        logits.masks.append((hidden, _number(fill), 0.0))
        return inner
    condition, inner, fill = _node(node.args[0]), _node(node.args[1]), node.args[2]
    logits.masks.append((condition, 0.0, _number(fill)))
    return inner


def _reaches_product(node: fx.Node) -> bool:
    """Whether an operand of an addition is the logits."""
    while node.op == "call_function":
        if node.target is aten.matmul.default:
            return True
        position = 1 if node.target in _WHERE else 0
        source = node.args[position] if len(node.args) > position else None
        if not isinstance(source, fx.Node):
            return False
        node = source
    return False


def _factor(value: object) -> float | fx.Node:
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor) and not shape_of(value):
        return value
    factor = _number(value)
    if not factor or math.isinf(factor):
        raise _NotUnderstoodError(f"the logits are scaled by {factor}")
    return factor


def _number(value: object) -> float:
    """Return a number, also one that was made into a tensor."""
    if isinstance(value, fx.Node):
        value = _constant(skip_no_ops(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise _NotUnderstoodError(f"{value} is not a number")
    return float(value)


def _constant(node: fx.Node) -> object:
    """Return the value of a tensor that holds one constant, or the node itself."""
    if node.op == "get_attr":
        held: object = getattr(node.graph.owning_module, str(node.target), None)
        if isinstance(held, torch.Tensor) and not _torch.is_fake(held) and held.numel() == 1:
            return held.item()
        return node
    if node.target is aten.full.default and not shape_of(node):
        return node.args[1]
    return node.args[0] if node.target is aten.scalar_tensor.default else node


def _untransposed(node: fx.Node) -> fx.Node:
    """Return the keys ``[B, H, L, D]`` from ``[B, H, D, L]``."""
    if node.target is aten.transpose.int and sorted(cast("list[int]", node.args[1:3])) in _LAST_TWO:
        return skip_no_ops(_node(node.args[0]))
    if node.target is aten.permute.default and list(node.args[1]) in ([0, 1, 3, 2], [0, 1, -1, -2]):  # type: ignore[call-overload]
        return skip_no_ops(_node(node.args[0]))
    raise _NotUnderstoodError("the keys are not transposed right before the product")


def _same_dtype(query: fx.Node, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Take off casts to a wider type, which the operator makes by itself."""
    wanted = value.meta["val"].dtype
    found = [_node(node.args[0]) if _is_cast(node) else node for node in (query, key)]
    if all(node.meta["val"].dtype == wanted for node in (query, key)):
        found = [query, key]
    if any(node.meta["val"].dtype != wanted for node in found):
        raise _NotUnderstoodError("queries, keys and values have different dtypes")
    return skip_no_ops(found[0]), skip_no_ops(found[1])


def _is_cast(node: fx.Node) -> bool:
    """Whether a node changes nothing but the floating-point type."""
    if node.target is not aten._to_copy.default or set(node.kwargs) - {"dtype", "memory_format"}:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and all(value.meta["val"].dtype.is_floating_point for value in (source, node))


# -- writing ---------------------------------------------------------------------------------------------------------


def _emit(program: Program, found: _Found, softmax: fx.Node) -> fx.Node:
    """Add the operator right after the product it stands for, and hand its result to the product's users."""
    graph, product = program.module.graph, found.product
    anchor = product

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        nonlocal anchor
        with graph.inserting_after(anchor):
            node = graph.call_function(target, args, kwargs)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        with program.fake_mode:
            node.meta["val"] = target(*values, **kwargs)
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            if name in softmax.meta:
                node.meta[name] = softmax.meta[name]
        anchor = node
        return node

    dtype = found.query.meta["val"].dtype
    query, scale = found.query, 1.0
    for factor, divides in found.logits.factors:
        if isinstance(factor, fx.Node):
            # Its value is data, a constant that the model keeps in a tensor: queries can be scaled as well as logits.
            query = call(aten.div.Tensor if divides else aten.mul.Tensor, query, factor)
            query = query if query.meta["val"].dtype == dtype else call(aten._to_copy.default, query, dtype=dtype)
        else:
            scale = scale / factor if divides else scale * factor
    mask: fx.Node | None = None
    # What is hidden stays hidden whatever is added to it, so conditions come last.
    for condition, yes, no in sorted(found.logits.masks, key=lambda part: part[1] is not None):
        if yes is None or no is None:
            mask = condition if mask is None else call(aten.add.Tensor, mask, condition)
        elif mask is None:
            mask = call(aten.where.Scalar, condition, yes, no)
        elif no == 0.0:
            mask = call(aten.where.ScalarSelf, condition, yes, mask)
        else:
            mask = call(aten.where.ScalarOther, condition, mask, no)
    if mask is not None and mask.meta["val"].dtype not in (dtype, torch.bool):
        mask = call(aten._to_copy.default, mask, dtype=dtype)
    result = call(
        aten.scaled_dot_product_attention.default,
        query,
        found.key,
        found.value,
        mask,
        0.0,
        False,
        scale=scale,
        enable_gqa=not same_size(shape_of(query)[1], shape_of(found.key)[1]),
    )
    if result.meta["val"].dtype != product.meta["val"].dtype:
        result = call(aten._to_copy.default, result, dtype=product.meta["val"].dtype)
    product.replace_all_uses_with(result)
    return result
