"""RULER's tasks: as long as asked for, answerable from the text alone, the same from the same seed."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from adakv_compile.evaluation import prompts, ruler, words
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.haystack import essay, insert
from adakv_compile.evaluation.metrics import METRICS
from adakv_compile.evaluation.ruler import counting, documents, niah
from adakv_compile.evaluation.sample import Sample
from tests.evaluation.texts import ChatTokenizer, Tokenizer


def one(task: str, length: int = 1500, seed: int = 0) -> Sample:
    return next(ruler.samples(task, Tokenizer(), length, 1, seed))


def needed(sample: Sample, tokenizer: object) -> int:
    return prompts.build(sample, tokenizer, "question-aware").tokens + sample.max_new_tokens


@pytest.mark.parametrize("task", ruler.GENERATED)
@pytest.mark.parametrize("length", [1024, 1500])
def test_a_text_is_as_long_as_asked_for_and_one_unit_more_would_be_too_long(task: str, length: int) -> None:
    tokenizer = Tokenizer()
    for sample in ruler.samples(task, tokenizer, length, 2, 3):
        assert needed(sample, tokenizer) <= length
        # The longest unit is a line of noise or a needle of two identifiers.
        assert needed(sample, tokenizer) > length - 45
        assert sample.labels["length"] == length
        assert sample.labels["tokens"] == needed(sample, tokenizer) - sample.max_new_tokens


def test_a_chat_template_and_another_tokenizer_count() -> None:
    for tokenizer in (ChatTokenizer(), Tokenizer(r".")):
        sample = next(ruler.samples("niah_single_2", tokenizer, 1200, 1, 0))
        assert 1150 < needed(sample, tokenizer) <= 1200


@pytest.mark.parametrize("task", ruler.GENERATED)
def test_answers_are_in_the_context_and_nowhere_else(task: str) -> None:
    sample = one(task)
    assert sample.answers
    assert len(set(sample.answers)) == len(sample.answers)
    for answer in sample.answers:
        assert answer in sample.context
        assert answer not in sample.question + sample.answer_prefix
    assert sample.metric in METRICS
    assert METRICS[sample.metric](" and ".join(sample.answers).upper(), sample.answers, ()) == 1.0
    assert METRICS[sample.metric]("nothing of it", sample.answers, ()) == 0.0


@pytest.mark.parametrize("task", ruler.GENERATED)
def test_the_same_seed_gives_the_same_samples_and_another_one_others(task: str) -> None:
    first = list(ruler.samples(task, Tokenizer(), 1024, 2, 5))
    assert list(ruler.samples(task, Tokenizer(), 1024, 2, 5)) == first
    assert next(ruler.samples(task, Tokenizer(), 1024, 1, 5)) == first[0]
    assert first[0].answers != first[1].answers
    assert next(ruler.samples(task, Tokenizer(), 1024, 1, 6)).answers != first[0].answers


@pytest.mark.parametrize("task", ruler.GENERATED)
def test_too_short_a_length_says_the_least_one(task: str) -> None:
    with pytest.raises(EvaluationError, match=r"choose a length of at least \d+$") as error:
        one(task, length=60)
    least = int(str(error.value).rpartition(" ")[2])
    tokenizer = Tokenizer()
    assert needed(one(task, length=least), tokenizer) == least
    with pytest.raises(EvaluationError):
        one(task, length=least - 1)


def test_an_unknown_task_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(EvaluationError, match=r"niah_single_1.*qa_2"):
        one("niah")


def test_the_tasks_are_those_of_the_paper() -> None:
    assert len(ruler.TASKS) == 13
    assert len(ruler.GENERATED) == 11
    assert {s.max_new_tokens for s in map(one, niah.SPECS)} == {128}
    assert [one(task).max_new_tokens for task in ("vt", "cwe", "fwe")] == [30, 120, 50]


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [("niah_single_1", 1, 1), ("niah_multikey_1", 4, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)],
)
def test_as_many_needles_as_the_task_says(task: str, needles: int, answers: int) -> None:
    sample = one(task)
    assert sample.context.count("One of the special magic") == needles
    assert len(sample.answers) == answers
    assert ("What are all" in sample.question) == (answers > 1)


def test_the_values_asked_for_belong_to_the_keys_asked_for() -> None:
    for task in niah.SPECS:
        sample = one(task)
        facts = re.findall(r"One of the special magic \w+ for (\S+) is: (.+?)\.(?=\s)", sample.context)
        asked = [value for key, value in facts if re.search(rf"\b{key}\b", sample.question)]
        assert sorted(asked) == sorted(sample.answers)


def test_a_haystack_of_needles_repeats_no_key_and_no_value() -> None:
    for task in ("niah_multikey_2", "niah_multikey_3"):
        facts = re.findall(r"for (\S+) is: (\S+)\.", one(task).context)
        assert len(facts) > 15
        assert len({key for key, _ in facts}) == len({value for _, value in facts}) == len(facts)


def test_the_depths_of_needles_reach_both_ends() -> None:
    found = [float(s.labels["depth"]) for s in ruler.samples("niah_single_2", Tokenizer(), 600, 40, 0)]
    assert min(found) < 10
    assert max(found) > 90


def test_a_chain_of_variables_leads_to_the_value() -> None:
    sample = one("vt")
    _, _, own = sample.context.rpartition("Memorize")
    assignments = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", own))
    for name in sample.answers:
        while name in assignments:
            name = assignments[name]
        assert name in sample.question
    assert len(assignments) == len(sample.answers) == 5
    # The example before it is solved, about other variables.
    assert sample.context.count("they are:") == 1


def test_common_words_are_the_ten_that_occur_most() -> None:
    for length, common, other in ((1500, 6, 1), (4200, 30, 3)):
        sample = one("cwe", length)
        _, _, listed = sample.context.rpartition("Memorize those.")
        counts = Counter(re.findall(r"\d+\. (\S+)", listed))
        assert {word for word, n in counts.items() if n == common} == set(sample.answers)
        assert {n for word, n in counts.items() if word not in sample.answers} == {other}


def test_no_counted_word_is_part_of_another() -> None:
    plain = sorted([*words.ADJECTIVES, *words.NOUNS, *words.THINGS], key=len)
    assert len(set(plain)) == len(plain)
    assert not [(a, b) for i, a in enumerate(plain) for b in plain[i + 1 :] if a in b]


def test_frequent_words_are_the_three_after_the_dots() -> None:
    for length in (400, 1500):
        sample = one("fwe", length)
        counts = Counter(sample.context.splitlines()[1].split())
        assert [word for word, _ in counts.most_common(4)] == ["...", *sample.answers]
        ranked = [n for _, n in counts.most_common(5)]
        assert sorted(set(ranked[:4]), reverse=True) == ranked[:4]
        assert ranked[3] > ranked[4]


def test_frequencies_fall_with_the_square_of_the_rank() -> None:
    # 1000 / (pi^2 / 6) = 607.9: divided by 1, 4, 9, 16 and rounded down.
    assert counting.zeta_counts(1000)[:4] == [607, 151, 67, 37]
    for total in range(counting.LEAST_CODED, 3000):
        top = counting.zeta_counts(total)[:5]
        assert sorted(set(top), reverse=True) == top


def test_a_longer_essay_begins_with_the_shorter_one() -> None:
    assert essay(random.Random(1), 30)[:10] == essay(random.Random(1), 10)
    assert insert(list("abcd"), ["x", "y"], [0.5, 1.0]) == ["a", "b", "x", "c", "d", "y"]


SQUAD = [
    {"question": "Who?", "context": "It was Ada.", "answers": {"text": ["Ada", "Ada"]}},
    {"question": "Why?", "context": "It was Ada.", "answers": {"text": []}},
    *({"question": "No", "context": f"Paragraph number {i}.", "answers": {"text": []}} for i in range(30)),
]
HOTPOT = [
    {
        "question": "Which?",
        "answer": "yes",
        "supporting_facts": {"title": ["B", "A", "B"]},
        "context": {"title": ["A", "B", "C"], "sentences": [["a1. ", "a2."], ["b."], ["c."]]},
    }
]


def test_questions_are_read_from_both_data_sets() -> None:
    questions, pool = documents.squad(SQUAD)
    assert questions == [documents.Question("Who?", ("Ada",), ("It was Ada.",))]
    assert len(pool) == 31
    questions, pool = documents.hotpot(HOTPOT)
    assert questions == [documents.Question("Which?", ("yes",), ("B\nb.", "A\na1. a2."))]
    assert pool == ["A\na1. a2.", "B\nb.", "C\nc."]


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    module = SimpleNamespace(load_dataset=lambda *_, **__: SQUAD)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(documents, "need", lambda _: None)
    return module


def test_the_paragraph_with_the_answer_is_among_the_others(fake_datasets: SimpleNamespace) -> None:
    del fake_datasets
    documents._load.cache_clear()
    sample = one("qa_1", length=700)
    documents._load.cache_clear()
    assert sample.context.count("It was Ada.") == 1
    assert sample.answers == ("Ada",)
    assert needed(sample, Tokenizer()) > 680
    assert METRICS[sample.metric]("ada, I think", sample.answers, ()) == 1.0


def test_missing_data_says_the_command_that_fetches_it(fake_datasets: SimpleNamespace) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    fake_datasets.load_dataset = offline
    with pytest.raises(EvaluationError, match=r"load_dataset\('hotpotqa/hotpot_qa', 'distractor'\)"):
        one("qa_2")
