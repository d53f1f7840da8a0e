"""A mean of numbers whose ends alone are known: against exact cases, drawn weights, and at the margin itself."""

from __future__ import annotations

from importlib import import_module
from math import sqrt
from typing import Any

import numpy as np
import pytest

from lcf_fast.evaluation.bounded_mean import mean_no_less, upper_end

pytest.importorskip("scipy")
stats: Any = import_module("scipy.stats")


@pytest.mark.parametrize("items", [1, 40, 3_000])
@pytest.mark.parametrize("value", [-1.0, -0.3, 0.0, 0.02])
def test_items_that_are_all_alike(items: int, value: float) -> None:
    """As many others as would not be seen, all of them 1."""
    assert mean_no_less(np.full(items, value), 0.028) == pytest.approx((0.972 / (1 - value)) ** items)
    others = 1 - 0.05 ** (1 / items)
    assert upper_end(np.full(items, value), 0.05) == pytest.approx(value + others * (1 - value))


@pytest.mark.parametrize(("right", "items"), [(0, 30), (3, 30), (30, 30), (20, 25), (210, 400)])
def test_of_the_ends_alone_it_is_cloppers_and_pearsons(right: int, items: int) -> None:
    values = np.repeat([1.0, -1.0], [right, items - right])
    for share in (0.1, 0.5, 0.6):
        assert mean_no_less(values, 2 * share - 1) == pytest.approx(stats.binom.cdf(right, items, share), rel=1e-9)
    high = stats.binomtest(right, items, alternative="less").proportion_ci(0.95, method="exact").high
    assert upper_end(values, 0.05) == pytest.approx(2 * high - 1)


@pytest.mark.parametrize("mean", [-0.2, 0.0, 0.05, 0.3])
def test_it_is_the_chance_of_drawn_weights(mean: float) -> None:
    rng = np.random.default_rng(1)
    values = rng.choice([-1, -0.4, 0, mean, 0.05, 0.5, 1], 30)
    weighted = rng.dirichlet(np.ones(31), 40_000) @ np.append(values, 1)
    assert mean_no_less(values, mean) == pytest.approx((weighted >= mean).mean(), abs=0.01)
    assert mean_no_less(rng.permutation(values), mean) == mean_no_less(values, mean)


def test_of_many_items_it_is_the_t_test() -> None:
    values = np.clip(0.1 + 0.2 * np.random.default_rng(2).standard_normal(4_000), -1, 1)
    error = values.std(ddof=1) / sqrt(len(values))
    for scores in (0.0, 1.0, 2.0):
        found = mean_no_less(values, values.mean() + scores * error)
        assert stats.norm.sf(scores) < found < 1.2 * stats.norm.sf(scores)


def test_beyond_all_that_can_be() -> None:
    assert mean_no_less(np.array([0.2, 0.5]), 1) == 0
    assert mean_no_less(np.array([0.2, 0.5]), 0.2) == 1
    assert upper_end(np.ones(5), 0.05) == 1


@pytest.mark.parametrize("items", [60, 120, 160])
@pytest.mark.parametrize("small", [0.05, -0.05])
def test_what_differs_by_the_margin_is_found_below_it_in_one_of_twenty_runs(items: int, small: float) -> None:
    """Of ten items one differs by a little, few by all there is: every count of both, with its chance at the margin."""
    margin, some = 0.028, 0.1
    whole = margin - some * small
    error = by_t = 0.0
    for large in range(7):
        for few in range(int(stats.binom.isf(1e-4, items, some))):
            chance = stats.multinomial.pmf([large, few, items - large - few], items, [whole, some, 1 - whole - some])
            values = np.repeat([1.0, small, 0.0], [large, few, items - large - few])
            error += chance * (mean_no_less(values, margin) < 0.05)
            if large + few:
                by_t += chance * (stats.ttest_1samp(values, margin, alternative="less").pvalue < 0.05)
    assert error <= 0.05
    assert by_t > 0.08, "what this test is for"
