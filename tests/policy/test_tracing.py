"""Selection reads no value on the host and traces with symbolic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from adakv_compile.policy import Policy, select, window_scores
from tests.policy.cases import left_padding, ragged, scores_like

POLICIES = [
    Policy(budget=12, window=4),
    Policy(budget=0.3, window=4, pool="avg", alpha=0.0),
    Policy(method="snapkv", budget=12, window=4),
    Policy(method="ada-pyramid", budget=12, window=4, layer=1, num_layers=4),
    Policy(method="streamingllm", budget=12),
]
NAMES = [f"{policy.method}-{policy.budget}" for policy in POLICIES]
# Operations that read a value on the host or have a shape that depends on one.
SYNCING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item", "equal"}


class NoSync(TorchDispatchMode):
    """Fails on operations that a device would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCING, f"{name} reads values on the host"
        if name == "index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), (
                "indexing with a mask has a data-dependent shape"
            )
        return func(*args, **(kwargs or {}))


def prefill(policy: Policy, scores: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return select(policy, scores, padding[:, None])


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_no_value_is_read_on_the_host(policy: Policy) -> None:
    scores = scores_like("smooth", (2, 3, 40), 0)
    with NoSync():
        prefill(policy, scores, left_padding(2, 40, 0))
        select(policy, scores)
        select(policy, scores, ragged(2, 3, 40, 0), total=torch.tensor([30, 50]))


def test_the_guard_of_the_test_above_works() -> None:
    with pytest.raises(AssertionError, match="reads values"), NoSync():
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError, match="mask"), NoSync():
        torch.ones(3)[torch.ones(3, dtype=torch.bool)]


@pytest.mark.parametrize("policy", POLICIES[:2] + POLICIES[3:], ids=NAMES[:2] + NAMES[3:])
def test_one_trace_serves_every_length(policy: Policy) -> None:
    def traced(scores: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return prefill(policy, scores, padding)

    graph = make_fx(traced, tracing_mode="symbolic")(scores_like("smooth", (2, 3, 40), 0), left_padding(2, 40, 0))
    for length in (9, 33, 57):
        scores, padding = scores_like("tied", (2, 3, length), 1), left_padding(2, length, 1)
        assert torch.equal(graph(scores, padding), prefill(policy, scores, padding))


def test_one_trace_of_the_scores_serves_every_length() -> None:
    def traced(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return window_scores(query, key, scale=0.5)

    graph = make_fx(traced, tracing_mode="symbolic")(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 40, 8))
    for length in (9, 33):
        query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, length, 8)
        torch.testing.assert_close(graph(query, key), traced(query, key))
