"""Recognise sinks that are written as a gate on the attention's result.

A softmax with one more logit ``s`` in its denominator gives ``softmax(x) @ v * sigmoid(logsumexp(x) - s)``: some models
compute that from an attention without sinks and its log-sum-exp.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from adakv_compile.passes.axes import Axes, Dims, Step, climb
from adakv_compile.passes.nodes import arg, shape_of, static_int

__all__ = ["find_gate"]

aten = torch.ops.aten

_GATE: Final = (aten.logsumexp.default, aten.sub.Tensor, aten.sigmoid.default, aten.unsqueeze.default)


def find_gate(axes: Axes, softmax: fx.Node, weighing: fx.Node, dims: Dims) -> tuple[fx.Node, Step] | None:
    """Return the gated result of an attention and its sinks, ``None`` if nothing is gated so.

    Args:
        axes: The axes of the attention.
        softmax: Its softmax, over the last dimension.
        weighing: The product of its weights and values.
        dims: Dimensions of the softmax.
    """
    logits: Any = softmax.args[0]
    sums = [user for user in logits.users if user.target is aten.logsumexp.default and user.args[1] == [-1]]
    if len(sums) != 1 or arg(sums[0], 2, "keepdim", False):
        return None
    chain = [sums[0]]
    for target in _GATE[1:]:
        users = list(chain[-1].users)
        if len(users) != 1 or users[0].target is not target or users[0].args[0] is not chain[-1]:
            return None
        chain.append(users[0])
    gates = list(chain[-1].users)
    if len(gates) != 1 or gates[0].target is not aten.mul.Tensor or set(gates[0].args) != {weighing, chain[-1]}:
        return None
    if list(weighing.users) != gates or chain[-1].args[1] not in (-1, len(dims) - 1):
        return None
    sinks = chain[1].args[1]
    if not isinstance(sinks, fx.Node) or chain[1].kwargs:
        return None
    shape = shape_of(sinks)
    aligned = dims[: len(dims) - 1][-len(shape) :]
    named = tuple(() if static_int(size) == 1 else dim for size, dim in zip(shape, aligned, strict=True))
    *_, top = climb(axes, sinks, named, casts=True)
    return gates[0], Step(top.node, axes.resolve(top.dims))
