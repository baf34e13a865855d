"""Write ``flex_attention`` out, with its functions of single logits and positions, so that it is read like any other.

What is written is never run: it is what ``passes/spelled.py`` reads. The block mask is a table of what its function
says already; that the two agree is seen in the graph, or checked at every call.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import fx

from adakv_compile import _torch
from adakv_compile.block_masks import BlockTable
from adakv_compile.capture import Program
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.inline import inline
from adakv_compile.passes.literals import NotUnderstoodError
from adakv_compile.passes.nodes import same_size, shape_of, skip_no_ops, static_int

__all__ = ["FLEX", "WrittenOut", "count_keys", "first_result", "size_of", "write_out"]

aten = torch.ops.aten

FLEX: Final = torch.ops.higher_order.flex_attention

_LARGEST_TABLE: Final = 64
"""Calls of the function of a block mask that are run at every call of the graph, at most."""


@dataclass(frozen=True)
class WrittenOut:
    """A ``flex_attention`` that is written out.

    Attributes:
        original: Its first result, the attention's output.
        softmax: The softmax of what was written.
        check: What must hold of the arguments, None if it was seen in the graph.
    """

    original: fx.Node
    softmax: fx.Node
    check: BlockTable | None


def write_out(program: Program, node: fx.Node, emit: Emitter) -> WrittenOut:
    """Write an attention out in front of its output.

    Args:
        program: The captured graph.
        node: A call of :data:`FLEX`.
        emit: Adds the calls; the insertion point is moved.

    Raises:
        NotUnderstoodError: It can't be written out.
    """
    original = first_result(node)
    query, key, value = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args[:3])
    block_mask = cast("tuple[object, ...]", node.args[4])
    scale = node.args[5]
    if not isinstance(scale, (int, float)):
        raise NotUnderstoodError(f"the scale is {scale}")
    of_scores, of_mask = (cast("tuple[object, ...]", node.args[i]) for i in (7, 8))
    score_mod, mask_mod = (_function(program, function) for function in (node.args[3], block_mask[-1]))
    for number in (*of_scores, *of_mask):
        _assume_offset(number, query, key)
    with program.module.graph.inserting_before(original):
        positions = _positions(emit, query, key)
        logits = _products(emit, query, key, float(scale))
        logits = inline(emit, score_mod, (logits, *positions, *of_scores))
        check = None
        if not _shows_all(mask_mod):
            visible = inline(emit, mask_mod, (*positions, *of_mask))
            check = _check(program, block_mask, visible)
            logits = emit.call(aten.where.ScalarOther, visible, logits, -torch.inf)
        elif not _is_one_block(block_mask):
            raise NotUnderstoodError("the tables of the block mask alone say what is visible")
        softmax = emit.call(aten._safe_softmax.default, logits, -1)
        weights = _cast(emit, softmax, query.meta["val"].dtype)
        emit.call(aten.matmul.default, weights, _repeated(emit, value, query))
    return WrittenOut(original, softmax, check)


def first_result(node: fx.Node) -> fx.Node:
    """Return the first of several results, an attention's output, if it is the only one that is used.

    Raises:
        NotUnderstoodError: The log-sum-exp or another one is used as well.
    """
    users = [user for user in node.users if user.users]
    if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0:
        raise NotUnderstoodError("its log-sum-exp is used, too")
    return users[0]


def _function(program: Program, argument: object) -> fx.GraphModule:
    held = getattr(program.module, str(argument.target), None) if isinstance(argument, fx.Node) else None
    if not isinstance(held, fx.GraphModule):
        raise NotUnderstoodError("one of its functions is not a graph")
    return held


def _assume_offset(number: object, query: fx.Node, key: fx.Node) -> None:
    """Let Dynamo guard that an integer, as it is now, is the number of keys before the first query's own.

    Such an offset comes in from outside, by a closure. If it is another one at a later call, the graph is not used.
    """
    value = number.meta.get("val") if isinstance(number, fx.Node) else None
    if isinstance(value, torch.SymInt):
        _torch.guard_if_equal(value, shape_of(key)[2] - shape_of(query)[2])


def _positions(emit: Emitter, query: fx.Node, key: fx.Node) -> tuple[fx.Node, ...]:
    """Return the indices of batch, head, query and key, each along a dimension of its own."""
    device = query.meta["val"].device
    found: list[fx.Node] = []
    new, total = shape_of(query)[2], shape_of(key)[2]
    for dim, size in enumerate((*shape_of(query)[:3], total)):
        count = count_keys(emit, total, new) if dim == 3 else size_of(emit, size)
        index = emit.call(aten.arange.default, count, dtype=torch.int32, device=device)
        found.append(emit.call(aten.view.default, index, [-1 if dim == other else 1 for other in range(4)]))
    return tuple(found)


def count_keys(emit: Emitter, total: int | torch.SymInt, new: int | torch.SymInt) -> int | fx.Node:
    """Return the number of keys as an argument: as a size of other tensors than the keys, which go away.

    Args:
        emit: Adds a call if no value of the graph holds it.
        total: The number of keys.
        new: The number of queries.

    Raises:
        NotUnderstoodError: Nor does one hold how many the cache holds.
    """
    try:
        return emit.size(total)
    except RuntimeError:
        return emit.call(operator.add, size_of(emit, total - new), size_of(emit, new))


def size_of(emit: Emitter, size: int | torch.SymInt) -> int | fx.Node:
    """Return a size as an argument.

    Raises:
        NotUnderstoodError: No value of the graph holds it.
    """
    try:
        return emit.size(size)
    except RuntimeError as failure:
        raise NotUnderstoodError(str(failure)) from failure


def _products(emit: Emitter, query: fx.Node, key: fx.Node, scale: float) -> fx.Node:
    wide = torch.promote_types(query.meta["val"].dtype, torch.float32)
    keys = emit.call(aten.transpose.int, _repeated(emit, _cast(emit, key, wide), query), -1, -2)
    products = emit.call(aten.matmul.default, _cast(emit, query, wide), keys)
    return products if scale == 1.0 else emit.call(aten.mul.Tensor, products, scale)


def _cast(emit: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else emit.call(aten._to_copy.default, node, dtype=dtype)


def _repeated(emit: Emitter, node: fx.Node, query: fx.Node) -> fx.Node:
    """Repeat keys or values for the query heads."""
    heads, given = (static_int(shape_of(operand)[1]) for operand in (query, node))
    if heads is None or not given or heads % given or not same_size(shape_of(node)[0], shape_of(query)[0]):
        raise NotUnderstoodError(f"query {shape_of(query)}, operand {shape_of(node)}")
    return node if heads == given else emit.call(aten.repeat_interleave.self_int, node, heads // given, 1)


# -- the block mask --------------------------------------------------------------------------------------------------


def _shows_all(mask_mod: fx.GraphModule) -> bool:
    """Whether a function is true whatever its arguments are, as that of no mask is."""
    value = next(iter(mask_mod.graph.find_nodes(op="output"))).args[0]
    if isinstance(value, (tuple, list)) and len(value) == 1:
        (value,) = value
    if not isinstance(value, fx.Node):
        return False
    if value.target in (aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        return True
    position = {aten.full.default: 1, aten.new_full.default: 2, aten.full_like.default: 1}.get(value.target)  # type: ignore[call-overload]
    return position is not None and value.args[position] is True


def _is_one_block(block_mask: tuple[object, ...]) -> bool:
    """Whether the tables were made of one block that holds everything, as they are when there is no mask."""
    counts, indices, *full = block_mask[2:6]
    if any(table is not None for table in full):
        return False
    filled = ((counts, (aten.ones.default,), 3), (indices, (aten.zeros.default,), 4))
    for table, targets, rank in filled:
        made = skip_no_ops(table) if isinstance(table, fx.Node) else None
        if made is None or made.target not in targets or shape_of(made) != (1,) * rank:
            return False
    return all(isinstance(size, int) and size >= _LARGE for size in block_mask[-3:-1])


_LARGE: Final = 1 << 30


def _check(program: Program, block_mask: tuple[object, ...], visible: fx.Node) -> BlockTable | None:
    """Return what makes sure that the tables agree with the function.

    Raises:
        NotUnderstoodError: Nothing does.
    """
    if _is_one_block(block_mask):
        return None
    tables = block_mask[2:6]
    sizes = block_mask[-3:-1]
    indices = [_argument(program, table) for table in tables]
    if indices[0] is None or indices[1] is None or (indices[2] is None) != (indices[3] is None):
        raise NotUnderstoodError("the block mask is made in the graph, or has no tables")
    block = tuple((size, False) if isinstance(size, int) else (_argument(program, size), True) for size in sizes)
    return BlockTable(
        cast("tuple[int, int, int | None, int | None]", tuple(indices)),
        cast("tuple[tuple[int, bool], tuple[int, bool]]", block),
        _of_arguments(program, visible),
    )


def _argument(program: Program, value: object) -> int | None:
    """Return which argument a value is.

    Raises:
        NotUnderstoodError: It is computed.
    """
    if value is None:
        return None
    node = skip_no_ops(value) if isinstance(value, fx.Node) else None
    if node is None or node not in program.inputs or node in program.compressed:
        raise NotUnderstoodError("the block mask is made in the graph")
    return program.inputs.index(node)


def _of_arguments(program: Program, value: fx.Node) -> fx.GraphModule:
    """Return the function of the graph's arguments that computes a value.

    Raises:
        NotUnderstoodError: It needs more than a few calls, or a cache.
    """
    needed, pending = {value}, [value]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                pending.append(source)
    if len(needed) > _LARGEST_TABLE or needed & program.compressed or any(node.op == "get_attr" for node in needed):
        raise NotUnderstoodError("what the block mask must agree with is not computed from the arguments alone")
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.inputs:
        copies[node] = graph.placeholder(node.name)
    for node in program.module.graph.nodes:
        if node in needed and node not in copies:
            # Named by what is called, so that equal functions have equal code.
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: copies[source])  # type: ignore[misc]
            copies[node] = graph.call_function(node.target, args, kwargs)  # pyright: ignore[reportArgumentType]
    graph.output(copies[value])
    return fx.GraphModule(torch.nn.Module(), graph)
