"""Paired statistics of channels on the same questions: tests, intervals, equivalence, correction. Most are SciPy's.

Scores are of one question each, from 0 to 1: right or not, exact match, F1. ``first[i]`` and ``second[i]`` are of the
same question. SciPy is imported when something is computed; without it, BackendError.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import BackendError, ShapeError
from .bounded_mean import mean_no_less, upper_end
from .failures import EvaluationError
from .paired_binary import below_margin, score_interval

__all__ = [
    "Accuracy",
    "Equivalence",
    "Interval",
    "McNemar",
    "OneSided",
    "Wilcoxon",
    "accuracy",
    "check_scipy",
    "equivalence",
]
__all__ += ["holm", "is_binary", "mcnemar", "mean_interval", "one_sided", "paired_interval", "wilcoxon"]

#: Of a score: what a causal audit takes for no difference that matters, 2.8 points.
MARGIN = 0.028
RESAMPLES = 9_999
# Resampled values held at once: 2 million float64 are 16 MB.
_BATCH_VALUES = 2_000_000
#: Signed ranks are summed in all ways of up to as many items (0.1 s); of more, an eighth of p is the most that normal
#: ones are off at p = 0.001, where all differences are of one size, and a twentieth where they are of several.
EXACT_RANKS = 500


@dataclass(frozen=True)
class Accuracy:
    """Right answers of ``items``, and the 95% interval of their share (Wilson)."""

    right: int
    items: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Interval:
    """A mean, or a mean difference, between the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Items right in the first alone (``gained``), in the second alone (``lost``), and the exact one-sided p."""

    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class Wilcoxon:
    """Items with the higher score in the first (``gained``), in the second (``lost``), and the one-sided p."""

    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class OneSided:
    """McNemar or Wilcoxon, whichever the scores call for, by its ``name``; the rest as there."""

    name: str
    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests (TOST): whether the mean difference lies within the margin, both ways.

    Attributes:
        difference: first minus second, with the interval of confidence ``1 - 2 * alpha``.
        equivalent: p_value below alpha.
    """

    difference: Interval
    margin: float
    p_value: float
    equivalent: bool


def accuracy(right: Sequence[bool]) -> Accuracy:
    """Of one channel's answers, right or not."""
    if not len(right):
        raise ShapeError("right", expected="at least one answer", got="none")
    count = sum(map(bool, right))
    interval = _stats().binomtest(count, len(right)).proportion_ci(method="wilson")
    return Accuracy(count, len(right), count / len(right), float(interval.low), float(interval.high))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Exact: is the first right more often? p of as many gained items or more, were gained and lost as likely.

    Raises:
        ShapeError: not the same number of items, or none. EvaluationError: a score other than 0 and 1.
    """
    one, two = _pair(first, second)
    if not (is_binary(one) and is_binary(two)):
        expected = "answers that are right or not (of shares such as F1: wilcoxon)"
        raise EvaluationError("first, second", expected=expected, got="scores between 0 and 1")
    gained, lost = int((one > two).sum()), int((one < two).sum())
    p_value = _stats().binomtest(gained, gained + lost, alternative="greater").pvalue if gained + lost else 1.0
    return McNemar(gained, lost, float(p_value))


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> Wilcoxon:
    """The signed-rank test: does the first score higher? Items of equal scores are left out, as Wilcoxon did.

    Exact, differences of one size included, of up to `EXACT_RANKS` items that differ.

    Raises: as `paired_interval`.
    """
    one, two = _pair(first, second)
    # (0.3 - 0.2) and (0.4 - 0.3) are one rank, not two that rounding tells apart.
    differences = np.round(one - two, 12)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return Wilcoxon(gained, lost, _signed_ranks(differences[differences != 0]))


def one_sided(first: Sequence[float], second: Sequence[float]) -> OneSided:
    """Does the first score higher? Exact McNemar where every score is 0 or 1, Wilcoxon's signed ranks else.

    Raises: as `paired_interval`.
    """
    if is_binary(first) and is_binary(second):
        exact = mcnemar(first, second)
        return OneSided("exact McNemar", exact.gained, exact.lost, exact.p_value)
    ranks = wilcoxon(first, second)
    return OneSided("Wilcoxon", ranks.gained, ranks.lost, ranks.p_value)


def mean_interval(scores: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean score with its bootstrap interval (BCa, items drawn again).

    Where all scores are the same, every resample is, too, and knows no error: then the interval is all means at which
    the chance to see that is ``(1 - confidence) / 2`` or more. Of scores of 0 or 1 it is Clopper's and Pearson's.

    Raises:
        ShapeError: no score. EvaluationError: a score outside 0 to 1.
    """
    return _bootstrap(_scores("scores", scores), 0.0, confidence, seed)


