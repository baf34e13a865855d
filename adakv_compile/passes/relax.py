"""Let views follow the layouts that values really have."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["relax_views"]

aten = torch.ops.aten


def relax_views(module: fx.GraphModule) -> None:
    """Turn every ``view`` into a ``reshape``, which copies where it must.

    Capturing decides by the strides of fake tensors that a reshape is a view. Executed operator by operator, some
    operators (a ``where`` of transposed operands, an attention that takes another path because of it) give results with
    other strides than their fakes have. For a compiler that fixes every layout itself both are the same.
    """
    for target in (aten.view.default, aten._unsafe_view.default):
        for node in module.graph.find_nodes(op="call_function", target=target):
            node.target = aten.reshape.default
    module.recompile()
