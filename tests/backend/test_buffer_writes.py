"""Every way to write to a preallocated buffer: understood where its slots are proved, refused next to that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adakv_compile import Reason
from tests.backend.buffered import SLOTS, Attention, at, attend, causal, follow, leave

Write = Callable[[Tensor, Tensor, Tensor], None]
"""``write(buffer, new, index)``."""
WriteFrom = Callable[[Tensor, Tensor, int], None]
"""``write(buffer, new, first)``."""


def _by_index(write: Write) -> Attention:
    def attention(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        index = at(k.shape[2], position)
        write(kc, k, index)
        write(vc, v, index)
        return attend(q, kc, vc, causal(index))

    return attention


def _from_first(write: WriteFrom) -> Attention:
    def attention(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        write(kc, k, position)
        write(vc, v, position)
        return attend(q, kc, vc, causal(torch.arange(position, position + k.shape[2])))

    return attention


def _column(index: Tensor) -> Tensor:
    return index[None, None, :, None]


def _slot(index: Tensor) -> Tensor:
    return _column(torch.arange(SLOTS)) == index


def scattered(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.scatter_(2, _column(index).expand_as(new), new)


def scattered_and_copied(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(buffer.scatter(2, _column(index).expand(*new.shape), new))


def copied_index(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(buffer.index_copy(2, index, new))


def narrowed(buffer: Tensor, new: Tensor, first: int) -> None:
    buffer.narrow(2, first, new.shape[2]).copy_(new)


def in_rows(buffer: Tensor, new: Tensor, first: int) -> None:
    buffer[: new.shape[0]][:, :, first : first + new.shape[2]] = new


def everything_kept(buffer: Tensor, new: Tensor, first: int) -> None:
    buffer[...] = torch.slice_scatter(buffer, new, 2, first, first + new.shape[2])


BY_INDEX: dict[str, Write] = {
    "scatter_": scattered,
    "scatter, copied back": scattered_and_copied,
    "index_copy, copied back": copied_index,
}
FROM_FIRST: dict[str, WriteFrom] = {
    "narrow": narrowed,
    "rows, then slots": in_rows,
    "slice_scatter, copied back": everything_kept,
}


@pytest.mark.parametrize("name", BY_INDEX)
def test_a_write_by_an_index_is_followed(name: str) -> None:
    follow(_by_index(BY_INDEX[name]), by_tensor=True)


@pytest.mark.parametrize("name", FROM_FIRST)
def test_a_write_from_a_slot_on_is_followed(name: str) -> None:
    follow(_from_first(FROM_FIRST[name]), by_tensor=False)


def chosen(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(_slot(index), new, buffer))


def chosen_the_other_way_round(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(index == _column(torch.arange(SLOTS)), new, buffer))


def selected(buffer: Tensor, new: Tensor, first: int) -> None:
    buffer[:, :, first] = new[:, :, 0]


def squeezed(buffer: Tensor, new: Tensor, first: int) -> None:
    buffer[:, :, first] = new.squeeze(2)


ONE_BY_INDEX: dict[str, Write] = {"where": chosen, "where, turned round": chosen_the_other_way_round}
ONE_FROM_FIRST: dict[str, WriteFrom] = {"one slot": selected, "one slot, squeezed": squeezed}


@pytest.mark.parametrize("name", ONE_BY_INDEX)
def test_a_single_entry_that_is_chosen_is_followed(name: str) -> None:
    follow(_by_index(ONE_BY_INDEX[name]), by_tensor=True, prompt=_by_index(scattered))


@pytest.mark.parametrize("name", ONE_FROM_FIRST)
def test_a_single_entry_in_a_slot_is_followed(name: str) -> None:
    follow(_from_first(ONE_FROM_FIRST[name]), by_tensor=False, prompt=_from_first(narrowed))


def another_slot_in_each_head(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    shifted = _column(index) + torch.arange(new.shape[1])[None, :, None, None]
    buffer.scatter_(2, shifted.expand_as(new) % SLOTS, new)


def another_slot_in_each_row(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.scatter_(2, (_column(index) + torch.arange(new.shape[0])[:, None, None, None]).expand_as(new), new)


def only_one_row(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.scatter_(2, _column(index).expand(1, *new.shape[1:]), new)


def half_of_the_head_dimension(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.scatter_(2, _column(index).expand_as(new)[..., : new.shape[3] // 2], new)


def along_the_head_dimension(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    slots = torch.arange(new.shape[3])[None, None, None].expand_as(new)
    buffer.scatter_(3, slots, new)


def added(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.scatter_add_(2, _column(index).expand_as(new), new)


def multiplied(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.scatter_reduce_(2, _column(index).expand_as(new), new, "prod")


def put_and_added(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.index_put_(
        (torch.arange(buffer.shape[0])[:, None], torch.zeros_like(index), index), new[:, 0], accumulate=True
    )


def in_a_ring(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.index_copy_(2, index % (SLOTS // 2), new)


def rolled(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(buffer.roll(-1, 2).index_copy(2, index, new))


def doubled(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(buffer.index_copy(2, index, new) * 2)


LEFT_BY_INDEX: dict[str, Write] = {
    "scatter, another slot in each head": another_slot_in_each_head,
    "scatter, another slot in each row": another_slot_in_each_row,
    "scatter, only one row": only_one_row,
    "scatter, half of the head dimension": half_of_the_head_dimension,
    "scatter, along the head dimension": along_the_head_dimension,
    "scatter_add": added,
    "scatter_reduce": multiplied,
    "index_put in three dimensions, added": put_and_added,
    "a ring": in_a_ring,
    "rolled, then written": rolled,
    "written, then doubled": doubled,
}


@pytest.mark.parametrize("name", LEFT_BY_INDEX)
def test_a_write_next_to_that_is_left_alone(name: str) -> None:
    leave(_by_index(LEFT_BY_INDEX[name]), Reason.CACHE_FORM, by_tensor=True)


def where_it_is_not(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(_slot(index), buffer, new))


def from_there_on(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(_column(torch.arange(SLOTS)) >= index, new, buffer))


def everywhere_but_there(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(_column(torch.arange(SLOTS)) != index, new, buffer))


def at_half_the_slot(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(_column(torch.arange(SLOTS)) * 2 == index, new, buffer))


def in_every_slot(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(_column(index) >= 0, new, buffer))


def a_slot_later(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    buffer.copy_(torch.where(_slot(index + 1), new, buffer))


def in_one_head(buffer: Tensor, new: Tensor, index: Tensor) -> None:
    first = torch.arange(buffer.shape[1])[None, :, None, None] == 0
    buffer.copy_(torch.where(_slot(index) & first, new, buffer))


def of_another_buffer(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    index = at(k.shape[2], position)
    kc.copy_(torch.where(_slot(index), k, vc))
    vc.copy_(torch.where(_slot(index), v, vc))
    return attend(q, kc, vc, causal(index))


ONE_LEFT: dict[str, Attention] = {
    "where, operands swapped": _by_index(where_it_is_not),
    "where, from a slot on": _by_index(from_there_on),
    "where, all slots but one": _by_index(everywhere_but_there),
    "where, every other position": _by_index(at_half_the_slot),
    "where, every slot": _by_index(in_every_slot),
    "where, a slot later": _by_index(a_slot_later),
    "where, one head": _by_index(in_one_head),
    "where, of another buffer": of_another_buffer,
}


@pytest.mark.parametrize("name", ONE_LEFT)
def test_a_choice_next_to_that_is_left_alone(name: str) -> None:
    leave(ONE_LEFT[name], Reason.CACHE_FORM, by_tensor=True, counts=(1, 1))


def first_of_several(buffer: Tensor, new: Tensor, first: int) -> None:
    buffer[:, :, first] = new[:, :, 0]


def summed(buffer: Tensor, new: Tensor, first: int) -> None:
    buffer[:, :, first] = new.sum(2)


@pytest.mark.parametrize("write", [first_of_several, summed])
def test_one_slot_for_several_tokens_is_left_alone(write: WriteFrom) -> None:
    leave(_from_first(write), Reason.CACHE_FORM, by_tensor=False, counts=(12, 1))
