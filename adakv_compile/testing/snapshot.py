"""Graph snapshots and assertions for continuous integration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adakv_compile.api import explain
from adakv_compile.report import Report

__all__ = ["assert_compressed", "graph_snapshot"]


def graph_snapshot(
    model: Callable[..., Any], /, *args: Any, options: Mapping[str, object] | None = None, **kwargs: Any
) -> str:
    """Return a stable text of every rewritten graph, for ``expecttest.TestCase.assertExpectedInline``.

    Values are renumbered, symbolic sizes are letters, and there are no paths, devices or addresses in it: it changes
    when the graph changes.

    Args:
        model: A module or function.
        *args: Arguments of one call.
        options: As for the backend.
        **kwargs: Keyword arguments of the call.

    Returns:
        One block a graph; a graph that is left alone is one line with the reasons.
    """
    blocks: list[str] = []
    for index, graph in enumerate(explain(model, *args, options=options, **kwargs).graphs):
        actions = ", ".join(site.action for site in graph.sites) or "no attention"
        reasons = ", ".join(refusal.reason.name for refusal in graph.refusals)
        heading = f"graph {index}: {actions}" + (f" [{reasons}]" if reasons else "")
        blocks.append(f"{heading}\n{graph.snapshot}".rstrip())
    return "\n\n".join(blocks)


def assert_compressed(report: Report, n_sites: int) -> None:
    """Assert that the graphs of ``report`` hold exactly ``n_sites`` attentions each and that all are compressed.

    Graphs without attention are not counted.

    Args:
        report: What :func:`adakv_compile.explain` returned.
        n_sites: Attentions of the model, one for each layer as a rule.

    Raises:
        AssertionError: With the whole report in the message.
    """
    graphs = [graph for graph in report.graphs if graph.sites]
    counts = [(len(graph.sites), sum(site.compressed for site in graph.sites)) for graph in graphs]
    if not graphs or any(count != (n_sites, n_sites) for count in counts):
        found = "; ".join(f"{done} of {sites} compressed" for sites, done in counts) or "no graph with attention"
        raise AssertionError(f"expected {n_sites} compressed attentions in every graph, found {found}\n\n{report}")