def paired_interval(
    first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of first minus second with its paired bootstrap interval (BCa): items are drawn with both scores.

    Where all differences are the same: as `mean_interval`, of differences from -1 to 1.

    Raises:
        ShapeError: not the same number of items, or none. EvaluationError: a score outside 0 to 1.
    """
    one, two = _pair(first, second)
    return _bootstrap(one - two, -1.0, confidence, seed)


def equivalence(
    first: Sequence[float], second: Sequence[float], *, margin: float = MARGIN, alpha: float = 0.05
) -> Equivalence:
    """Paired TOST: p is the larger of those against a difference of ``margin`` and of ``-margin``.

    Where every score is 0 or 1 the tests are exact (`lcf_fast.evaluation.paired_binary`), and the interval is of the
    same score, taken for normal. Shares such as F1 are judged by what can be said of any numbers from 0 to 1
    (`lcf_fast.evaluation.bounded_mean`), the interval too: where few items differ, t tests find equivalence too easily.

    Raises:
        ShapeError: not the same number of items, or fewer than 2. EvaluationError: a score outside 0 to 1, a margin
            or an alpha outside 0 to 1.
    """
    one, two = _pair(first, second)
    if not 0 < margin < 1:
        raise EvaluationError("margin", expected="between 0 and 1 (0.028 is 2.8 points)", got=str(margin))
    if not 0 < alpha < 0.5:
        raise EvaluationError("alpha", expected="between 0 and 0.5", got=str(alpha))
    differences = one - two
    if len(differences) < 2:
        raise ShapeError("first", expected="2 items or more", got="1")
    mean = float(differences.mean())
    if is_binary(one) and is_binary(two):
        _stats()
        gained, lost, items = int((differences > 0).sum()), int((differences < 0).sum()), len(differences)
        p_value = max(below_margin(gained, lost, items, margin), below_margin(lost, gained, items, margin))
        interval = Interval(mean, *score_interval(gained, lost, items, 1 - 2 * alpha))
    else:
        _stats()
        p_value = max(mean_no_less(differences, margin), mean_no_less(-differences, margin))
        interval = Interval(mean, -upper_end(-differences, alpha), upper_end(differences, alpha))
    return Equivalence(interval, margin, p_value, p_value < alpha)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm's step-down), in their order.

    SciPy has corrections of the false discovery rate alone; statsmodels would come with pandas and patsy for these
    lines. Its tests hold them against the definition: closed testing with Bonferroni's test of every subset.

    Raises:
        EvaluationError: a p value outside 0 to 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise EvaluationError("p_values", expected="numbers from 0 to 1", got=str(list(p_values))[:80])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def is_binary(scores: Any) -> bool:
    """Whether every score is 0 or 1."""
    values = np.asarray(scores, dtype=np.float64)
    return bool(((values == 0) | (values == 1)).all())


def check_scipy() -> None:
    """Refuse before any work where nothing could be decided at its end."""
    _stats()


def _signed_ranks(differences: np.ndarray[Any, Any]) -> float:
    """p of as large a sum of the ranks above 0 or a larger one, were each of them above and below as likely.

    SciPy is exact without ties alone, and draws lots with them.
    """
    items = len(differences)
    if not items:
        return 1.0
    stats = _stats()
    if items > EXACT_RANKS:
        return float(stats.wilcoxon(differences, alternative="greater", method="asymptotic").pvalue)
    ranks = np.rint(2 * stats.rankdata(abs(differences))).astype(int)  # twice: items of one size share a half
    ways = np.zeros(ranks.sum() + 1)  # of each sum; 2^500 at most, which float64 holds
    ways[0], end = 1.0, 1
    for rank in np.sort(ranks):
        end += rank
        ways[rank:end] += ways[: end - rank]
    return float(np.ldexp(ways[ranks[differences > 0].sum() :].sum(), -items))


def _of_one_value(value: float, least: float, items: int, confidence: float) -> Interval:
    """Of the mean of numbers from ``least`` to 1, all ``items`` of which are ``value``.

    Among all items there may be so many others that these show none of them with a chance of ``(1 - confidence) / 2``;
    those are then as far off as they can be.
    """
    others = 1 - ((1 - confidence) / 2) ** (1 / items)
    return Interval(value, value - others * (value - least), value + others * (1 - value))


def _bootstrap(values: np.ndarray[Any, Any], least: float, confidence: float, seed: int) -> Interval:
    if not 0 < confidence < 1:
        raise EvaluationError("confidence", expected="between 0 and 1", got=str(confidence))
    mean = float(values.mean())
    if np.ptp(values) <= 1e-12:
        return _of_one_value(mean, least, len(values), confidence)
    stats = _stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, _BATCH_VALUES // len(values)),
            confidence_level=confidence,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    low, high = map(float, found.confidence_interval)
    if math.isnan(low) or math.isnan(high):  # BCa knows none for so few items: the percentiles
        low, high = map(float, np.quantile(found.bootstrap_distribution, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return Interval(mean, low, high)


def _pair(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    one, two = _scores("first", first), _scores("second", second)
    if len(one) != len(two):
        raise ShapeError("second", expected=f"{len(one)} scores, of the same items", got=str(len(two)))
    return one, two


def _scores(name: str, scores: Sequence[float]) -> np.ndarray[Any, Any]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ShapeError(name, expected="a sequence of one score or more", got=f"shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise EvaluationError(name, expected="scores from 0 to 1", got="others")
    return values


def _stats() -> Any:
    try:
        return import_module("scipy.stats")
    except ImportError:
        expected = "SciPy, which pip install 'lcf-fast[eval]' brings"
        raise BackendError("statistics", expected=expected, got="an environment without it") from None
