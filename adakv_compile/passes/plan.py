"""Decide, from proofs and options, what happens to every attention; nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx

from adakv_compile.capture import Program
from adakv_compile.options import Options
from adakv_compile.passes.attention import AttentionSite, Unsupported, find_attention
from adakv_compile.passes.cache import CacheUpdate, find_cache_update
from adakv_compile.passes.implementation import Implementation, choose_attention, choose_kernels
from adakv_compile.passes.masks import MaskProof, MaskProver, PaddingFact
from adakv_compile.passes.nodes import same_size, shape_of, source_line, static_int
from adakv_compile.report import Reason, Refusal, SiteReport

__all__ = ["Action", "MaskUse", "Plan", "PlannedSite", "make_plan"]


class Action(Enum):
    """What the rewrite does with an attention."""

    COMPRESS = "compress"
    """The cache is dense: attend as before, then keep the budget."""
    DECODE = "decode"
    """The cache is compressed and one token comes in: append it and attend."""
    RECOMPRESS = "recompress"
    """The cache is compressed and several tokens come in: attend, then keep the budget again."""


@dataclass(frozen=True)
class MaskUse:
    """How the rewritten attention sees the mask.

    Attributes:
        proof: What the mask was proved to mean.
        lookup: The mask itself, read at the positions of the kept entries, when it is not proved causal.
        padding: Which entries are padding, when the proved mask says so.
        sliding_window: Window of a proved sliding mask, in tokens.
        columns: Whether entries that a sliding cache has dropped must be told apart by their column.
    """

    proof: MaskProof
    lookup: fx.Node | None = None
    padding: PaddingFact | None = None
    sliding_window: int | None = None
    columns: bool = False


@dataclass(frozen=True)
class PlannedSite:
    """One attention that will be rewritten.

    Attributes:
        index: Position among the attentions of its graph.
        site: The attention.
        key: How its cached keys are updated.
        value: How its cached values are updated.
        mask: How the rewritten attention sees the mask.
        action: What is done.
        layer: Index among the attentions that are rewritten.
        kernels: The overload of the ops.
        attention: The backend of the prompt's attention; None for the other actions.
    """

    index: int
    site: AttentionSite
    key: CacheUpdate
    value: CacheUpdate
    mask: MaskUse
    action: Action
    layer: int
    kernels: Implementation
    attention: Implementation | None


@dataclass(frozen=True)
class Plan:
    """The whole decision for one graph.

    Attributes:
        sites: The attentions to rewrite.
        left: The attentions left alone: index, node and reason.
        policies: What each of ``sites`` keeps, as ``Policy.encode()``.
    """

    sites: tuple[PlannedSite, ...]
    left: tuple[tuple[int, fx.Node, Refusal], ...]
    policies: tuple[str, ...]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why attentions were left alone, in order."""
        return tuple(refusal for _, _, refusal in self.left)

    @property
    def unmet(self) -> tuple[str, ...]:
        """Wishes of the user's options that could not be met, each once."""
        choices = [choice for planned in self.sites for choice in (planned.kernels, planned.attention)]
        return tuple(dict.fromkeys(choice.unmet for choice in choices if choice is not None and choice.unmet))

    def describe(self) -> tuple[SiteReport, ...]:
        """Return the report of every attention, in order."""
        done = [_describe(planned) for planned in self.sites]
        left = [
            SiteReport(i, "leave", "", "", (), "", "", refusal, source_line(node)) for i, node, refusal in self.left
        ]
        return tuple(sorted(done + left, key=lambda site: site.index))


def make_plan(program: Program, options: Options) -> Plan:
    """Analyse a captured graph; it is only read.

    Args:
        program: The captured graph.
        options: The user's options.
    """
    prover = MaskProver(program.module.graph)
    found: list[PlannedSite] = []
    left: list[tuple[int, fx.Node, Refusal]] = []
    for index, site in enumerate(find_attention(program)):
        decided = _decide(program, options, prover, index, site, layer=len(found))
        if isinstance(decided, Refusal):
            left.append((index, site.node, decided))
        else:
            found.append(decided)
    policies = tuple(options.policy(planned.layer, len(found)).encode() for planned in found)
    return Plan(tuple(found), tuple(left), policies)


