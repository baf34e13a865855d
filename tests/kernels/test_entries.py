"""What is laid out of a store gives the attention that the store gives itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cases import Case, ragged_case

HEADS = 3


def case(count: int = 1, **changes: object) -> Case:
    made = ragged_case([[20], [17]], prefix_length=40, group=HEADS, count=count, slots=22)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def columns(count: int) -> int:
    return 40 + 3 + count


RANDOM = torch.Generator().manual_seed(2)
CASES: dict[str, Case] = {
    "plain": case(),
    "several tokens": case(4),
    "sliding": case(sliding_window=15),
    "padded": case(padding=torch.rand(2, columns(1), generator=RANDOM) < 0.8),
    "masked": case(3, mask=torch.rand(2, 1, 3, columns(3), generator=RANDOM) < 0.8),
    "biased by head": case(mask=torch.randn(1, HEADS, 1, columns(1), generator=RANDOM)),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_over_what_is_laid_out(name: str) -> None:
    given = CASES[name]
    query, *store = given.arguments()[:10]
    expected = torch.ops.adakv.decode_attention_v2(*given.arguments())
    keys, values, visible = torch.ops.adakv.entries_v1(*store, given.mask, given.padding, given.sliding_window)
    found = F.scaled_dot_product_attention(query, keys, values, visible, scale=given.arguments()[-3], enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_store_grows() -> None:
    given = case(4)
    _, *store = given.arguments()[:10]
    tail_keys, cursor = store[6], store[8]
    before = int(cursor[0])
    torch.ops.adakv.entries_v1(*store, None, None, None)
    assert cursor.tolist()[:2] == [before + 4, 40]
    assert torch.equal(tail_keys[:, :, before : before + 4], given.key_new)


def test_more_than_one_head_is_refused() -> None:
    given = ragged_case([[4, 5], [6, 3]], prefix_length=40)
    _, *store = given.arguments()[:10]
    with pytest.raises(ValueError, match="entries: key_new"):
        torch.ops.adakv.entries_v1(*store, None, None, None)
