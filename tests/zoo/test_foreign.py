"""Decoders from outside of transformers: each is a right decoder, and each is compressed rightly or refused truly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo.foreign import FOREIGN
from tests.zoo.subject import Subject, greedy

PADDED = [name for name, subject in FOREIGN.items() if subject.supports_padding]


def prompt(subject: Subject, extra: int = 0) -> Tensor:
    """Return ordinary tokens for two rows, always the same."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(2, subject.vocab, (2, subject.prompt + extra), generator=generator)


@torch.no_grad()
def fed(subject: Subject, ids: Tensor, mask: Tensor | None, *cuts: int) -> Tensor:
    """Return the logits ``[B, T, V]`` of ``ids`` fed in pieces that end at ``cuts`` and at the end."""
    model, state, found, begin = subject.build(), None, list[Tensor](), 0
    for end in (*cuts, ids.shape[1]):
        logits, state = subject.run(model, ids[:, begin:end], state, None if mask is None else mask[:, :end])
        found.append(logits)
        begin = end
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", FOREIGN)
def test_steps_with_the_cache_equal_the_whole_sequence_at_once(name: str) -> None:
    subject = FOREIGN[name]
    ids, p = prompt(subject, extra=9), subject.prompt
    whole = fed(subject, ids, None)
    # One by one, and several tokens at once behind a cache.
    steps = fed(subject, ids, None, p, p + 1, p + 2, p + 6, p + 7, p + 8)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FOREIGN)
def test_no_token_sees_a_later_one_and_every_token_sees_the_first(name: str) -> None:
    subject = FOREIGN[name]
    ids = prompt(subject)
    late, early = ids.clone(), ids.clone()
    late[:, 30:] = (late[:, 30:] + 1) % subject.vocab
    early[:, 0] = (early[:, 0] + 1) % subject.vocab
    whole = fed(subject, ids, None)
    torch.testing.assert_close(fed(subject, late, None)[:, :30], whole[:, :30], rtol=1e-4, atol=1e-4)
    changed = (fed(subject, early, None) - whole).abs().amax(-1)
    assert (changed > 1e-6).all()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_second_conversation_does_not_remember_the_first(name: str) -> None:
    subject = FOREIGN[name]
    model, ids = subject.build(), prompt(subject)
    first = greedy(subject, model, ids, None, 3)
    greedy(subject, model, ids.flip(1), None, 3)
    assert torch.equal(greedy(subject, model, ids, None, 3), first)


@pytest.mark.parametrize("name", PADDED)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    subject, pad = FOREIGN[name], 5
    ids, p = prompt(subject, extra=3), subject.prompt
    alone: Any = fed(subject, ids[1:, pad:], None, p - pad)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    ids = ids.masked_fill(mask == 0, 0)
    together = fed(subject, ids, mask, p, p + 1, p + 2)
    torch.testing.assert_close(together[1:, pad:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[:1], fed(subject, ids[:1], mask[:1], p), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(FOREIGN) - set(PADDED)))
def test_a_decoder_without_padding_says_so(name: str) -> None:
    subject = FOREIGN[name]
    ids = prompt(subject)
    with pytest.raises(AssertionError):
        subject.run(subject.build(), ids, None, torch.ones_like(ids))
