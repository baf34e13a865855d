"""Find how keys and values are cached: what was there, what is new, and where the caller gets it back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.passes.attention import AttentionSite
from adakv_compile.passes.nodes import arg, shape_of, skip_no_ops
from adakv_compile.report import Reason, Refusal

__all__ = ["CacheUpdate", "find_cache_update"]

aten = torch.ops.aten
_SEQUENCE_DIM = 2


@dataclass(frozen=True)
class CacheUpdate:
    """One tensor's update, ``whole = cat([past, new], dim=2)``, and what the caller keeps of it.

    Attributes:
        past: The cache as it came in, a placeholder, or ``None`` in the first call of a conversation.
        compressed: Whether ``past`` is a ``CompressedKV``.
        new: Entries of this call, ``[B, Hkv, T, D]``.
        whole: What attention reads, ``[B, Hkv, L, D]``.
        cached: What the caller keeps: ``whole``, or its newest entries in a sliding-window layer.
        slots: The outputs in which the caller gets ``cached``.
    """

    past: fx.Node | None
    compressed: bool
    new: fx.Node
    whole: fx.Node
    cached: fx.Node
    slots: tuple[int, ...]

    @property
    def is_sliding(self) -> bool:
        """Whether the caller drops the oldest entries by itself."""
        return self.cached is not self.whole

    @property
    def cached_length(self) -> int | torch.SymInt:
        """Logical length of the cache after the call."""
        return shape_of(self.cached)[_SEQUENCE_DIM]


def find_cache_update(program: Program, site: AttentionSite, which: str) -> CacheUpdate | Refusal:
    """Analyse the keys or the values of one attention; the graph is only read.

    Args:
        program: The captured graph.
        site: The attention.
        which: ``"key"`` or ``"value"``.
    """
    whole = site.key if which == "key" else site.value
    past, new, refusal = _split(whole, which)
    if refusal is not None:
        return refusal
    slots, cached = _slots(program, whole)
    if past is not None and past.op != "placeholder":
        return Refusal(Reason.CACHE_FORM, f"the {which}s are concatenated to a computed value, {past.name}")
    if not slots:
        if past is None or past not in program.compressed:
            if _is_returned_in_disguise(program, site, whole):
                return Refusal(Reason.CACHE_FORM, f"the {which}s are returned in another form than attention reads")
            return Refusal(Reason.NO_CACHE, f"{which}s")
        return Refusal(Reason.CACHE_FORM, f"the compressed {which}s are extended but not returned")
    strangers = _strangers(program, site, whole, cached, past)
    if strangers:
        return Refusal(Reason.CACHE_CONSUMER, f"{which}s read by {', '.join(strangers)}")
    return CacheUpdate(
        past=past,
        compressed=past is not None and past in program.compressed,
        new=new,
        whole=whole,
        cached=cached,
        slots=slots,
    )


def _split(whole: fx.Node, which: str) -> tuple[fx.Node | None, fx.Node, Refusal | None]:
    """Split ``cat([past, new])``; a tensor that is no concatenation is all new."""
    if whole.target is not aten.cat.default:
        return None, whole, None
    parts = whole.args[0]
    assert isinstance(parts, (list, tuple))
    nodes = [part for part in parts if isinstance(part, fx.Node) and not _is_empty(part)]
    if arg(whole, 1, "dim", 0) not in (_SEQUENCE_DIM, _SEQUENCE_DIM - 4):
        # For instance a rotary embedding: the halves of the head dimension are put together. All of it is new.
        return None, whole, None
    if len(nodes) == 1:
        return None, nodes[0], None
    if len(nodes) == 2:
        return skip_no_ops(nodes[0]), nodes[1], None
    return None, whole, Refusal(Reason.CACHE_FORM, f"the {which}s are concatenated from {len(nodes)} parts")


def _is_empty(node: fx.Node) -> bool:
    """Tell the empty tensor that a cache starts from (``torch.tensor([])``)."""
    shape = shape_of(node)
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0


def _slots(program: Program, whole: fx.Node) -> tuple[tuple[int, ...], fx.Node]:
    """Return the outputs that hold ``whole``, or else its newest entries."""
    returned = [skip_no_ops(output) if isinstance(output, fx.Node) else None for output in program.outputs]
    exact = tuple(i for i, output in enumerate(returned) if output is whole)
    if exact:
        return exact, whole
    for output in returned:
        if output is not None and _is_newest_entries_of(output, whole):
            return tuple(i for i, other in enumerate(returned) if other is output), output
    return (), whole


def _is_newest_entries_of(node: fx.Node, whole: fx.Node) -> bool:
    """Tell ``whole[:, :, -n:]``: what a sliding-window cache keeps."""
    if node.target is not aten.slice.Tensor or arg(node, 4, "step", 1) != 1:
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or skip_no_ops(source) is not whole:
        return False
    end = arg(node, 3, "end")
    reaches_end = end is None or (isinstance(end, int) and end >= 2**62)
    return arg(node, 1, "dim", 0) == _SEQUENCE_DIM and reaches_end


def _is_returned_in_disguise(program: Program, site: AttentionSite, whole: fx.Node) -> bool:
    """Tell whether what makes the keys (or values), and not the queries, reaches the caller around the attention."""
    own = _ancestors(whole) - _ancestors(site.query)
    seen, pending = set(own), list(own)
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            if user is not site.node and user not in seen and user not in program.superseded:
                seen.add(user)
                pending.append(user)
    return False


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a value and all that it is computed from in the graph."""
    found, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found and source.op == "call_function":
                found.add(source)
                pending.append(source)
    return found


def _strangers(
    program: Program, site: AttentionSite, whole: fx.Node, cached: fx.Node, past: fx.Node | None
) -> tuple[str, ...]:
    """Name the readers of the cache other than this attention, the caller and size queries.

    A compressed cache has no dense form, so in the decode graph such a reader would have nothing to read.
    """
    chain = _chain(site, whole)
    output = next(iter(program.module.graph.find_nodes(op="output")))
    known = {site.node, output, whole, cached, *chain}
    found: list[str] = []
    pending = [whole, cached, *chain] + ([past] if past is not None else [])
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in known or user in program.superseded or user.target is aten.sym_size.int:
                continue
            known.add(user)
            if skip_no_ops(user) in (whole, cached, past):
                pending.append(user)
            else:
                found.append(str(user.target))
    return tuple(found)


def _chain(site: AttentionSite, whole: fx.Node) -> tuple[fx.Node, ...]:
    """Return the views between the cache and the attention's operand: no-ops and the repetition for grouped queries."""
    operand = site.node.args[1 if whole is site.key else 2]
    chain: list[fx.Node] = []
    while isinstance(operand, fx.Node) and operand is not whole:
        chain.append(operand)
        operand = operand.args[0]
    return tuple(chain)
