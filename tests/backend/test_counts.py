"""What a compiled decoder is made of, counted: graphs, operators, launches, allocations. Times are for the benchmarks.

What the generated code of a step does is read off its text: Inductor's Python wrapper, one line for each launch.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._functorch import config as aot_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache

from adakv_compile.kernels.decode_attention import SPEC
from tests.models.families import VOCAB, build

LAYERS = 2
OPTIONS: dict[str, Any] = {"budget": 24, "window": 8, "strict": True}
DECODE = SPEC.name
#: Parts of a store that a step takes, in the order of the operator's arguments; see its table.
STORE_ARGUMENTS = slice(3, 10)
CALL = re.compile(r"^\s*(?:\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+)\((.*)\)", re.MULTILINE)
#: Launches of a step that plain Inductor with a dense cache does without.
MORE_LAUNCHES = 0


@dataclass(frozen=True)
class Code:
    """The generated code of one graph: the body of its ``call``."""

    body: str

    @property
    def calls(self) -> list[tuple[str, list[str]]]:
        """Every launch in order: its name and its arguments."""
        return [(name, _split(arguments)) for name, arguments in CALL.findall(self.body)]

    def named(self, name: str) -> list[list[str]]:
        """Return the arguments of the calls of an operator."""
        return [arguments for called, arguments in self.calls if called.startswith(f"torch.ops.{name}")]

    @property
    def allocations(self) -> list[str]:
        """The sizes of what is allocated."""
        return re.findall(r"= empty_strided\w*\(\(([^)]*)\)", self.body)

    @property
    def of_cache_size(self) -> set[str]:
        """The inputs with a size that is not a number: in a step, those are the parts of the cache."""
        return {
            name
            for name, sizes in re.findall(r"assert_size_stride\((\w+), \(([^)]*)\)", self.body)
            if re.search(r"\bs\d+", sizes)
        }


def _split(arguments: str) -> list[str]:
    """Return the positional arguments of a call, written as Python."""
    call = ast.parse(f"call({arguments})", mode="eval").body
    assert isinstance(call, ast.Call)
    return [ast.unparse(argument) for argument in (*call.args, *(keyword.value for keyword in call.keywords))]


def _code_of_a_step(backend: str, **options: Any) -> Code:
    """Return the generated code of a step behind a prompt, for a cache of any length."""
    model = _compiled(backend, **options)
    ids = torch.randint(2, VOCAB, (1, 60))
    cache = _prompt(model, ids)
    uncached = inductor_config.patch(fx_graph_cache=False), aot_config.patch(enable_autograd_cache=False)
    with uncached[0], uncached[1], torch.no_grad():
        _, (text,) = run_and_get_code(model, ids[:, :1], past_key_values=cache, use_cache=True)
    body = text[text.index("def call(") :]
    return Code(body[: re.search(r"^\s*return \(", body, re.MULTILINE).start()])  # type: ignore[union-attr]


def _compiled(backend: str, **options: Any) -> Any:
    model = build("llama", layers=LAYERS, max_position_embeddings=4096)
    model.compile(backend=backend, dynamic=True, **({"options": {**OPTIONS, **options}} if backend == "adakv" else {}))
    return model


@torch.no_grad()
def _prompt(model: Any, ids: Tensor) -> Any:
    return model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def _step(model: Any, cache: Any) -> None:
    model(torch.ones(cache.layers[0].keys.shape[0], 1, dtype=torch.long), past_key_values=cache, use_cache=True)


@pytest.fixture(scope="module")
def codes() -> dict[str, Code]:
    torch.manual_seed(0)
    found = {backend: _code_of_a_step(backend) for backend in ("adakv", "inductor")}
    torch.compiler.reset()
    return found


class TestGeneratedCode:
    """The step's code, as Inductor wrote it."""

    def test_one_operator_a_layer_and_none_else(self, codes: dict[str, Code]) -> None:
        assert len(codes["adakv"].named("adakv.")) == len(codes["adakv"].named(f"adakv.{DECODE}.")) == LAYERS

    def test_stores_go_to_the_operator_as_they_came(self, codes: dict[str, Code]) -> None:
        given = [arguments[STORE_ARGUMENTS] for arguments in codes["adakv"].named(f"adakv.{DECODE}.")]
        assert all(re.fullmatch(r"arg\d+_1", argument) for arguments in given for argument in arguments), given
        assert len({argument for arguments in given for argument in arguments}) == 7 * LAYERS

    def test_nothing_else_reads_the_entries(self, codes: dict[str, Code]) -> None:
        code = codes["adakv"]
        # Keys, values, positions and both tails of each layer.
        assert len(code.of_cache_size) == 5 * LAYERS
        for name, arguments in code.calls:
            if not name.startswith(f"torch.ops.adakv.{DECODE}."):
                read = {entry for entry in code.of_cache_size for text in arguments if re.search(rf"\b{entry}\b", text)}
                assert not read, f"{name} reads {read}"

    def test_nothing_of_the_caches_size_is_allocated(self, codes: dict[str, Code]) -> None:
        def by_length(code: Code) -> list[str]:
            return [sizes for sizes in code.allocations if re.search(r"[a-z]", sizes)]

        assert codes["adakv"].allocations
        assert by_length(codes["adakv"]) == []
        # A dense cache is copied at every step: this is how that looks.
        assert len(by_length(codes["inductor"])) >= 2 * LAYERS

    def test_nothing_is_copied_by_name(self, codes: dict[str, Code]) -> None:
        copies = r"\.(?:clone|contiguous|copy_)\(|aten\.(?:clone|copy_?|contiguous)\b"
        code = re.sub(r"#.*", "", codes["adakv"].body)
        found = re.findall(copies, code)
        assert not found

    def test_no_more_launches_than_with_a_dense_cache(self, codes: dict[str, Code]) -> None:
        ours, theirs = codes["adakv"].calls, codes["inductor"].calls
        assert len(theirs) > 10 * LAYERS
        assert len(ours) <= len(theirs) + MORE_LAUNCHES, f"{len(ours)} against {len(theirs)}"


