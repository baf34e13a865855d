"""Give attentions that are written out with products and a softmax the operator they mean: one analysis serves all.

The operator's call is added beside what it stands for, which stays in the graph: whatever the plan leaves alone is put
back by the rewrite and runs to the last bit as the model wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import fx

from adakv_compile.block_masks import BlockTable
from adakv_compile.capture import Program, Spelled
from adakv_compile.kernels import attention
from adakv_compile.passes.emit import Emitter
from adakv_compile.passes.flash import is_flash, say_flash
from adakv_compile.passes.flex import FLEX, write_out
from adakv_compile.passes.literals import Factor, NotUnderstoodError
from adakv_compile.passes.logits import Part, scale_of
from adakv_compile.passes.nodes import same_layout, same_size, shape_of
from adakv_compile.passes.spelled import SOFTMAXES, Meaning, understand

__all__ = ["normalise", "why_not_attention"]

aten = torch.ops.aten


def normalise(program: Program) -> Program:
    """Add the operator for every attention that is written out and understood.

    Args:
        program: The captured graph; calls are added to it.

    Returns:
        The program that knows which results stand for which.
    """
    spelled: dict[fx.Node, Spelled] = {}
    refused: dict[fx.Node, str] = {}
    checks: dict[object, BlockTable] = {}
    for node in list(program.module.graph.nodes):
        if node.target is FLEX:
            try:
                call, stood_for, check = _written_out(program, node)
            except NotUnderstoodError as failure:
                refused[node] = str(failure)
                continue
            spelled[call] = stood_for
            if check is not None:
                checks[(check.tables, check.block, check.visible.code)] = check
        elif is_flash(node):
            try:
                call, stood_for = say_flash(program, node)
            except NotUnderstoodError as failure:
                refused[node] = str(failure)
                continue
            spelled[call] = stood_for
        elif node.target in SOFTMAXES:
            try:
                meaning = understand(node)
                if meaning.product in program.outputs:
                    continue
                with program.module.graph.inserting_before(meaning.product.next):
                    call, result = _Writer(program, node, meaning).write()
            except NotUnderstoodError:
                continue
            spelled[call] = Spelled(result, meaning.product, meaning.logits.exact)
    superseded = _only_for(stood_for.original for stood_for in spelled.values())
    return dataclasses.replace(
        program, spelled=spelled, superseded=superseded, refused=refused, checks=tuple(checks.values())
    )


def _written_out(program: Program, node: fx.Node) -> tuple[fx.Node, Spelled, BlockTable | None]:
    """Add the operator for an attention that is written out first, by :mod:`adakv_compile.passes.flex`.

    Raises:
        NotUnderstoodError: It can't be; nothing was changed.
    """
    graph = program.module.graph
    emit = Emitter(graph, program.fake_mode, node)
    try:
        written = write_out(program, node, emit)
        original = written.original
        if original in program.outputs:
            raise NotUnderstoodError("its result is returned as it is")
        with graph.inserting_before(original.next):
            meaning = understand(written.softmax)
            writer = _Writer(program, written.softmax, meaning)
            call, result = writer.write()
            result = writer.lay_out_as(original, result)
    except NotUnderstoodError:
        emit.undo()
        raise
    original.replace_all_uses_with(result)
    for spare in reversed(emit.made):
        if not spare.users:
            graph.erase_node(spare)
    return call, Spelled(result, original, meaning.logits.exact), written.check


def why_not_attention(softmax: fx.Node) -> str:
    """Say what of an attention that is written out was not understood."""
    try:
        _heads_of_sinks(understand(softmax))
    except NotUnderstoodError as failure:
        return str(failure)
    return "its result is returned as it is, or its parts have no common layout"


def _heads_of_sinks(meaning: Meaning) -> tuple[str, ...]:
    """Return the axes of the query heads, if the sinks have no others.

    Raises:
        NotUnderstoodError: The operator has no such sinks.
    """
    sinks, heads = meaning.logits.sinks, (*meaning.heads, *meaning.groups)
    unwanted = {axis for dim in sinks.dims for axis in meaning.axes.flat(dim)} - set(heads) if sinks else set[str]()
    if any(meaning.axes.sizes[axis] != 1 for axis in unwanted):
        raise NotUnderstoodError("its sinks differ from query to query")
    return heads


def _only_for(products: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Return the nodes that nothing but ``products`` needs, themselves included."""
    found = set(products)
    pending = list(found)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source.op == "call_function" and source not in found and all(user in found for user in source.users):
                found.add(source)
                pending.append(source)
    return frozenset(found)


