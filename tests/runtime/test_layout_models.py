"""Decode steps in eager mode as models write them, over caches in their own layouts, against dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adakv_compile.runtime.boundary import wrap_grown, wrap_prefill
from adakv_compile.runtime.compressed import CompressedKV
from adakv_compile.runtime.errors import CacheMismatchError, UnsupportedCacheOperation
from adakv_compile.runtime.layout import STANDARD, Layout
from tests.runtime.dense import HEADS, KEY_DIM, Conversation, attention, conversation, random_entries

Cache = tuple[Tensor, ...]


@dataclass(frozen=True)
class Style:
    """How a model keeps and reads its cache.

    Attributes:
        layouts: Of keys and values, or once that of a pair.
        append: Cache and new ``[B, H, T, D]`` keys and values to the longer cache.
        read: Cache to keys and values ``[B, H, L, D]``.
        reorder: Cache and rows to the cache of these rows.
    """

    layouts: tuple[Layout, ...]
    append: Callable[[Cache, Tensor, Tensor], Cache]
    read: Callable[[Cache], tuple[Tensor, Tensor]]
    reorder: Callable[[Cache, Tensor], Cache] = lambda cache, rows: tuple(t.index_select(0, rows) for t in cache)


def _grouped(cache: Cache) -> tuple[Tensor, Tensor]:
    key, value = (tensor.transpose(1, 2) for tensor in cache)
    return key, value


def _merged_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).reshape(tensor.shape[0], tensor.shape[2], HEADS * KEY_DIM)


def _split_heads(tensor: Tensor) -> Tensor:
    return tensor.view(*tensor.shape[:2], HEADS, KEY_DIM).transpose(1, 2)


def _append_bloom(cache: Cache, key: Tensor, value: Tensor) -> Cache:
    key = key.reshape(-1, key.shape[2], KEY_DIM).transpose(1, 2)
    return torch.cat((cache[0], key), dim=2), torch.cat((cache[1], value.reshape(-1, *value.shape[2:])), dim=1)


def _read_bloom(cache: Cache) -> tuple[Tensor, Tensor]:
    key, value = cache
    length = key.shape[2]
    return key.view(-1, HEADS, KEY_DIM, length).transpose(2, 3), value.view(-1, HEADS, length, KEY_DIM)


def _reorder_bloom(cache: Cache, rows: Tensor) -> Cache:
    by_row = (tensor.view(-1, HEADS, *tensor.shape[1:]) for tensor in cache)
    return tuple(tensor.index_select(0, rows).flatten(0, 1) for tensor in by_row)


def _append_stacked(cache: Cache, key: Tensor, value: Tensor) -> Cache:
    past_key, past_value = cache[0]
    return (torch.stack((torch.cat((past_key, key), 2), torch.cat((past_value, value), 2))),)


def _append_packed(cache: Cache, key: Tensor, value: Tensor) -> Cache:
    past_key, past_value = cache[0].chunk(2, dim=-1)
    return (torch.cat([torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)], dim=-1),)


def _halves(cache: Cache) -> tuple[Tensor, Tensor]:
    key, value = cache[0].split(KEY_DIM, dim=-1)
    return key, value


def _unbound(cache: Cache) -> tuple[Tensor, Tensor]:
    key, value = cache[0].unbind(0)
    return key, value


def _read_by_token(cache: Cache) -> tuple[Tensor, Tensor]:
    pair = cache[0].view(*cache[0].shape[:2], HEADS, 2 * KEY_DIM).transpose(1, 2)
    return pair[..., :KEY_DIM], pair[..., KEY_DIM:]


STYLES: dict[str, Style] = {
    "[B, L, H, D]": Style(
        (Layout(("b", "l", "h", "d")),) * 2,
        lambda cache, key, value: (
            torch.cat([cache[0], key.transpose(1, 2)], dim=1),
            torch.cat([cache[1], value.transpose(1, 2)], dim=-3),
        ),
        _grouped,
    ),
    "[L, B, H, D]": Style(
        (Layout(("l", "b", "h", "d")),) * 2,
        lambda cache, key, value: (
            torch.cat([cache[0], key.permute(2, 0, 1, 3)]),
            torch.cat([cache[1], value.permute(2, 0, 1, 3)]),
        ),
        lambda cache: (cache[0].permute(1, 2, 0, 3), cache[1].permute(1, 2, 0, 3)),
        lambda cache, rows: tuple(tensor[:, rows] for tensor in cache),
    ),
    "[B, L, H * D]": Style(
        (Layout(("b", "l", "hd")),) * 2,
        lambda cache, key, value: (
            torch.cat([cache[0], _merged_heads(key)], dim=1),
            torch.cat([cache[1], _merged_heads(value)], dim=1),
        ),
        lambda cache: (_split_heads(cache[0]), _split_heads(cache[1])),
    ),
    "[B * H, D, L]": Style(
        (Layout(("bh", "d", "l")), Layout(("bh", "l", "d"))), _append_bloom, _read_bloom, _reorder_bloom
    ),
    "packed": Style(
        (Layout(("b", "h", "l", "pd")),),
        lambda cache, key, value: (torch.cat([cache[0], torch.cat([key, value], -1)], dim=2),),
        _halves,
    ),
    "packed, apart in a step": Style((Layout(("b", "h", "l", "pd")),), _append_packed, _halves),
    "packed by token": Style(
        (Layout(("b", "l", "hpd")),),
        lambda cache, key, value: (
            torch.cat([cache[0], torch.cat([key, value], -1).transpose(1, 2).flatten(2)], dim=1),
        ),
        _read_by_token,
    ),
    "stacked": Style(
        (Layout(("p", "b", "h", "l", "d")),),
        lambda cache, key, value: (torch.cat([cache[0], torch.stack([key, value])], dim=3),),
        _unbound,
        lambda cache, rows: tuple(tensor.index_select(1, rows) for tensor in cache),
    ),
    "stacked, apart in a step": Style(
        (Layout(("p", "b", "h", "l", "d")),),
        _append_stacked,
        _unbound,
        lambda cache, rows: tuple(tensor[:, rows] for tensor in cache),
    ),
}


def _start(style: Style, talk: Conversation) -> Cache:
    views = wrap_grown(talk.key.store, talk.length, layouts=(style.layouts[0], style.layouts[-1]))
    return views[: len(style.layouts)]


def _longer(talk: Conversation, key: Tensor, value: Tensor) -> Conversation:
    new = torch.ones(talk.batch, HEADS, key.shape[2], dtype=torch.bool)
    return talk.dense(
        torch.cat([talk.dense_key, key], 2), torch.cat([talk.dense_value, value], 2), torch.cat([talk.held, new], 2)
    )


def _agrees(style: Style, cache: Cache, talk: Conversation, generator: torch.Generator) -> None:
    hidden = ~talk.held[..., None]
    dense = talk.dense_key.masked_fill(hidden, 7.0), talk.dense_value.masked_fill(hidden, 7.0)
    for at, (tensor, layout) in enumerate(zip(cache, style.layouts, strict=True)):
        assert type(tensor) is CompressedKV
        assert tensor.axes == layout
        expected = layout.join_pair(*dense) if layout.is_pair else layout.from_standard(dense[at])
        assert torch.equal(tensor.dense(fill=7.0)[0], expected)
    query = torch.randn(talk.batch, 2 * HEADS, 2, KEY_DIM, generator=generator).double()
    key, value = style.read(cache)
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, attention(query, talk))
    by_token = (tensor.transpose(1, 2).repeat_interleave(2, dim=2) for tensor in (key, value))
    out = F.scaled_dot_product_attention(query, *(tensor.transpose(1, 2) for tensor in by_token))
    torch.testing.assert_close(out, attention(query, talk))
    repeated = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    torch.testing.assert_close(F.scaled_dot_product_attention(query, *repeated), attention(query, talk))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", STYLES)
def test_steps_in_eager_mode_append_in_place(name: str, inference: bool) -> None:
    style, talk, generator = STYLES[name], conversation(3), torch.Generator().manual_seed(3)
    with torch.inference_mode(inference), torch.no_grad():
        cache = _start(style, talk)
        for tokens in (1, 3, 1, 1):
            key, value = random_entries(talk.batch, tokens, torch.float64, generator)
            cache, talk = style.append(cache, key, value), _longer(talk, key, value)
            _agrees(style, cache, talk, generator)
            for tensor in cache:
                assert isinstance(tensor, CompressedKV)
                assert tensor.store is talk.key.store
                assert tensor.pending is None


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", STYLES)
def test_beams_branches_and_crops(name: str, inference: bool) -> None:
    style, talk, generator = STYLES[name], conversation(5), torch.Generator().manual_seed(5)
    with torch.inference_mode(inference), torch.no_grad():
        known = [(_start(style, talk), talk)]
        for step in range(6):
            cache, talk = known[-1 - step % len(known)]
            key, value = random_entries(talk.batch, 2, torch.float64, generator)
            cache, talk = style.append(cache, key, value), _longer(talk, key, value)
            known.append((cache, talk))
            rows = torch.randint(2, (2,), generator=generator)
            dense = talk.dense(talk.dense_key[rows], talk.dense_value[rows], talk.held[rows])
            known.append((style.reorder(cache, rows), dense))
            dense = talk.dense(talk.dense_key[:, :, :-1], talk.dense_value[:, :, :-1], talk.held[:, :, :-1])
            cropped = (
                tensor.narrow(layout.sequence_dim, 0, talk.length - 1)
                for tensor, layout in zip(cache, style.layouts, strict=True)
            )
            known.append((tuple(cropped), dense))
        for cache, talk in known:
            _agrees(style, cache, talk, generator)


@pytest.mark.parametrize("name", STYLES)
def test_a_cache_that_slides(name: str) -> None:
    style, talk, generator = STYLES[name], conversation(7), torch.Generator().manual_seed(7)
    window = 9
    cache = _start(style, talk)
    stores: set[int] = set()
    with torch.no_grad():
        for _ in range(80):
            key, value = random_entries(talk.batch, 1, torch.float64, generator)
            cache, talk = style.append(cache, key, value), _longer(talk, key, value)
            _agrees(style, cache, talk, generator)
            first = talk.length - window
            cache = tuple(
                tensor.narrow(layout.sequence_dim, first, window)
                for tensor, layout in zip(cache, style.layouts, strict=True)
            )
            talk = talk.dense(talk.dense_key[:, :, first:], talk.dense_value[:, :, first:], talk.held[:, :, first:])
            assert isinstance(cache[0], CompressedKV)
            stores.add(id(cache[0].store))
    assert len(stores) <= 3  # moved only when the tail was full


def test_a_single_head_in_any_dimension() -> None:
    talk = conversation()
    store = talk.key.store
    entries = store.offsets[:, 1:2].max().item()
    offsets = store.offsets[:, :2].contiguous()
    parts = store.keys[:, :entries].clone(), store.values[:, :entries].clone()
    layout = Layout(("b", "l", "hd"))
    views = wrap_prefill(*parts, offsets, store.positions[:, :entries].clone(), 17, layouts=(layout, layout))
    assert views[0].shape == (2, 17, KEY_DIM)
    query = torch.randn(2, 6, 1, KEY_DIM).double()
    alone = replace(talk, dense_key=talk.dense_key[:, :1], dense_value=talk.dense_value[:, :1], held=talk.held[:, :1])
    wide = alone.dense(*(t.expand(-1, HEADS, *t.shape[2:]) for t in (alone.dense_key, alone.dense_value, alone.held)))
    with torch.no_grad():
        for heads in (
            [view.unsqueeze(1) for view in views],
            [view[:, :, None].transpose(1, 2) for view in views],
            [view.view(2, 1, 17, KEY_DIM) for view in views],
            [view.unsqueeze(1).expand(2, 6, 17, KEY_DIM) for view in views],
            [view.unsqueeze(1).expand(-1, 6, -1, -1) for view in views],
        ):
            out = F.scaled_dot_product_attention(query, heads[0], heads[1], enable_gqa=True)
            torch.testing.assert_close(out, attention(query, wide))


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        (Layout(("b", "l", "h", "d")), lambda kv: kv),
        (Layout(("b", "l", "h", "d")), lambda kv: kv.permute(0, 2, 3, 1)),
        (Layout(("b", "l", "h", "d")), lambda kv: kv.transpose(0, 2)),
        (Layout(("b", "l", "h", "d")), lambda kv: kv.repeat_interleave(2, dim=2)),
        (STANDARD, lambda kv: kv[None]),
        (STANDARD, lambda kv: kv.flatten(0, 1)),
        (STANDARD, lambda kv: kv[:, :, None].expand(-1, -1, 2, -1, -1)),
        (STANDARD, lambda kv: kv.mT),
    ],
)
def test_attention_over_anything_but_heads_by_tokens_is_refused(
    layout: Layout, change: Callable[[Tensor], Tensor]
) -> None:
    talk = conversation(length=HEADS)
    views = [change(view) for view in wrap_grown(talk.key.store, HEADS, layouts=(layout, layout))]
    query = torch.ones(*views[0].shape[:-2], 1, views[0].shape[-1]).double()
    with torch.no_grad(), pytest.raises(UnsupportedCacheOperation, match="attention"):
        F.scaled_dot_product_attention(query, views[0], views[1])


def test_attention_over_a_pair_is_refused() -> None:
    talk = conversation()
    pair, _ = wrap_grown(talk.key.store, 17, layouts=(Layout(("b", "h", "l", "pd")),) * 2)
    with torch.no_grad(), pytest.raises(UnsupportedCacheOperation, match="attention"):
        F.scaled_dot_product_attention(torch.ones(2, 3, 1, 16).double(), pair, pair)


def test_keys_of_a_pair_after_an_append_do_not_go_with_values_before_it() -> None:
    talk = conversation()
    pair, _ = wrap_grown(talk.key.store, 17, layouts=(Layout(("p", "b", "h", "l", "d")),) * 2)
    longer = torch.cat([pair, torch.ones(2, 2, HEADS, 1, KEY_DIM).double()], 3)
    with torch.no_grad(), pytest.raises(CacheMismatchError, match=r"belong together|batch and length"):
        F.scaled_dot_product_attention(torch.ones(2, 3, 1, KEY_DIM).double(), longer[0], pair[1])
