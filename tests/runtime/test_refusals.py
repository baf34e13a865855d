"""What a compressed cache must refuse, and that the message says what, where and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adakv_compile.errors import AdaKVError
from adakv_compile.runtime.boundary import join, wrap_grown
from adakv_compile.runtime.compressed import CompressedKV
from adakv_compile.runtime.errors import CacheError, CacheMismatchError, CropError, UnsupportedCacheOperation
from adakv_compile.runtime.layout import STANDARD
from tests.runtime.dense import conversation, random_entries

REFUSED: dict[str, Callable[[CompressedKV], object]] = {
    "arithmetic": lambda kv: kv + 1,
    "arithmetic, second": lambda kv: torch.ones(()) * kv,
    "in place": lambda kv: kv.add_(1),
    "comparison": lambda kv: kv == 0,
    "equal": lambda kv: torch.equal(kv, kv),
    "reduction": lambda kv: kv.sum(),
    "isnan": lambda kv: kv.isnan(),
    "matmul": lambda kv: torch.ones(2, 3, 1, 8).double() @ kv.mT,
    "matmul, values": lambda kv: torch.ones(2, 3, 1, 17).double() @ kv,
    "einsum": lambda kv: torch.einsum("bhld->bhd", kv),
    "view": lambda kv: kv.view(2, 3, -1),
    "reshape": lambda kv: kv.reshape(-1),
    "one row": lambda kv: kv[0],
    "one slot": lambda kv: kv[:, :, 3],
    "one head": lambda kv: kv[:, :1],
    "part of the head dimension": lambda kv: kv[..., :4],
    "every second slot": lambda kv: kv[:, :, ::2],
    "slots by index": lambda kv: kv.index_select(2, torch.tensor([0, 1])),
    "heads by index": lambda kv: kv[:, torch.tensor([0])],
    "rows by matrix": lambda kv: kv[torch.tensor([[0, 1]])],
    "gather": lambda kv: kv.gather(2, torch.zeros(2, 3, 1, 8, dtype=torch.int64)),
    "item": lambda kv: kv[0, 0, 0, 0].item(),
    "iteration": lambda kv: list(kv),
    "split slots": lambda kv: kv.split(4, dim=2),
    "chunk heads": lambda kv: kv.chunk(3, dim=1),
    "write slots": lambda kv: kv.__setitem__((slice(None), slice(None), torch.tensor([3])), 0.0),
    "write a row": lambda kv: kv.__setitem__(0, 0.0),
    "index_copy_": lambda kv: kv.index_copy_(2, torch.tensor([1]), torch.ones(2, 3, 1, 8).double()),
    "copy_": lambda kv: kv.copy_(torch.ones(2, 3, 17, 8)),
    "copy_ from": lambda kv: torch.ones(2, 3, 17, 8).double().copy_(kv),
    "out": lambda kv: torch.add(torch.ones(2, 3, 17, 8).double(), 1, out=kv),
    "foreach": lambda kv: torch.ops.aten._foreach_add.Scalar([kv], 1),
    "prepend": lambda kv: torch.cat([torch.ones(2, 3, 1, 8).double(), kv], dim=2),
    "cat of rows": lambda kv: torch.cat([kv, kv]),
    "cat of heads": lambda kv: torch.cat([kv, kv], dim=1),
    "cat of caches": lambda kv: torch.cat([kv, kv], dim=2),
    "stack": lambda kv: torch.stack([kv, kv]),
    "pad": lambda kv: F.pad(kv, (0, 1)),
    "roll": lambda kv: kv.roll(1, 2),
    "numpy": lambda kv: kv.numpy(),
    "tolist": lambda kv: kv.tolist(),
    "data_ptr": lambda kv: kv.data_ptr(),
    "dlpack": lambda kv: torch.utils.dlpack.from_dlpack(kv),
    "set data": lambda kv: setattr(kv, "data", torch.ones(2, 3, 17, 8).double()),
    "set_": lambda kv: kv.set_(torch.ones(1).double()),
    "resize_": lambda kv: kv.resize_(1),
    "integers": lambda kv: kv.int(),
    "meta": lambda kv: kv.to("meta"),
    "repeat slots": lambda kv: kv.repeat(1, 1, 2, 1),
    "repeat slots, each": lambda kv: kv.repeat_interleave(2, dim=2),
    "expand": lambda kv: kv.expand(3, 2, 3, 17, 8),
    "heads repeated, then arithmetic": lambda kv: kv.repeat_interleave(2, dim=1) * 2,
    "heads repeated, then append": lambda kv: torch.cat(
        [kv.repeat_interleave(2, dim=1), torch.ones(2, 6, 1, 8).double()], dim=2
    ),
    "heads repeated, other merge": lambda kv: kv[:, :, None].expand(2, 3, 2, 17, 8).reshape(4, 3, 17, 8),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_other_operations_are_refused(what: str, inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        talk = conversation()
        with pytest.raises(UnsupportedCacheOperation, match=r"CompressedKV\(.*(dense|sdpa)"):
            REFUSED[what](talk.key)
        assert torch.equal(talk.key.dense()[1], talk.held)  # and leave the cache as it was


def test_the_message_names_operation_shape_and_remedy() -> None:
    talk = conversation()
    with pytest.raises(AdaKVError) as caught:
        _ = talk.key * 2
    message = str(caught.value)
    for part in ("aten.mul.Tensor", "[2, 3, 17, 8]", "backend='adakv'", ".dense()"):
        assert part in message
    assert isinstance(caught.value, RuntimeError)


def test_cropping_into_the_evicted_part() -> None:
    talk = conversation()
    key, _ = random_entries(2, 3, torch.float64, torch.Generator())
    grown = torch.cat([talk.key, key], 2)
    assert grown[:, :, :-3].shape[2] == 17
    with pytest.raises(CropError, match=r"newest 4 tokens .* only the 3 tokens .* 17 before .* deepcopy"):
        grown[:, :, :-4]


def test_cropping_when_nothing_was_evicted() -> None:
    talk = conversation(kept=1.0, shorter_rows=False)
    key, value = talk.key[:, :, 2:9], talk.value[:, :, 2:9]
    assert key.store is value.store
    assert torch.equal(key.dense()[0], talk.dense_key[:, :, 2:9])
    assert torch.equal(value.dense()[0], talk.dense_value[:, :, 2:9])
    assert bool(key.dense()[1].all())
    assert key.store.prefix_length == 9


def test_cropping_everything_starts_again() -> None:
    talk = conversation()
    key, value = talk.key[:, :, :0], talk.value[:, :, :0]
    assert key.numel() == 0
    assert key.store is value.store
    assert key.store.nbytes_held == key.store.bookkeeping_bytes
    new = random_entries(2, 4, torch.float64, torch.Generator().manual_seed(1))
    key, value = torch.cat([key, new[0]], 2), torch.cat([value, new[1]], 2)
    query = torch.randn(2, 3, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        out = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, *new))


def test_zeroing_drops_every_entry_and_keeps_the_shape() -> None:
    talk = conversation()
    older = talk.key.detach()
    talk.key.zero_()
    with pytest.raises(CacheMismatchError):
        join(talk.key, talk.value)
    talk.value.zero_()
    store = join(talk.key, talk.value)
    assert talk.key.shape == (2, 3, 17, 8)
    assert store.nbytes_held == store.bookkeeping_bytes
    assert not talk.key.head_lengths.any()
    assert torch.equal(older.dense()[1], talk.held)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda talk, other: (talk.value, talk.key), "exchanged"),
        (lambda talk, other: (talk.key, talk.key), "used twice"),
        (lambda talk, other: (talk.key, other.value[:, :, :-3]), "different layers, conversations or devices"),
        (lambda talk, other: (talk.key, talk.dense_value), "not compressed"),
        (lambda talk, other: (talk.key[:, :, 3:], talk.value), "different tokens"),
        (lambda talk, other: (other.key[:, :, 3:], other.value[:, :, :-3]), "different tokens"),
        (lambda talk, other: (torch.cat([talk.key, talk.dense_key[:, :, :1]], 2), talk.value), "different tokens"),
        (lambda talk, other: (talk.key[torch.tensor([1, 0])], talk.value), "different layers, conversations"),
        (lambda talk, other: (talk.key.float(), talk.value), "different layers, conversations or devices"),
        (lambda talk, other: (talk.key.repeat_interleave(2, 1), talk.value.repeat_interleave(2, 1)), "repeated"),
    ],
)
def test_tensors_that_do_not_belong_together(
    change: Callable[..., tuple[torch.Tensor, torch.Tensor]], reason: str
) -> None:
    other = conversation(1)
    grown = join(other.key, other.value, 3)
    grown.append(*random_entries(2, 3, torch.float64, torch.Generator()))
    views = wrap_grown(grown, 20)
    key, value = change(conversation(0), replace(other, key=views[0], value=views[1]))
    with pytest.raises(CacheMismatchError, match=reason):
        join(key, value)


def test_appended_to_one_of_the_two_only() -> None:
    talk = conversation()
    key, value = random_entries(2, 2, torch.float64, torch.Generator())
    grown = torch.cat([talk.key, key], 2), torch.cat([talk.value, value], 2)
    join(*grown)
    with pytest.raises(CacheMismatchError, match="appended to one"):
        join(grown[0], torch.cat([talk.value, value], 2))


@pytest.mark.parametrize(
    "new",
    [
        torch.ones(1, 3, 1, 8).double(),
        torch.ones(2, 6, 1, 8).double(),
        torch.ones(2, 3, 1, 4).double(),
        torch.ones(2, 3, 1, 8),
        torch.ones(2, 3, 8).double(),
    ],
    ids=["batch", "heads", "head dimension", "dtype", "rank"],
)
def test_new_entries_of_another_model(new: torch.Tensor) -> None:
    with pytest.raises(CacheMismatchError, match="another model"):
        torch.cat([conversation().key, new], dim=2)


@pytest.mark.parametrize("inference", [False, True])
def test_attention_over_mixed_keys_and_values(inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        talk = conversation()
        query = torch.ones(2, 3, 1, 8).double()
        with pytest.raises(CacheMismatchError, match="only one is compressed"):
            F.scaled_dot_product_attention(query, talk.key, talk.dense_value)
        with pytest.raises(CacheMismatchError, match="only one is compressed"):
            F.scaled_dot_product_attention(query, talk.dense_key, talk.value)
        with pytest.raises(CacheMismatchError, match="belong together"):
            F.scaled_dot_product_attention(query, talk.value, talk.key)


def test_composed_attention_is_refused_with_the_way_out() -> None:
    talk = conversation()
    query = torch.ones(2, 3, 1, 8).double()
    with torch.no_grad(), pytest.raises(UnsupportedCacheOperation, match="inference_mode"):
        F.scaled_dot_product_attention(query, talk.key, talk.value, dropout_p=0.5)
    with torch.inference_mode():
        F.scaled_dot_product_attention(query, talk.key, talk.value, dropout_p=0.5)


@pytest.mark.parametrize(
    ("kind", "length", "start"), [("keys", None, 0), ("key", 16, 0), ("key", 18, 0), ("key", 17, -1)]
)
def test_views_that_a_store_does_not_have(kind: Any, length: int | None, start: int) -> None:
    with pytest.raises(ValueError, match="is not a view of LayerStore"):
        CompressedKV(conversation().key.store, kind, length, start)


def test_rows_out_of_range() -> None:
    talk = conversation()
    with pytest.raises(IndexError):
        talk.key.index_select(0, torch.tensor([2]))
    with pytest.raises(IndexError):
        talk.key[torch.tensor([True])]


@pytest.mark.parametrize("use", [lambda kv: kv + 1, lambda kv: torch.cat([kv, kv], 2), lambda kv: kv[:, :, 1:]])
def test_other_backends_are_refused_and_never_run_on_nothing(use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    talk = conversation()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="another backend"):
        torch.compile(use, backend="aot_eager")(talk.key)
    torch._dynamo.reset()


def test_a_view_without_entries_says_so() -> None:
    empty = CompressedKV.__tensor_unflatten__({"anchor": torch.empty(0)}, STANDARD.dims, (1, 2, 3, 4), None)
    assert "no entries" in repr(empty)
    for use in (lambda: empty.head_lengths, lambda: empty.dense(), lambda: empty[:, :, 1:], lambda: join(empty, empty)):
        with pytest.raises(CacheError, match="holds no entries"):
            use()
