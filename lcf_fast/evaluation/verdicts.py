"""Whether content crossed: what a channel's matching message does that another item's message does not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..counting import counted
from .failures import EvaluationError
from .statistics import Interval, holm, one_sided, paired_interval

__all__ = ["ALPHA", "NO_CONTENT", "Scores", "Verdict", "small_p", "verdict", "verdicts"]

#: A difference that chance alone makes more often than this is not shown.
ALPHA = 0.001
NO_CONTENT = "no content shown"

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Scores:
    """One channel's scores of the same items, each from 0 to 1.

    Attributes:
        matched: with the matching message.
        mismatched: with another item's message.
        none: of the receiver without any message; None where that was not run.
        own: with the message that the receiver makes itself, of what it has read itself; None as ``none``.
    """

    matched: Sequence[float]
    mismatched: Sequence[float]
    none: Sequence[float] | None = None
    own: Sequence[float] | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether the answers depend on what the message says.

    Attributes:
        content: matched minus mismatched, the mean and its paired bootstrap interval (95%).
        crossed: that is above 0 by more than chance explains: ``p_adjusted`` below alpha.
        gained, lost: items with the higher score with the matching message, and with the other item's.
        test: what ``p_value`` (one-sided) is of.
        p_adjusted: after Holm's correction for the channels judged together; of one channel ``p_value``.
        gain: matched minus no message. surviving: mismatched minus no message: what is left of the gain when the
            content is another's. None without scores of no message.
        gain_p_adjusted: one-sided, of the gain, by the same tests and with Holm's correction among the gains.
        over_own, over_own_p_adjusted: the same of matched minus the receiver as its own sharer; None where not run.
        sentence: the same in words.
    """

    content: Interval
    crossed: bool
    gained: int
    lost: int
    test: str
    p_value: float
    p_adjusted: float
    gain: Interval | None
    surviving: Interval | None
    gain_p_adjusted: float | None
    over_own: Interval | None
    over_own_p_adjusted: float | None
    sentence: str


def verdict(
    matched: Sequence[float],
    mismatched: Sequence[float],
    none: Sequence[float] | None = None,
    *,
    alpha: float = ALPHA,
    seed: int = 0,
) -> Verdict:
    """Of one channel. Arguments as in `Scores`; ``seed`` is the bootstrap's.

    Answers that are right or not are judged by exact McNemar, shares such as F1 by Wilcoxon's signed ranks.

    Raises:
        ShapeError: scores of different numbers of items, or of none. EvaluationError: a score or alpha outside 0 to 1.
    """
    return verdicts({"": Scores(matched, mismatched, none)}, alpha=alpha, seed=seed)[""]


def verdicts(
    channels: Mapping[Name, Scores], *, alpha: float = ALPHA, seed: int = 0, progress: bool = False
) -> dict[Name, Verdict]:
    """Of several channels together, their p values adjusted for their number (Holm). Raises as `verdict`.

    ``progress``: whether the number of channels judged is shown on standard error; 10,000 items take seconds each.
    """
    if not 0 < alpha < 1:
        raise EvaluationError("alpha", expected="between 0 and 1", got=str(alpha))
    tests = {name: one_sided(scores.matched, scores.mismatched) for name, scores in channels.items()}
    adjusted = holm([test.p_value for test in tests.values()])
    gains = _adjusted({name: (c.matched, c.none) for name, c in channels.items() if c.none is not None})
    over = _adjusted({name: (c.matched, c.own) for name, c in channels.items() if c.own is not None})
    made = {}
    all_of_them = counted(channels.items(), "judging channels", total=len(channels), shown=progress)
    for (name, scores), p_adjusted in zip(all_of_them, adjusted):
        content = paired_interval(scores.matched, scores.mismatched, seed=seed)
        gain = surviving = over_own = None
        if scores.none is not None:
            gain = paired_interval(scores.matched, scores.none, seed=seed)
            surviving = paired_interval(scores.mismatched, scores.none, seed=seed)
        if scores.own is not None:
            over_own = paired_interval(scores.matched, scores.own, seed=seed)
        test, crossed, gain_p = tests[name], p_adjusted < alpha, gains.get(name)
        p_text = f"{test.name}, p {small_p(p_adjusted)}" + (", Holm" if len(channels) > 1 else "")
        said = _sentence(content, gain, surviving, p_text, crossed, gain_p is not None and gain_p < alpha)
        if over_own is not None:
            said += f"; {100 * over_own.value:+.1f} points over the receiver as its own sharer"
            said += f" (p {small_p(over[name])})"
        made[name] = Verdict(
            content,
            crossed,
            test.gained,
            test.lost,
            test.name,
            test.p_value,
            p_adjusted,
            gain,
            surviving,
            gain_p,
            over_own,
            over.get(name),
            said,
        )
    return made


def _adjusted(pairs: Mapping[Name, tuple[Sequence[float], Sequence[float]]]) -> dict[Name, float]:
    """One-sided p values of each pair, first over second, corrected for their number."""
    return dict(zip(pairs, holm([one_sided(*pair).p_value for pair in pairs.values()])))


def _sentence(
    content: Interval, gain: Interval | None, surviving: Interval | None, p_text: str, crossed: bool, gains: bool
) -> str:
    value, low, high = (f"{100 * share:+.1f}" for share in (content.value, content.low, content.high))
    led = f"matched minus mismatched {value} points ({low} to {high}; {p_text}): content crossed: "
    led += "yes" if crossed else NO_CONTENT
    if gain is None or surviving is None:
        return led
    over = f"{100 * gain.value:+.1f} points over no message"
    if gains and not crossed:
        return f"{led}; the gain of {over} survives another item's message ({100 * surviving.value:+.1f})"
    if gains:
        return f"{led}; a gain of {over}, of which another item's message gives {100 * surviving.value:+.1f}"
    return f"{led}; no gain is shown ({over})"


def small_p(p_value: float) -> str:
    """``= 0.0004``, or ``< 1e-12``."""
    return f"= {p_value:.2g}" if p_value >= 1e-12 else "< 1e-12"
