"""Every op's schema, fake kernel and registration hold, for static and for symbolic sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import adakv_compile.kernels as kernels
from adakv_compile.policy import Policy
from tests.kernels.cases import Case, ragged_case

SPECS = kernels.SPECS
POLICY = Policy(budget=12, window=4).encode()
PYRAMID = Policy(method="ada-pyramid", budget=0.3, window=4, layer=1, num_layers=2).encode()
CASE = ragged_case([[4, 20, 0], [9, 9, 6]], prefix_length=40, poison=False)
MASKED = dataclasses.replace(
    CASE, mask=torch.rand(2, 1, 1, 44) < 0.8, padding=torch.ones(2, 44, dtype=torch.bool), sliding_window=30
)
SINKS = torch.tensor([0.5, -torch.inf, 2.0, -1.0, 0.0, 1.0])
CAPPED = dataclasses.replace(MASKED, softcap=2.0, sinks=SINKS)
LONG = ragged_case([[4, 20, 0], [9, 9, 6]], prefix_length=40, count=5, poison=False)


SHARED = ragged_case([[20], [20]], prefix_length=40, poison=False, group=3)
SHARED_LONG = ragged_case([[20], [18]], prefix_length=40, count=5, tail=4, poison=False, group=3)
SHARED_PADDED = dataclasses.replace(
    SHARED_LONG,
    padding=torch.arange(52) >= torch.tensor([[0], [7]]),
    mask=torch.randn(2, 3, 5, 53, generator=torch.manual_seed(1)),
)
SHARED_BIASED = dataclasses.replace(SHARED, mask=torch.randn(2, 3, 1, 44, generator=torch.manual_seed(1)))


def entries(case: Case) -> tuple[Any, ...]:
    _, *store = case.arguments()[:10]
    return (*store, case.mask, case.padding, case.sliding_window)


def laid_out(case: Case) -> tuple[Any, ...]:
    _, *store = case.arguments()[:9]
    return (*store, *case.cursor.tolist()[:2], case.mask, case.padding, case.sliding_window)


def retained(case: Case, policy: str, evict: bool = True) -> tuple[Any, ...]:
    *entries, visible, at = torch.ops.adakv.lay_out_v1(*laid_out(case))
    scores = torch.rand(at.shape, generator=torch.manual_seed(3))[:, None]
    assert visible.shape[-1] == at.shape[1]
    length = sum(case.cursor.tolist()[:2]) + case.key_new.shape[2]
    return (scores, at, *entries, length, case.padding, case.sliding_window, policy, evict)


def prefill(policy: str, padded: bool, window: int | None, softcap: float | None = None) -> dict[str, tuple[Any, ...]]:
    random = torch.manual_seed(0)
    sinks = None if softcap is None else SINKS
    query, key = torch.randn(2, 6, 30, 8, generator=random), torch.randn(2, 3, 30, 8, generator=random)
    value = torch.randn(2, 3, 30, 6, generator=random)
    padding = torch.ones(2, 30, dtype=torch.bool) if padded else None
    if padding is not None:
        padding[0, :9] = False
    scores = torch.rand(2, 3, 30, generator=random)
    positions, offsets = torch.ops.adakv.select_v1(scores, padding, window, policy)
    return {
        "observe_v3": (query, key, None, padding, None, sinks, 0.3, window, softcap, policy),
        "select_v1": (scores, padding, window, policy),
        "compact_v1": (key, value, positions, offsets),
    }


PREFILL_SAMPLES: dict[str, tuple[str, tuple[Any, ...]]] = {
    f"{name}-{label}": (name, arguments)
    for label, options in {
        "plain": (POLICY, False, None),
        "padded": (POLICY, True, None),
        "pyramid": (PYRAMID, True, None),
        "sliding": (POLICY, False, 20),
        "capped": (POLICY, True, None, 2.0),
    }.items()
    for name, arguments in prefill(*options).items()
}
_QUERY, _KEY = PREFILL_SAMPLES["observe_v3-plain"][1][:2]
_BIAS = torch.randn(1, 6, 30, 33, generator=torch.manual_seed(0))
_PADDED = torch.arange(30) >= torch.tensor([[0], [7]])
SAMPLES = PREFILL_SAMPLES | {
    "observe-mask": ("observe_v3", (_QUERY, _KEY, _BIAS > 0, None, None, None, 0.3, None, None, POLICY)),
    "observe-bias": ("observe_v3", (_QUERY, _KEY, _BIAS, None, None, SINKS, 0.3, None, 2.0, POLICY)),
    "decode-plain": ("decode_attention_v2", CASE.arguments()),
    "decode-masked": ("decode_attention_v2", MASKED.arguments()),
    "decode-long": ("decode_attention_v2", LONG.arguments()),
    "decode-capped": ("decode_attention_v2", CAPPED.arguments()),
    "attend-plain": ("attend_v1", CASE.attend_arguments()),
    "attend-long": ("attend_v1", LONG.attend_arguments()),
    "attend-capped": ("attend_v1", CAPPED.attend_arguments()),
    "entries-plain": ("entries_v1", entries(SHARED)),
    "entries-biased": ("entries_v1", entries(SHARED_BIASED)),
    "lay-out-plain": ("lay_out_v1", laid_out(SHARED_LONG)),
    "lay-out-biased": ("lay_out_v1", laid_out(SHARED_PADDED)),
    "retain-plain": ("retain_v1", retained(SHARED_LONG, POLICY)),
    "retain-pyramid": ("retain_v1", retained(SHARED_PADDED, PYRAMID)),
    "retain-whole": ("retain_v1", retained(SHARED_LONG, POLICY, evict=False)),
    "padded-attention": ("padded_attention_v1", (_QUERY, _QUERY, _QUERY, _PADDED, 0.3)),
    "padded-attention-grouped": ("padded_attention_v1", (_QUERY, _KEY, _KEY, torch.ones_like(_PADDED), 0.3)),
    "attention-plain": ("attention_v1", (_QUERY, _KEY, _KEY, None, None, True, 0.3, None)),
    "attention-all": ("attention_v1", (_QUERY, _KEY, _KEY, _BIAS[..., 3:], SINKS, False, 0.3, 2.0)),
    "extend-plain": ("extend_v2", LONG.extend_arguments(Policy.decode(POLICY))),
    "extend-pyramid": ("extend_v2", LONG.extend_arguments(Policy.decode(PYRAMID))),
    "extend-whole": ("extend_v2", LONG.extend_arguments(Policy.decode(POLICY), evict=False)),
    "extend-masked": ("extend_v2", MASKED.extend_arguments(Policy.decode(POLICY))),
    "extend-capped": ("extend_v2", CAPPED.extend_arguments(Policy.decode(POLICY))),
}


BY_NAME = {spec.name: spec for spec in SPECS}
IMPLEMENTED = [
    (sample, kernel)
    for sample, (name, _) in SAMPLES.items()
    for kernel in kernels.KERNELS
    if kernel == "auto" or BY_NAME[name].triton is not None
]


@pytest.mark.parametrize(("sample", "kernel"), IMPLEMENTED)
def test_opcheck(sample: str, kernel: kernels.Kernels) -> None:
    """Schema, fake kernel and dispatch, whoever computes."""
    name, arguments = SAMPLES[sample]
    spec = BY_NAME[name]
    torch.library.opcheck(spec.overload_for(kernel), arguments)


@pytest.mark.parametrize("sample", SAMPLES)
def test_fakes_describe_results_exactly(sample: str) -> None:
    """Shapes, strides and dtypes with every size symbolic, and not one guard on the way that could ever fail."""
    name, arguments = SAMPLES[sample]
    operator = getattr(torch.ops.adakv, name).default
    names = [argument.name for argument in operator._schema.arguments]
    numbers = [name for name in names if name in ("sliding_window", "softcap")]
    constant = {name: arguments[names.index(name)] for name in numbers}
    sizes = [value for name, value in zip(names, clone(arguments), strict=True) if name not in constant]

    def call_with(*values: Any) -> Any:
        given = dict(zip((name for name in names if name not in constant), values, strict=True))
        return operator(**given, **constant)

    graph = make_fx(call_with, tracing_mode="symbolic")(*sizes)
    environment = graph.shape_env
    assert environment is not None
    lengths = {value.node.expr for value in placeholders(graph) if isinstance(value, torch.SymInt)}
    assert [str(guard.expr) for guard in environment.guards if not always(guard.expr, lengths)] == []
    (call,) = [node for node in graph.graph.nodes if node.target is operator]
    results = operator(*clone(arguments))
    fakes = call.meta["val"]
    for fake, real in zip(tuples(fakes), tuples(results), strict=True):
        assert fake.dtype == real.dtype
        assert [concrete(size) for size in fake.shape] == list(real.shape)
        assert [concrete(stride) for stride in fake.stride()] == list(real.stride())


def placeholders(graph: torch.fx.GraphModule) -> list[Any]:
    return [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]


def always(guard: sympy.Basic, lengths: set[sympy.Basic]) -> bool:
    """Whether a guard holds for all sizes from 2 and all lengths from 0, so that it says nothing."""
    values = {
        symbol: sympy.Dummy(integer=True, nonnegative=True) + (0 if symbol in lengths else 2)
        for symbol in guard.free_symbols
    }
    return guard.subs(values).expand() == sympy.true


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_an_overload_is_one_object(kernel: kernels.Kernels) -> None:
    """PyTorch keeps the address of the first; another would leave it dangling, and graphs are searched by identity."""
    for spec in SPECS:
        if kernel == "auto" or spec.triton is not None:
            name = "default" if kernel == "auto" else kernel
            assert spec.overload_for(kernel) is getattr(getattr(torch.ops.adakv, spec.name), name)
            assert spec.overload_for(kernel) is spec.overload_for(kernel)


def test_registration_covers_the_dialect() -> None:
    assert sorted(spec.name for spec in SPECS) == [
        "attend_v1",
        "attention_v1",
        "compact_v1",
        "decode_attention_v2",
        "entries_v1",
        "extend_v2",
        "lay_out_v1",
        "observe_v3",
        "padded_attention_v1",
        "prefill_attention_v1",
        "retain_v1",
        "select_v1",
    ]
    for spec in SPECS:
        operator = getattr(torch.ops.adakv, spec.name).default
        assert torch.Tag.pt2_compliant_tag in operator.tags


def clone(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments)


def tuples(results: Any) -> tuple[torch.Tensor, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def concrete(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else size.node.hint


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_implementation_for_any_device_reads_a_tensor_on_the_host(sample: str) -> None:
    """Fake tensors have no data: whatever asks for a value, or makes a shape of one, raises."""
    name, arguments = SAMPLES[sample]
    spec = BY_NAME[name]
    expected = tuples(getattr(torch.ops.adakv, name).default(*clone(arguments)))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        results = tuples(spec.portable(*fakes))
    assert [result.shape for result in results] == [result.shape for result in expected]
    assert [result.stride() for result in results] == [result.stride() for result in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_same_on_a_gpu_without_waiting_for_it(sample: str) -> None:
    name, arguments = SAMPLES[sample]
    operator = getattr(torch.ops.adakv, name).default
    expected = tuples(operator(*clone(arguments)))
    moved = [value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments]
    operator(*clone(tuple(moved)))
    fresh = clone(tuple(moved))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = tuples(operator(*fresh))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), truth, rtol=1e-3, atol=1e-3)
