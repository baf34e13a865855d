"""Decide, from proofs and options, what happens to every attention; nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import fx

from adakv_compile.capture import Program
from adakv_compile.options import Options
from adakv_compile.passes.attention import AttentionSite, Unsupported, find_attention
from adakv_compile.passes.buffer_plan import Buffers, BufferSite, share
from adakv_compile.passes.cache import CacheUpdate, find_cache_update
from adakv_compile.passes.constants import Constants
from adakv_compile.passes.implementation import PADDED, choose_attention, choose_kernels
from adakv_compile.passes.late import Late, find_late
from adakv_compile.passes.latent import find_latent
from adakv_compile.passes.masks import MaskProof, MaskProver
from adakv_compile.passes.nodes import same_size, skip_no_ops, source_line, static_int
from adakv_compile.passes.planned import Action, MaskUse, Plan, PlannedSite
from adakv_compile.passes.readers import is_returned_in_disguise, readers_of
from adakv_compile.passes.region import Region
from adakv_compile.report import Reason, Refusal

__all__ = ["make_plan"]


@dataclass(frozen=True)
class _Candidate:
    """An attention whose cache is understood."""

    index: int
    site: AttentionSite
    key: CacheUpdate
    value: CacheUpdate
    latent: Region | None = None
    late: Late | None = None


def make_plan(program: Program, options: Options) -> Plan:
    """Analyse a captured graph; it is only read.

    Args:
        program: The captured graph.
        options: The user's options.
    """
    constants = Constants(program.kept)
    prover = MaskProver(program.module.graph, constants)
    groups: dict[tuple[fx.Node, fx.Node], list[_Candidate]] = {}
    left: list[tuple[int, fx.Node, Refusal]] = []
    sites = find_attention(program)
    buffers = Buffers(program, options, [site for site in sites if isinstance(site, AttentionSite)], constants)
    buffered: list[tuple[int, BufferSite]] = []
    for index, site in enumerate(sites):
        understood = buffers.decide(site) if isinstance(site, AttentionSite) else None
        if isinstance(understood, BufferSite):
            buffered.append((index, understood))
            continue
        candidate = _candidate(program, index, site)
        if isinstance(candidate, Refusal) and understood is not None:
            # Keys put together in a tensor of their own look like a buffer, too: its reason counts only here.
            candidate = understood
        if isinstance(candidate, Refusal):
            left.append((index, site.node, candidate))
        else:
            groups.setdefault((candidate.key.whole, candidate.value.whole), []).append(candidate)
    found: list[PlannedSite] = []
    for group in groups.values():
        decided = _decide(program, options, prover, group, layer=sum(planned.owner is None for planned in found))
        if isinstance(decided, Refusal):
            left.extend((member.index, member.site.node, decided) for member in group)
        else:
            found.extend(decided)
    pairs: dict[tuple[fx.Node | None, fx.Node | None], list[tuple[int, BufferSite]]] = {}
    for member in buffered:
        pairs.setdefault((member[1].key.past, member[1].value.past), []).append(member)
    for members in pairs.values():
        layer = sum(planned.owner is None for planned in found)
        found.extend(_plan_of_buffers(options, members, layer))
    if buffered:
        found.sort(key=lambda planned: planned.index)
    layers = sum(planned.owner is None for planned in found)
    policies = tuple(options.policy(planned.layer, layers).encode() for planned in found)
    return Plan(tuple(found), tuple(sorted(left, key=lambda entry: entry[0])), policies, constants.relied_on)


def _candidate(program: Program, index: int, site: AttentionSite | Unsupported) -> _Candidate | Refusal:
    if isinstance(site, Unsupported):
        return site.refusal
    key, value = (find_cache_update(program, site.operand(which), which) for which in ("key", "value"))
    if isinstance(key, Refusal) and isinstance(value, Refusal) and (found := find_latent(program, site)) is not None:
        inner, region = found
        latents = [find_cache_update(program, inner.operand(which), which) for which in ("key", "value")]
        if not any(isinstance(update, Refusal) for update in latents):
            key, value = cast("list[CacheUpdate]", latents)
            return (
                Refusal(Reason.KEY_VALUE_MISMATCH, why)
                if (why := _mismatch(key, value))
                else _Candidate(index, inner, key, value, region)
            )
    late: Late | None = None
    if isinstance(key, Refusal) and isinstance(value, CacheUpdate) and (found_late := find_late(program, site.keys)):
        keys, late = found_late
        site = replace(site, keys=keys)
        key = find_cache_update(program, keys, "key")
        if isinstance(key, CacheUpdate) and (key.is_sliding or key.is_pair):
            return Refusal(Reason.CACHE_FORM, "the keys are computed from a sliding cache, or from one of both")
    for update, other, which in ((key, value, "key"), (value, key, "value")):
        if isinstance(update, Refusal):
            missing = update.reason is Reason.NO_CACHE
            if missing and isinstance(other, CacheUpdate):
                return Refusal(Reason.KEY_VALUE_MISMATCH, "only one of them is returned")
            if missing and is_returned_in_disguise(program, site, which):
                return Refusal(Reason.CACHE_FORM, f"the {which}s are returned in another form than attention reads")
            return update
    assert isinstance(key, CacheUpdate)
    assert isinstance(value, CacheUpdate)
    if mismatch := _mismatch(key, value):
        return Refusal(Reason.KEY_VALUE_MISMATCH, mismatch)
    return _Candidate(index, site, key, value, late=late)


def _decide(
    program: Program, options: Options, prover: MaskProver, group: Sequence[_Candidate], layer: int
) -> list[PlannedSite] | Refusal:
    """Decide for the attentions to one layer's keys and values, the first of which owns them: all of them or none."""
    owner = group[0]
    attentions = frozenset(member.site.node for member in group)
    regions = [region for member in group for region in (member.latent, member.late and member.late.region) if region]
    computed = frozenset(node for region in regions for node in region.nodes)
    strangers = readers_of(program, (owner.key, owner.value), attentions, computed)
    if strangers:
        return Refusal(Reason.CACHE_CONSUMER, f"keys or values read by {', '.join(strangers)}")
    if owner.late is not None and len(group) > 1:
        return Refusal(Reason.CACHE_FORM, "several attentions read keys that are computed from what is cached")
    if owner.latent is not None and (len(group) > 1 or owner.key.is_sliding):
        return Refusal(Reason.CACHE_FORM, "several attentions, or a sliding one, read a cache that all heads share")
    planned: list[PlannedSite] = []
    for member in group:
        site, key = member.site, member.key
        proof = prover.prove(site.mask, is_causal=site.is_causal, q_len=site.query_length, kv_len=site.key_length)
        action = _action(site, key)
        if isinstance(action, Refusal):
            return action
        spelled = program.spelled.get(site.node)
        if spelled is not None and spelled.exact and (proof.biased or not proof.proved):
            return Refusal(Reason.MASK_UNPROVEN, "the logits are multiplied by a mask that may be more than 0 and 1")
        prefill = action is Action.COMPRESS
        mask = _mask_of_prefill(site, key, proof, options) if prefill else _mask_of_past(site, key, proof)
        if isinstance(mask, Refusal):
            return mask
        shared = member is not owner
        attention = None
        if prefill and not shared and member.latent is None:
            attention = choose_attention(options, site, mask.sliding_window, _why_masked(mask), proof)
        planned.append(
            PlannedSite(
                member.index,
                site,
                key,
                member.value,
                mask,
                Action.SHARE if shared else action,
                layer,
                choose_kernels(options, site),
                attention,
                owner.index if shared else None,
                member.latent,
                member.late,
            )
        )
    return planned


