"""Decoders from outside of transformers: each is a right decoder, and each is compressed rightly or refused truly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo.checks import BUDGET, STEPS, WINDOW, Trial, count_graphs, identity, small_budget
from tests.zoo.foreign import FOREIGN
from tests.zoo.foreign.parts import LAYERS
from tests.zoo.subject import Subject, compressed, greedy

#: What happens to the attentions of a prompt: "compressed" or the name of a `Reason`, each once. True today, so that a
#: change either way is noticed.
STATUS: dict[str, str] = {
    "nano": "compressed",
    "blhd": "compressed",
    "einsum": "compressed",
    "meta": "compressed",
    "static": "compressed",
    "alibi": "compressed",
    "capped": "compressed",
    "sinks": "compressed",
    "packed": "compressed",
    "stacked": "compressed",
    "late_rotary": "compressed",
    "t5bias": "compressed",
    "differential": "SPELLED_OUT",
    "mha": "NO_CACHE",
    "cross": "CACHE_FORM compressed",
    "flex": "compressed",
    "flex_inside": "OPERATOR",
    "scaled_mask": "compressed",
    "value_first": "compressed",
    "grouped": "compressed",
    "merged": "compressed",
}
#: Where padding makes a difference.
STATUS_PADDED: dict[str, str] = {"capped": "MASK_UNPROVEN", "t5bias": "MASK_UNPROVEN"}
#: What the harness can't look into: attention inside one call of PyTorch.
OPAQUE = {"flex", "flex_inside"}

PADDED = [name for name, subject in FOREIGN.items() if subject.supports_padding]
CASES = [(name, padded) for name in FOREIGN for padded in (False, True) if not padded or name in PADDED]


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


def status(trial: Trial) -> str:
    """Return what happened to the prompt's attentions, in one word where it was the same for all."""
    found = {"compressed" if site.refusal is None else site.refusal.reason.name for site in trial.sites}
    found |= {graph.refusal.reason.name for graph in trial.prompt if graph.refusal is not None}
    return " ".join(sorted(found)) or "unseen"


def test_every_decoder_has_a_status() -> None:
    assert STATUS.keys() == FOREIGN.keys()
    assert STATUS_PADDED.keys() <= set(PADDED)


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_a_budget_longer_than_the_text_changes_no_token(name: str, padded: bool) -> None:
    assert identity(FOREIGN[name], padded) == []


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_a_small_budget_is_attention_without_the_evicted_entries(name: str, padded: bool) -> None:
    subject = FOREIGN[name]
    trial = small_budget(subject, padded, "snapkv" if padded else "ada-snapkv")
    expected = STATUS[name]
    assert status(trial) == (STATUS_PADDED.get(name, expected) if padded else expected)
    if name in OPAQUE:
        assert all(problem.startswith("(d) the model computes 0 attentions") for problem in trial.problems)
        assert trial.attentions == 0
        assert len(trial.sites) == (0 if expected == "CAPTURE" else LAYERS)
    else:
        assert trial.problems == []
    if status(trial) == "compressed":
        assert trial.stores == LAYERS
        assert len(trial.prompt) == 1


@pytest.mark.parametrize("name", FOREIGN)
def test_there_are_no_more_graphs_than_without_the_backend(name: str) -> None:
    subject = FOREIGN[name]
    trial = small_budget(subject, False)
    assert len(trial.prompt) + len(trial.steps) <= count_graphs(subject, False)


@torch.no_grad()
def decoded(subject: Subject) -> tuple[list[Tensor], list[list[int]]]:
    """Return the logits of a prompt and of steps after it at a small budget, and the positions that each head kept."""
    torch.compiler.reset()
    model, ids = subject.build(), prompt(subject, extra=STEPS)
    model.compile(
        backend="adakv", dynamic=True, options={"budget": BUDGET, "window": WINDOW, "inner": "eager", "strict": True}
    )
    logits, state = subject.run(model, ids[:, : subject.prompt], None, None)
    found = [logits]
    stores = compressed(state)
    heads = [(row, head) for row in range(2) for head in range(stores[0].store.offsets.shape[1] - 1)]
    kept = [view.positions(*at).tolist() for view in stores for at in heads]
    for t in range(subject.prompt, ids.shape[1]):
        logits, state = subject.run(model, ids[:, t : t + 1], state, None)
        found.append(logits)
    return found, kept


@pytest.mark.parametrize("name", ["value_first", "merged"])
def test_the_same_weights_in_another_order_are_the_same_decoder(name: str) -> None:
    # One of them is checked against what its attention computes, which for the others can't always be looked into.
    expected, expected_kept = decoded(FOREIGN["scaled_mask"])
    found, kept = decoded(FOREIGN[name])
    assert kept == expected_kept
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
