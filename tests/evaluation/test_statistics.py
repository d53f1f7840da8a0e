"""Paired statistics against SciPy on fixed tables, tables worked out by hand, and what must hold of any scores."""

from __future__ import annotations

import itertools
import sys
from importlib import import_module
from math import comb, sqrt
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lcf_fast.errors import BackendError, ShapeError
from lcf_fast.evaluation import statistics
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.statistics import (
    accuracy,
    equivalence,
    holm,
    is_binary,
    mcnemar,
    mean_interval,
    one_sided,
    paired_interval,
    wilcoxon,
)

scipy_stats: Any = import_module("scipy.stats")


def answers(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Items right in both, in the first alone, in the second alone, in neither."""
    pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return [one for one, _ in pairs], [two for _, two in pairs]


SCORES = st.lists(st.tuples(st.sampled_from([0, 0.25, 0.5, 1]), st.sampled_from([0, 0.25, 0.5, 1])), min_size=2)
BINARY = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1)


# --- exact McNemar
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(10, 0), (15, 5), (5, 15), (7, 7), (1, 0), (0, 1), (131, 86)])
def test_mcnemar_is_the_binomial_tail(first: int, second: int) -> None:
    found = mcnemar(*answers(20, first, second, 30))
    count = first + second
    assert (found.gained, found.lost) == (first, second)
    assert found.p_value == pytest.approx(sum(comb(count, k) for k in range(first, count + 1)) / 2**count, rel=1e-10)
    assert mcnemar(*answers(0, first, second, 0)).p_value == found.p_value  # items alike in both say nothing


def test_mcnemar_by_hand() -> None:
    assert mcnemar(*answers(3, 5, 0, 3)).p_value == pytest.approx(1 / 32)
    assert mcnemar(*answers(3, 0, 0, 3)).p_value == 1
    # R: binom.test(c(15, 5), alternative = "greater")
    assert mcnemar(*answers(0, 15, 5, 0)).p_value == pytest.approx(0.02069473, abs=1e-8)


@given(BINARY)
def test_mcnemar_both_ways(pairs: list[tuple[bool, bool]]) -> None:
    one, two = [a for a, _ in pairs], [b for _, b in pairs]
    ahead, back = mcnemar(one, two), mcnemar(two, one)
    assert (ahead.gained, ahead.lost) == (back.lost, back.gained)
    count = ahead.gained + ahead.lost
    equal = comb(count, ahead.gained) / 2**count if count else 1
    assert ahead.p_value + back.p_value == pytest.approx(1 + equal)  # the middle counts on both sides
    assert mcnemar([*one, True], [*two, False]).p_value <= ahead.p_value + 1e-12


# --- Wilcoxon
# ---------------------------------------------------------------------------------------------------------


def test_wilcoxon_is_scipys() -> None:
    # Depths of Wilcoxon-like pairs without ties or zeros: exact.
    one = [0.91, 0.52, 0.83, 0.44, 0.95, 0.66, 0.37]
    two = [0.90, 0.50, 0.79, 0.49, 0.87, 0.50, 0.05]
    # Signed ranks of the differences 1 2 4 -5 8 16 32 (hundredths): only rank 4 is negative, W+ = 24. Of the 2^7
    # signings those of a sum of at least 24 leave ranks of at most 4 out: {}, 1, 2, 3, 4, 1+2, 1+3.
    found = wilcoxon(one, two)
    assert (found.gained, found.lost) == (6, 1)
    assert found.p_value == pytest.approx(7 / 128)
    rng = np.random.default_rng(3)
    many, other = rng.random(200) ** 2, rng.random(200)
    expected = scipy_stats.wilcoxon(other - many, alternative="greater", method="exact").pvalue
    assert wilcoxon(other.tolist(), many.tolist()).p_value == pytest.approx(expected, rel=1e-9)
    # Of more than are summed in all ways: the normal ones, ties and all.
    many, other = rng.random(700).round(2), rng.random(700).round(2)
    other[:20] = many[:20]
    differences = (many - other).round(12)[many != other]
    assert len(differences) > statistics.EXACT_RANKS
    expected = scipy_stats.wilcoxon(differences, alternative="greater", method="asymptotic").pvalue
    assert wilcoxon(many.tolist(), other.tolist()).p_value == pytest.approx(expected)


@pytest.mark.parametrize(("gained", "lost", "alike"), [(3, 0, 97), (17, 3, 980), (28, 8, 0), (0, 4, 60), (260, 240, 9)])
def test_wilcoxon_of_differences_of_one_size_is_mcnemar(gained: int, lost: int, alike: int) -> None:
    """Normal ranks, which the items that are alike brought on, gave 0.042 for three gained and none lost."""
    one, two = answers(alike, gained, lost, 0)
    found = wilcoxon([0.5 * right for right in one], [0.5 * right for right in two])
    assert found.p_value == pytest.approx(mcnemar(one, two).p_value, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([-1, -0.5, -0.25, 0, 0.25, 0.5, 1]), min_size=1, max_size=9))
def test_wilcoxon_with_ties_is_all_signings(differences: list[float]) -> None:
    sizes = np.abs([d for d in differences if d])
    ranks = scipy_stats.rankdata(sizes)
    sums = [sum(r for r, up in zip(ranks, signs) if up) for signs in itertools.product((0, 1), repeat=len(ranks))]
    seen = sum(r for r, d in zip(ranks, (d for d in differences if d)) if d > 0)
    found = wilcoxon([max(d, 0) for d in differences], [max(-d, 0) for d in differences])
    assert found.p_value == pytest.approx(np.mean([s >= seen for s in sums]))


def test_wilcoxon_knows_equal_differences_from_rounding() -> None:
    assert 0.3 - 0.2 != 0.4 - 0.3
    one, two = [0.3, 0.4, 0.5, 0.7], [0.2, 0.3, 0.4, 0.9]
    exact = [3, 4, 5, 7], [2, 3, 4, 9]
    assert wilcoxon(one, two) == wilcoxon(*[[x / 16 for x in side] for side in exact])
    assert wilcoxon([0.5, 0.1], [0.5, 0.1]).p_value == 1


@settings(max_examples=15, deadline=None)
@given(SCORES)
def test_wilcoxon_both_ways(pairs: list[tuple[float, float]]) -> None:
    one, two = [a for a, _ in pairs], [b for _, b in pairs]
    ahead, back = wilcoxon(one, two), wilcoxon(two, one)
    assert (ahead.gained, ahead.lost) == (back.lost, back.gained)
    assert ahead.p_value + back.p_value >= 1 - 1e-9
    assert 0 <= ahead.p_value <= 1


def test_the_test_that_scores_call_for() -> None:
    one, two = answers(20, 15, 5, 10)
    found = one_sided(one, two)
    assert (found.name, found.gained, found.lost, found.p_value) == ("exact McNemar", 15, 5, mcnemar(one, two).p_value)
    shares = [0.9, 0.5, 0.2], [0.1, 0.3, 0.3]
    found = one_sided(*shares)
    assert (found.name, found.gained, found.lost, found.p_value) == ("Wilcoxon", 2, 1, wilcoxon(*shares).p_value)


# --- intervals
# ---------------------------------------------------------------------------------------------------------


def test_wilson_by_its_formula() -> None:
    z = 1.959963984540054
    for right, items in ((0, 10), (10, 10), (81, 263), (1, 2)):
        share, wide = right / items, z * z / items
        middle = (share + wide / 2) / (1 + wide)
        half = z / (1 + wide) * sqrt(share * (1 - share) / items + wide / items / 4)
        found = accuracy([True] * right + [False] * (items - right))
        assert (found.right, found.items, found.share) == (right, items, share)
        assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)
    # Newcombe (1998), table I: 81 of 263.
    found = accuracy([True] * 81 + [False] * 182)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_paired_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(5)
    one = rng.random(60)
    two = np.clip(one - 0.1 + 0.2 * rng.standard_normal(60), 0, 1)
    found = paired_interval(one.tolist(), two.tolist(), confidence=0.9, seed=7)

    def difference(a: Any, b: Any, axis: int = -1) -> Any:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    scipys = scipy_stats.bootstrap(
        (one, two), difference, paired=True, confidence_level=0.9, rng=np.random.default_rng(7)
    ).confidence_interval
    assert found.value == pytest.approx((one - two).mean())
    assert (found.low, found.high) == pytest.approx((scipys.low, scipys.high), abs=1e-3)
    # Pairing matters: the two vary together.
    apart = scipy_stats.bootstrap((one, two), difference, confidence_level=0.9, rng=np.random.default_rng(7))
    assert found.high - found.low < 0.7 * (apart.confidence_interval.high - apart.confidence_interval.low)


def test_intervals_repeat_and_hold_the_mean() -> None:
    one, two = answers(40, 20, 8, 32)
    shares = np.random.default_rng(1).random((2, 50)).tolist()
    assert paired_interval(*shares, seed=1) == paired_interval(*shares, seed=1)
    assert paired_interval(*shares, seed=1) != paired_interval(*shares, seed=2)
    found, back = paired_interval(one, two), paired_interval(two, one)
    assert found.low < found.value == 0.12 < found.high
    assert back.value == -0.12
    assert (-back.high, -back.low) == pytest.approx((found.low, found.high), abs=0.011)
    assert mean_interval(one).value == 0.6
    few = mean_interval([0, 1])
    assert 0 <= few.low <= 0.5 <= few.high <= 1
    narrow, wide = mean_interval(one, confidence=0.5), mean_interval(one, confidence=0.99)
    assert wide.low < narrow.low < 0.6 < narrow.high < wide.high


@pytest.mark.parametrize("items", [1, 3, 1000])
@pytest.mark.parametrize("right", [0, 1])
def test_scores_that_are_all_alike_are_not_certain(items: int, right: int) -> None:
    exact = scipy_stats.binomtest(right * items, items).proportion_ci(method="exact")
    found = mean_interval([right] * items)
    assert (found.value, found.low, found.high) == pytest.approx((right, exact.low, exact.high))
    apart = paired_interval([right] * items, [1 - right] * items)
    assert apart.value == 2 * right - 1
    assert ((1 + apart.low) / 2, (1 + apart.high) / 2) == pytest.approx((exact.low, exact.high))
    share = mean_interval([0.25] * items)  # others could be 0 or 1
    unseen = 1 - 0.025 ** (1 / items)
    assert (share.low, share.high) == pytest.approx((0.25 - 0.25 * unseen, 0.25 + 0.75 * unseen))
    alike = paired_interval([right] * items, [right] * items)
    assert (alike.low, alike.high) == pytest.approx((-unseen, unseen))
    rounded = paired_interval([0.3, 0.4] * items, [0.2, 0.3] * items)  # 0.1 each, but for rounding
    unseen = 1 - 0.025 ** (1 / (2 * items))
    assert (rounded.low, rounded.high) == pytest.approx((0.1 - 1.1 * unseen, 0.1 + 0.9 * unseen))


@pytest.mark.parametrize("count", [5_899, 12_032])
def test_sets_of_the_published_sizes_take_seconds(count: int) -> None:
    one = np.random.default_rng(0).random(count)
    found = mean_interval(one.tolist())
    half = 1.96 * one.std() / sqrt(count)
    assert (found.low, found.high) == pytest.approx((one.mean() - half, one.mean() + half), abs=half / 10)


# --- equivalence
# ---------------------------------------------------------------------------------------------------------


def test_tost_of_many_shares_is_nearly_two_t_tests() -> None:
    rng = np.random.default_rng(4)
    one = 0.3 + 0.4 * rng.random(3_000)
    two = np.clip(one - 0.028 + 0.25 * rng.standard_normal(3_000), 0, 1)
    found = equivalence(one.tolist(), two.tolist())
    d = one - two
    error = d.std(ddof=1) / sqrt(len(d))
    expected = max(
        scipy_stats.t.sf((d.mean() + 0.028) / error, len(d) - 1),
        scipy_stats.t.cdf((d.mean() - 0.028) / error, len(d) - 1),
    )
    assert 0.001 < expected < found.p_value < 1.3 * expected
    assert found.margin == 0.028
    half = scipy_stats.t.ppf(0.95, len(d) - 1) * error
    interval = found.difference
    assert interval.value == d.mean()
    assert (interval.low, interval.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=half / 15)


def test_one_difference_does_not_make_shares_alike() -> None:
    """By t tests 40 equal shares were no evidence (p = 0.32), and certain (2e-23) with one of them 0.05 off."""
    same = [0.5] * 40
    equal = equivalence(same, same).p_value
    assert equal == pytest.approx(0.972**40)
    for off in (1e-9, 0.001, 0.05):
        found = equivalence([0.5 + off, *same[1:]], same)
        assert equal < found.p_value < equal + off
        assert not found.equivalent


def test_what_is_not_equivalent() -> None:
    assert not equivalence(*answers(500, 60, 20, 420)).equivalent  # 4 points apart
    assert not equivalence(*answers(20, 2, 2, 20)).equivalent  # alike, and too few to know
    # No difference at all in n items: 0.972^n below 0.05 from 106 items on.
    assert equivalence(*answers(105, 0, 0, 0)).p_value == pytest.approx(0.972**105)
    assert not equivalence(*answers(105, 0, 0, 0)).equivalent
    assert equivalence(*answers(106, 0, 0, 0)).equivalent
    assert equivalence([1] * 500, [0] * 500).p_value == 1
    assert equivalence([0.5] * 500, [0.49] * 500).p_value == pytest.approx((0.972 / 0.99) ** 500)


@settings(max_examples=50, deadline=None)
@given(SCORES, st.floats(0.01, 0.4))
def test_equivalence_both_ways_and_with_a_wider_margin(pairs: list[tuple[float, float]], margin: float) -> None:
    one, two = [a for a, _ in pairs], [b for _, b in pairs]
    found = equivalence(one, two, margin=margin)
    assert found.p_value == pytest.approx(equivalence(two, one, margin=margin).p_value, abs=1e-12)
    assert equivalence(one, two, margin=2 * margin).p_value <= found.p_value + 1e-12
    inside = -margin < found.difference.low and found.difference.high < margin
    if not (is_binary(one) and is_binary(two)):
        assert found.equivalent == inside  # the interval of 1 - 2 alpha says the same


# --- Holm
# ---------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.001, 0.03]) == pytest.approx([0.06, 0.003, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing(p_values: list[float]) -> None:
    """A hypothesis falls where Bonferroni's test rejects every set of hypotheses that it is in."""
    count = len(p_values)
    sets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    expected = [
        min(1.0, max(len(chosen) * min(p_values[i] for i in chosen) for chosen in sets if at in chosen))
        for at in range(count)
    ]
    assert holm(p_values) == pytest.approx(expected)


# --- what is refused
# ---------------------------------------------------------------------------------------------------------


def test_scores_that_are_refused() -> None:
    tests: list[Any] = [mcnemar, wilcoxon, paired_interval, equivalence]
    for test in tests:
        with pytest.raises(ShapeError):
            test([1, 0], [1])
        with pytest.raises(ShapeError):
            test([], [])
        for bad in (1.5, -0.1, float("nan")):
            with pytest.raises(EvaluationError):
                test([1, bad], [0, 0])
    with pytest.raises(EvaluationError, match="wilcoxon"):
        mcnemar([1, 0.5], [0, 0])
    with pytest.raises(ShapeError):
        accuracy([])
    with pytest.raises(ShapeError):
        equivalence([1], [1])
    for margin in (0, 1, 2.8):
        with pytest.raises(EvaluationError, match=r"2\.8 points"):
            equivalence([1, 0], [1, 0], margin=margin)
    for alpha in (0, 0.5):
        with pytest.raises(EvaluationError, match="alpha"):
            equivalence([1, 0], [1, 0], alpha=alpha)
    for p_values in ([0.1, 1.2], [float("nan")], [-0.1]):
        with pytest.raises(EvaluationError):
            holm(p_values)
    assert is_binary([0, 1, True, 1.0])
    assert not is_binary([0, 0.5])


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(BackendError, match=r"lcf-fast\[eval\]"):
        statistics.check_scipy()
