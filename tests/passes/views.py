"""Capture chains of views with a symbolic batch and length, and check what is said of their dimensions on real data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from adakv_compile import _torch
from adakv_compile.passes.axes import Axes, Dims

__all__ = ["DIM", "HEADS", "Chain", "Views", "agree", "capture_views", "concrete", "picks", "random_chain"]

HEADS, DIM = 4, 6
_BATCH, _LENGTH = 3, 7

Chain = Callable[[Tensor, Any, Any], Tensor]
"""``chain(x [B, HEADS, L, DIM], B, L)``."""


class _Module(nn.Module):
    def __init__(self, chains: Sequence[Chain]) -> None:
        super().__init__()
        self.chains = chains

    def forward(self, x: Tensor, batch: Any, length: Any) -> tuple[Tensor, ...]:
        # The copy keeps what is a view of the input a value of the graph.
        return tuple(chain(x, batch, length).clone() for chain in self.chains)


@dataclass(frozen=True)
class Views:
    """Chains captured in one graph.

    Attributes:
        module: The graph.
        fake_mode: Where its fake values live.
        symbols: The sizes ``B`` and ``L``.
    """

    module: fx.GraphModule
    fake_mode: FakeTensorMode
    symbols: tuple[torch.SymInt, torch.SymInt]

    @property
    def results(self) -> list[fx.Node]:
        """What the chains return, in order, without the copy at their ends."""
        (returned,) = self.output.args
        assert isinstance(returned, (list, tuple))
        copies = [node for node in returned if isinstance(node, fx.Node)]
        return [copy.all_input_nodes[0] for copy in copies]

    @property
    def output(self) -> fx.Node:
        """The graph's last node, before which calls can be added."""
        return next(iter(self.module.graph.find_nodes(op="output")))

    @property
    def x(self) -> fx.Node:
        """The input that the chains are views of."""
        return next(iter(self.module.graph.find_nodes(op="placeholder")))

    def values(self, batch: int = _BATCH, length: int = _LENGTH) -> dict[str, Tensor]:
        """Execute the graph on numbers that are all different; return every tensor by the name of its node."""
        x = torch.arange(float(batch * HEADS * length * DIM)).view(batch, HEADS, length, DIM)
        recorder = _Recorder(self.module)
        recorder.run(x, batch, length)
        return recorder.found

    def sizes(self, batch: int = _BATCH, length: int = _LENGTH) -> dict[sympy.Basic, int]:
        """Return the values of the symbols."""
        return {symbol.node.expr: value for symbol, value in zip(self.symbols, (batch, length), strict=True)}


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = result
        return result