def _plan_of_buffers(options: Options, members: Sequence[tuple[int, BufferSite]], layer: int) -> list[PlannedSite]:
    """Decide for the attentions to one layer's buffers, the first of which owns what is kept."""
    planned: list[PlannedSite] = []
    use = share([found for _, found in members])
    for index, found in members:
        site, proof = found.site, found.proof
        one_token = static_int(site.query_length) == 1
        window = static_int(proof.window)
        mask = MaskUse(proof, padding=proof.padding, sliding_window=window, reach=window)
        why = "the prompt is attended to where it is kept" if found.use.whole or found.use.mask is not None else None
        if why is None and mask.padding is not None:
            why = PADDED
        is_owner, attention = index == members[0][0], None
        if is_owner and not one_token:
            attention = choose_attention(options, site, mask.sliding_window, why or _why_masked(mask), proof)
        action = Action.DECODE if one_token else Action.COMPRESS
        planned.append(
            PlannedSite(
                index,
                site,
                found.key,
                found.value,
                mask,
                action if is_owner else Action.SHARE,
                layer,
                choose_kernels(options, site),
                attention,
                None if is_owner else members[0][0],
                buffer=use if is_owner else found.use,
            )
        )
    return planned


def _action(site: AttentionSite, key: CacheUpdate) -> Action | Refusal:
    one_token = static_int(site.query_length) == 1
    if key.new is None:
        return Action.READ
    if not same_size(site.query_length, key.new_length):
        return Refusal(Reason.CACHE_FORM, f"{site.query_length} queries come with {key.new_length} new keys")
    if not key.compressed:
        return Refusal(Reason.DENSE_CACHE, "") if key.past is not None and one_token else Action.COMPRESS
    return Action.DECODE if one_token else Action.RECOMPRESS


