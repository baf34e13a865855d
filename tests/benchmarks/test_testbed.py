"""The test bed's tokenizer and training documents: nothing is lost, and nothing of the evaluation is trained on."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from adakv_compile.evaluation import needle, ruler, words
from benchmarks.testbed import evaluate, model
from benchmarks.testbed import tokenizer as pieces
from benchmarks.testbed.corpus import Corpus, held_out
from benchmarks.testbed.train import STAGES


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pieces.build(2048)


def test_every_generated_prompt_decodes_to_what_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 1500
    for task in ruler.GENERATED:
        sample = next(ruler.samples(task, tokenizer, 800, 1, 1))
        text = " ".join((sample.context + sample.question + sample.answer_prefix).split())
        ids = tokenizer.encode(text)
        assert pieces.UNKNOWN not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("text", "tokens"), [("1234567", 4), ("modest-oak", 2), ("is:", 1), ("1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed", 20)]
)
def test_a_key_or_a_value_is_a_few_tokens(tokenizer: PreTrainedTokenizerFast, text: str, tokens: int) -> None:
    assert len(tokenizer.encode(text, add_special_tokens=False)) == tokens


@pytest.mark.parametrize("length", [stage.length for stage in STAGES])
def test_documents_ask_for_what_they_hold(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    ids, answers = Corpus(tokenizer, 3).batch(length, 30)
    assert ids.shape == answers.shape == (30, length)
    complete = 0
    for row, mask in zip(ids, answers, strict=True):
        text = tokenizer.decode(row[row > pieces.UNKNOWN])
        known = set(re.findall(r"One of the special magic \w+ for (\S+ is: [\w -]+)\.", text))
        said = tokenizer.decode(row[mask])
        # An answer that the end of the document cuts off has no end-of-text token.
        for told in said.split("</s>")[: said.count("</s>")]:
            facts = re.findall(r"(\S+ is: [\w -]+)\.", told)
            assert facts
            assert set(facts) <= known
            complete += 1
    assert complete >= 25


def test_keys_that_are_held_out_never_occur_and_are_a_fifth_of_all(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, _ = Corpus(tokenizer, 4).batch(512, 40)
    text = " ".join(tokenizer.decode(row) for row in ids)
    found = set(re.findall(r"for ([a-z]+-[a-z]+) is:", text))
    assert len(found) > 100
    assert not [key for key in found if held_out(key)]
    drawn = words.keys(random.Random(0), 2000)
    assert np.mean([held_out(key) for key in drawn]) == pytest.approx(0.2, abs=0.03)


def test_no_key_is_told_twice_and_those_of_many_documents_share_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, _ = Corpus(tokenizer, 9).batch(512, 60)
    several = alike = needles = 0
    for row in ids:
        facts = set(re.findall(r"for (\S+) is: ([\w -]+)\.", tokenizer.decode(row).partition("What ")[0]))
        by_key = {key for key, _ in facts}
        # More keys than are ever hidden: a haystack of needles, where a key has one value. Elsewhere four are meant.
        if len(by_key) > 16:
            needles += 1
            assert len(facts) == len(by_key)
        named = [key.split("-") for key in by_key if key.count("-") == 1]
        if len(named) >= 4:
            several += 1
            alike += any(len({name[part] for name in named}) <= 3 for part in (0, 1))
    assert needles >= 5
    assert several >= 20
    assert several / 4 <= alike <= several * 3 / 4


def test_a_seed_fixes_the_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    first, _ = Corpus(tokenizer, 5).batch(256, 4)
    again, _ = Corpus(tokenizer, 5).batch(256, 4)
    other, _ = Corpus(tokenizer, 6).batch(256, 4)
    assert (first == again).all()
    assert not (first == other).all()


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_weights_belong_to_the_generators_of_today(tokenizer: PreTrainedTokenizerFast, seed: str) -> None:
    kept = AutoTokenizer.from_pretrained(model.WEIGHTS / seed)
    assert kept.get_vocab() == tokenizer.get_vocab()
    network = AutoModelForCausalLM.from_pretrained(model.WEIGHTS / seed).eval()
    samples = list(needle.samples(kept, [512], [0, 50, 100], 1, 7))
    assert evaluate.score(network, kept, "needle", 512, samples).mean == 1.0


def test_a_keys_values_are_told_from_the_end_of_the_text_on(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, answers = Corpus(tokenizer, 8).batch(512, 60)
    told = 0
    for row, mask in zip(ids, answers, strict=True):
        text, said = tokenizer.decode(row[~mask]), tokenizer.decode(row[mask])
        for answer in said.split("</s>")[: said.count("</s>")]:
            facts = [fact.strip() for fact in answer.removesuffix(".").split(".") if fact.strip()]
            by_key: dict[str, list[int]] = {}
            for fact in facts:
                by_key.setdefault(fact.split(" is: ")[0], []).append(text.index(f"for {fact}."))
            for places in by_key.values():
                assert places == sorted(places, reverse=True)
                told += len(places) > 1
    assert told >= 5
