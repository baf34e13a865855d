"""Every metric against cases computed by hand, with each quirk of the original code."""

from __future__ import annotations

import sys

import pytest

from adakv_compile.evaluation.longbench import DATASETS
from adakv_compile.evaluation.metrics import METRICS, dataset_score, normalised


def score(metric: str, prediction: str, *answers: str, classes: tuple[str, ...] = ()) -> float:
    return METRICS[metric](prediction, answers, classes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat,  a dog\nand AN owl!", "cat dog and owl"),
        ("theatre another", "theatre another"),
        ("u.s.a", "usa"),
        ("t-h-e end", "end"),
        ("a", ""),
    ],
)
def test_normalising_lowers_then_drops_punctuation_then_articles_then_spaces(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_f1_is_of_multisets_of_words() -> None:
    # Two of three words of the prediction, two of four of the answer.
    assert score("qa_f1", "red red blue", "red red green green") == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )
    assert score("qa_f1", "red", "red red") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert score("qa_f1", "The  Eiffel tower.", "eiffel Tower") == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"), [("blue", "red"), ("", "red"), ("red", ""), ("the", "the"), ("", "")]
)
def test_f1_without_a_common_word_is_zero_even_between_equal_texts(prediction: str, answer: str) -> None:
    assert score("qa_f1", prediction, answer) == 0.0


def test_the_best_reference_counts() -> None:
    assert score("qa_f1", "blue", "red", "blue", "blue green") == 1.0
    assert score("qa_f1", "blue") == 0.0


def test_rouge_l_is_the_f_of_the_union_of_longest_common_subsequences() -> None:
    pytest.importorskip("rouge")
    # "the cat" of three words each.
    assert score("rouge_l", "the cat sat", "the cat ran") == pytest.approx(2 / 3, abs=1e-6)
    # Precision 1, recall 2 / 4.
    assert score("rouge_l", "one three", "one two three four") == pytest.approx(2 * 0.5 / 1.5, abs=1e-6)


def test_rouge_l_counts_every_distinct_word_once() -> None:
    pytest.importorskip("rouge")
    # Ten times the same word has one distinct word, all of it common.
    assert score("rouge_l", "go " * 10, "go") == pytest.approx(1.0, abs=1e-6)


def test_rouge_l_splits_sentences_at_full_stops_only() -> None:
    pytest.importorskip("rouge")
    # By sentences "a b" and "c d" are found in either order; as one sentence, two of four words are.
    assert score("rouge_l", "c d.a b", "a b.c d") == pytest.approx(1.0, abs=1e-6)
    assert score("rouge_l", "c d a b", "a b c d") == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("prediction", ["", ".", "...", "\n", " "])
def test_rouge_l_of_nothing_is_zero(prediction: str) -> None:
    pytest.importorskip("rouge")
    assert score("rouge_l", prediction, "a summary") == 0.0
    assert score("rouge_l", "a summary", prediction) == 0.0


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_rouge_l_of_a_sentence_beyond_pythons_recursion_limit_is_zero_whatever_it_was_raised_to(limit: int) -> None:
    pytest.importorskip("rouge")
    endless = " ".join(map(str, range(1200)))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        assert score("rouge_l", endless, endless) == 0.0
        assert sys.getrecursionlimit() == limit
    finally:
        sys.setrecursionlimit(before)


def test_classification_is_shared_among_the_classes_named() -> None:
    classes = ("Date", "City", "Reason")
    assert score("classification", "City", "City", classes=classes) == 1.0
    assert score("classification", "City or Date", "City", classes=classes) == 0.5
    assert score("classification", "Date", "City", classes=classes) == 0.0
    assert score("classification", "city", "City", classes=classes) == 0.0


def test_classes_within_the_answers_name_do_not_count() -> None:
    assert score("classification", "Other number", "Other number", classes=("number", "Other number")) == 1.0


def test_the_class_after_a_removed_one_is_passed_over() -> None:
    # "Other" is removed, so "number", now in its place, is passed over and stays: half instead of one.
    classes = ("Other", "number", "Other number")
    assert score("classification", "Other number", "Other number", classes=classes) == 0.5


