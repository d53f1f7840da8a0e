"""Channels against each other, from answers that are known."""

from __future__ import annotations

import pytest

from lcf_fast.evaluation.comparisons import compare, default_pairs
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.predictions import MATCHED, MISMATCHED, Prediction
from lcf_fast.evaluation.statistics import equivalence, holm, mcnemar, paired_interval


def cell(set: str, channel: str, right: range, items: int, control: str = MATCHED) -> list[Prediction]:
    return [Prediction(f"q{i}", set, channel, control, "A", correct=i in right) for i in range(items)]


ROWS = [
    *cell("a", "c2c", range(10, 40), 60),
    *reversed(cell("a", "lcf", range(0, 40), 60)),
    *cell("a", "lcf", range(0), 60, MISMATCHED),
    *cell("b", "c2c", range(0, 100), 200),
    *cell("b", "lcf", range(1, 103), 200),
    *cell("c", "none", range(0, 5), 9),
    *cell("c", "c2c", range(0, 5), 9, MISMATCHED),
    *cell("b", "none", range(0, 50), 200),
]


def test_all_sets_that_both_were_run_on() -> None:
    (found,) = compare(ROWS, [("lcf", "c2c")])
    ours = [i in range(0, 40) for i in reversed(range(60))] + [i in range(1, 103) for i in range(200)]
    theirs = [i in range(10, 40) for i in reversed(range(60))] + [i in range(0, 100) for i in range(200)]
    assert (found.sets, found.items) == (("a", "b"), 260)
    assert (found.test.name, found.test.gained, found.test.lost) == ("exact McNemar", 13, 1)
    assert found.test.p_value == found.p_adjusted == mcnemar(ours, theirs).p_value
    assert found.difference == paired_interval(ours, theirs)
    assert found.equivalence == equivalence(ours, theirs)
    assert found.sentence.startswith("lcf minus c2c +4.6 points (+")
    assert "on 260 questions; one-sided exact McNemar, p = 0.00092" in found.sentence
    assert "equivalent" not in found.sentence
    (back,) = compare(ROWS, [("c2c", "lcf")])
    assert back.difference.value == -found.difference.value
    assert back.p_adjusted > 0.99


def test_chosen_sets_and_the_correction_of_several_pairs() -> None:
    pairs = [("lcf", "c2c"), ("lcf", "none"), ("c2c", "none")]
    found = compare(ROWS, pairs, sets=["b"])
    assert [c.items for c in found] == [200] * 3
    assert [c.p_adjusted for c in found] == holm([c.test.p_value for c in found])
    assert found[1].p_adjusted > found[1].test.p_value
    assert all(c.sentence.endswith(f"one-sided exact McNemar, p = {c.p_adjusted:.2g}") for c in found)
    assert compare(ROWS, pairs)[2].sets == ("b",), "of c there is no matching message"
    alike = [*cell("s", "x", range(0, 150), 300), *cell("s", "y", range(0, 150), 300)]
    assert "equivalent within 2.8 points" in compare(alike, [("x", "y")])[0].sentence
    assert compare(ROWS, []) == []


def test_seed_and_margin_are_those_given() -> None:
    ours, theirs = ([i in those for i in range(200)] for those in (range(1, 103), range(0, 100)))
    (found,) = compare(ROWS, [("lcf", "c2c")], sets=["b"], margin=0.1, seed=1)
    assert found.difference == paired_interval(ours, theirs, seed=1) != paired_interval(ours, theirs)
    assert found.equivalence == equivalence(ours, theirs, margin=0.1)
    assert "equivalent within 10.0 points" in found.sentence


def test_comparisons_that_are_refused() -> None:
    with pytest.raises(EvaluationError, match="'lcf' twice"):
        compare(ROWS, [("lcf", "lcf")])
    with pytest.raises(EvaluationError, match="a set that both 'lcf' and 'text_50'"):
        compare(ROWS, [("lcf", "text_50")])
    with pytest.raises(EvaluationError, match="c/lcf/matched"):
        compare(ROWS, [("lcf", "none")], sets=["b", "c"])
    with pytest.raises(EvaluationError, match="the same questions"):
        compare([*ROWS, *cell("b", "short", range(3), 150)], [("lcf", "short")])


def test_what_is_compared_unless_it_is_said() -> None:
    """Ours against every other method, other cuts of a context against the first; never with the scores in view."""
    ran = ["none", "full_context", "text_50", "lcf_x", "lcf_x_one", "kvcomm_0.5", "lcf_x"]
    others = [("lcf_x", other) for other in ("full_context", "text_50", "kvcomm_0.5")]
    assert default_pairs(ran) == [*others, ("lcf_x_one", "lcf_x")]
    assert default_pairs(["c2c", "lcf", "none"]) == [("lcf", "c2c")]
    assert default_pairs(["none", "lcf_x_one"]) == []
