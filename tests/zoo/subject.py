"""What every check is told about a decoder: how to build it, how to feed it, where its cache is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adakv_compile import CompressedKV
from adakv_compile.runtime.side import beside

__all__ = ["Run", "Subject", "compressed", "greedy", "grown", "views"]

#: ``run(model, ids, state, mask) -> (logits, state)``; see :class:`Subject`.
Run = Callable[[nn.Module, Tensor, Any, Tensor | None], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Subject:
    """A decoder that the checks can run.

    Attributes:
        name: Unique among the subjects.
        build: Return the decoder in evaluation mode. Two calls return the same weights, uneven enough for attention
            to prefer some entries. Weights are float32.
        run: ``run(model, ids [B, T], state, mask)`` feeds ``T`` new tokens and returns their logits ``[B, T, V]`` (or
            only the last, ``[B, 1, V]``) and the state after them. ``state`` is what the call before returned, None at
            the start of a conversation. A decoder that keeps its cache in itself forgets it where ``state`` is None
            and returns itself as the state. ``mask`` is ``[B, L]`` int64 over all tokens so far and the new ones, 1
            for tokens and 0 for padding on the left, or None. It must go through ``model(...)``, so that a module
            compiled in place is served, and never touch the entries of the cache itself.
        vocab: Number of tokens; ids from 2 on are ordinary ones.
        supports_padding: Whether ``run`` follows a ``mask`` with padding.
        generate: ``generate(model, ids, mask, count) -> [B, count]`` greedy tokens, where the decoder has its own
            way; by default :func:`greedy` over ``run``.
        prompt: Length of the prompts; no other size of the model may equal it or one of the next twelve, because
            attention is found by this size.
        prefix: Tokens of its own that the decoder puts before the prompt.
        windows: How many keys a query of a layer that slides, or that works in chunks, is given at most.
    """

    name: str
    build: Callable[[], nn.Module]
    run: Run
    vocab: int = 97
    supports_padding: bool = False
    generate: Callable[[nn.Module, Tensor, Tensor | None, int], Tensor] | None = None
    prompt: int = 51
    prefix: int = 0
    windows: tuple[int, ...] = ()


def grown(mask: Tensor | None, count: int = 1) -> Tensor | None:
    """Return a padding mask ``[B, L]`` with ``count`` more tokens on its right."""
    return None if mask is None else torch.cat([mask, mask.new_ones(mask.shape[0], count)], dim=1)


@torch.no_grad()
def greedy(subject: Subject, model: nn.Module, ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Return the ``count`` most likely tokens after ``ids``, one after the other, ``[B, count]``."""
    if subject.generate is not None:
        return subject.generate(model, ids, mask, count)
    found: list[Tensor] = []
    state: Any = None
    for _ in range(count):
        logits, state = subject.run(model, ids, state, mask)
        ids, mask = logits[:, -1].argmax(-1, keepdim=True), grown(mask)
        found.append(ids)
    return torch.cat(found, dim=1)


def compressed(state: object) -> list[CompressedKV]:
    """Return one view of every compressed layer in ``state``, its keys where it has them, in layer order."""
    found: dict[int, CompressedKV] = {}
    for view in views(state):
        found.setdefault(id(view.store), view)
    return list(found.values())


def views(state: object) -> Iterator[CompressedKV]:
    """Yield every ``CompressedKV`` inside ``state`` or beside a buffer in it, depth first."""
    seen: dict[int, object] = {}  # holds the objects, so that an id stays theirs
    stack = [state]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, CompressedKV):
            yield item
        elif isinstance(item, Tensor) and (kept := beside(item)) is not None:
            yield kept
        elif not isinstance(item, Tensor):
            stack.extend(reversed(_parts(item)))


def _parts(item: object) -> list[object]:
    if isinstance(item, Mapping):
        return list(cast("Mapping[object, object]", item).values())
    if isinstance(item, (list, tuple)):
        return list(cast("list[object]", item))
    if isinstance(item, nn.Module):
        own = {name: part for name, part in vars(item).items() if not name.startswith("_")}
        return [*own.values(), *item.buffers(recurse=False), *item.children()]
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return [getattr(item, field.name) for field in dataclasses.fields(item)]
    # Caches are plain objects; functions, classes, configurations and strings are not walked into.
    is_cache = "cache" in type(item).__name__.lower() or "layer" in type(item).__name__.lower()
    return list(vars(item).values()) if is_cache and hasattr(item, "__dict__") else []
