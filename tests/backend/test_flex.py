"""``flex_attention`` is compressed where its functions mean attention to the past, and left alone where they don't."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import adakv_compile
from adakv_compile import CompressedKV, Reason
from adakv_compile.block_masks import BlockTable
from tests.backend.decoders import Cache, OneLayer, causal

OPTIONS: dict[str, Any] = {"budget": 12, "window": 4, "inner": "eager"}
LENGTH, STEPS, WINDOW = 40, 3, 24
LENGTHS = ((0, LENGTH), *((i, i + 1) for i in range(LENGTH, LENGTH + STEPS)), (LENGTH + STEPS, LENGTH + STEPS + 5))

Mod = Callable[..., Tensor]
"""``score_mod(score, b, h, q_idx, kv_idx)``."""
BlockTables = dict[str, Tensor]
"""The tables of a block mask that say which keys a block of queries sees."""


def seen(start: int, end: int, also: Callable[[Tensor, Tensor], Tensor] | None = None) -> BlockMask:
    """Return a block mask: what comes before each token from ``start`` on, and ``also`` of positions."""

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        before = q_idx + start >= kv_idx
        return before if also is None else before & also(q_idx + start, kv_idx)

    return create_block_mask(visible, None, None, end - start, end, device="cpu", BLOCK_SIZE=16)


class Flex(OneLayer):
    """``forward(x, block_mask, cache)``."""

    def __init__(self, score_mod: Callable[[int], Mod] | None = None) -> None:
        super().__init__()
        self.score_mod = score_mod

    def forward(self, x: Tensor, block_mask: BlockMask | None, cache: Cache | None = None) -> tuple[Tensor, Cache]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = self.project(x)
        if cache is not None:
            k, v = self.extend(cache[0], k), self.extend(cache[1], v)
        mod = None if self.score_mod is None else self.score_mod(k.shape[2] - q.shape[2])
        out = flex_attention(q, k, v, score_mod=mod, block_mask=block_mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(2), (k, v)


def capped(start: int) -> Mod:
    return lambda score, b, h, q_idx, kv_idx: 2.0 * torch.tanh(score / 2.0)


def alibi(start: int) -> Mod:
    return lambda score, b, h, q_idx, kv_idx: score - (h + 1) * 0.05 * (q_idx + start - kv_idx)


def relative(start: int) -> Mod:
    return lambda score, b, h, q_idx, kv_idx: score + (kv_idx - q_idx)


def hidden_by_score(start: int) -> Mod:
    return lambda score, b, h, q_idx, kv_idx: torch.where(q_idx + start >= kv_idx, score, -float("inf"))


def run(model: Any, x: Tensor, mask: Callable[[int, int], BlockMask | None] = seen) -> tuple[list[Tensor], Cache]:
    found, cache = list[Tensor](), None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        for begin, end in LENGTHS:
            out, cache = model(x[:, begin:end], mask(begin, end), cache)
            found.append(out)
    assert cache is not None
    return found, cache


MEANT: dict[str, Callable[[int], Mod] | None] = {
    "no score_mod": None,
    "soft cap": capped,
    "ALiBi": alibi,
    "relative positions": relative,
}


@pytest.mark.parametrize("name", MEANT)
def test_a_budget_longer_than_the_text_changes_nothing(name: str) -> None:
    model, x = Flex(MEANT[name]), torch.randn(2, LENGTHS[-1][1], 64)
    expected, _ = run(model, x)
    options = OPTIONS | {"budget": 200, "strict": True}
    found, cache = run(torch.compile(model, backend="adakv", dynamic=True, options=options), x)
    assert isinstance(cache[0], CompressedKV)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["no score_mod", "soft cap"])
def test_a_small_budget_is_a_compressed_cache_for_every_call(name: str) -> None:
    model, x = Flex(MEANT[name]), torch.randn(2, LENGTHS[-1][1], 64)
    found, cache = run(torch.compile(model, backend="adakv", dynamic=True, options=OPTIONS | {"strict": True}), x)
    assert isinstance(cache[0], CompressedKV)
    assert (cache[0].head_lengths.sum(1) == 2 * 12).all()
    # The prompt's attention stays the model's own.
    torch.testing.assert_close(found[0], run(model, x)[0][0], rtol=1e-4, atol=1e-5)


def without_sign(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score.abs()


def weighted(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * (kv_idx + 1)


def capped_at_half(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.clamp(score, max=0.5)


def biased_below_a_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.tanh(score + (kv_idx - q_idx))


def refused(model: nn.Module, x: Tensor, mask: BlockMask | None) -> Reason:
    """Return why a prompt is left alone; its results are the model's own."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        report = adakv_compile.explain(model, x, mask, options=OPTIONS)
        (site,) = report.graphs[0].sites
        assert site.refusal is not None
        found, cache = torch.compile(model, backend="adakv", options=OPTIONS)(x, mask)
        assert not isinstance(cache[0], CompressedKV)
        torch.testing.assert_close(found, model(x, mask)[0], rtol=1e-4, atol=1e-5)
    return site.refusal.reason


