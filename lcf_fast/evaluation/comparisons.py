"""One channel against another on the questions that both were asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .failures import EvaluationError
from .predictions import MATCHED, Prediction, paired_scores
from .statistics import MARGIN, Equivalence, Interval, OneSided, equivalence, holm, one_sided, paired_interval

__all__ = ["Comparison", "compare", "default_pairs"]

#: This package's own channels.
OURS = ("lcf", "slots", "lcf_x")


@dataclass(frozen=True)
class Comparison:
    """The first channel's scores against the second's, question by question.

    Attributes:
        sets: whose questions; each question weighs the same.
        difference: first minus second, the mean and its paired bootstrap interval (95%).
        test: does the first score higher?
        p_adjusted: of the test, after Holm's correction for all comparisons of the call.
        equivalence: within the margin, both ways; None of a single question.
    """

    first: str
    second: str
    sets: tuple[str, ...]
    items: int
    difference: Interval
    test: OneSided
    p_adjusted: float
    equivalence: Equivalence | None

    @property
    def sentence(self) -> str:
        """The same in words."""
        value, low, high = (100 * x for x in (self.difference.value, self.difference.low, self.difference.high))
        text = (
            f"{self.first} minus {self.second} {value:+.1f} points ({low:+.1f} to {high:+.1f}) on {self.items:,} "
            f"questions; one-sided {self.test.name}, p = {self.p_adjusted:.2g}"
        )
        if self.equivalence is not None and self.equivalence.equivalent:
            text += f"; equivalent within {100 * self.equivalence.margin:.1f} points"
        return text


def default_pairs(channels: Iterable[str]) -> list[tuple[str, str]]:
    """What is tested unless something else is asked for, whatever the scores.

    Slots against LCF-X, each of this package's channels against every other method (`none` has the verdicts), and each
    other way to cut LCF-X's context (``lcf_x_...``) against the first.
    """
    names = list(dict.fromkeys(channels))
    cuts = [(name, "lcf_x") for name in names if name.startswith("lcf_x_") and "lcf_x" in names]
    mine = [name for name in OURS if name in names]
    others = [name for name in names if name != "none" and name not in OURS and (name, "lcf_x") not in cuts]
    among = [("slots", "lcf_x")] if {"slots", "lcf_x"} <= set(names) else []
    return among + [(ours, other) for ours in mine for other in others] + cuts


def compare(
    predictions: Iterable[Prediction],
    pairs: Sequence[tuple[str, str]],
    *,
    sets: Sequence[str] | None = None,
    margin: float = MARGIN,
    seed: int = 0,
) -> list[Comparison]:
    """Channels against each other, with the matching message.

    Args:
        pairs: ``(first, second)`` channels, chosen before the scores are seen: the test is one-sided.
        sets: over whose questions together; None: all that hold predictions of both channels.
        margin: of equivalence.
        seed: of the bootstrap.

    Raises:
        EvaluationError: a pair of one channel, no set with both, a channel that was not run on one of ``sets``, or not
            on the same questions.
    """
    rows = [prediction for prediction in predictions if prediction.control == MATCHED]
    run: dict[str, set[str]] = {}
    for row in rows:
        run.setdefault(row.set, set()).add(row.channel)
    made: list[tuple[str, str, tuple[str, ...], list[float], list[float]]] = []
    for first, second in pairs:
        if first == second:
            raise EvaluationError("pairs", expected="two channels", got=f"{first!r} twice")
        shared = tuple(sets) if sets is not None else tuple(name for name in run if {first, second} <= run[name])
        if not shared:
            raise EvaluationError("pairs", expected=f"a set that both {first!r} and {second!r} were run on", got="none")
        ours: list[float] = []
        theirs: list[float] = []
        for name in shared:
            one, two = paired_scores(rows, name, (first, MATCHED), (second, MATCHED))
            ours += one
            theirs += two
        made.append((first, second, shared, ours, theirs))
    tests = [one_sided(ours, theirs) for *_, ours, theirs in made]
    adjusted = holm([test.p_value for test in tests])
    return [
        Comparison(
            first,
            second,
            shared,
            len(ours),
            paired_interval(ours, theirs, seed=seed),
            test,
            p_adjusted,
            equivalence(ours, theirs, margin=margin) if len(ours) > 1 else None,
        )
        for (first, second, shared, ours, theirs), test, p_adjusted in zip(made, tests, adjusted)
    ]
