"""How sure the demo may be: intervals of accuracies, and whether content crossed at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ShapeError
from ..evaluation.statistics import Accuracy, accuracy, check_scipy, mcnemar
from ..evaluation.verdicts import ALPHA, NO_CONTENT, small_p

__all__ = ["ALPHA", "Accuracy", "Verdict", "accuracy", "check_scipy", "verdict"]


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


def verdict(matched: Sequence[bool], mismatched: Sequence[bool]) -> Verdict:
    """Of the same items' answers, with the matching message and with another item's."""
    if len(matched) != len(mismatched) or not matched:
        raise ShapeError("mismatched", expected=f"{len(matched)} answers (1 or more)", got=f"{len(mismatched)}")
    found = mcnemar(matched, mismatched)
    crossed = found.p_value < ALPHA
    shares = f"{sum(matched) / len(matched):.1%} with the matching message, {sum(mismatched) / len(matched):.1%} with"
    said = f"content crossed: {'yes' if crossed else NO_CONTENT}"
    sentence = f"{said} ({shares} another item's; exact McNemar, p {small_p(found.p_value)})"
    return Verdict(crossed, found.gained, found.lost, found.p_value, sentence)