class _Writer:
    """Says one meaning with the operator, where the graph's insertion point is."""

    def __init__(self, program: Program, softmax: fx.Node, meaning: Meaning) -> None:
        self._meaning = meaning
        self._emit = Emitter(program.module.graph, program.fake_mode, softmax)
        self._dtype = meaning.value.node.meta["val"].dtype

    def write(self) -> tuple[fx.Node, fx.Node]:
        """Return the operator's call and what replaces the product.

        Raises:
            NotUnderstoodError: The operator can't say it; nothing was changed.
        """
        try:
            return self._write()
        except NotUnderstoodError:
            self._emit.undo()
            raise

    def lay_out_as(self, original: fx.Node, result: fx.Node) -> fx.Node:
        """Give ``[B, H, T, D]`` the memory layout that views behind it were traced for: that of the queries, as a rule.

        Raises:
            NotUnderstoodError: It is another one; nothing was changed.
        """
        if same_layout(result, original):
            return result
        rows = self._emit.call(aten.transpose.int, result, 1, 2)
        rows = self._emit.call(aten.clone.default, rows, memory_format=torch.contiguous_format)
        result = self._emit.call(aten.transpose.int, rows, 1, 2)
        if not same_layout(result, original):
            self._emit.undo()
            raise NotUnderstoodError(f"its result has strides {original.meta['val'].stride()}")
        return result

    def _write(self) -> tuple[fx.Node, fx.Node]:
        meaning, emit = self._meaning, self._emit
        heads = (*meaning.heads, *meaning.groups)
        scale, query = self._scaled(
            self._arranged(meaning.query.node, meaning.query.dims, heads, meaning.row, meaning.inner)
        )
        key = self._arranged(meaning.key.node, meaning.key.dims, meaning.heads, meaning.column, meaning.inner)
        value = self._arranged(meaning.value.node, meaning.value.dims, meaning.heads, meaning.column, meaning.outer)
        call = emit.call(
            attention.SPEC.overload, query, key, value, self._mask(), self._sinks(), False, scale, meaning.logits.cap
        )
        dims = (meaning.batch, heads, meaning.row, meaning.outer)
        result = emit.arrange(meaning.axes, call, dims, meaning.dims)
        if not _same_shape(result, meaning.product):
            raise NotUnderstoodError("the result has another shape than the product")
        if meaning.product.meta["val"].is_contiguous() and not same_layout(result, meaning.product):
            # Views behind it were traced for the product's layout in memory.
            result = emit.call(aten.clone.default, result, memory_format=torch.contiguous_format)
        if result.meta["val"].dtype != meaning.product.meta["val"].dtype:
            result = emit.call(aten._to_copy.default, result, dtype=meaning.product.meta["val"].dtype)
        meaning.product.replace_all_uses_with(result)
        return call, result

    def _arranged(
        self, node: fx.Node, dims: tuple[tuple[str, ...], ...], heads: tuple[str, ...], *rest: tuple[str, ...]
    ) -> fx.Node:
        """Return a tensor as ``[B, H, ...]``."""
        return self._emit.arrange(self._meaning.axes, node, dims, (self._meaning.batch, heads, *rest))

    def _scaled(self, query: fx.Node) -> tuple[float, fx.Node]:
        """Return the scale, and the queries with the factors in them that are data."""
        logits = self._meaning.logits
        numbers = [factor for factor in logits.factors if not isinstance(factor[0], fx.Node)]
        for factor in logits.factors:
            if factor not in numbers:
                # A constant that the model keeps in a tensor: queries can be scaled as well as logits.
                query = self._times(query, factor)
        if query.meta["val"].dtype != self._dtype:
            query = self._emit.call(aten._to_copy.default, query, dtype=self._dtype)
        return scale_of(numbers) * (1.0 if logits.cap is None else logits.cap), query

    def _times(self, node: fx.Node, factor: Factor) -> fx.Node:
        return self._emit.call(aten.div.Tensor if factor[1] else aten.mul.Tensor, node, factor[0])

    def _mask(self) -> fx.Node | None:
        """Return all masks and biases as one."""
        emit, mask = self._emit, None
        # What is hidden stays hidden whatever is added to it, so conditions come last.
        for part in sorted(self._meaning.logits.parts, key=lambda part: part.yes is not None):
            node = self._visible(part)
            if part.yes is None or part.no is None:
                for factor in part.factors:
                    node = node if factor == (1.0, False) else self._times(node, factor)
                mask = node if mask is None else emit.call(aten.add.Tensor, mask, node)
            elif mask is None:
                mask = emit.call(aten.where.Scalar, node, part.yes, part.no)
            elif part.no == 0.0:
                mask = emit.call(aten.where.ScalarSelf, node, part.yes, mask)
            else:
                mask = emit.call(aten.where.ScalarOther, node, mask, part.no)
        if mask is not None and mask.meta["val"].dtype not in (self._dtype, torch.bool):
            mask = emit.call(aten._to_copy.default, mask, dtype=self._dtype)
        return mask

    def _visible(self, part: Part) -> fx.Node:
        """Return a mask as ``[B or 1, Hq or 1, T or 1, L or 1]``."""
        meaning = self._meaning
        return self._arranged(part.node, part.dims, (*meaning.heads, *meaning.groups), meaning.row, meaning.column)

    def _sinks(self) -> fx.Node | None:
        """Return the sinks as ``[Hq]``."""
        sinks, heads = self._meaning.logits.sinks, _heads_of_sinks(self._meaning)
        return None if sinks is None else self._emit.arrange(self._meaning.axes, sinks.node, sinks.dims, (heads,))


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return len(shape_of(a)) == len(shape_of(b)) and all(
        same_size(x, y) for x, y in zip(shape_of(a), shape_of(b), strict=True)
    )
