"""Find every scaled dot-product attention and the keys and values it really reads, before they are repeated for GQA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.nodes import arg, same_size, shape_of, skip_no_ops, source_line, static_int
from adakv_compile.passes.normalise import SOFTMAXES, why_not_attention
from adakv_compile.report import Reason, Refusal

__all__ = ["AttentionSite", "Unsupported", "find_attention"]

aten = torch.ops.aten
_PRODUCTS: Final = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_PASSED_ON: Final = (
    aten._to_copy.default,
    aten.dropout.default,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    # What attention sinks, differential attention and the like do to their weights.
    aten.slice.Tensor,
    aten.mul.Tensor,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
)
_VIEWS: Final = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class AttentionSite:
    """One attention whose operands are understood.

    Attributes:
        node: The attention in the graph.
        query: ``[B, Hq, T, Dk]``.
        key: ``[B, Hkv, L, Dk]``, not repeated.
        value: ``[B, Hkv, L, Dv]``, not repeated.
        mask: Boolean or additive mask, broadcastable to ``[B, Hq, T, L]``, or ``None``.
        is_causal: The operator's own causal flag (aligned at the first query and the first key).
        scale: Factor on the logits.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(shape_of(self.query)[1])

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cache."""
        return int(shape_of(self.key)[1])

    @property
    def query_length(self) -> int | torch.SymInt:
        """New tokens of this call."""
        return shape_of(self.query)[2]

    @property
    def key_length(self) -> int | torch.SymInt:
        """Entries attended to."""
        return shape_of(self.key)[2]


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
        if node.target is aten.scaled_dot_product_attention.default:
            found.append(_understand(node))
        elif node.target in SOFTMAXES and node not in program.superseded and _is_weights(node):
            found.append(Unsupported(node, Refusal(Reason.SPELLED_OUT, why_not_attention(node), source_line(node))))
    return tuple(found)


def _is_weights(softmax: fx.Node) -> bool:
    """Whether a softmax is multiplied with something, perhaps after some arithmetic."""
    pending = list(softmax.users)
    while pending:
        user = pending.pop()
        if user.target in _PRODUCTS:
            return True
        if skip_no_ops(user) is softmax or user.target in _PASSED_ON:
            pending.extend(user.users)
    return False


def _understand(node: fx.Node) -> AttentionSite | Unsupported:
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    if arg(node, 4, "dropout_p", 0.0) != 0.0:
        return Unsupported(node, Refusal(Reason.DROPOUT, f"dropout_p={arg(node, 4, 'dropout_p')}"))
    key, value = _before_repeat(key), _before_repeat(value)
    shapes = [shape_of(operand) for operand in (query, key, value)]
    heads = [static_int(shape[1]) if len(shape) == 4 else None for shape in shapes]
    num_heads, num_kv_heads, num_value_heads = heads
    if num_heads is None or num_kv_heads is None or num_kv_heads != num_value_heads or num_heads % num_kv_heads:
        return Unsupported(node, Refusal(Reason.HEADS, f"query {shapes[0]}, key {shapes[1]}, value {shapes[2]}"))
    mask = arg(node, 3, "attn_mask")
    scale = arg(node, 6, "scale")
    head_dim = static_int(shapes[0][3])
    if head_dim is None or not (scale is None or isinstance(scale, (int, float))):
        return Unsupported(node, Refusal(Reason.HEADS, f"head dimension {shapes[0][3]}, scale {scale}"))
    return AttentionSite(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=mask if isinstance(mask, fx.Node) else None,
        is_causal=bool(arg(node, 5, "is_causal", False)),
        scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
    )


def _before_repeat(node: fx.Node) -> fx.Node:
    """Return the tensor that was repeated for grouped queries, or the node itself, without no-ops."""
    node = skip_no_ops(node)
    if node.target is aten.repeat_interleave.self_int and arg(node, 2, "dim") in (1, -3):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return skip_no_ops(source)
    if node.target not in _VIEWS or len(shape_of(node)) != 4:
        return node
    # [B, Hkv, L, D] -> unsqueeze -> [B, Hkv, 1, L, D] -> expand -> [B, Hkv, G, L, D] -> view -> [B, Hkv * G, L, D]
    grouped = node.args[0]
    assert isinstance(grouped, fx.Node)
    grouped = skip_no_ops(grouped)
    if grouped.target is not aten.expand.default:
        return node
    single = grouped.args[0]
    assert isinstance(single, fx.Node)
    single = skip_no_ops(single)
    if single.target is not aten.unsqueeze.default or single.args[1] not in (2, -3):
        return node
    source = single.args[0]
    assert isinstance(source, fx.Node)
    wide, narrow, final = shape_of(grouped), shape_of(source), shape_of(node)
    if len(narrow) != 4 or len(wide) != 5:
        return node
    kept = all(same_size(a, b) for a, b in zip((*wide[:2], *wide[3:]), narrow, strict=True))
    merged = same_size(final[1], wide[1] * wide[2]) and same_size(final[2], wide[3]) and same_size(final[3], wide[4])
    return skip_no_ops(source) if kept and merged else node
