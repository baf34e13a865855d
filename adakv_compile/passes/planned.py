"""The decision for a graph, as facts: what the rewrite does with every attention, and what the report says of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx

from adakv_compile.passes.attention import AttentionSite
from adakv_compile.passes.buffer_plan import BufferUse
from adakv_compile.passes.cache import CacheUpdate
from adakv_compile.passes.implementation import Implementation
from adakv_compile.passes.late import Late
from adakv_compile.passes.masks import MaskProof, PaddingFact
from adakv_compile.passes.nodes import source_line
from adakv_compile.passes.region import Region
from adakv_compile.report import Refusal, SiteReport
from adakv_compile.runtime.layout import STANDARD

__all__ = ["Action", "MaskUse", "Plan", "PlannedSite"]


class Action(Enum):
    """What the rewrite does with an attention."""

    COMPRESS = "compress"
    """The cache is dense: attend as before, then keep the budget."""
    DECODE = "decode"
    """The cache is compressed and one token comes in: append it and attend."""
    RECOMPRESS = "recompress"
    """The cache is compressed and several tokens come in: attend, then keep the budget again."""
    SHARE = "share"
    """The keys and values are those of an attention before this one, which decides what is kept."""
    READ = "read"
    """The cache is compressed and holds the new tokens already."""


@dataclass(frozen=True)
class MaskUse:
    """How the rewritten attention sees the mask.

    Attributes:
        proof: What the mask was proved to mean.
        lookup: The mask itself, read at the positions of the kept entries, when it is not proved causal. A prompt
            has one where every query sees itself and what came before only in part.
        padding: Which entries are padding, when the proved mask says so.
        sliding_window: Window of a proved sliding mask, in tokens.
        reach: How many keys, its own included, any later query is shown at most, in tokens: by a sliding window, by
            chunks, or because the caller's own cache drops older ones.
        visible: A prompt's mask whose last row tells all that later queries can see: nothing that is hidden there is
            shown again.
        columns: Whether entries that a sliding cache has dropped must be told apart by their column.
        bias: Whether the proved mask also adds numbers, which the scores need: ``lookup`` is the mask then, too.
        checked: The mask, a prompt's, of which nothing can be proved because it comes in from outside: its values are
            checked to be causal times padding at every call.
    """

    proof: MaskProof
    lookup: fx.Node | None = None
    padding: PaddingFact | None = None
    sliding_window: int | None = None
    reach: int | None = None
    visible: fx.Node | None = None
    columns: bool = False
    bias: bool = False
    checked: fx.Node | None = None

    @property
    def covers_padding(self) -> bool:
        """Whether the mask that is looked up hides padding as well."""
        return self.lookup is not None and not self.bias


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
        owner: For an attention to another one's keys and values, that one's index.
        latent: How keys and values are computed from what is cached, if they are not cached themselves.
        late: How the keys are computed from what is cached, if that is before their position embedding.
        buffer: How the layer's preallocated buffers are treated, if that is what its cache is.
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
    owner: int | None = None
    latent: Region | None = None
    late: Late | None = None
    buffer: BufferUse | None = None


@dataclass(frozen=True)
class Plan:
    """The whole decision for one graph.

    Attributes:
        sites: The attentions to rewrite.
        left: The attentions left alone: index, node and reason.
        policies: What each of ``sites`` keeps, as ``Policy.encode()``.
        assumed: Inputs that the model keeps and whose values were relied on.
    """

    sites: tuple[PlannedSite, ...]
    left: tuple[tuple[int, fx.Node, Refusal], ...]
    policies: tuple[str, ...]
    assumed: tuple[fx.Node, ...] = ()

    @property
    def checked(self) -> tuple[fx.Node, ...]:
        """Masks whose values must be checked at every call."""
        masks = [planned.mask.checked for planned in self.sites]
        return tuple(dict.fromkeys(mask for mask in masks if mask is not None))

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


def _describe(planned: PlannedSite) -> SiteReport:
    site, mask = planned.site, planned.mask
    heads = f"{site.num_heads} query heads on {site.num_kv_heads} KV heads"
    shape = f"{heads}, head dim {site.key_dim}, {site.query_length} of {site.key_length} tokens new"
    if mask.checked is not None:
        text = "comes in from outside; checked at every call to be causal, times padding"
    elif planned.buffer is not None and planned.buffer.mask is not None:
        text = "comes in from outside; checked at every call to be causal from the write on, times padding"
    elif mask.lookup is None:
        text = f"proved: {mask.proof}"
    elif mask.bias:
        text = f"proved: {mask.proof}, with numbers added that are looked up at the kept positions"
    else:
        text = f"looked up at the kept positions ({mask.proof})"
    past = "compressed" if planned.key.compressed else "no" if planned.key.past is None else "dense"
    cache = f"{past} past, {'newest entries' if planned.key.is_sliding else 'all entries'} returned"
    if planned.buffer is not None:
        cache = str(planned.buffer)
    elif planned.owner is not None:
        cache = f"that of attention {planned.owner}"
    elif planned.latent is not None:
        cache += ", of which keys and values of all heads are computed"
    elif planned.late is not None:
        cache += ", keys before their position embedding; kept are those after it"
    elif planned.key.layout != STANDARD or planned.value.layout != STANDARD:
        layouts = dict.fromkeys(str(update.layout) for update in (planned.key, planned.value))
        cache += f", kept as {' and '.join(layouts)}"
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
