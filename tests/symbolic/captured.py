"""Capture functions that make attention masks, prove the masks, and compute the same masks for real."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from adakv_compile import _torch
from adakv_compile.passes.masks import MaskProof, MaskProver

__all__ = ["BATCH", "MaskFunction", "MaskGraph", "Run", "capture_mask", "capture_masks", "visible_in"]

BATCH = 2

MaskFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``mask(tokens [B, T], keys [B, L], padding [B, L] of int64)``; the first two only for their sizes."""


class _Module(nn.Module):
    def __init__(self, functions: Sequence[MaskFunction]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, tokens: Tensor, keys: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        torch._check(keys.shape[1] >= tokens.shape[1])
        # The copy keeps a mask that is an input, or a view of one, a value of the graph.
        return tuple(function(tokens, keys, padding).clone() for function in self.functions)


@dataclass(frozen=True)
class Run:
    """One real execution: the mask, and every value of the graph by name."""

    mask: Tensor
    values: Mapping[str, Tensor]
    symbols: Mapping[str, int]
    shape: tuple[int, int, int]


class _Program:
    """A captured graph of several masks, with what was executed of it."""

    def __init__(self, module: fx.GraphModule, queries: int | torch.SymInt, keys: int | torch.SymInt) -> None:
        self.module, self.queries, self.keys = module, queries, keys
        self.run = lru_cache(maxsize=None)(self._run)

    def _run(self, queries: int, keys: int, seed: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, keys, (BATCH, 1), generator=generator)
        padding = (torch.arange(keys) >= first).long()
        recorder = _Recorder(self.module)
        masks = recorder.run(torch.zeros(BATCH, queries), torch.zeros(BATCH, keys), padding)
        return masks, recorder.values


@dataclass(frozen=True)
class MaskGraph:
    """One captured mask."""

    program: _Program
    position: int

    @property
    def module(self) -> fx.GraphModule:
        """The graph, which may make other masks as well."""
        return self.program.module

    @property
    def queries(self) -> int | torch.SymInt:
        """Number of queries."""
        return self.program.queries

    @property
    def keys(self) -> int | torch.SymInt:
        """Number of keys."""
        return self.program.keys

    @property
    def mask(self) -> fx.Node:
        """The mask in the graph."""
        (outputs,) = next(iter(self.module.graph.find_nodes(op="output"))).args
        return outputs[self.position]

    def prove(self, *, is_causal: bool = False) -> MaskProof:
        """Prove the mask with a prover of its own."""
        prover = MaskProver(self.module.graph)
        return prover.prove(self.mask, is_causal=is_causal, q_len=self.queries, kv_len=self.keys)

    def run(self, queries: int, keys: int, seed: int = 0) -> Run:
        """Execute the graph with a random left padding that leaves every row at least one token."""
        masks, values = self.program.run(queries, keys, seed)
        sizes = ((self.queries, queries), (self.keys, keys))
        symbols = {str(symbolic): concrete for symbolic, concrete in sizes if isinstance(symbolic, torch.SymInt)}
        return Run(masks[self.position], values, symbols, (BATCH, queries, keys))


class _Recorder(fx.Interpreter):
    """Executes a graph and keeps all its tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result.clone()
        return result


def capture_mask(function: MaskFunction, *, queries: int = 4, keys: int = 7, dynamic: bool = False) -> MaskGraph:
    """Capture the mask that a function makes; with ``dynamic``, equal lengths share one symbol."""
    return capture_masks([function], queries=queries, keys=keys, dynamic=dynamic)[0]


def capture_masks(
    functions: Sequence[MaskFunction], *, queries: int = 4, keys: int = 7, dynamic: bool = False
) -> list[MaskGraph]:
    """Capture the masks that functions make in one graph, which is much faster than a graph for each."""
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)

    def fake(tensor: Tensor) -> Tensor:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DUCK]) if dynamic else None
        return mode.from_tensor(tensor, symbolic_context=context, static_shapes=not dynamic)

    tokens, real_keys = fake(torch.zeros(BATCH, queries)), fake(torch.zeros(BATCH, keys))
    padding = fake(torch.ones(BATCH, keys, dtype=torch.int64))
    module, mutated, lifted = _torch.capture(_Module(functions), [tokens, real_keys, padding], mode)
    assert not mutated
    assert not lifted
    program = _Program(module, tokens.shape[1], real_keys.shape[1])
    return [MaskGraph(program, position) for position in range(len(functions))]


def visible_in(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return a mask as bool ``[B, 1, q, kv]``, true where visible; an additive one must hold zero and lowest alone."""
    if mask.is_floating_point():
        hidden = mask <= torch.finfo(mask.dtype).min
        assert (hidden | (mask == 0)).all()
        mask = ~hidden
    batch, queries, keys = shape
    return mask.expand(batch, 1, queries, keys)
