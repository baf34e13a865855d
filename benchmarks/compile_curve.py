"""``python -m benchmarks.compile_curve``: how the stages of a compilation grow with the layers of a model.

The models are narrow, and the inner compiler is ``eager``: what is timed is this package's own work and Dynamo's, none
of Inductor's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adakv_compile
from benchmarks.machine import describe

__all__ = ["LAYERS", "main", "rows"]

LAYERS: Final = (4, 8, 16, 32, 64, 80)
_STAGES: Final = ("capture", "analyse", "rewrite")


def rows(layers: Sequence[int] = LAYERS) -> Iterator[dict[str, Any]]:
    """Yield one row for each graph, prompt and decode step, of a decoder with each number of layers.

    A row holds the number of layers, the graph, its nodes, the seconds of each stage and of all three, those of the
    whole call with both graphs, Dynamo's share included, and milliseconds for each layer.
    """
    for count in layers:
        model = _narrow(count)
        ids = torch.ones(1, 64, dtype=torch.long)
        torch.compiler.reset()
        begin = time.perf_counter()
        report = adakv_compile.explain(model, ids, use_cache=True, options={"budget": 40, "window": 8})
        whole = time.perf_counter() - begin
        for name, graph in zip(("prompt", "decode"), report.graphs, strict=True):
            if not all(site.compressed for site in graph.sites) or len(graph.sites) != count:
                raise RuntimeError(f"{count} layers: not every attention is compressed\n{report}")
            stages = {stage: graph.seconds[stage] for stage in _STAGES}
            total = sum(stages.values())
            yield {
                "layers": count,
                "graph": name,
                "nodes": graph.nodes,
                **stages,
                "total": total,
                "call": whole,
                "ms_a_layer": total / count * 1e3,
            }


def _narrow(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Print the rows as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    # What is imported and set up once is no part of the curve.
    list(rows((2,)))
    if given.json:
        _say(json.dumps({"machine": describe(), "rows": list(rows(given.layers))}, indent=2))
        return
    _say("layers  graph    nodes  capture  analyse  rewrite  total s  ms a layer  whole call s")
    for row in rows(given.layers):
        _say(
            f"{row['layers']:6}  {row['graph']:7}  {row['nodes']:5}  {row['capture']:7.2f}  {row['analyse']:7.2f}"
            f"  {row['rewrite']:7.2f}  {row['total']:7.2f}  {row['ms_a_layer']:10.1f}  {row['call']:12.1f}",
        )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
