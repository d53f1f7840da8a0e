"""Paired answers that are right or not: the difference of two shares tested against a margin, and its interval.

Of n items the first alone is right in ``gained``, the second alone in ``lost``. The statistic is the score of Tango
(Statistics in Medicine 17, 1998), whose variance is estimated under the difference that is tested: it is sound where
few items differ, or none, as the t test's is not. Its p value is not read off the normal distribution, but is exact:
the largest chance of a score as far off, over all shares of items that differ.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["below_margin", "score", "score_interval"]

Array = np.ndarray[Any, np.dtype[np.float64]]
#: Shares of items that only the second is right in, tried for the largest p value: closer to each other near 0.
_SHARES = 120
#: Chance of fewer items that differ than are looked at, and of more; it counts for the p value.
_PASSED_OVER = 1e-9


def score(gained: Any, lost: Any, items: int, difference: float) -> Array:
    """Tango's score of counts (arrays or numbers) were the true difference this one; 0 at what was observed."""
    b, c = np.asarray(gained, dtype=np.float64), np.asarray(lost, dtype=np.float64)
    first = (2 * items - b + c) * difference - b - c
    root = np.sqrt(np.maximum(first**2 + 8 * items * c * difference * (1 - difference), 0.0))
    share = np.maximum((root - first) / (4 * items), 0.0)  # of `lost`, its likeliest under that difference
    variance = items * np.maximum(2 * share + difference * (1 - difference), 0.0)
    off = b - c - items * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(np.abs(off) < 1e-9, 0.0, off / np.sqrt(variance))
    return found


def below_margin(gained: int, lost: int, items: int, margin: float) -> float:
    """Exact p of a true difference (first minus second) of ``margin`` or more: small where it is less.

    The chance of a score as low as this or lower, for that share of items that differ at which it is largest.
    """
    binom = import_module("scipy.stats").binom
    observed = float(score(gained, lost, items, margin)) + 1e-9
    totals = np.arange(items + 1)
    # Of each number of items that differ: the largest number of gained ones whose score is as low; -1: none's is. The
    # score grows with it, so that halving finds it.
    low, high = np.full(items + 1, -1), totals.copy()
    while (open_ := low < high).any():
        middle = (low + high + 1) // 2
        as_low = score(np.maximum(middle, 0), totals - np.maximum(middle, 0), items, margin) <= observed
        low, high = np.where(open_ & as_low, middle, low), np.where(open_ & ~as_low, middle - 1, high)
    share = (1 - margin) / 2 * np.linspace(0, 1, _SHARES)[:, None] ** 2
    differ = 2 * share + margin
    start = np.maximum(binom.ppf(_PASSED_OVER, items, differ), 0).astype(int)
    width = int((binom.ppf(1 - _PASSED_OVER, items, differ) - start).max()) + 1
    some = start + np.arange(width)
    within = np.minimum(some, items)
    chances = binom.pmf(some, items, differ) * binom.cdf(low[within], within, (share + margin) / differ)
    return min(float(chances.sum(1).max()) + 2 * _PASSED_OVER, 1.0)


def score_interval(gained: int, lost: int, items: int, confidence: float) -> tuple[float, float]:
    """The differences that Tango's score does not reject on either side."""
    brentq = import_module("scipy.optimize").brentq
    bound = float(import_module("scipy.stats").norm.ppf((1 + confidence) / 2))
    observed = (gained - lost) / items
    ends = []
    for side, end in ((1.0, -1.0), (-1.0, 1.0)):

        def off(difference: float, side: float = side) -> float:
            return float(side * score(gained, lost, items, difference)) - bound

        far = end * (1 - 1e-12)
        ends.append(end if off(far) < 0 else float(brentq(off, far, observed)))
    return ends[0], ends[1]
