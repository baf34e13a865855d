"""The ops inside compiled graphs: same results, tails and cursor mutated in place, nothing of them copied."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from adakv_compile.policy import Policy
from tests.kernels.cases import dense, ragged_case
from tests.kernels.tolerances import assert_near

LENGTHS = [[4, 20, 0], [9, 9, 6]]
# Importing Inductor warns about what PyTorch itself does.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

POLICY = Policy(budget=12, window=4)


def step(*arguments: Any) -> torch.Tensor:
    """What surrounds the op in a model: pointwise work before and after."""
    query, rest = arguments[0], arguments[1:]
    return torch.ops.adakv.decode_attention_v2(query * 1.0, *rest).transpose(1, 2).relu()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_decode(backend: str) -> None:
    case = ragged_case(LENGTHS, count=1)
    arguments = case.arguments()
    pointers = [value.data_ptr() for value in arguments[7:10]]
    with torch.no_grad():
        output = torch.compile(step, backend=backend, fullgraph=True)(*arguments)
    assert_near(output, dense(case).output.transpose(1, 2).relu(), torch.float32)
    assert [value.data_ptr() for value in arguments[7:10]] == pointers
    assert arguments[9].tolist() == [4, 200]
    assert torch.equal(arguments[7][:, :, 3:4], case.key_new)
    assert torch.equal(arguments[8][:, :, 3:4], case.value_new)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_copies_nothing_of_the_store(dynamic: bool) -> None:
    case = ragged_case(LENGTHS, count=1, capacity=37, slots=53, poison=False)
    arguments = case.arguments()
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
        _, sources = run_and_get_code(compiled, *arguments)
    source = "\n".join(sources)
    assert source.count("torch.ops.adakv.decode_attention_v2.default(") == 1
    call = re.search(r"decode_attention_v2\.default\((.*?)\)\n", source)
    assert call is not None
    passed = [name.strip() for name in call.group(1).split(",")]
    # The store's tensors reach the op as the graph's own inputs (renumbered by Inductor, hence the pattern).
    for place in range(3, 10):
        assert re.fullmatch(r"arg\d+_1", passed[place]), passed
    allocated = re.findall(r"empty_strided_\w+\(\(([^)]*)\)", source)
    assert len(allocated) <= 2, allocated
    assert "copy_(" not in source
    assert "clone" not in source.split("def call")[-1]


def test_several_layers_share_nothing() -> None:
    cases = [ragged_case(LENGTHS, seed=seed) for seed in range(2)]

    def layers(first: tuple[Any, ...], second: tuple[Any, ...]) -> torch.Tensor:
        hidden = step(*first).transpose(1, 2)
        query = torch.nn.functional.pad(hidden, (0, 2)) + second[0]
        return torch.ops.adakv.decode_attention_v2(query, *second[1:])

    eager = [case.arguments() for case in cases]
    compiled = [case.arguments() for case in cases]
    with torch.no_grad():
        expected = layers(*eager)
        found, sources = run_and_get_code(torch.compile(layers, fullgraph=True), *compiled)
    torch.testing.assert_close(found, expected)
    for one, other in zip(eager, compiled, strict=True):
        for left, right in zip(one[7:10], other[7:10], strict=True):
            torch.testing.assert_close(left, right, equal_nan=True)
    assert "copy_(" not in "\n".join(sources)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_prefill_and_extension(backend: str) -> None:
    random = torch.manual_seed(0)
    text = POLICY.encode()

    def prefill(query: Any, key: Any, value: Any) -> Any:
        scores = torch.ops.adakv.observe_v3(query, key, None, None, None, None, 0.3, None, None, text)
        positions, offsets = torch.ops.adakv.select_v1(scores, None, None, text)
        return (*torch.ops.adakv.compact_v1(key, value, positions, offsets), positions, offsets)

    compiled = torch.compile(prefill, backend=backend, fullgraph=True, dynamic=True)
    for length in (30, 31, 9):
        query = torch.randn(2, 6, length, 8, generator=random)
        key = torch.randn(2, 3, length, 8, generator=random)
        value = torch.randn(2, 3, length, 6, generator=random)
        with torch.no_grad():
            torch.testing.assert_close(compiled(query, key, value), prefill(query, key, value))

    arguments = ragged_case(LENGTHS, count=5, poison=False).extend_arguments(POLICY)

    def extension(*values: Any) -> Any:
        return torch.ops.adakv.extend_v2(*values[:9], 3, 200, *values[11:])

    with torch.no_grad():
        found = torch.compile(extension, backend=backend, fullgraph=True)(*arguments)
    torch.testing.assert_close(found, extension(*arguments))


def test_no_recompilation_as_the_prompt_grows() -> None:
    text = POLICY.encode()
    counter = torch._dynamo.testing.CompileCounter()

    def prefill(query: Any, key: Any) -> Any:
        scores = torch.ops.adakv.observe_v3(query, key, None, None, None, None, 0.3, None, None, text)
        return torch.ops.adakv.select_v1(scores, None, None, text)

    compiled = torch.compile(prefill, backend=counter, fullgraph=True)
    for length in (16, 17, 40, 5, 200):
        query, key = torch.rand(1, 4, length, 8), torch.rand(1, 2, length, 8)
        for value in (query, key):
            torch._dynamo.mark_dynamic(value, 2)
        compiled(query, key)
    assert counter.frame_count == 1


def test_graphs_with_the_ops_can_be_cached() -> None:
    from torch._dynamo.utils import counters

    arguments = ragged_case(LENGTHS, poison=False).arguments()
    counters.clear()
    with torch.no_grad():
        torch.compile(step, fullgraph=True)(*arguments)
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    assert counters["inductor"]["fxgraph_cache_bypass"] == 0
