"""Observation scores are the mean attention of the window's queries, whatever hides keys and shapes the softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adakv_compile.policy import Policy
from tests.kernels.tolerances import assert_near

OPS = torch.ops.adakv


def inputs(queries: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(queries * 1000 + length)
    query = torch.randn(2, 6, queries, 8, generator=random, dtype=torch.float64)
    key = torch.randn(2, 3, length, 8, generator=random, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def observe(query: torch.Tensor, key: torch.Tensor, policy: Policy, overload: str = "default", **rest: Any) -> Any:
    """Call the op by name, without what a test does not mention."""
    given: dict[str, Any] = dict.fromkeys(("mask", "padding", "lse", "sinks", "sliding_window", "softcap"))
    operator = getattr(OPS.observe_v3, overload)
    return operator(query=query, key=key, policy=policy.encode(), **(given | {"scale": 0.4} | rest))


def observed(
    query: torch.Tensor,
    key: torch.Tensor,
    policy: Policy,
    *,
    mask: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float = 0.4,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Loop over rows, heads and queries in float64."""
    batch, num_heads, length = key.shape[:3]
    num_query_heads, count = query.shape[1:3]
    group = num_query_heads // num_heads
    scores = torch.zeros(batch, num_heads, length, dtype=torch.float64)
    if mask is not None:
        mask = mask.expand(batch, num_query_heads, count, mask.shape[3])[..., mask.shape[3] - length :]
    for row in range(batch):
        for head in range(num_heads):
            members: list[torch.Tensor] = []
            for member in range(head * group, head * group + group):
                found: list[torch.Tensor] = []
                for step in range(max(0, count - policy.window), count):
                    place = length - count + step
                    if place < 0 or (padding is not None and not padding[row, place]):
                        continue
                    logits = key[row, head].double() @ query[row, member, step].double() * scale
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                    if mask is None:
                        first = 0 if sliding_window is None else max(0, place - sliding_window + 1)
                        seen = torch.zeros(length, dtype=torch.bool)
                        seen[first : place + 1] = True
                        logits = logits.masked_fill(~seen, -torch.inf)
                    elif mask.dtype == torch.bool:
                        logits = logits.masked_fill(~mask[row, member, step], -torch.inf)
                    else:
                        logits = logits + mask[row, member, step].double()
                    if padding is not None:
                        logits = logits.masked_fill(~padding[row], -torch.inf)
                    sink = logits.new_empty(0) if sinks is None else sinks[member : member + 1].double()
                    visible = (logits > -torch.inf).any()
                    weights = torch.cat((logits, sink)).softmax(-1)[:length]
                    found.append(weights if visible else torch.zeros_like(logits))
                if found:
                    members.append(torch.stack(found).mean(0))
            if members:
                stacked = torch.stack(members)
                scores[row, head] = stacked.amax(0) if policy.gqa == "max" else stacked.mean(0)
    return scores


def check(query: torch.Tensor, key: torch.Tensor, **rest: Any) -> None:
    """Compare both reductions with the loops."""
    for gqa in ("mean", "max"):
        policy = Policy(budget=16, window=8, gqa=gqa)
        # On the CPU the default leaves out what decides nothing.
        scores = observe(query, key, policy, "portable", **rest)
        assert scores.dtype == torch.float32
        assert_near(scores, observed(query, key, policy, **rest), torch.float32)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 3, 21])
