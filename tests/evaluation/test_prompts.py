"""What a model reads under each protocol: the question is never in what is compressed before it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from adakv_compile.errors import OptionsError
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.methods import Setting, parse_budgets, settings
from adakv_compile.evaluation.prompts import PROTOCOLS, build
from tests.evaluation.samples import RETRIEVER, fact

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['content'] | trim }} </s>{% endfor %}{% if add_generation_prompt %} see{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(RETRIEVER)


def text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids)


def test_question_aware_is_one_text(tokenizer: Any) -> None:
    prompt = build(fact(filler=4), tokenizer, "question-aware")
    assert text(tokenizer, prompt.compressed) == "the the remember alice amber canyon velvet . the the recall alice"
    assert prompt.question == ()


def test_question_agnostic_compresses_the_context_alone(tokenizer: Any) -> None:
    prompt = build(fact(filler=4), tokenizer, "question-agnostic")
    assert text(tokenizer, prompt.compressed) == "the the remember alice amber canyon velvet . the the"
    assert text(tokenizer, prompt.question) == "recall alice"


def test_both_protocols_show_the_model_the_same_tokens(tokenizer: Any) -> None:
    for template in (None, TEMPLATE):
        tokenizer.chat_template = template
        aware, agnostic = (build(fact(answer_prefix=" is"), tokenizer, protocol) for protocol in PROTOCOLS)
        assert aware.compressed == agnostic.compressed + agnostic.question
        assert (aware.sha256, aware.tokens) == (agnostic.sha256, agnostic.tokens)


def test_a_chat_template_goes_around_both_and_the_prefix_follows_it(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    prompt = build(fact(filler=2, answer_prefix=" is"), tokenizer, "question-agnostic")
    assert text(tokenizer, prompt.compressed) == "<s> the remember alice amber canyon velvet . the"
    assert text(tokenizer, prompt.question) == "recall alice </s> see is"


def test_a_sample_may_be_without_the_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    for protocol in PROTOCOLS:
        assert "<s>" not in text(tokenizer, build(fact(chat=False), tokenizer, protocol).compressed)


def test_a_joined_prompt_is_read_only_when_the_question_is_known(tokenizer: Any) -> None:
    sample = fact(joined="recall bruno")
    assert text(tokenizer, build(sample, tokenizer, "question-aware").compressed) == "recall bruno"
    assert text(tokenizer, build(sample, tokenizer, "question-agnostic").question) == "recall alice"


def test_other_prompts_have_other_hashes(tokenizer: Any) -> None:
    hashes = {build(fact(index), tokenizer, "question-aware").sha256 for index in range(3)}
    assert len(hashes) == 3
    assert all(len(digest) == 64 for digest in hashes)


def test_every_method_is_run_under_every_budget_and_the_full_cache_once() -> None:
    found = settings(("snapkv", "full", "ada-snapkv"), parse_budgets(("128", "0.1")), {"window": 8})
    pairs = [("full", None), ("snapkv", 128), ("ada-snapkv", 128), ("snapkv", 0.1), ("ada-snapkv", 0.1)]
    assert found == tuple(Setting(*pair) for pair in pairs)
    assert settings(("full",), (), {}) == (Setting("full", None),)


@pytest.mark.parametrize(
    ("methods", "budgets", "told"),
    [
        (("ada-snapvk",), (128,), "did you mean 'ada-snapkv'"),
        (("snapkv", "snapkv"), (128,), "method is given twice"),
        (("snapkv",), (128, 128), "budget is given twice"),
        (("snapkv",), (), "nothing to evaluate"),
        ((), (128,), "nothing to evaluate"),
    ],
)
def test_wrong_methods_are_refused(methods: tuple[str, ...], budgets: tuple[int, ...], told: str) -> None:
    with pytest.raises(EvaluationError, match=told):
        settings(methods, budgets, {})


def test_a_wrong_option_is_told_with_the_setting_it_is_wrong_for() -> None:
    with pytest.raises(OptionsError, match="snapkv 16: option 'budget' is 16 but the observation window of 32"):
        settings(("snapkv",), (16,), {})
    with pytest.raises(EvaluationError, match="--methods"):
        settings(("snapkv",), (128,), {"method": "full"})


@pytest.mark.parametrize("budget", ["lots", "True", "[1]", "", "None"])
def test_budgets_are_numbers(budget: str) -> None:
    with pytest.raises(EvaluationError, match="neither a number of entries nor a share"):
        parse_budgets([budget])
