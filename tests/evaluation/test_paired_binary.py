"""The exact test of two shares' difference against a margin: by enumeration, and at the margin itself."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from lcf_fast.evaluation.paired_binary import below_margin, score, score_interval
from lcf_fast.evaluation.statistics import equivalence

scipy_stats = pytest.importorskip("scipy.stats")


def chance(gained: int, lost: int, items: int, first: float, second: float) -> float:
    """Of these counts, the first alone right in a share ``first`` of items, the second alone in ``second``."""
    ways = comb(items, gained) * comb(items - gained, lost)
    return float(ways * first**gained * second**lost * (1 - first - second) ** (items - gained - lost))


@pytest.mark.parametrize("margin", [0.028, 0.15, 0.4])
def test_p_is_the_largest_chance_of_a_score_as_low(margin: float) -> None:
    """Every count of twelve items, each against all others, one by one."""
    items = 12
    counts = [(b, c) for b in range(items + 1) for c in range(items + 1 - b)]
    shares = (1 - margin) / 2 * np.linspace(0, 1, 400)
    scores = {pair: float(score(*pair, items, margin)) for pair in counts}
    tables = {pair: np.array([chance(*pair, items, q + margin, q) for q in shares]) for pair in counts}
    for pair in counts[::3]:
        as_low = [other for other in counts if scores[other] <= scores[pair] + 1e-9]
        largest = float(sum(tables[other] for other in as_low).max())  # type: ignore[union-attr]
        assert below_margin(*pair, items, margin) == pytest.approx(largest, abs=2e-4)


@pytest.mark.parametrize("items", [100, 160])
@pytest.mark.parametrize("lost_share", [0.0, 0.005])
def test_what_differs_by_the_margin_is_called_equivalent_in_one_of_twenty_runs(items: int, lost_share: float) -> None:
    """All counts at which both tests reject, with their chance under a difference of just the margin."""
    margin, error, known = 0.028, 0.0, dict[tuple[int, int], float]()

    def below(gained: int, lost: int) -> float:
        return known.setdefault((gained, lost), below_margin(gained, lost, items, margin))

    for lost in range(8 if lost_share else 1):
        gained = 0
        while below(gained, lost) < 0.05:  # the more are gained the larger it is
            if below(lost, gained) < 0.05:
                error += chance(gained, lost, items, margin + lost_share, lost_share)
            gained += 1
    assert error <= 0.05
    assert items < 106 or error > 0.002, "nothing is ever called equivalent"


def answers(items: int, gained: int, lost: int) -> tuple[list[int], list[int]]:
    same = [0] * (items - gained - lost)
    return [1] * gained + [0] * lost + same, [0] * gained + [1] * lost + same


def test_the_more_items_differ_the_less_is_shown() -> None:
    """Of 100 questions t tests found one that differs more alike than none: 0.0375 after 0.058."""
    found = [equivalence(*answers(100, differ, 0)).p_value for differ in range(5)]
    assert found[0] == pytest.approx(0.972**100)
    assert found == sorted(found)
    assert found[1] > 0.2
    both = [equivalence(*answers(400, differ, differ)).p_value for differ in range(4)]
    assert both == sorted(both)
    assert equivalence(*answers(100, 1, 0)).p_value == pytest.approx(equivalence(*answers(100, 0, 1)).p_value)


def test_of_many_items_it_is_what_the_normal_distribution_says() -> None:
    for gained, lost in ((180, 200), (230, 150), (300, 180)):
        expected = scipy_stats.norm.cdf(float(score(gained, lost, 5_000, 0.028)))
        assert below_margin(gained, lost, 5_000, 0.028) == pytest.approx(expected, rel=0.15, abs=3e-9)
    assert equivalence(*answers(12_032, 300, 290)).equivalent
    assert not equivalence(*answers(12_032, 500, 190)).equivalent


@pytest.mark.parametrize("counts", [(9, 1, 50), (1, 9, 50), (0, 0, 30), (200, 180, 5_000), (20, 20, 40)])
def test_an_interval_ends_where_the_score_does(counts: tuple[int, int, int]) -> None:
    gained, lost, items = counts
    low, high = score_interval(*counts, 0.9)
    assert -1 < low < (gained - lost) / items < high < 1
    assert float(score(*counts, low)) == pytest.approx(scipy_stats.norm.ppf(0.95), abs=1e-4)
    assert float(score(*counts, high)) == pytest.approx(scipy_stats.norm.ppf(0.05), abs=1e-4)
    assert float(score(*counts, (gained - lost) / items)) == 0
    assert score_interval(lost, gained, items, 0.9) == pytest.approx((-high, -low))
    found = equivalence(*answers(items, gained, lost)).difference
    assert (found.value, found.low, found.high) == ((gained - lost) / items, low, high), "of 1 - 2 alpha"


def test_the_ends_of_all_and_nothing() -> None:
    assert score_interval(50, 0, 50, 0.9)[1] == 1
    assert score_interval(0, 50, 50, 0.9)[0] == -1
    assert below_margin(30, 0, 30, 0.1) == 1
    assert below_margin(0, 30, 30, 0.1) == pytest.approx(0.45**30, abs=3e-9)
    assert 0 < below_margin(0, 3_000, 3_000, 0.028) < 3e-9
