"""Find every attention and the keys and values it really reads, before they are repeated or brought into its layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.kernels import attention
from adakv_compile.passes.axes import Axes, Dims, Step, climb
from adakv_compile.passes.emit import Order
from adakv_compile.passes.flash import operator_of, refuse_packed
from adakv_compile.passes.nodes import arg, same_size, shape_of, source_line, static_int
from adakv_compile.passes.normalise import why_not_attention
from adakv_compile.passes.products import PRODUCTS
from adakv_compile.passes.spelled import SOFTMAXES
from adakv_compile.report import Reason, Refusal

__all__ = ["AttentionSite", "Unsupported", "find_attention"]

aten = torch.ops.aten


_LOG_SOFTMAXES: Final = (aten.log_softmax.int, aten._log_softmax.default)
_SUMS: Final = (*PRODUCTS, aten.linear.default, aten.mm.default, aten.mv.default, aten.sum.dim_IntList)


@dataclass(frozen=True)
class Operand:
    """The keys or the values of an attention.

    Attributes:
        steps: The attention's operand and what it is a view of, upwards.
        axes: The axes that their dimensions are written in.
        batch: Those of the batch.
        heads: Those of the KV heads.
        column: Those of the sequence.
        inner: Those of the head dimension.
    """

    steps: tuple[Step, ...]
    axes: Axes
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    column: tuple[str, ...]
    inner: tuple[str, ...]

    @property
    def order(self) -> Order:
        """The dimensions as the operators take them, ``[B, Hkv, L, D]``."""
        return (self.batch, self.heads, self.column, self.inner)

    @property
    def head_dim(self) -> int | torch.SymInt:
        """The head dimension."""
        return self.axes.size(self.inner)


@dataclass(frozen=True)
class AttentionSite:
    """One attention whose operands are understood.

    Attributes:
        node: The attention in the graph.
        query: ``[B, Hq, T, Dk]``.
        keys: The keys.
        values: The values.
        mask: Boolean or additive mask, broadcastable to ``[B, Hq, T, L]``, or ``None``.
        sinks: ``[Hq]`` logits without values, or ``None``.
        is_causal: The operator's own causal flag (aligned at the first query and the first key).
        scale: Factor on the logits.
        softcap: Cap of the logits, or ``None``.
    """

    node: fx.Node
    query: fx.Node
    keys: Operand
    values: Operand
    mask: fx.Node | None
    sinks: fx.Node | None
    is_causal: bool
    scale: float
    softcap: float | None

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(shape_of(self.query)[1])

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cache."""
        return int(self.keys.axes.size(self.keys.heads))

    @property
    def key_dim(self) -> int | torch.SymInt:
        """Head dimension of the keys."""
        return self.keys.head_dim

    @property
    def value_dim(self) -> int | torch.SymInt:
        """Head dimension of the values."""
        return self.values.head_dim

    @property
    def batch_size(self) -> int | torch.SymInt:
        """Rows of the batch."""
        return shape_of(self.query)[0]

    @property
    def query_length(self) -> int | torch.SymInt:
        """New tokens of this call."""
        return shape_of(self.query)[2]

    @property
    def key_length(self) -> int | torch.SymInt:
        """Entries attended to."""
        return self.keys.axes.size(self.keys.column)

    @property
    def is_plain(self) -> bool:
        """Whether any scaled dot-product attention computes it."""
        return self.softcap is None and self.sinks is None

    def operand(self, which: str) -> Operand:
        """Return the keys or the values.

        Args:
            which: ``"key"`` or ``"value"``.
        """
        return self.keys if which == "key" else self.values


@dataclass(frozen=True)
class Unsupported:
    """An attention that is left alone, and why."""

    node: fx.Node
    refusal: Refusal


def find_attention(program: Program) -> tuple[AttentionSite | Unsupported, ...]:
    """Return the attentions of a normalised program, in order; the graph is only read.

    A softmax that is left and whose result is multiplied with another tensor is an attention that was not understood:
    it is returned as unsupported, so that nobody believes it to be compressed.
    """
    found: list[AttentionSite | Unsupported] = []
    for node in program.module.graph.nodes:
        if node.target in (aten.scaled_dot_product_attention.default, attention.SPEC.overload):
            found.append(_understand(node))
        elif node.target in SOFTMAXES and node not in program.superseded and _is_weights(node):
            found.append(Unsupported(node, Refusal(Reason.SPELLED_OUT, why_not_attention(node), source_line(node))))
        elif node.target in _LOG_SOFTMAXES and _is_weights(node):
            found.append(Unsupported(node, Refusal(Reason.SPELLED_OUT, "by logarithms", source_line(node))))
        elif node not in program.superseded and _is_named_attention(node):
            found.append(Unsupported(node, refuse_packed(node) or _refuse_named(node, program.refused.get(node))))
    return tuple(found)


def _is_named_attention(node: fx.Node) -> bool:
    """Whether an operator's name says that it attends: flex_attention, FlashAttention's, another library's."""
    name = str(operator_of(node) or node.target)
    return node.op == "call_function" and ("attention" in name or "attn" in name)