def _decide(
    program: Program,
    options: Options,
    prover: MaskProver,
    index: int,
    site: AttentionSite | Unsupported,
    layer: int,
) -> PlannedSite | Refusal:
    if isinstance(site, Unsupported):
        return site.refusal
    key, value = (find_cache_update(program, site, which) for which in ("key", "value"))
    for update, other in ((key, value), (value, key)):
        if isinstance(update, Refusal):
            half = update.reason is Reason.NO_CACHE and isinstance(other, CacheUpdate)
            return Refusal(Reason.KEY_VALUE_MISMATCH, "only one of them is returned") if half else update
    assert isinstance(key, CacheUpdate)
    assert isinstance(value, CacheUpdate)
    if mismatch := _mismatch(key, value):
        return Refusal(Reason.KEY_VALUE_MISMATCH, mismatch)
    proof = prover.prove(site.mask, is_causal=site.is_causal, q_len=site.query_length, kv_len=site.key_length)
    one_token = static_int(site.query_length) == 1
    if not key.compressed:
        if key.past is not None and one_token:
            return Refusal(Reason.DENSE_CACHE, "")
        mask = _mask_of_prefill(site, key, proof, options)
        action = Action.COMPRESS
    else:
        mask = _mask_of_past(site, key, proof)
        action = Action.DECODE if one_token else Action.RECOMPRESS
    if isinstance(mask, Refusal):
        return mask
    kernels = choose_kernels(options, site)
    attention = None
    if action is Action.COMPRESS:
        attention = choose_attention(options, site, mask.sliding_window, mask.padding is not None)
    return PlannedSite(index, site, key, value, mask, action, layer, kernels, attention)


def _mismatch(key: CacheUpdate, value: CacheUpdate) -> str:
    if (key.past is None) != (value.past is None) or key.compressed != value.compressed:
        return "one of them has a past of another kind"
    if key.is_sliding != value.is_sliding:
        return "only one of them drops old entries"
    if key.is_sliding and not same_size(key.cached_length, value.cached_length):
        return f"{key.cached_length} keys are kept, but {value.cached_length} values"
    if key.slots and set(key.slots) & set(value.slots):
        return "both are returned as the same output"
    keys, values = shape_of(key.new), shape_of(value.new)
    if not all(same_size(a, b) for a, b in zip(keys[:3], values[:3], strict=True)):
        return f"new keys {tuple(keys)}, new values {tuple(values)}"
    if key.new.meta["val"].dtype != value.new.meta["val"].dtype:
        return f"keys are {key.new.meta['val'].dtype}, values {value.new.meta['val'].dtype}"
    return ""


def _refuse_mask(site: AttentionSite, proof: MaskProof) -> Refusal:
    where = proof.where or source_line(site.node)
    detail = proof.why_not_self_causal(site.query_length, site.key_length) or ""
    return Refusal(Reason.MASK_NOT_CAUSAL if proof.proved else Reason.MASK_UNPROVEN, detail, where)


def _mask_of_prefill(site: AttentionSite, update: CacheUpdate, proof: MaskProof, options: Options) -> MaskUse | Refusal:
    if not proof.is_self_causal(site.query_length, site.key_length):
        return _refuse_mask(site, proof)
    window = static_int(proof.window)
    if proof.window is not None and window is None:
        return Refusal(Reason.MASK_UNPROVEN, f"the sliding window {proof.window} is not a number")
    if update.is_sliding and window is None:
        return Refusal(Reason.CACHE_FORM, "old entries are dropped although the mask still shows them")
    if window is not None and isinstance(options.budget, int) and options.budget >= window - 1:
        return Refusal(Reason.WITHIN_WINDOW, f"window {window}, budget {options.budget}")
    return MaskUse(proof, padding=proof.padding, sliding_window=window)


def _mask_of_past(site: AttentionSite, update: CacheUpdate, proof: MaskProof) -> MaskUse | Refusal:
    window = static_int(proof.window)
    causal = proof.is_self_causal(site.query_length, site.key_length)
    if causal and (proof.window is None or window is not None):
        # A sliding cache has dropped entries that are still stored; something must tell their columns.
        columns = update.is_sliding and proof.padding is None and window is None
        return MaskUse(proof, padding=proof.padding, sliding_window=window, columns=columns)
    if site.mask is None:
        return _refuse_mask(site, proof)
    return MaskUse(proof, lookup=site.mask)


def _describe(planned: PlannedSite) -> SiteReport:
    site, mask = planned.site, planned.mask
    heads = f"{site.num_heads} query heads on {site.num_kv_heads} KV heads"
    shape = f"{heads}, head dim {shape_of(site.key)[3]}, {site.query_length} of {site.key_length} tokens new"
    text = f"proved: {mask.proof}" if mask.lookup is None else f"looked up at the kept positions ({mask.proof})"
    past = "compressed" if planned.key.compressed else "no" if planned.key.past is None else "dense"
    cache = f"{past} past, {'newest entries' if planned.key.is_sliding else 'all entries'} returned"
    kernels = planned.kernels.text
    if planned.attention is not None:
        kernels += f"; attention of the prompt: {planned.attention.text}"
    return SiteReport(
        index=planned.index,
        action=planned.action.value,
        shape=shape,
        mask=text,
        proof=tuple(mask.proof.steps),
        cache=cache,
        kernels=kernels,
        refusal=None,
        where=source_line(site.node),
    )
