"""Exact match and token F1 of short answers, as HotpotQA's official script (hotpot_evaluate_v1.py) defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DTypeError
from .failures import EvaluationError

__all__ = ["WHOLE", "AnswerScore", "mean_score", "normalized", "score_answer"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's alone
#: Answers that are right or wrong as a whole: sharing a token with one of them is worth nothing.
WHOLE = frozenset({"yes", "no", "noanswer"})


@dataclass(frozen=True)
class AnswerScore:
    """Of one answer 0 or 1 (exact) and shares from 0 to 1; of several, means."""

    exact: float
    f1: float
    precision: float
    recall: float


def normalized(text: str) -> str:
    """Lower case, without punctuation, then without the articles a, an and the, words apart by one space each.

    Punctuation goes first and leaves no space: "well-known" is one word, and the article of "the-end" stays in it.
    """
    if not isinstance(text, str):
        raise DTypeError("text", expected="a str", got=type(text).__name__)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score_answer(prediction: str, answer: str) -> AnswerScore:
    """One prediction against the answer. Two texts without a word are an exact match with F1 0, as in the script."""
    said, right = normalized(prediction), normalized(answer)
    exact = float(said == right)
    none = AnswerScore(exact, 0.0, 0.0, 0.0)
    if said != right and (said in WHOLE or right in WHOLE):
        return none
    said_words, right_words = said.split(), right.split()
    same = sum((Counter(said_words) & Counter(right_words)).values())
    if same == 0:
        return none
    precision, recall = same / len(said_words), same / len(right_words)
    return AnswerScore(exact, 2 * precision * recall / (precision + recall), precision, recall)


def mean_score(scores: Sequence[AnswerScore]) -> AnswerScore:
    """The mean of each measure; EvaluationError without a score."""
    if not scores:
        raise EvaluationError("scores", expected="at least one", got="none")
    count = len(scores)
    return AnswerScore(
        sum(score.exact for score in scores) / count,
        sum(score.f1 for score in scores) / count,
        sum(score.precision for score in scores) / count,
        sum(score.recall for score in scores) / count,
    )
