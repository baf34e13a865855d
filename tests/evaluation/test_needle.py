"""The grid of the needle: lengths and depths are met, and answers can't be guessed."""

from __future__ import annotations

import re

import pytest

from adakv_compile.evaluation import needle, prompts
from adakv_compile.evaluation.errors import EvaluationError
from adakv_compile.evaluation.metrics import METRICS
from adakv_compile.evaluation.sample import Sample
from tests.evaluation.texts import ChatTokenizer, Tokenizer

FACT = re.compile(r"One of the special magic words for (\S+) is: ([a-z ]+)\.")


def cell(length: int, depth: float, kind: needle.Kind = "single", metric: needle.Metric = "string_match_all") -> Sample:
    return next(needle.samples(Tokenizer(), [length], [depth], 1, 0, kind, metric))


def needed(sample: Sample, tokenizer: object) -> int:
    return prompts.build(sample, tokenizer, "question-aware").tokens + sample.max_new_tokens


@pytest.mark.parametrize("tokenizer", [Tokenizer(), ChatTokenizer(), Tokenizer(r".")], ids=["words", "chat", "letters"])
@pytest.mark.parametrize("kind", needle.KINDS)
def test_lengths_are_met(tokenizer: Tokenizer, kind: needle.Kind) -> None:
    for sample in needle.samples(tokenizer, [900, 1300], [0, 50, 100], 1, 0, kind):
        length = int(sample.labels["length"])
        assert length - 90 < needed(sample, tokenizer) <= length
        assert sample.labels["tokens"] == needed(sample, tokenizer) - sample.max_new_tokens


@pytest.mark.parametrize("depth", [0, 10, 33, 50, 75, 100])
def test_depths_are_met_to_one_sentence(depth: float) -> None:
    tokenizer = Tokenizer()
    sample = cell(2000, depth)
    match = FACT.search(sample.context)
    assert match
    _, _, text = sample.context.partition("later.\n")
    before, after = text.split(match[0])
    counts = [len(tokenizer(part, add_special_tokens=False).input_ids) for part in (before, after)]
    found = 100 * counts[0] / sum(counts)
    assert found == pytest.approx(float(sample.labels["depth_found"]), abs=0.01)
    # No sentence is longer than 16 words of about 1,900.
    assert depth - 1 < found <= depth
    assert before.strip() == "" or before.rstrip().endswith(".")


def test_several_facts_are_spread_from_the_depth_to_the_end() -> None:
    sample = cell(2000, 40, "multi-query")
    places = [match.start() / len(sample.context) for match in FACT.finditer(sample.context)]
    assert places == pytest.approx([0.4, 0.6, 0.8, 1.0], abs=0.05)


@pytest.mark.parametrize(
    ("kind", "facts", "keys", "answers"),
    [("single", 1, 1, 1), ("multi-key", 4, 4, 1), ("multi-value", 4, 1, 4), ("multi-query", 4, 4, 4)],
)
def test_answers_are_what_the_text_says_of_the_keys_asked_for(
    kind: needle.Kind, facts: int, keys: int, answers: int
) -> None:
    sample = cell(1000, 30, kind)
    found = FACT.findall(sample.context)
    assert len(found) == facts
    assert len({key for key, _ in found}) == keys
    assert len(sample.answers) == answers
    assert sorted(sample.answers) == sorted(v for key, v in found if key in sample.question)
    assert not [answer for answer in sample.answers if answer in sample.question + sample.answer_prefix]
    # Three words, so that the first token, which a prompt gives before anything is evicted, is not the answer.
    assert all(len(answer.split()) == 3 for answer in sample.answers)


def test_an_answer_is_scored_as_a_whole_or_by_its_words() -> None:
    whole = cell(1000, 30, "multi-value")
    recall = cell(1000, 30, "multi-value", "keyword_recall")
    two = f"{whole.answers[0]} and {whole.answers[2]}"
    assert METRICS[whole.metric](two.upper(), whole.answers, ()) == 0.5
    assert METRICS[whole.metric](whole.answers[0].rpartition(" ")[0], whole.answers, ()) == 0.0
    exact = cell(1000, 30, "multi-value", "exact")
    assert recall.answers == exact.answers == (" ".join(whole.answers),)
    assert METRICS[exact.metric](exact.answers[0].upper(), exact.answers, ()) == 1.0
    assert METRICS[exact.metric](f"It is {exact.answers[0]}", exact.answers, ()) == 0.0
    wanted = set(recall.answers[0].split())
    assert METRICS[recall.metric](two, recall.answers, ()) == pytest.approx(
        len(set(two.split()) & wanted) / len(wanted)
    )


def test_a_grid_is_complete_and_the_same_from_the_same_seed() -> None:
    grid = list(needle.samples(Tokenizer(), [600, 800], [0, 50, 100], 2, 1))
    assert [(s.labels["length"], s.labels["depth"]) for s in grid[::2]] == [
        (length, depth) for length in (600, 800) for depth in (0, 50, 100)
    ]
    assert [sample.index for sample in grid] == list(range(12))
    assert len({sample.answers for sample in grid}) == 12
    assert list(needle.samples(Tokenizer(), [600, 800], [0, 50, 100], 2, 1)) == grid
    assert next(needle.samples(Tokenizer(), [800], [50], 1, 1)).context == grid[8].context
    assert next(needle.samples(Tokenizer(), [600], [0], 1, 2)).answers != grid[0].answers


def test_too_short_a_length_says_the_least_one() -> None:
    with pytest.raises(EvaluationError, match=r"choose a length of at least \d+$") as error:
        cell(60, 0)
    least = int(str(error.value).rpartition(" ")[2])
    assert needed(cell(least, 50), Tokenizer()) == least
    with pytest.raises(EvaluationError):
        cell(least - 1, 50)


@pytest.mark.parametrize("depth", [-1, 101])
def test_a_depth_that_is_no_percentage_is_an_error(depth: float) -> None:
    with pytest.raises(EvaluationError, match="from 0 to 100"):
        cell(800, depth)


def test_unknown_kinds_and_metrics_are_errors_that_name_the_known_ones() -> None:
    for kind, metric in (("double", "string_match_all"), ("single", "rouge")):
        with pytest.raises(EvaluationError, match=r"multi-query.*keyword_recall"):
            next(needle.samples(Tokenizer(), [800], [0], 1, 0, kind, metric))
