"""What was compressed, what was not, and why: plain strings and numbers, no live graphs or tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Final

__all__ = ["GraphReport", "Reason", "Refusal", "Report", "SiteReport", "SourceLine"]


class Reason(Enum):
    """Why an attention, or a whole graph, was left as it is."""

    GRAD_ENABLED = "gradients are enabled; call the model under torch.no_grad() or torch.inference_mode()"
    NO_CACHE = "the keys and values are not returned to the caller, so there is no cache to compress"
    SPELLED_OUT = "the attention is written out with softmax and matmul in a way that is not understood"
    OPERATOR = "the attention is computed by an operator whose meaning is not known"
    PACKED = (
        "the attention is over sequences packed one after the other: which entries belong to which sequence is data, "
        "and a cache of them has no rows to share a budget out to"
    )
    DROPOUT = "the attention drops probabilities; put the model in evaluation mode"
    HEADS = "the query heads are not a multiple of the key heads, or keys and values have different heads"
    CACHE_FORM = (
        "the cache is not updated in a way that is understood: new entries concatenated along the sequence, or written "
        "into a preallocated buffer at known positions"
    )
    CACHE_CONSUMER = "the cached keys or values are also read by something other than this attention"
    KEY_VALUE_MISMATCH = "keys and values are not updated in the same way"
    MASK_UNPROVEN = "the meaning of the attention mask could not be proved"
    MASK_NOT_CAUSAL = "the attention mask lets a token see other entries than itself and those before it"
    DENSE_CACHE = (
        "the cache is dense: it was filled outside of this backend, or its layer had nothing to evict; only a call "
        "with several tokens compresses it"
    )
    WITHIN_WINDOW = "the layer's sliding window is not longer than the budget, so there is nothing to evict"
    CAPTURE = "the graph could not be captured"
    REWRITE = "the rewritten graph could not be built or compiled"

    @property
    def is_refusal(self) -> bool:
        """Whether a user who asked for compression should be warned."""
        return self not in _EXPECTED


_EXPECTED: Final = frozenset({Reason.NO_CACHE, Reason.GRAD_ENABLED, Reason.WITHIN_WINDOW, Reason.DENSE_CACHE})


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of the user's program."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.code}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason with its details.

    Attributes:
        reason: The kind of obstacle.
        detail: What was found, in the graph's terms.
        where: The line of the user's program that made the value in question, if known.
    """

    reason: Reason
    detail: str
    where: SourceLine | None = None

    def __str__(self) -> str:
        at = f"\n      at {self.where}" if self.where else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.reason.name}: {self.reason.value}{detail}{at}"


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One attention.

    Attributes:
        index: Position among the attentions of its graph.
        action: ``"compress"`` (prefill), ``"recompress"``, ``"decode"``, or ``"leave"``.
        shape: Query heads, KV heads, head dimension and lengths, as text.
        mask: What the mask was proved to mean, or how it is looked up.
        proof: The steps of that proof.
        cache: How the cache is updated.
        kernels: Who computes the ops and, for ``"compress"``, the attention itself; with the reason where it is not
            what was asked for or the fastest there is.
        refusal: Why the attention was left alone, for ``"leave"``.
        where: The user's line of the attention.
    """

    index: int
    action: str
    shape: str
    mask: str
    proof: tuple[str, ...]
    cache: str
    kernels: str
    refusal: Refusal | None
    where: SourceLine | None

    @property
    def compressed(self) -> bool:
        """Whether this attention reads or makes a compressed cache."""
        return self.action != "leave"


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One graph that reached the backend.

    Attributes:
        nodes: Number of nodes of the captured graph.
        sites: Its attentions, in order.
        refusal: Why the whole graph was left alone, if it was.
        seconds: Time spent in each stage.
        snapshot: The graph as it is compiled, in the stable form of :mod:`adakv_compile.testing`.
        unmet: Options that could not be followed, and what was done instead of failing.
    """

    nodes: int
    sites: tuple[SiteReport, ...]
    refusal: Refusal | None
    seconds: Mapping[str, float]
    snapshot: str = ""
    unmet: tuple[str, ...] = ()

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The refusals a user should hear of, each once."""
        found = [self.refusal, *(site.refusal for site in self.sites)]
        return tuple(dict.fromkeys(item for item in found if item is not None and item.reason.is_refusal))


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that reached the backend during one call of a model.

    ``print(report)`` is a page for people, :meth:`json` is for machines.
    """

    graphs: tuple[GraphReport, ...]

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """All attentions of all graphs."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """All refusals, each once."""
        return tuple(dict.fromkeys(refusal for graph in self.graphs for refusal in graph.refusals))

    def json(self) -> str:
        """Return the report as a JSON document."""
        return json.dumps(asdict(self), indent=2, default=_plain)

    def __str__(self) -> str:
        if not self.graphs:
            return "No graph reached the backend."
        return "\n\n".join(_graph_page(i, graph) for i, graph in enumerate(self.graphs))


def _plain(value: object) -> object:
    if isinstance(value, Reason):
        return value.name
    if isinstance(value, Mapping):
        return dict(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return str(value)


def _graph_page(index: int, graph: GraphReport) -> str:
    done = sum(site.compressed for site in graph.sites)
    lines = [f"graph {index}  {graph.nodes} nodes  {done} of {len(graph.sites)} attentions on a compressed cache"]
    if graph.refusal is not None:
        lines.append(f"  left alone  {graph.refusal}")
    for site in graph.sites:
        lines.append(f"  attention {site.index}  {site.action.upper()}  {site.shape}")
        if site.where is not None:
            lines.append(f"      at {site.where}")
        lines.append(f"      mask: {site.mask}")
        lines.append(f"      cache: {site.cache}")
        if site.kernels:
            lines.append(f"      kernels: {site.kernels}")
        if site.refusal is not None:
            lines.append(f"      {site.refusal}")
    lines += [f"  not met: {wish}" for wish in graph.unmet]
    if graph.seconds:
        lines.append("  " + "  ".join(f"{stage} {value:.2f} s" for stage, value in graph.seconds.items()))
    return "\n".join(lines)
