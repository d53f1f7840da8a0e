"""How sure the demo may be: intervals of accuracies, and whether content crossed at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import BackendError, ShapeError

__all__ = ["Accuracy", "Verdict", "accuracy", "check_scipy", "verdict"]

#: A difference that chance alone makes more often than this is not shown.
ALPHA = 0.001


@dataclass(frozen=True)
class Accuracy:
    """Right answers of ``items``, and the 95% interval of their share (Wilson)."""

    right: int
    items: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """Whether the answers depend on what the message says.

    Attributes:
        crossed: the matching message gives more right answers than another item's, by more than chance explains.
        gained, lost: items right with the matching message alone, and with the other item's alone.
        p_value: of the one-sided exact McNemar test on those.
        sentence: the same in words.
    """

    crossed: bool
    gained: int
    lost: int
    p_value: float
    sentence: str


def accuracy(right: Sequence[bool]) -> Accuracy:
    """Of one channel's answers, right or not."""
    if not right:
        raise ShapeError("right", expected="at least one answer", got="none")
    count = sum(right)
    interval = _scipy_stats().binomtest(count, len(right)).proportion_ci(method="wilson")
    return Accuracy(count, len(right), count / len(right), float(interval.low), float(interval.high))


def verdict(matched: Sequence[bool], mismatched: Sequence[bool]) -> Verdict:
    """Of the same items' answers, with the matching message and with another item's."""
    if len(matched) != len(mismatched) or not matched:
        raise ShapeError("mismatched", expected=f"{len(matched)} answers (1 or more)", got=f"{len(mismatched)}")
    gained = sum(a and not b for a, b in zip(matched, mismatched))
    lost = sum(b and not a for a, b in zip(matched, mismatched))
    p_value = 1.0
    if gained + lost:
        p_value = float(_scipy_stats().binomtest(gained, gained + lost, alternative="greater").pvalue)
    crossed = p_value < ALPHA
    shares = f"{sum(matched) / len(matched):.1%} with the matching message, {sum(mismatched) / len(matched):.1%} with"
    said = "content crossed: yes" if crossed else "content crossed: no content shown"
    return Verdict(
        crossed, gained, lost, p_value, f"{said} ({shares} another item's; exact McNemar, p {_small(p_value)})"
    )


def check_scipy() -> None:
    """Refuse before any work where nothing could be decided at its end."""
    _scipy_stats()


def _small(p_value: float) -> str:
    return f"= {p_value:.2g}" if p_value >= 1e-12 else "< 1e-12"


def _scipy_stats() -> Any:
    try:
        return import_module("scipy.stats")
    except ImportError:
        expected = "SciPy, which pip install 'lcf-fast[plot]' brings"
        raise BackendError("statistics", expected=expected, got="an environment without it") from None
