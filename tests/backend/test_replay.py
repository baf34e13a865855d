"""CUDA graphs (``mode="reduce-overhead"``): what Inductor is told, which a machine without a GPU can check."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, config
from torch._inductor.cudagraph_utils import check_for_mutation_ignore_cuda_graph_managed_tensor
from transformers import DynamicCache

import adakv_compile
from tests.models.families import VOCAB, build

OPTIONS: dict[str, Any] = {"budget": 24, "window": 8, "strict": True, "inductor": {"triton.cudagraphs": True}}


class Compilations:
    """What Inductor was asked to compile."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._compile = compile_fx._compile_fx_inner

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        mutated = {
            node.args[0] for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        }
        self.calls.append(
            {
                "recorded": config.triton.cudagraphs,
                "inputs": gm.graph.find_nodes(op="placeholder"),
                "static": set(kwargs["static_input_idxs"]),
                "mutated": mutated,
                "graph": gm,
            }
        )
        return self._compile(gm, example_inputs, **kwargs)


def decode(padded: bool = False) -> tuple[list[dict[str, Any]], torch.nn.Module]:
    """Run a prompt and three steps, whose positions the model counts itself; return what was compiled."""
    model = build("llama", layers=2)
    ids, mask = torch.randint(2, VOCAB, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    seen = Compilations()
    model.compile(backend="adakv", options=OPTIONS, dynamic=True)
    patched = mock.patch.object(compile_fx, "_compile_fx_inner", seen)
    uncached = config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False)
    cache = DynamicCache()
    with patched, uncached[0], uncached[1], torch.no_grad():
        for _ in range(4):
            given = {"attention_mask": mask} if padded else {}
            out = model(ids, past_key_values=cache, **given)
            ids = out.logits[:, -1:].argmax(-1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return seen.calls, model


def test_a_step_is_recorded_and_the_prompt_is_not() -> None:
    (prompt, step), model = decode()
    assert not prompt["recorded"], "a replay would write over the cache that this graph makes"
    assert step["recorded"]
    placeholders = step["inputs"]
    values = [node.meta["val"] for node in placeholders]
    # Integers would mean one recording for each of their values; a batch is the same in every step.
    assert sum(isinstance(value, torch.SymInt) for value in values) <= 1
    static = [values[i] for i in step["static"]]
    floats = [value for value in static if value.dtype == torch.float32]
    assert len([value for value in static if value.dtype == torch.int32]) == 2 * 3, "offsets, positions and cursor"
    assert len([value for value in floats if value.dim() >= 3]) == 2 * 4, "prefix and tail, keys and values"
    assert len([value for value in floats if value.dim() <= 2]) >= len(list(model.parameters()))
    copied = [value for i, value in enumerate(values) if i not in step["static"] and isinstance(value, torch.Tensor)]
    assert all(value.dim() <= 2 for value in copied), "only token ids, positions and the like are copied at a replay"


def test_nothing_that_a_step_writes_to_keeps_it_from_being_recorded() -> None:
    _, step = decode()[0]
    names = [node.name for node in step["inputs"]]
    written = {i for i, node in enumerate(step["inputs"]) if any(_mutates(user, node) for user in node.users)}
    assert len(written) == 2 * 3, [names[i] for i in written]
    why = check_for_mutation_ignore_cuda_graph_managed_tensor(
        step["graph"], {names[i] for i in written}, written, sorted(step["static"])
    )
    assert why is None


def test_a_mask_that_grows_can_not_be_replayed_and_the_report_says_so() -> None:
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph: inputs of sizes .* change with every token"):
        (prompt, step), _ = decode(padded=True)
    assert not prompt["recorded"]
    assert not step["recorded"]


def test_without_the_mode_the_report_says_nothing_of_it() -> None:
    report = adakv_compile.explain(
        build("llama"), torch.randint(2, VOCAB, (1, 40)), options={"budget": 24, "window": 8}
    )
    assert "CUDA graph" not in str(report)


def _mutates(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """Whether a node of the functional graph writes to an input in place."""
    if user.target is torch.ops.aten.copy_.default:
        return user.args[0] is node
    schema = getattr(user.target, "_schema", None)
    if schema is None:
        return False
    names = [argument.name for argument in schema.arguments if argument.is_write]
    positions = [argument.name for argument in schema.arguments]
    return any(user.args[positions.index(name)] is node for name in names if positions.index(name) < len(user.args))