def capture_views(chains: Sequence[Chain]) -> Views:
    """Capture chains of views of one tensor ``[B, HEADS, L, DIM]``."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic = [DimDynamic.DYNAMIC if i in (0, 2) else DimDynamic.STATIC for i in range(4)]
    context = StatelessSymbolicContext(dynamic_sizes=dynamic)
    x = mode.from_tensor(torch.zeros(_BATCH, HEADS, _LENGTH, DIM), symbolic_context=context)
    symbols = (x.shape[0], x.shape[2])
    assert all(isinstance(symbol, torch.SymInt) for symbol in symbols)
    module, mutated, lifted = _torch.capture(_Module(chains), [x, *symbols], mode)
    assert not mutated
    assert not lifted
    return Views(module, mode, symbols)


def _random_view(x: Tensor, b: Any, n: Any, pick: random.Random) -> Tensor:
    """Apply some view to a tensor; sizes are read from its shape, which may be symbolic."""
    rank = x.dim()
    static = [i for i, size in enumerate(x.shape) if isinstance(size, int)]
    even = [i for i in static if x.shape[i] % 2 == 0]
    dim, other = pick.randrange(rank), pick.randrange(rank)
    match pick.randrange(12):
        case 0:
            return x.transpose(dim, other)
        case 1:
            return x.permute(pick.sample(range(rank), rank))
        case 2:
            return x.unsqueeze(dim)
        case 3 if even:
            return x.unflatten(at := pick.choice(even), (2, x.shape[at] // 2))
        case 4 if rank > 2:
            first = pick.randrange(rank - 1)
            return x.flatten(first, first + 1)
        case 5:
            return x.repeat_interleave(2, dim=dim)
        case 6:
            return x.repeat([2 if i == dim else 1 for i in range(rank)])
        case 7:
            return x.unsqueeze(dim).expand(*(3 if i == dim else -1 for i in range(rank + 1)))
        case 8 if even and rank > 2:
            return x.chunk(2, dim=pick.choice(even))[pick.randrange(2)]
        case 9 if static and rank > 2:
            return x.select(at := pick.choice(static), pick.randrange(x.shape[at]))
        case 10 if rank > 1:
            # Of the shape of a transposed tensor, but not transposed.
            return x.reshape([*x.shape[:-2], x.shape[-1], x.shape[-2]])
        case 11 if even:
            at = pick.choice(even)
            return x.narrow(at, x.shape[at] // 2, x.shape[at] // 2)
        case _:
            return x.contiguous()


def random_chain(seed: int) -> Chain:
    """Return a chain of up to six views, some of them not of a kind that can be followed."""

    def chain(x: Tensor, b: Any, n: Any) -> Tensor:
        pick = random.Random(seed)
        for _ in range(pick.randrange(2, 7)):
            x = _random_view(x, b, n, pick)
        return x

    return chain


def concrete(size: int | torch.SymInt, symbols: Mapping[sympy.Basic, int]) -> int:
    """Return a size, given its symbols."""
    return int(size.node.expr.xreplace(symbols)) if isinstance(size, torch.SymInt) else size


def _grid(axes: Axes, names: Sequence[str], symbols: Mapping[sympy.Basic, int]) -> dict[str, Tensor]:
    """Return all positions along some axes, as index tensors that broadcast."""
    sizes = [concrete(axes.sizes[name], symbols) for name in names]
    shapes = [[-1 if i == at else 1 for i in range(len(names))] for at in range(len(names))]
    return {name: torch.arange(size).view(shape) for name, size, shape in zip(names, sizes, shapes, strict=True)}


def picks(axes: Axes, symbols: Mapping[sympy.Basic, int]) -> dict[str, int]:
    """Return the positions used of axes of which one is used, also of what they were found to consist of."""
    found: dict[str, int] = {}
    for axis, index in axes.picked.items():
        rest = index % concrete(axes.sizes[axis], symbols)
        for part in reversed(axes.flat((axis,))):
            rest, found[part] = divmod(rest, concrete(axes.sizes[part], symbols))
    return found


def _element(
    axes: Axes, tensor: Tensor, dims: Dims, at: Mapping[str, Tensor], symbols: Mapping[sympy.Basic, int]
) -> Tensor:
    """Return the elements of a tensor at positions along its axes."""
    index: list[Tensor] = []
    chosen = picks(axes, symbols)
    for size, dim in zip(tensor.shape, axes.resolve(dims), strict=True):
        place, whole = torch.tensor(0), 1
        for axis in dim:
            extent = concrete(axes.sizes[axis], symbols)
            position = torch.tensor(chosen[axis]) if axis in chosen else at[axis]
            place, whole = place * extent + position, whole * extent
        assert whole == size
        index.append(place)
    return tensor[tuple(index)]


def agree(
    axes: Axes,
    below: tuple[Tensor, Dims],
    above: tuple[Tensor, Dims],
    symbols: Mapping[sympy.Basic, int] | None = None,
) -> bool:
    """Tell whether one tensor is the view of another one that their dimensions say.

    At every position along the axes of ``below``, both hold the same element; the axes that ``above`` lacks don't
    matter to it, and of those that are picked only one position is used.
    """
    symbols = symbols or {}
    names = [axis for dim in axes.resolve(below[1]) for axis in dim]
    assert len(set(names)) == len(names)
    at = _grid(axes, names, symbols)
    one, other = (_element(axes, tensor, dims, at, symbols) for tensor, dims in (below, above))
    return bool((one == other).all())