@pytest.mark.parametrize("mod", [without_sign, weighted, capped_at_half, biased_below_a_cap])
def test_a_score_mod_that_means_something_else_is_left_alone(mod: Mod) -> None:
    x = torch.randn(2, LENGTH, 64)
    assert refused(Flex(lambda start: mod), x, seen(0, LENGTH)) is Reason.OPERATOR


def test_a_block_mask_that_shows_the_future_is_left_alone() -> None:
    def all_but_one(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + 1 >= kv_idx

    mask = create_block_mask(all_but_one, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16)
    assert refused(Flex(), torch.randn(2, LENGTH, 64), mask) is Reason.MASK_NOT_CAUSAL


def test_what_score_mod_hides_is_hidden() -> None:
    def no_mask(start: int, end: int) -> None:
        return None

    model, x = Flex(hidden_by_score), torch.randn(2, LENGTHS[-1][1], 64)
    expected, _ = run(model, x, no_mask)
    options = OPTIONS | {"budget": 200, "strict": True}
    found, cache = run(torch.compile(model, backend="adakv", dynamic=True, options=options), x, no_mask)
    assert isinstance(cache[0], CompressedKV)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_mask_at_all_is_not_causal() -> None:
    assert refused(Flex(), torch.randn(2, LENGTH, 64), None) is Reason.MASK_NOT_CAUSAL


def of_tables(change: Callable[[BlockTables], None] | None = None) -> tuple[BlockTable, list[Any]]:
    """Return the check of a causal block mask with blocks of 16, and its arguments."""
    mask = seen(0, LENGTH)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    tables = {
        "counts": mask.kv_num_blocks.clone(),
        "indices": mask.kv_indices.clone(),
        "full_counts": mask.full_kv_num_blocks.clone(),
        "full_indices": mask.full_kv_indices.clone(),
    }
    if change is not None:
        change(tables)
    graph = torch.fx.Graph()
    for name in tables:
        graph.placeholder(name)
    graph.output(graph.call_function(causal, (LENGTH, LENGTH)))
    function = torch.fx.GraphModule(nn.Module(), graph)
    return BlockTable((0, 1, 2, 3), ((16, False), (16, False)), function), list(tables.values())


def drop_one(tables: BlockTables) -> None:
    tables["counts"][0, 0, -1] -= 1


def show_one_more(tables: BlockTables) -> None:
    tables["full_counts"][0, 0, 0] = 1
    tables["full_indices"][0, 0, 0, 0] = 2


def mark_a_partial_one_full(tables: BlockTables) -> None:
    tables["counts"][0, 0, 0] = 0
    tables["full_counts"][0, 0, 0] = 1
    tables["full_indices"][0, 0, 0, 0] = 0


def list_one_twice(tables: BlockTables) -> None:
    tables["counts"][0, 0, -1] = 2
    tables["indices"][0, 0, -1, :2] = 2


def test_the_tables_of_a_block_mask_agree_with_its_function() -> None:
    check, args = of_tables()
    assert check.holds(args)


@pytest.mark.parametrize("change", [drop_one, show_one_more, mark_a_partial_one_full, list_one_twice])
def test_tables_that_hide_or_show_something_else_are_noticed(change: Callable[[BlockTables], None]) -> None:
    check, args = of_tables(change)
    with pytest.warns(UserWarning, match="do not say what its mask_mod says"):
        assert not check.holds(args)
