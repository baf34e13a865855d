"""What one cached head holds, laid out, attended to and kept: the same as the op for several heads does at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from adakv_compile.policy import Method, Policy
from tests.kernels.cases import Case, ragged_case

GROUP, COUNT, LENGTH = 3, 5, 48
RANDOM = torch.Generator().manual_seed(2)


def case(**changes: object) -> Case:
    made = ragged_case([[20], [17]], prefix_length=40, group=GROUP, count=COUNT, slots=22)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


CASES: dict[str, Case] = {
    "plain": case(),
    "sliding": case(sliding_window=15),
    "padded": case(padding=torch.arange(LENGTH) >= torch.tensor([[0], [9]])),
    "padded and sliding": case(padding=torch.arange(LENGTH) >= torch.tensor([[0], [36]]), sliding_window=15),
    "masked": case(mask=torch.rand(2, 1, COUNT, LENGTH, generator=RANDOM) < 0.8),
    "biased by head": case(mask=torch.randn(1, GROUP, COUNT, LENGTH, generator=RANDOM)),
}


def both(given: Case, policy: Policy, evict: bool) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return attention and the new prefix: of the one op, and of those for one head."""
    expected = torch.ops.adakv.extend_v2(*given.extend_arguments(policy, evict))
    query, *store = given.arguments()[:9]
    lengths, scale = given.cursor.tolist()[:2], given.arguments()[-3]
    rules = (given.padding, given.sliding_window)
    keys, values, visible, at = torch.ops.adakv.lay_out_v1(*store, *lengths, given.mask, *rules)
    out = F.scaled_dot_product_attention(query, keys, values, visible, scale=scale, enable_gqa=True)
    encoded = policy.encode()
    scores = torch.ops.adakv.observe_v3(query, keys, visible, at >= 0, None, None, scale, None, None, encoded)
    kept = torch.ops.adakv.retain_v1(scores, at, keys, values, LENGTH, *rules, encoded, evict)
    return expected, (out, *kept)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["snapkv", "ada-snapkv", "streamingllm"])
def test_what_is_kept(name: str, method: Method) -> None:
    policy = Policy(method=method, budget=12, window=4, pool="avg", kernel_size=3)
    expected, found = both(CASES[name], policy, evict=True)
    for theirs, ours in zip(expected[:1], found[:1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for theirs, ours in zip(expected[1:], found[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_evicted_that_is_not_padding(name: str) -> None:
    expected, found = both(CASES[name], Policy(budget=12, window=4), evict=False)
    for theirs, ours in zip(expected[1:], found[1:], strict=True):
        used = int(expected[3][:, -1].max())
        assert torch.equal(ours[:, :used], theirs[:, :used])


def test_the_store_is_left_as_it_is() -> None:
    given = case()
    before = [value.clone() for value in given.arguments()[3:10]]
    both(given, Policy(budget=12, window=4), evict=True)
    for old, new in zip(before, given.arguments()[3:10], strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


def test_more_than_one_head_is_refused() -> None:
    given = ragged_case([[4, 5], [6, 3]], prefix_length=40)
    _, *store = given.arguments()[:9]
    with pytest.raises(ValueError, match="lay_out: key_new"):
        torch.ops.adakv.lay_out_v1(*store, *given.cursor.tolist()[:2], None, None, None)
    policy = Policy(budget=12, window=4).encode()
    with pytest.raises(ValueError, match="retain: scores"):
        torch.ops.adakv.retain_v1(
            torch.rand(1, 2, 5), torch.zeros(1, 5, dtype=torch.int32), *store[2:4], 9, None, None, policy, True
        )