class TestGraphs:
    """Graphs and recompilations."""

    def test_two_graphs_serve_all_lengths_and_a_long_generation(self) -> None:
        model = _compiled("adakv", inner="eager")
        counters.clear()
        _step(model, _prompt(model, torch.randint(2, VOCAB, (1, 40))))
        with dynamo_config.patch(error_on_recompile=True):
            for length in (41, 64, 9, 30, 127, 1000):
                cache = _prompt(model, torch.randint(2, VOCAB, (1, length)))
                for _ in range(3):
                    _step(model, cache)
            for _ in range(600):
                _step(model, cache)
        assert counters["stats"]["unique_graphs"] == 2
        assert cache.layers[0].keys.shape[2] == 1603

    def test_a_batch_is_one_more_of_each(self) -> None:
        model = _compiled("adakv", inner="eager")
        counters.clear()
        for batch in (1, 2, 3, 5):
            _step(model, _prompt(model, torch.randint(2, VOCAB, (batch, 40))))
        assert counters["stats"]["unique_graphs"] <= 4


class TestRunning:
    """What a profile sees of one call."""

    def test_operators_of_a_prompt_and_of_a_step(self) -> None:
        model = _compiled("adakv", inner="eager")
        ids = torch.randint(2, VOCAB, (1, 60))
        cache = _prompt(model, ids)
        _step(model, cache)
        assert _operators(lambda: _step(model, cache)) == {DECODE: LAYERS}
        assert set(_operators(lambda: _prompt(model, ids)).values()) == {LAYERS}

    def test_a_step_makes_as_many_tensors_at_any_length(self) -> None:
        model = _compiled("adakv", inner="eager")
        counts: dict[tuple[int, int], int] = {}
        for length in (30, 300, 1500):
            cache = _prompt(model, torch.randint(2, VOCAB, (1, length)))
            for step in range(1, 102):
                if step in (3, 40, 101):  # none of them outgrows the tail
                    counts[length, step] = _allocations(lambda cache=cache: _step(model, cache))
                else:
                    _step(model, cache)
        assert len(set(counts.values())) == 1, counts
        assert min(counts.values()) > 0


def _events(call: Callable[[], object]) -> list[Any]:
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return list(profile.profiler.kineto_results.events())  # type: ignore[union-attr]


def _operators(call: Callable[[], object]) -> dict[str, int]:
    """Return how often each operator of the dialect was called."""
    names = (event.name() for event in _events(call))
    return dict(Counter(name.removeprefix("adakv::") for name in names if name.startswith("adakv::")))


def _allocations(call: Callable[[], object]) -> int:
    """Return how many times a call allocated memory for a tensor."""
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in _events(call))
