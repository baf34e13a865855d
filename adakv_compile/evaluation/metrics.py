"""How a prediction is scored against its references; the quirks of the original code are kept, and stated.

LongBench's metrics are those of THUDM/LongBench (metrics.py and eval.py, MIT), RULER's those of NVIDIA/RULER
(scripts/eval/synthetic/constants.py, Apache-2.0). They are written anew from their definitions.
"""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["METRICS", "Metric", "dataset_score", "normalised"]

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
"""``(prediction, answers, classes) -> score`` in [0, 1]."""

_ONE = Callable[[str, str, Sequence[str]], float]
_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = frozenset(string.punctuation)
_NUMBER: Final = re.compile(r"\d+")
_PARAGRAPH: Final = re.compile(r"Paragraph (\d+)")
_PLAIN_RECURSION: Final = 1000
_CONTROL: Final = re.compile(r"[\x00-\x1f]")


def dataset_score(scores: Sequence[float]) -> float:
    """Return the score of a data set: 100 times the mean, rounded to two decimals.

    Args:
        scores: Scores of its rows, at least one.
    """
    return round(100 * sum(scores) / len(scores), 2)


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, then without articles, then with single spaces.

    The order matters: "U.S.A" loses its dots before "a" could stand alone, "t-h-e" becomes an article and goes.
    """
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _qa_f1(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Return the F1 of the two multisets of words."""
    ours, theirs = normalised(prediction).split(), normalised(answer).split()
    same = (Counter(ours) & Counter(theirs)).total()
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


@contextmanager
def _recursion_limit(limit: int) -> Generator[None]:
    """Let Python recurse as deep as it does by itself: compilers raise the limit, which must not change a score."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _rouge_l(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Return the F of ROUGE-L as the package ``rouge`` has it.

    It splits sentences at full stops, counts the union of longest common subsequences, every distinct word once. What
    it can't score is 0, as in the original: empty texts, and sentences so long that its recursion ends.
    """
    from adakv_compile.evaluation.errors import need

    need("rouge")
    from rouge import Rouge  # pyright: ignore[reportMissingTypeStubs]

    try:
        with _recursion_limit(_PLAIN_RECURSION):
            scores: Any = Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)
    except (ValueError, RecursionError, ZeroDivisionError):
        return 0.0
    return float(scores["rouge-l"]["f"])


def _classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes that the prediction names, if the answer is among them.

    Classes that are a part of the answer's name shall not count. The original removes them from the list that it is
    going through, so that the class after each removed one is passed over and may stay; kept, for equal figures.
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def _share_of_numbers(prediction: str, number: str) -> float:
    numbers = _NUMBER.findall(prediction)
    return sum(found == number for found in numbers) / len(numbers) if numbers else 0.0


def _count(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Return the share of all numbers in the prediction that are the answer; compared as texts, so 07 is not 7."""
    return _share_of_numbers(prediction, answer)


def _retrieval(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Return the share of all numbers in the prediction that are the number of the answer's paragraph."""
    found = _PARAGRAPH.search(answer)
    if found is None:
        raise ValueError(f"the reference {answer!r} names no paragraph")
    return _share_of_numbers(prediction, found[1])


def _code_similarity(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Return the similarity of the first line that is no comment or fence to the answer.

    ``fuzz.ratio`` of fuzzywuzzy with python-Levenshtein: rounded to a whole per cent, 0 if one text is empty. RapidFuzz
    computes the same ratio and doesn't round; with fuzzywuzzy's other backend, difflib, figures may differ by a point.
    """
    from adakv_compile.evaluation.errors import need

    need("rapidfuzz")
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(code, answer)) / 100


def _found(prediction: str, answers: Sequence[str]) -> list[bool]:
    text = _CONTROL.sub("\n", prediction.strip()).lower()
    return [answer.lower() in text for answer in answers]


def _string_match_all(prediction: str, answers: Sequence[str], _: Sequence[str]) -> float:
    """Return the share of references that the prediction holds, in any case (RULER)."""
    found = _found(prediction, answers)
    return sum(found) / len(found)


def _string_match_part(prediction: str, answers: Sequence[str], _: Sequence[str]) -> float:
    """Return 1 if the prediction holds one of the references, in any case (RULER's questions)."""
    return float(any(_found(prediction, answers)))


def _exact(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Return 1 if both are the same but for case and white space."""
    return float(prediction.lower().split() == answer.lower().split())


def _keyword_recall(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Return the share of the answer's distinct words that the prediction holds, articles and punctuation aside."""
    wanted = set(normalised(answer).split())
    return len(wanted & set(normalised(prediction).split())) / len(wanted) if wanted else 0.0


def _best(one: _ONE) -> Metric:
    """Score against each reference and take the best."""

    def score(prediction: str, answers: Sequence[str], classes: Sequence[str]) -> float:
        return max((one(prediction, answer, classes) for answer in answers), default=0.0)

    return score


def _of_first_line(metric: Metric) -> Metric:
    """Score the first line only, empty lines before it aside (LongBench's few-shot data sets)."""

    def score(prediction: str, answers: Sequence[str], classes: Sequence[str]) -> float:
        return metric(prediction.lstrip("\n").split("\n")[0], answers, classes)

    return score


METRICS: Final[Mapping[str, Metric]] = {
    "qa_f1": _best(_qa_f1),
    "qa_f1_first_line": _of_first_line(_best(_qa_f1)),
    "rouge_l": _best(_rouge_l),
    "rouge_l_first_line": _of_first_line(_best(_rouge_l)),
    "classification": _best(_classification),
    "classification_first_line": _of_first_line(_best(_classification)),
    "count": _best(_count),
    "retrieval": _best(_retrieval),
    "code_similarity": _best(_code_similarity),
    "string_match_all": _string_match_all,
    "string_match_part": _string_match_part,
    "exact": _best(_exact),
    "keyword_recall": _best(_keyword_recall),
}
"""All metrics by name."""