def _mismatch(key: CacheUpdate, value: CacheUpdate) -> str:
    if (key.past is None) != (value.past is None) or key.compressed != value.compressed:
        return "one of them has a past of another kind"
    if key.is_sliding != value.is_sliding:
        return "only one of them drops old entries"
    if key.is_sliding and not same_size(key.cached_length, value.cached_length):
        return f"{key.cached_length} keys are kept, but {value.cached_length} values"
    if key.is_pair or value.is_pair:
        fits = (key.part, value.part) == (0, 1) and key.slots == value.slots and key.layout == value.layout
        return "" if fits else "they are taken from one tensor in another way than as its halves"
    if key.slots and set(key.slots) & set(value.slots):
        return "both are returned as the same output"
    if (key.new is None) != (value.new is None) or not same_size(key.new_length, value.new_length):
        return f"{key.new_length} new keys, {value.new_length} new values"
    dtypes = [update.whole.meta["val"].dtype for update in (key, value)]
    return "" if dtypes[0] == dtypes[1] else f"keys are {dtypes[0]}, values {dtypes[1]}"


def _refuse_mask(site: AttentionSite, proof: MaskProof) -> Refusal:
    where = proof.where or source_line(site.node)
    detail = proof.why_not_self_causal(site.query_length, site.key_length) or ""
    return Refusal(Reason.MASK_NOT_CAUSAL if proof.proved else Reason.MASK_UNPROVEN, detail, where)


def _mask_of_prefill(site: AttentionSite, update: CacheUpdate, proof: MaskProof, options: Options) -> MaskUse | Refusal:
    in_chunks = proof.is_causal_in_chunks(site.query_length, site.key_length)
    if not in_chunks and not proof.is_self_causal(site.query_length, site.key_length):
        outside = _from_outside(site)
        if outside is None or update.is_sliding:
            return _refuse_mask(site, proof)
        return MaskUse(proof, visible=outside, checked=outside)
    window = static_int(proof.window)
    if proof.window is not None and window is None:
        return Refusal(Reason.MASK_UNPROVEN, f"the sliding window {proof.window} is not a number")
    reach = proof.chunk if in_chunks else window
    if update.is_sliding and reach is None:
        # The mask may show more than the caller keeps: what was dropped can't be seen again.
        held = static_int(update.cached_length)
        if held is None:
            return Refusal(Reason.CACHE_FORM, f"old entries are dropped down to a number not known, {update.cached}")
        reach = held + 1
    if reach is not None and isinstance(options.budget, int) and options.budget >= reach - 1:
        return Refusal(Reason.WITHIN_WINDOW, f"window {reach}, budget {options.budget}")
    return MaskUse(
        proof,
        lookup=site.mask if proof.biased or in_chunks else None,
        padding=proof.padding,
        sliding_window=window,
        reach=reach,
        visible=site.mask if in_chunks else None,
        bias=proof.biased,
    )


def _from_outside(site: AttentionSite) -> fx.Node | None:
    """Return the boolean mask of a whole prompt that the graph is given, as after a graph break."""
    mask = None if site.mask is None else skip_no_ops(site.mask)
    if mask is None or mask.op != "placeholder" or site.is_causal or mask.meta["val"].dtype != torch.bool:
        return None
    shape = mask.meta["val"].shape
    square = len(shape) == 4 and same_size(shape[2], site.query_length) and same_size(shape[3], site.key_length)
    whole = same_size(site.query_length, site.key_length)
    return mask if square and whole and static_int(shape[1]) == 1 else None


def _mask_of_past(site: AttentionSite, update: CacheUpdate, proof: MaskProof) -> MaskUse | Refusal:
    window = static_int(proof.window)
    causal = proof.is_self_causal(site.query_length, site.key_length)
    if causal and proof.biased:
        return MaskUse(proof, lookup=site.mask, padding=proof.padding, bias=True)
    if causal and (proof.window is None or window is not None):
        # A sliding cache has dropped entries that are still stored; something must tell their columns.
        columns = update.is_sliding and proof.padding is None and window is None
        return MaskUse(proof, padding=proof.padding, sliding_window=window, columns=columns)
    if site.mask is None:
        return _refuse_mask(site, proof)
    return MaskUse(proof, lookup=site.mask)


def _why_masked(mask: MaskUse) -> str | None:
    """Return why a prompt's attention takes the model's own mask."""
    if mask.checked is not None:
        return "the mask comes in from outside"
    if mask.bias:
        return "numbers are added to the logits"
    if mask.lookup is not None:
        return "queries see their own chunk alone"
    return None
