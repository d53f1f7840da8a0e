"""Learning rate and gate temperature, as functions of the step alone: a resumed run needs no state of theirs."""

from __future__ import annotations

import math

__all__ = ["gate_temperature", "learning_rate_factor"]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """What the learning rate is multiplied with at ``step`` (0-based) of ``steps``.

    Linear up over the first ``ceil(warmup * steps)`` steps, the last of which has the full rate, then linear down
    towards zero, which would be reached one step after the last: no step is spent at a rate of zero.
    """
    # The product of a decimal fraction is off by its last bits: 0.07 * 100 is 7.000000000000001, and means 7.
    rising = math.ceil(round(warmup * steps, 9))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(steps - rising, 1)


def gate_temperature(step: int, steps: int, start: float, end: float) -> float:
    """Geometrically from ``start`` at step 0 to ``end`` at the last of ``steps``."""
    if steps == 1:
        return start
    done = step / (steps - 1)
    return math.exp((1 - done) * math.log(start) + done * math.log(end))
