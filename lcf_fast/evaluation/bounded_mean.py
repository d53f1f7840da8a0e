"""The mean of numbers from -1 to 1, of which nothing else is known, tested against a margin: Gaffke's statistic.

To the items that were seen comes one that was not, and is 1: as far off as any can be. All get random weights that sum
up to 1, every choice of weights as likely (Dirichlet); p of a true mean of m or more is the chance that the weighted
mean is m or more (N. Gaffke, Three test statistics for a nonparametric one-sided hypothesis on the mean of a
nonnegative variable, 2005). Of items that are all d it is ``((1 - m) / (1 - d)) ** items``, of items that are -1 or 1
Clopper's and Pearson's, of very many items the t test's. A t test knows the error of what it has seen alone: where a
few items differ by much, and by chance none of them was seen, it is certain of what is false.

That this p is never too small is known of items that are -1 or 1, of others conjectured (Learned-Miller and Thomas, A
New Confidence Interval for the Mean of a Bounded Random Variable, 2019); its tests count how often it errs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["mean_no_less", "upper_end"]

Array = np.ndarray[Any, np.dtype[np.float64]]


def mean_no_less(values: Array, mean: float) -> float:
    """p of a true mean of ``mean`` or more: small where it is less. Computed, not drawn.

    Such weights are exponential numbers over their sum: it is the chance that distances from ``mean``, each times one
    of these, sum up to 0 or more. Of an item that is b above and one that is a below either may be left out, the one
    below with chance ``b / (a + b)``, else the one above (the partial fractions of their transform), until all that are
    left are on one side.
    """
    off = np.sort(np.append(values, 1.0) - mean)  # sorted: the order of items shall not change a digit
    above, below = off[off > 0], -off[off < 0][::-1]
    if not len(below):
        return 1.0
    if not len(above):
        return 0.0
    # chance[i] after step k: of the first i above and the last k - i below. Those of one step do not need each other.
    chance = np.ones(len(above) + 1)
    chance[0] = 0.0
    for k in range(2, len(above) + len(below) + 1):
        first, end = max(1, k - len(below)), min(len(above), k - 1) + 1
        b, a = above[first - 1 : end - 1], below[len(below) - k + first : len(below) - k + end]
        chance[first:end] = (b * chance[first:end] + a * chance[first - 1 : end - 1]) / (a + b)
    return float(chance[-1])


def upper_end(values: Array, chance: float) -> float:
    """The mean whose p is ``chance``: larger ones have less."""
    if values.min() >= 1:
        return 1.0
    normal = import_module("scipy.stats").norm
    at = normal.isf(chance)

    def off(mean: float) -> float:
        # As normal scores p is nearly a line, whose root takes half as many steps.
        return float(normal.isf(min(max(mean_no_less(values, mean), 1e-300), 1 - 1e-16)) - at)

    return float(import_module("scipy.optimize").brentq(off, values.min(), 1.0))
