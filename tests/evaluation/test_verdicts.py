"""What is said of a channel, from fixed answers."""

from __future__ import annotations

import numpy as np
import pytest

from lcf_fast.errors import ShapeError
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.statistics import mcnemar, wilcoxon
from lcf_fast.evaluation.verdicts import NO_CONTENT, Scores, small_p, verdict, verdicts


def right(*ranges: tuple[int, int], items: int = 200) -> list[bool]:
    """Answers of which those in the ranges are right."""
    return [any(start <= i < stop for start, stop in ranges) for i in range(items)]


NONE, OTHERS, OURS = right((0, 60)), right((0, 64)), right((0, 140))


def test_content_that_crossed() -> None:
    found = verdict(OURS, OTHERS, NONE)
    assert found.crossed
    assert (found.gained, found.lost, found.test) == (76, 0, "exact McNemar")
    assert found.p_value == found.p_adjusted == mcnemar(OURS, OTHERS).p_value == 2.0**-76
    assert found.content.value == pytest.approx(0.38)
    assert found.gain is not None and found.gain.value == pytest.approx(0.4)
    assert found.surviving is not None and found.surviving.value == pytest.approx(0.02)
    assert found.sentence.startswith("matched minus mismatched +38.0 points (")
    assert "content crossed: yes; a gain of +40.0 points over no message" in found.sentence
    assert "of which another item's message gives +2.0" in found.sentence
    assert NO_CONTENT not in found.sentence


def test_a_gain_that_survives_another_items_message() -> None:
    found = verdict(OURS, OURS, NONE)
    assert not found.crossed
    assert found.p_value == 1
    assert "content crossed: no content shown; the gain of +40.0 points over no message survives" in found.sentence
    # Nearly all of it survives: two items are no evidence.
    assert NO_CONTENT in verdict(OURS, right((0, 138)), NONE).sentence
    # A message that harms more the more it fits.
    worse = verdict(OTHERS, OURS, NONE)
    assert not worse.crossed
    assert worse.p_value > 0.999
    assert worse.sentence.startswith("matched minus mismatched -38.0")
    assert NO_CONTENT in worse.sentence


def test_no_gain_and_no_scores_without_a_message() -> None:
    assert (
        "content crossed: no content shown; no gain is shown (+2.0 points over" in verdict(OTHERS, NONE, NONE).sentence
    )
    # Another's message harms and the matching one does not help: its content is read all the same.
    harmed = verdict(NONE, right((0, 20)), NONE)
    assert harmed.crossed
    assert "content crossed: yes; no gain is shown (+0.0 points" in harmed.sentence
    alone = verdict(OURS, OTHERS)
    assert alone.gain is None and alone.surviving is None and alone.gain_p_adjusted is None
    assert alone.sentence.endswith("content crossed: yes")


def test_shares_are_judged_by_ranks() -> None:
    rng = np.random.default_rng(2)
    low = rng.random(100) / 2
    high = low + rng.random(100) / 2
    found = verdict(high.tolist(), low.tolist(), low.tolist())
    assert found.test == "Wilcoxon"
    assert found.p_value == wilcoxon(high.tolist(), low.tolist()).p_value
    assert found.crossed
    assert NO_CONTENT in verdict(high.tolist(), high.tolist(), low.tolist()).sentence


def test_channels_judged_together_are_corrected() -> None:
    barely = Scores(right((0, 10)), right(), None)  # p = 2^-10, just below alpha
    alone = verdicts({"a": barely})["a"]
    assert alone.crossed
    assert "Holm" not in alone.sentence
    nothing = Scores(OURS, OURS)
    three = verdicts({"a": barely, "b": nothing, "c": nothing})
    assert three["a"].p_value == 2.0**-10
    assert three["a"].p_adjusted == pytest.approx(3 * 2.0**-10)
    assert not three["a"].crossed
    assert "p = 0.0029, Holm" in three["a"].sentence
    assert verdicts({"a": barely, "b": nothing}, alpha=0.01)["a"].crossed
    assert verdicts({}) == {}


def test_a_p_value_is_said_as_it_is_unless_it_is_tiny() -> None:
    assert [small_p(p) for p in (0.05, 0.00042, 1e-12, 9e-13)] == ["= 0.05", "= 0.00042", "= 1e-12", "< 1e-12"]


def test_gains_are_corrected_too() -> None:
    barely = right((0, 10))  # over nothing: p = 2^-10, just below alpha
    alone = verdict(barely, barely, right())
    assert alone.gain_p_adjusted == 2.0**-10
    assert "survives another item's message" in alone.sentence
    both = verdicts(
        {"a": Scores(barely, barely, right()), "b": Scores(barely, barely, right()), "c": Scores(OURS, OURS)}
    )
    assert both["a"].gain_p_adjusted == 2.0**-9  # of two gains: the third has none to judge
    assert both["c"].gain_p_adjusted is None
    assert "no content shown; no gain is shown (+5.0 points" in both["a"].sentence


def test_a_verdict_repeats_and_refuses() -> None:
    assert verdict(OURS, OTHERS, NONE, seed=3) == verdict(OURS, OTHERS, NONE, seed=3)
    with pytest.raises(ShapeError):
        verdict(OURS, OTHERS[:-1])
    with pytest.raises(ShapeError):
        verdict(OURS, OTHERS, NONE[:-1])
    with pytest.raises(ShapeError):
        verdict([], [])
    with pytest.raises(EvaluationError):
        verdict(OURS, OTHERS, alpha=5)


def test_what_the_receiver_makes_of_what_it_has_read_itself() -> None:
    found = verdicts({"a": Scores(OURS, OTHERS, NONE, right((0, 100))), "b": Scores(OURS, OTHERS, NONE, OURS)})
    for name, over, p in (("a", 0.2, 2 * 2.0**-40), ("b", 0.0, 1.0)):
        one = found[name]
        assert one.over_own is not None and one.over_own.value == pytest.approx(over)
        assert one.over_own_p_adjusted == pytest.approx(p), "corrected for two"
        assert f"; {100 * over:+.1f} points over the receiver as its own sharer (p " in one.sentence
    assert found["b"].crossed, "it is no part of the verdict on content"
    without = verdict(OURS, OTHERS, NONE)
    assert without.over_own is None and without.over_own_p_adjusted is None
    assert "its own sharer" not in without.sentence
