"""Exact match and F1 against values worked out by hand from the definitions of HotpotQA's script."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lcf_fast.errors import DTypeError
from lcf_fast.evaluation.extractive import AnswerScore, mean_score, normalized, score_answer
from lcf_fast.evaluation.failures import EvaluationError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  the   Eiffel\tTower.\n", "eiffel tower"),
        ("Chief of Protocol", "chief of protocol"),
        ("An apple a day", "apple day"),
        ("theatre, Anna, data", "theatre anna data"),  # articles are words of their own
        ("A.", ""),
        ("the-end", "theend"),  # punctuation goes before articles, and leaves no space
        ("well-known U.S. city's", "wellknown us citys"),
        ("3,677 seated", "3677 seated"),
        ("«the» café—bar", "« » café—bar"),  # only ASCII's punctuation goes
        ("a_b", "ab"),
        ("", ""),
        ("!?", ""),
    ],
)
def test_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the Eiffel Tower!", "Eiffel tower", AnswerScore(1, 1, 1, 1)),
        ("tower", "Eiffel Tower", AnswerScore(0, 2 / 3, 1, 1 / 2)),
        ("Paris, the capital of France", "Paris", AnswerScore(0, 2 / 5, 1 / 4, 1)),
        ("Rome", "Paris", AnswerScore(0, 0, 0, 0)),
        ("new new york", "New York new", AnswerScore(0, 1, 1, 1)),  # a bag of words: the order is exact match's
        ("york york york", "york york", AnswerScore(0, 4 / 5, 2 / 3, 1)),  # words count as often as they occur
        ("yes", "Yes.", AnswerScore(1, 1, 1, 1)),
        ("yes it is", "yes", AnswerScore(0, 0, 0, 0)),
        ("no", "no one", AnswerScore(0, 0, 0, 0)),
        ("noanswer", "noanswer given", AnswerScore(0, 0, 0, 0)),
        ("yes it is", "yes it was", AnswerScore(0, 2 / 3, 2 / 3, 2 / 3)),  # not the whole answer: words as others
        ("", "Paris", AnswerScore(0, 0, 0, 0)),
        ("the", "a", AnswerScore(1, 0, 0, 0)),  # as the script has it: equal, and no word in common
    ],
)
def test_scores(prediction: str, answer: str, expected: AnswerScore) -> None:
    found = score_answer(prediction, answer)
    assert found.exact == expected.exact
    assert (found.f1, found.precision, found.recall) == pytest.approx(
        (expected.f1, expected.precision, expected.recall)
    )


WORDS = st.lists(st.sampled_from(["the", "yes", "no", "Rome", "rome.", "x", "y-z", "a"]), max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_both_ways_precision_is_recall(one: str, two: str) -> None:
    ahead, back = score_answer(one, two), score_answer(two, one)
    assert (ahead.exact, ahead.precision, ahead.recall) == (back.exact, back.recall, back.precision)
    assert ahead.f1 == pytest.approx(back.f1)
    assert min(ahead.precision, ahead.recall) <= ahead.f1 + 1e-12 <= max(ahead.precision, ahead.recall) + 2e-12
    assert normalized(normalized(one)) == normalized(one)
    if ahead.exact and normalized(one):
        assert ahead.f1 == 1


def test_means_and_refusals() -> None:
    scores = [AnswerScore(1, 1, 1, 1), AnswerScore(0, 0.5, 0.25, 0.75)]
    assert mean_score(scores) == AnswerScore(0.5, 0.75, 0.625, 0.875)
    with pytest.raises(EvaluationError):
        mean_score([])
    with pytest.raises(DTypeError):
        score_answer(3, "three")  # type: ignore[arg-type]
