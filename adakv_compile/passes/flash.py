"""Say what calls of the flash-attn package mean, by the operator that every analysis reads.

Recognised by qualified name and by the names of all arguments: forks register other operators under the same name.
The contract is that of flash-attn 2.6 to 2.8, ``flash_attn/flash_attn_interface.py``: ``[B, L, H, D]``; query ``i`` of
``T`` stands at position ``i + L - T``, whatever masks it; a window of ``(left, right)`` keys besides its own, negative
where it has no bound; ``causal`` is a right bound of 0; a soft cap of 0 is none.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import fx
from torch._ops import OpOverload

from adakv_compile import _torch
from adakv_compile.capture import Program, Spelled
from adakv_compile.kernels import attention
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.flex import count_keys, first_result, size_of
from adakv_compile.passes.literals import NotUnderstoodError
from adakv_compile.passes.nodes import arg, same_layout, same_size, shape_of, source_line, static_int
from adakv_compile.report import Reason, Refusal

__all__ = ["is_flash", "operator_of", "refuse_packed", "say_flash"]

aten = torch.ops.aten

_NAME: Final = "flash_attn::_flash_attn_forward"
_ARGUMENTS: Final = (
    "q",
    "k",
    "v",
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
    "alibi_slopes",
    "return_softmax",
)
_LENGTHS: Final = ("cu_seq", "cum_seq")
"""How the arguments begin that say where packed sequences start: flash-attn's, and those of torch."""


def is_flash(node: fx.Node) -> bool:
    """Tell whether a node is a call that :func:`say_flash` can read."""
    target = node.target
    return isinstance(target, OpOverload) and target.name() == _NAME and _torch.arguments_of(target) == _ARGUMENTS


def refuse_packed(node: fx.Node) -> Refusal | None:
    """Return why an attention over packed sequences is left alone; ``None`` if sequences are rows of a batch.

    Args:
        node: A call of an operator that attends.
    """
    target = operator_of(node)
    if target is None:
        return None
    for position, name in enumerate(_torch.arguments_of(target)):
        given = node.kwargs.get(name) if target is not node.target else arg(node, position, name)
        if name.startswith(_LENGTHS) and given is not None:
            return Refusal(Reason.PACKED, f"{target.name()}, {name}", source_line(node))
    return None


def operator_of(node: fx.Node) -> OpOverload | None:
    """Return the operator that a node calls, also one that writes to its arguments and was made functional."""
    targets = (node.target, *node.args[:1])
    return next((target for target in targets if isinstance(target, OpOverload)), None)


def say_flash(program: Program, node: fx.Node) -> tuple[fx.Node, Spelled]:
    """Put the operator that a call means in the place of its output.

    Args:
        program: The captured graph.
        node: A call of which :func:`is_flash` is true.

    Returns:
        The operator's call, and what it stands for.

    Raises:
        NotUnderstoodError: It means something that the operator can't say; nothing was changed.
    """
    original = first_result(node)
    if original in program.outputs:
        raise NotUnderstoodError("its result is returned as it is")
    emit = Emitter(program.module.graph, program.fake_mode, node)
    try:
        with program.module.graph.inserting_before(original.next):
            call, result = _say(emit, node, original)
    except NotUnderstoodError:
        emit.undo()
        raise
    original.replace_all_uses_with(result)
    return call, Spelled(result, original)


def _say(emit: Emitter, node: fx.Node, original: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the operator's call, and its result in the layout of the original."""
    given = {name: arg(node, position, name) for position, name in enumerate(_ARGUMENTS)}
    if given["dropout_p"] != 0:
        raise NotUnderstoodError(f"it drops probabilities, dropout_p={given['dropout_p']}")
    if given["alibi_slopes"] is not None:
        raise NotUnderstoodError("it adds ALiBi slopes")
    scale, cap = given["softmax_scale"], given["softcap"]
    if not isinstance(scale, (int, float)) or not isinstance(cap, (int, float)) or cap < 0:
        raise NotUnderstoodError(f"its scale is {scale}, its soft cap {cap}")
    query, key, value = (cast("fx.Node", given[name]) for name in ("q", "k", "v"))
    mask = _mask(emit, query, key, *_window(given))
    heads = [emit.call(aten.transpose.int, operand, 1, 2) for operand in (query, key, value)]
    call = emit.call(attention.SPEC.overload, *heads, mask, None, False, float(scale), float(cap) if cap else None)
    result = emit.call(aten.transpose.int, call, 1, 2)
    if not same_layout(result, original):
        # Views behind it were traced for the layout in memory that the queries have.
        result = emit.call(aten.clone.default, result, memory_format=torch.contiguous_format)
    if not same_layout(result, original):
        raise NotUnderstoodError(f"its result has strides {original.meta['val'].stride()}")
    return call, result


def _window(given: dict[str, object]) -> tuple[int | None, int | None]:
    """Return how many keys before and after its own a query sees, ``None`` for all of them."""
    left, right = (static_int(given[f"window_size_{side}"]) for side in ("left", "right"))
    if left is None or right is None or not isinstance(given["causal"], bool):
        raise NotUnderstoodError("its window is not known before the call")
    if given["causal"]:
        right = 0
    return (None if left < 0 else left), (None if right < 0 else right)


def _mask(emit: Emitter, query: fx.Node, key: fx.Node, left: int | None, right: int | None) -> fx.Node | None:
    """Return which keys are visible, ``[1, 1, T, L]``; ``None`` if all of them are."""
    new, total = shape_of(query)[1], shape_of(key)[1]
    if static_int(new) == 1:
        # The last position of all: nothing is to its right.
        right = None
    if left is None and right is None:
        return None
    device = query.meta["val"].device
    column = _indices(emit, count_keys(emit, total, new), device, (1, 1, 1, -1))
    row = _indices(emit, size_of(emit, new), device, (1, 1, -1, 1))
    if not same_size(total, new):
        row = emit.call(aten.add.Tensor, row, size_of(emit, total - new))
    mask = None if right is None else emit.call(aten.le.Tensor, column, _moved(emit, row, right))
    if left is None:
        return mask
    recent = emit.call(aten.ge.Tensor, column, _moved(emit, row, -left))
    return recent if mask is None else emit.call(aten.bitwise_and.Tensor, mask, recent)


def _indices(emit: Emitter, count: int | fx.Node, device: torch.device, shape: tuple[int, ...]) -> fx.Node:
    index = emit.call(aten.arange.default, count, dtype=torch.int64, device=device)
    return emit.call(aten.view.default, index, list(shape))


def _moved(emit: Emitter, row: fx.Node, by: int) -> fx.Node:
    return emit.call(aten.add.Tensor, row, by) if by else row
