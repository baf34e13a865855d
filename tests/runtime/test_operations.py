"""Random sequences of what caches do to their tensors, on compressed views and on dense tensors with a mask."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_compile.runtime.boundary import join, wrap_grown
from tests.runtime.dense import Conversation, attention, check, conversation, random_entries

Step = Callable[[Conversation, torch.Generator, int], Conversation]


def _query(talk: Conversation, generator: torch.Generator, tokens: int) -> torch.Tensor:
    shape = (talk.batch, 6, tokens, talk.dense_key.shape[3])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(talk.key.dtype)


def _appended(talk: Conversation, key: torch.Tensor, value: torch.Tensor) -> Conversation:
    new = torch.ones(talk.batch, key.shape[1], key.shape[2], dtype=torch.bool)
    return talk.dense(
        torch.cat([talk.dense_key, key], 2), torch.cat([talk.dense_value, value], 2), torch.cat([talk.held, new], 2)
    )


def _append(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    key, value = random_entries(talk.batch, size, talk.key.dtype, generator)
    views = torch.cat([talk.key, key], dim=-2), torch.cat([talk.value, value], dim=-2)
    key.fill_(9.0)  # torch.cat copies
    talk = replace(talk, key=views[0], value=views[1])
    key = views[0].dense()[0][:, :, -size:]
    return _appended(talk, key, value)


def _append_and_attend(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    talk = _append(talk, generator, size)
    query = _query(talk, generator, size)
    out = F.scaled_dot_product_attention(query, talk.key, talk.value, enable_gqa=True)
    torch.testing.assert_close(out, attention(query, talk), rtol=2e-4, atol=2e-5)
    return talk


def _compiled_step(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    key, value = random_entries(talk.batch, size, talk.key.dtype, generator)
    length, start = talk.key.length + size, talk.key.start
    store = join(talk.key, talk.value, size)
    store.append(key, value)
    views = wrap_grown(store, length, start)
    return _appended(replace(talk, key=views[0], value=views[1]), key, value)


def _slots(talk: Conversation, low: int, high: int) -> Conversation:
    kept = slice(low, high)
    return replace(
        talk.dense(talk.dense_key[:, :, kept], talk.dense_value[:, :, kept], talk.held[:, :, kept]),
        key=talk.key[..., kept, :],
        value=talk.value[..., kept, :],
        evicted_before=max(talk.evicted_before - low, 0),
    )


def _crop(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    removed = min(size, talk.length - talk.evicted_before, talk.length - 1)
    return _slots(talk, 0, talk.length - removed)


def _drop_oldest(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    return _slots(talk, min(size, talk.length - 1), talk.length)


def _slide(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    window = max(talk.length, 2)
    whole = _append(talk, generator, size)
    cached = _slots(whole, max(whole.length - window, 0), whole.length)
    query = _query(whole, generator, 1)
    out = F.scaled_dot_product_attention(query, whole.key, whole.value, enable_gqa=True)
    torch.testing.assert_close(out, attention(query, whole), rtol=2e-4, atol=2e-5)
    return cached


def _mapped(talk: Conversation, change: Callable[[torch.Tensor], torch.Tensor], held: torch.Tensor) -> Conversation:
    dense = talk.dense(change(talk.dense_key), change(talk.dense_value), held)
    return replace(dense, key=change(talk.key), value=change(talk.value))  # pyright: ignore[reportArgumentType]


def _rows(talk: Conversation, index: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Conversation:
    return _mapped(talk, change, talk.held[index])


def _reorder(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    index = torch.randint(talk.batch, (talk.batch,), generator=generator)
    return _rows(talk, index, lambda tensor: tensor.index_select(0, index))


def _select(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    index = torch.randint(-talk.batch, talk.batch, (2,), generator=generator)
    return _rows(talk, index, lambda tensor: tensor[index, ...])


def _mask_rows(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    mask = torch.arange(talk.batch) != size % max(talk.batch, 2)
    return _rows(talk, mask, lambda tensor: tensor[mask])


def _slice_rows(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    return _rows(talk, torch.arange(talk.batch)[-2:], lambda tensor: tensor[-2:])


def _split_rows(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    return _rows(talk, torch.arange(talk.batch)[:1], lambda tensor: tensor.split(1)[0])


def _repeat_each(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    if talk.batch > 4:
        return talk
    index = torch.arange(talk.batch).repeat_interleave(2)
    return _rows(talk, index, lambda tensor: tensor.repeat_interleave(2, dim=0))


def _repeat_all(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    if talk.batch > 4:
        return talk
    return _rows(talk, torch.arange(talk.batch).repeat(2), lambda tensor: tensor.repeat(2, 1, 1, 1))


def _to_single(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    return _mapped(talk, lambda tensor: tensor.to(torch.float32), talk.held)


def _to_double(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    return _mapped(talk, torch.Tensor.double, talk.held)


def _clone(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    return _mapped(talk, torch.Tensor.clone, talk.held)


def _detach(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    return _mapped(talk, lambda tensor: tensor.detach().contiguous()[:, :, :], talk.held)


def _deepcopy(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    key, value = copy.deepcopy((talk.key, talk.value))
    assert key.store is value.store
    assert key.store is not talk.key.store
    return replace(talk, key=key, value=value)


def _pickle(talk: Conversation, generator: torch.Generator, size: int) -> Conversation:
    key, value = pickle.loads(pickle.dumps((talk.key, talk.value)))
    assert key.store is value.store
    return replace(talk, key=key, value=value)


STEPS: tuple[Step, ...] = (
    _append,
    _append_and_attend,
    _compiled_step,
    _crop,
    _drop_oldest,
    _slide,
    _reorder,
    _select,
    _mask_rows,
    _slice_rows,
    _split_rows,
    _repeat_each,
    _repeat_all,
    _to_single,
    _to_double,
    _clone,
    _detach,
    _deepcopy,
    _pickle,
)
GROWING: tuple[Step, ...] = (_append, _append_and_attend, _compiled_step, _slide)

moves = st.tuples(st.one_of(st.sampled_from(STEPS), st.sampled_from(GROWING)), st.integers(1, 5), st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.lists(moves, max_size=14), st.booleans())
def test_any_sequence_of_operations_equals_the_dense_model(
    seed: int, kept: float, sequence: list[tuple[Step, int, int]], inference: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(inference), torch.no_grad():
        talks = [conversation(seed, kept=kept)]
        for step, size, which in sequence:
            source = talks[-1 - which % len(talks)]
            talk = step(source, generator, size)
            if talk.batch == 0:
                continue
            talks.append(talk)
            check(talk)
        for talk in talks:  # every conversation is as it was left, whatever the others did since
            check(talk, _query(talk, generator, 2))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["none", "bool", "float", "causal"]), st.integers(1, 4), st.booleans())
def test_attention_looks_masks_up_at_the_kept_positions(seed: int, kind: str, tokens: int, inference: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(inference), torch.no_grad():
        talk = _append(conversation(seed), generator, tokens)
        query = _query(talk, generator, tokens)
        full = (talk.batch, 6, tokens, talk.length)
        mask = None
        if kind == "bool":
            mask = torch.rand((talk.batch, 1, tokens, talk.length), generator=generator) < 0.6
        elif kind == "float":
            mask = torch.randn((1, 6, tokens, talk.length), generator=generator, dtype=torch.float64).expand(full)
        causal = kind == "causal"
        expected = attention(query, talk, mask, is_causal=causal)
        calls = {
            "enable_gqa": lambda: F.scaled_dot_product_attention(
                query, talk.key, talk.value, mask, is_causal=causal, enable_gqa=True
            ),
            "repeat_interleave": lambda: F.scaled_dot_product_attention(
                query,
                talk.key.repeat_interleave(2, dim=1),
                talk.value.repeat_interleave(2, dim=1),
                mask,
                is_causal=causal,
            ),
            "expand": lambda: F.scaled_dot_product_attention(
                query, _repeat_kv(talk.key), _repeat_kv(talk.value), mask, is_causal=causal
            ),
        }
        for name, call in calls.items():
            torch.testing.assert_close(call(), expected, msg=lambda message, name=name: f"{name}: {message}")


def _repeat_kv(tensor: torch.Tensor) -> torch.Tensor:
    batch, heads, length, dim = tensor.shape
    return tensor[:, :, None, :, :].expand(batch, heads, 2, length, dim).reshape(batch, heads * 2, length, dim)


@pytest.mark.parametrize(
    ("name", "arguments", "outputs"),
    [
        ("_scaled_dot_product_flash_attention_for_cpu", (), 2),
        ("_scaled_dot_product_flash_attention", (), 9),
        ("_scaled_dot_product_efficient_attention", (None, False), 4),
        ("_scaled_dot_product_cudnn_attention", (None, False), 9),
        ("_scaled_dot_product_fused_attention_overrideable", (), 9),
        ("_scaled_dot_product_attention_math", (), 2),
    ],
)
def test_every_fused_attention_is_served(name: str, arguments: tuple[object, ...], outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    talk = conversation(3)
    query = _query(talk, generator, 1)[:, :3]
    with torch.inference_mode():
        returned = getattr(torch.ops.aten, name).default(query, talk.key, talk.value, *arguments)
    assert len(returned) == outputs
    torch.testing.assert_close(returned[0], attention(query, talk))


def test_repeated_heads_can_be_copied_and_looked_at() -> None:
    talk = conversation(4)
    for repeated in (talk.key.repeat_interleave(2, dim=1), talk.key[:, :, None].expand(2, 3, 2, 17, 8)):
        expected = talk.dense_key.repeat_interleave(2, dim=1).view(repeated.shape)
        held = talk.held.repeat_interleave(2, dim=1).view(repeated.shape[:-1])
        for each in (repeated, repeated.clone(), copy.deepcopy(repeated), pickle.loads(pickle.dumps(repeated))):
            assert each.shape == repeated.shape
            assert torch.equal(each.dense()[0], expected * held[..., None])
            assert torch.equal(each.dense()[1], held)


@pytest.mark.parametrize("inference", [False, True])
def test_a_view_made_in_one_mode_is_continued_in_the_other(inference: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(inference):
        talk = _append_and_attend(conversation(1), generator, 1)
        copied = _deepcopy(talk, generator, 1)
    with torch.inference_mode(not inference), torch.no_grad():
        for each in (talk, copied):
            check(_append_and_attend(_compiled_step(each, generator, 2), generator, 1), _query(each, generator, 1))


def test_queries_that_require_grad_run_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    talk = _append(conversation(2), generator, 1)
    query = _query(talk, generator, 1)
    out = F.scaled_dot_product_attention(query.clone().requires_grad_(), talk.key, talk.value, enable_gqa=True)
    torch.testing.assert_close(out.detach(), attention(query, talk))