def _refuse_named(node: fx.Node, why: str | None) -> Refusal:
    name = str(operator_of(node) or node.target)
    return Refusal(Reason.OPERATOR, name if why is None else f"{name}: {why}", source_line(node))


def _is_weights(softmax: fx.Node) -> bool:
    """Whether a softmax is multiplied with something, perhaps after some arithmetic that keeps it as large as it is."""
    if len(shape_of(softmax)) < 3:
        return False
    columns = shape_of(softmax)[-1]
    pending, seen = list(softmax.users), set(softmax.users)
    while pending:
        user = pending.pop()
        if user.target in _SUMS and _sums_columns(user, columns):
            return True
        value = user.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        # Sinks and other entries that are no keys are cut off.
        if any(same_size(size, columns) or same_size(size + 1, columns) for size in value.shape[-3:]):
            fresh = [other for other in user.users if other not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return False


def _sums_columns(node: fx.Node, columns: int | torch.SymInt) -> bool:
    """Whether weights over the columns disappear in a product or a sum that has a dimension in their place."""
    if node.target is not aten.sum.dim_IntList:
        return True
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = arg(node, 1, "dim")
    shape = shape_of(source)
    summed = [shape[dim] for dim in dims] if isinstance(dims, (list, tuple)) else []
    return len(shape) > 3 and any(same_size(size, columns) for size in summed)


def _understand(node: fx.Node) -> AttentionSite | Unsupported:
    operands = node.args[:3]
    query, key, value = (operand for operand in operands if isinstance(operand, fx.Node))
    if arg(node, 4, "dropout_p", 0.0) != 0.0 and node.target is not attention.SPEC.overload:
        return Unsupported(node, Refusal(Reason.DROPOUT, f"dropout_p={arg(node, 4, 'dropout_p')}"))
    shapes = [shape_of(operand) for operand in (query, key, value)]
    heads = _heads(shapes)
    if heads is None:
        return Unsupported(node, Refusal(Reason.HEADS, f"query {shapes[0]}, key {shapes[1]}, value {shapes[2]}"))
    keys, values = _operand(key, *heads), _operand(value, *heads)
    if keys is None or values is None or keys.axes.size(keys.heads) != values.axes.size(values.heads):
        return Unsupported(node, Refusal(Reason.HEADS, "keys and values are repeated in another order than by groups"))
    marked = node.target is attention.SPEC.overload
    mask = node.args[3] if marked else arg(node, 3, "attn_mask")
    sinks = node.args[4] if marked else None
    scale = arg(node, 6, "scale")
    head_dim = static_int(shapes[0][3])
    if head_dim is None or not (scale is None or isinstance(scale, (int, float))):
        return Unsupported(node, Refusal(Reason.HEADS, f"head dimension {shapes[0][3]}, scale {scale}"))
    softcap = node.args[7] if marked else None
    return AttentionSite(
        node=node,
        query=query,
        keys=keys,
        values=values,
        mask=mask if isinstance(mask, fx.Node) else None,
        sinks=sinks if isinstance(sinks, fx.Node) else None,
        is_causal=bool(arg(node, 5, "is_causal", False)),
        scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
        softcap=float(softcap) if isinstance(softcap, (int, float)) else None,
    )


def _names(axes: Axes, dims: Dims) -> frozenset[str]:
    return frozenset(axis for dim in axes.resolve(dims) for axis in dim)


def _heads(shapes: Sequence[Sequence[int | torch.SymInt]]) -> tuple[int, int] | None:
    """Return the number of query heads and of heads of the operands; ``None`` if they don't fit."""
    if any(len(shape) != 4 for shape in shapes):
        return None
    heads, key_heads, value_heads = (static_int(shape[1]) for shape in shapes)
    if heads is None or key_heads is None or key_heads != value_heads or heads % key_heads:
        return None
    return heads, key_heads


def _operand(node: fx.Node, num_heads: int, num_given: int) -> Operand | None:
    """Follow keys or values up; ``None`` if their heads are not repeated one by one."""
    axes = Axes()
    sizes = (shape_of(node)[0], num_heads, *shape_of(node)[2:])
    names = ("batch", "heads", "column", "inner")
    for name, size in zip(names, sizes, strict=True):
        axes.add(name, size)
    given = ("heads",)
    if num_given != num_heads:
        pieces = axes.carve(given, (num_given, num_heads // num_given))
        assert pieces is not None  # a product of two numbers divides
        given = pieces[0]
    steps = tuple(climb(axes, node, (("batch",), given, ("column",), ("inner",))))
    every, held = axes.flat(("heads",)), _names(axes, steps[-1].dims)
    heads = tuple(axis for axis in every if axis in held)
    if heads != every[: len(heads)]:
        return None
    batch, _, column, inner = (axes.flat((name,)) for name in names)
    return Operand(steps, axes, batch, heads, column, inner)
