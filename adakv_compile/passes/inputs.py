"""The inputs of a rewritten graph: parts of a layer's store instead of a dense cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import fx

from adakv_compile import _torch
from adakv_compile.assumptions import StoreSize
from adakv_compile.call import STORE_TENSORS, Dimension, Input, Passed, Past, StorePart
from adakv_compile.capture import Program
from adakv_compile.kernels.decode_attention import CURSOR_SIZE
from adakv_compile.passes.nodes import same_size
from adakv_compile.passes.planned import Action, PlannedSite

__all__ = ["GraphInputs"]

aten = torch.ops.aten
# Any size will do for tracing, as long as nothing takes it for another one: no layer has exactly so many entries.
_HINT: Final = 4099


@dataclass
class GraphInputs:
    """Collects the inputs while a graph is rewritten.

    Attributes:
        program: The captured graph.
        examples: The inputs Dynamo passed, one for each placeholder of the captured graph.
        pasts: The compressed pasts, in the order they were added.
        unguarded: Symbolic sizes that Dynamo doesn't guard on, with where they come from in a call.
    """

    program: Program
    examples: Sequence[Any]
    pasts: list[Past] = field(default_factory=list[Past])
    unguarded: list[tuple[torch.SymInt, StoreSize]] = field(default_factory=list["tuple[torch.SymInt, StoreSize]"])
    _added: dict[fx.Node, tuple[Input, Any]] = field(default_factory=dict[fx.Node, "tuple[Input, Any]"])
    _lengths: list[tuple[int | torch.SymInt, fx.Node]] = field(
        default_factory=list["tuple[int | torch.SymInt, fx.Node]"]
    )

    def add_past(self, planned: PlannedSite, appends: int | torch.SymInt) -> tuple[int, dict[str, fx.Node]]:
        """Add the parts of a layer's store as inputs; return the past's index and the parts by field name.

        Args:
            planned: The attention whose past it is.
            appends: Tokens that the graph appends to the tail in place.
        """
        key, value = planned.key.past, planned.value.past
        assert key is not None
        assert value is not None
        index = len(self.pasts)
        mask = planned.mask
        told_apart = mask.columns or mask.lookup is not None or mask.padding is not None
        self.pasts.append(
            Past(
                key=self.program.inputs.index(key),
                value=self.program.inputs.index(value),
                appends=appends if isinstance(appends, int) else self._argument(appends),
                drops_oldest=told_apart or mask.sliding_window is not None,
            )
        )
        site = planned.site
        batch, heads = site.batch_size, site.num_kv_heads
        fake_mode, like = self.program.fake_mode, key.meta["val"]
        entries, capacity = (
            _torch.fresh_size(fake_mode, f"adakv_{name}_{index}", _HINT + 2 * index + i, at_least_two=True)
            for i, name in enumerate(("entries", "capacity"))
        )
        self.unguarded += [(entries, StoreSize(index, "entries")), (capacity, StoreSize(index, "capacity"))]
        shapes: dict[str, tuple[Any, ...]] = {
            "keys": (batch, entries, site.key_dim),
            "values": (batch, entries, site.value_dim),
            "offsets": (batch, heads + 1),
            "positions": (batch, entries),
            "tail_keys": (batch, heads, capacity, site.key_dim),
            "tail_values": (batch, heads, capacity, site.value_dim),
            "cursor": (CURSOR_SIZE,),
        }
        parts: dict[str, fx.Node] = {}
        for name in STORE_TENSORS:
            if name == "cursor" and planned.action is Action.RECOMPRESS:
                continue
            dtype = torch.int32 if name in ("offsets", "positions", "cursor") else like.dtype
            with fake_mode:
                fake = torch.empty(shapes[name], dtype=dtype, device=like.device)
            parts[name] = self._add(f"layer_{index}_{name}", StorePart(index, name), fake)
        if planned.buffer is None and isinstance(appends, int) and appends and not self.pasts[index].drops_oldest:
            self._lengths.append((planned.key.past_length, parts["cursor"]))
        return index, parts

    def _argument(self, size: torch.SymInt) -> Passed:
        """Return the argument that holds a size.

        Raises:
            RuntimeError: There is none.
        """
        for index, node in enumerate(self.program.inputs):
            if isinstance(node.meta["val"], torch.SymInt) and same_size(node.meta["val"], size):
                return Passed(index)
        raise RuntimeError(f"no argument holds the size {size}")

    def add_host_length(self, past: int, name: Literal["tail_length", "prefix_length"]) -> fx.Node:
        """Add a length that the host knows as an integer input."""
        size = _torch.fresh_size(self.program.fake_mode, f"adakv_{name}_{past}", _HINT, at_least_two=False)
        self.unguarded.append((size, StoreSize(past, name)))
        return self._add(f"layer_{past}_{name}", StorePart(past, name), size)

    def _add(self, name: str, source: Input, example: Any) -> fx.Node:
        first = next(node for node in self.program.module.graph.nodes if node.op != "placeholder")
        with self.program.module.graph.inserting_before(first):
            node = self.program.module.graph.placeholder(name)
        node.meta["val"] = example
        self._added[node] = (source, example)
        return node

    def finish(self, pasts: Iterable[fx.Node]) -> list[tuple[Input, Any]]:
        """Remove what only the compressed caches' dense form needed; return the inputs in their final order.

        Args:
            pasts: The caches whose attention was rewritten.

        Raises:
            RuntimeError: A dense form is still read.
        """
        dense = [past for past in pasts if past in self.program.compressed]
        for past in dense:
            for user in list(past.users):
                if user.target is aten.sym_size.int:
                    self._replace_size(past, user)
        self.program.module.graph.eliminate_dead_code()
        self._count_on_the_device()
        self._drop_unused_sizes(dense)
        inputs: list[tuple[Input, Any]] = []
        for node in self.program.module.graph.find_nodes(op="placeholder"):
            if node in self._added:
                inputs.append(self._added[node])
                continue
            if node in dense:
                if node.users:
                    raise RuntimeError(f"the dense cache {node.name} is still read by {list(node.users)}")
                self.program.module.graph.erase_node(node)
                continue
            index = self.program.inputs.index(node)
            inputs.append((Passed(index), self.examples[index]))
        return inputs

    def _count_on_the_device(self) -> None:
        """Let positions that start at the length of the past start at the cursor, which holds it on the device.

        As an integer input it would change at every step; see :meth:`_drop_unused_sizes`.
        """
        if not self._lengths:
            return
        length, cursor = self._lengths[0]
        graph = self.program.module.graph
        placeholders = graph.find_nodes(op="placeholder")
        counted = [
            user
            for node in placeholders
            if isinstance(node.meta["val"], torch.SymInt) and same_size(node.meta["val"], length)
            for user in node.users
            if _adds_to_integers(user, node)
        ]
        if not counted:
            return
        total = self._past_length(cursor, placeholders[-1])
        for user in counted:
            user.update_arg(1, total)

    def _past_length(self, cursor: fx.Node, last: fx.Node) -> fx.Node:
        """Add the sum of a cursor's two lengths, int64 without dimensions, before anything appends to the store."""
        graph = self.program.module.graph
        with graph.inserting_after(last):
            lengths = graph.call_function(aten.slice.Tensor, (cursor, 0, 0, 2))
        with graph.inserting_after(lengths):
            total = graph.call_function(aten.sum.default, (lengths,), {"dtype": torch.int64})
        with self.program.fake_mode:
            lengths.meta["val"] = aten.slice.Tensor(cursor.meta["val"], 0, 0, 2)
            total.meta["val"] = aten.sum.default(lengths.meta["val"], dtype=torch.int64)
        return total

    def _drop_unused_sizes(self, dense: Sequence[fx.Node]) -> None:
        """Remove integers that nothing is computed from any more, such as the length of the text.

        They would change at every step, and a CUDA graph is recorded anew for every value of an integer.
        """
        graph = self.program.module.graph
        unused = [
            node
            for node in graph.find_nodes(op="placeholder")
            if isinstance(node.meta["val"], torch.SymInt) and not node.users and node not in self._added
        ]
        needed: set[object] = set()
        for node in graph.nodes:
            if node not in unused and node not in dense:
                needed |= _symbols(node.meta.get("val"))
        for node in unused:
            if not _symbols(node.meta["val"]) & needed:
                graph.erase_node(node)

    def _replace_size(self, past: fx.Node, user: fx.Node) -> None:
        dim = user.args[1]
        assert isinstance(dim, int)
        source = Dimension(self.program.inputs.index(past), dim)
        node = next((known for known, (given, _) in self._added.items() if given == source), None)
        if node is None:
            node = self._add(f"{past.name}_size_{dim}", source, user.meta["val"])
        user.replace_all_uses_with(node)
        self.program.module.graph.erase_node(user)


def _adds_to_integers(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is ``integers + node``, the positions of new tokens as a rule."""
    return (
        user.target is aten.add.Tensor
        and user.args[1:] == (node,)
        and not user.kwargs
        and isinstance(user.args[0], fx.Node)
        and user.args[0].meta["val"].dtype == torch.int64
    )


def _symbols(value: object) -> frozenset[object]:
    """Return the symbols in the sizes of a node's value."""
    if isinstance(value, (tuple, list)):
        return frozenset[object]().union(*map(_symbols, value))
    if isinstance(value, torch.Tensor):
        return _torch.symbols_of(value.shape)
    return _torch.symbols_of((value,)) if isinstance(value, torch.SymInt) else frozenset()