@pytest.mark.parametrize(("queries", "length"), [(20, 20), (3, 20), (1, 20), (1, 1), (40, 20), (40, 2)])
def test_observe(queries: int, length: int, sliding_window: int | None, padded: bool) -> None:
    query, key = inputs(queries, length)
    padding = torch.ones(2, length, dtype=torch.bool) if padded else None
    if padding is not None:
        padding[0, : length // 2] = False
        padding[1, -1] = False
    check(query, key, padding=padding, sliding_window=sliding_window)
    check(query, key, padding=padding, sliding_window=sliding_window, softcap=1.5, sinks=torch.linspace(-3, 3, 6))


def test_scores_that_decide_nothing_are_not_computed_on_a_cpu() -> None:
    policy = Policy(budget=16, window=8)
    for length in (1, 16, 17):
        query, key = inputs(length, length)
        scores = observe(query, key, policy)
        assert torch.equal(
            scores, observe(query, key, policy, "portable") if length > 16 else torch.zeros(2, 3, length)
        )
        assert scores.dtype == torch.float32
        assert scores.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_observe_in_half_precision(dtype: torch.dtype) -> None:
    query, key = inputs(20, 20, dtype)
    check(query, key)
    check(query, key, softcap=2.0, sinks=torch.linspace(-3, 3, 6, dtype=dtype))


@pytest.mark.parametrize("softcap", [0.05, 1.0, 50.0, 1e5])
def test_soft_caps_below_and_above_the_logits(softcap: float) -> None:
    query, key = inputs(20, 20)
    check(query * 5, key, softcap=softcap)
    check(query * 5, key, softcap=softcap, mask=torch.randn(2, 6, 20, 20, generator=torch.manual_seed(0)))


@pytest.mark.parametrize("sink", [-80.0, 0.0, 80.0])
def test_a_sink_takes_its_share(sink: float) -> None:
    query, key = inputs(20, 20)
    check(query, key, sinks=torch.full((6,), sink))
    scores = observe(query, key, Policy(budget=16, window=8), sinks=torch.full((6,), sink))
    total = scores.sum(-1)
    assert (total < 1).all() if sink == 0.0 else torch.allclose(total, torch.tensor(float(sink < 0)), atol=1e-6)


def test_a_sink_of_nothing_is_none() -> None:
    query, key = inputs(20, 20)
    policy, nothing = Policy(budget=16, window=8), torch.full((6,), -torch.inf)
    torch.testing.assert_close(observe(query, key, policy, sinks=nothing), observe(query, key, policy))
    unseen = torch.zeros(2, 20, dtype=torch.bool)
    assert not observe(query, key, policy, sinks=nothing, padding=unseen).any()
    hidden = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    assert not observe(query, key, policy, sinks=nothing, mask=hidden).any()
    mixed = torch.tensor([1.0, -torch.inf] * 3)
    check(query, key, sinks=mixed)
    check(query, key, sinks=mixed, mask=hidden.index_fill(2, torch.tensor([19]), True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("columns", [0, 7])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", ["111", "bht", "b1t", "1h1"])
@pytest.mark.parametrize(("queries", "length"), [(20, 20), (5, 20), (30, 20)])
def test_a_mask_replaces_the_rules(
    queries: int, length: int, shape: str, kind: str, columns: int, padded: bool
) -> None:
    query, key = inputs(queries, length)
    random = torch.manual_seed(1)
    sizes = [size if letter in shape else 1 for letter, size in zip("bht", (2, 6, queries), strict=True)]
    mask = torch.rand(*sizes, length + columns, generator=random) < 0.6
    if kind == "float":
        mask = torch.randn(mask.shape, generator=random).masked_fill(~mask, -torch.inf)
    padding = torch.rand(2, length, generator=random) < 0.7 if padded else None
    check(query, key, mask=mask, padding=padding, sliding_window=3)
    check(query, key, mask=mask, padding=padding, softcap=1.0, sinks=torch.linspace(-2, 2, 6))


def test_a_bias_of_each_head() -> None:
    """ALiBi: the distance to the key times a slope."""
    query, key = inputs(20, 20)
    distance = torch.arange(20)[None, :] - torch.arange(20)[:, None]
    slopes = 2.0 ** -torch.arange(1, 7)
    bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)[None]
    check(query, key, mask=bias)
    check(query.bfloat16(), key.bfloat16(), mask=bias.bfloat16())


def test_sums_change_nothing() -> None:
    query, key = inputs(20, 20)
    sums = torch.randn(2, 6, 20)
    sinks = torch.linspace(-3, 3, 6)
    policy = Policy(budget=16, window=8)
    assert torch.equal(observe(query, key, policy, sinks=sinks, lse=sums), observe(query, key, policy, sinks=sinks))


def test_streaming_needs_no_scores() -> None:
    query, key = inputs(20, 20)
    policy = Policy(method="streamingllm", budget=16, window=8)
    assert not observe(query * torch.nan, key, policy).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query": torch.zeros(2, 4, 5, 8)}, "query heads 4 not a multiple of KV heads 3"),
        ({"key": torch.zeros(2, 3, 20, 8).double()}, r"key is torch\.float64; expected torch\.float32"),
        ({"padding": torch.ones(2, 19, dtype=torch.bool)}, r"padding has shape \[2, 19\]; expected \[2, 20\]"),
        ({"padding": torch.ones(2, 20)}, r"padding is torch\.float32; expected torch\.bool"),
        ({"mask": torch.ones(2, 6, 3, 20)}, "mask has shape"),
        ({"mask": torch.ones(2, 6, 5, 19)}, "mask has 19 columns; expected 20 or more"),
        ({"mask": torch.ones(2, 6, 5, 20).int()}, r"mask is torch\.int32"),
        ({"sinks": torch.ones(3)}, r"sinks has shape \[3\]; expected \[6\]"),
        ({"sinks": torch.ones(6).int()}, r"sinks is torch\.int32; expected a floating dtype"),
        ({"softcap": 0.0}, r"softcap is 0\.0; expected a positive number"),
        ({"softcap": -1.0}, "expected a positive number"),
        ({"softcap": float("nan")}, "expected a positive number"),
        ({"softcap": float("inf")}, "expected a positive number"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], message: str) -> None:
    query, key = inputs(5, 20)
    with pytest.raises(ValueError, match=f"observe: {message}|{message}"):
        observe(**({"query": query, "key": key, "policy": Policy(budget=12, window=4)} | given))