def test_few_shot_metrics_read_the_first_line() -> None:
    assert score("classification_first_line", "\n\nCity\nDate", "City", classes=("City", "Date")) == 1.0
    assert score("classification", "\n\nCity\nDate", "City", classes=("City", "Date")) == 0.5
    assert score("qa_f1_first_line", "\nblue\nred", "red") == 0.0
    # Only line breaks are dropped before the first line: one of spaces is the first line.
    assert score("qa_f1_first_line", " \nblue", "blue") == 0.0
    assert score("qa_f1_first_line", "blue\nand more words", "blue") == 1.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("7", 1.0), ("7 or 8", 0.5), ("7, 7 and 8", 2 / 3), ("07", 0.0), ("17", 0.0), ("seven", 0.0)],
)
def test_count_is_the_share_of_numbers_that_are_right(prediction: str, expected: float) -> None:
    assert score("count", prediction, "7") == pytest.approx(expected)


def test_retrieval_compares_any_number_with_the_paragraphs() -> None:
    assert score("retrieval", "Paragraph 12", "Paragraph 12") == 1.0
    assert score("retrieval", "12", "Paragraph 12") == 1.0
    assert score("retrieval", "Paragraph 12 or Paragraph 1", "Paragraph 12") == 0.5
    assert score("retrieval", "Paragraph 1", "Paragraph 12") == 0.0
    assert score("retrieval", "none", "Paragraph 12") == 0.0


def test_retrieval_refuses_a_reference_without_a_paragraph() -> None:
    with pytest.raises(ValueError, match="names no paragraph"):
        score("retrieval", "12", "twelve")


def test_code_similarity_takes_the_first_line_that_is_neither_comment_nor_fence() -> None:
    pytest.importorskip("rapidfuzz")
    answer = "x = 1"
    for before in ("", "\n\n", "```python\n", "# a comment\n", "// a comment\n", "y = 2  # why\n", "a // b\n"):
        assert score("code_similarity", f"{before}x = 1\ny = 2", answer) == 1.0
    assert score("code_similarity", "# only a comment", answer) == 0.0
    # A line of nothing is a line, too, unless it comes first.
    assert score("code_similarity", "# why\n\nx = 1", answer) == 0.0


def test_code_similarity_is_rounded_to_whole_per_cent() -> None:
    pytest.importorskip("rapidfuzz")
    # Four of the five letters of "abcde", and all of "abcd": 2 * 4 / 9 = 0.888...
    assert score("code_similarity", "abcd", "abcde") == 0.89


def test_string_match_is_case_insensitive_and_within_words() -> None:
    assert score("string_match_all", "It is 123 and ABC.", "123", "abc", "xyz", "45") == 0.5
    assert score("string_match_all", "12345", "234") == 1.0
    assert score("string_match_part", "It is 123.", "xyz", "123") == 1.0
    assert score("string_match_part", "nothing", "xyz", "123") == 0.0


def test_string_match_makes_control_characters_line_breaks() -> None:
    assert score("string_match_all", "12\x0034", "1234") == 0.0
    assert score("string_match_all", "a\tb", "a\nb") == 1.0


def test_exact_ignores_case_and_white_space_only() -> None:
    assert score("exact", " Amber  canyon\n", "amber canyon") == 1.0
    assert score("exact", "amber canyon.", "amber canyon") == 0.0
    assert score("exact", "amber", "amber canyon") == 0.0


def test_keyword_recall_counts_distinct_words_of_the_answer() -> None:
    assert score("keyword_recall", "Eat a sandwich!", "eat the sandwich in the park") == 0.5
    assert score("keyword_recall", "x", "the") == 0.0


def test_dataset_score_is_the_mean_in_per_cent_rounded() -> None:
    assert dataset_score([1.0, 0.0, 0.0]) == 33.33
    assert dataset_score([0.5]) == 50.0


def test_every_data_set_has_a_metric() -> None:
    assert {facts.metric for facts in DATASETS.values()} <= set(METRICS)
