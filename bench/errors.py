"""The rule that a result must keep before its time is printed: the tests' error budget, on lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

#: No further from float64 than K times plain torch at the same dtype, plus two units in the last place.
K = 2.0
#: What others may be off by and still be a baseline: so many units in the last place of the cache's dtype.
BASELINE_ULPS = 8.0


@dataclass(frozen=True)
class Judgement:
    """How far a result is from float64, and whether that is within bounds.

    Attributes:
        rel_rms: root mean square of the error over that of the truth, over all tensors.
        max_abs: largest error.
        bound_rms: the budget for ``rel_rms`` over all tensors.
        bound_max: the budget for ``max_abs`` over all tensors.
        used: largest share of a budget that any single tensor uses, by rms or by its largest error; above 1 is out.
        within: whether the result is good.
        rule: the bound, in words.
    """

    rel_rms: float
    max_abs: float
    bound_rms: float
    bound_max: float
    used: float
    within: bool
    rule: str

    def to_dict(self) -> dict[str, float | bool | str | None]:
        """Plain JSON; what is not finite is null."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def judge(
    got: Sequence[Tensor],
    truth: Sequence[Tensor],
    plain: Sequence[Tensor],
    *,
    baseline_dtype: torch.dtype | None = None,
) -> Judgement:
    """Hold ``got`` against ``truth``, the same in float64, and ``plain``, the same in plain torch at the same dtype.

    Each tensor keeps the budget on its own, at the root mean square and at its largest error.

    Args:
        baseline_dtype: given for another implementation, which is held to `BASELINE_ULPS` of this dtype, or to our own
            budget where that is wider.
    """
    rule = f"{K:g} x plain torch at this dtype + 2 ulp"
    if baseline_dtype is not None:
        rule += f", or {BASELINE_ULPS:g} ulp of the caches' dtype"
    if len(got) != len(truth) or any(one.shape != other.shape for one, other in zip(got, truth)):
        return Judgement(math.inf, math.inf, 0.0, 0.0, math.inf, False, f"{rule} (shapes differ)")
    squares, sizes = [0.0, 0.0, 0.0], 0  # of error, plain's error, truth
    max_abs = bound_max = used = 0.0
    finite = True
    for result, exact, same in zip(got, truth, plain):
        eps = torch.finfo(result.dtype).eps
        error, own = result.double() - exact, same.double() - exact
        finite &= bool(torch.isfinite(error).all())
        scale_rms, scale_max = _rms(exact), _largest(exact)
        slack = 2 * eps
        if baseline_dtype is not None:
            slack = max(slack, BASELINE_ULPS * torch.finfo(baseline_dtype).eps)
        budget_rms = K * _rms(own) + slack * scale_rms
        budget_max = K * _largest(own) + slack * scale_max
        error_rms, error_max = _rms(error), _largest(error)
        used = max(used, _share(error_rms, budget_rms), _share(error_max, budget_max))
        squares = [s + x * x * exact.numel() for s, x in zip(squares, (error_rms, budget_rms, scale_rms))]
        sizes += exact.numel()
        max_abs, bound_max = max(max_abs, error_max), max(bound_max, budget_max)
    norm = math.sqrt(squares[2]) or 1.0
    finite &= math.isfinite(squares[0])
    return Judgement(
        rel_rms=math.sqrt(squares[0]) / norm if finite else math.inf,
        max_abs=max_abs if finite else math.inf,
        bound_rms=math.sqrt(squares[1]) / norm,
        bound_max=bound_max,
        used=used if finite else math.inf,
        within=finite and used <= 1.0,
        rule=rule,
    )


def judge_rounding(got: Tensor, truth: Tensor, steps: Tensor) -> Judgement:
    """Hold what was stored and read again against what it was, both float64: each number within a rounding of its own.

    Args:
        steps: the most that each number may be off by, of the shape of ``truth``.
    """
    rule = "half a step of what it is stored in"
    if got.shape != truth.shape:
        return Judgement(math.inf, math.inf, 0.0, 0.0, math.inf, False, f"{rule} (shapes differ)")
    error = (got - truth).abs()
    norm = _rms(truth) or 1.0
    bounds = _rms(steps) / norm, _largest(steps)
    if not bool(torch.isfinite(error).all()):
        return Judgement(math.inf, math.inf, *bounds, math.inf, False, rule)
    shares = torch.where(error == 0, 0.0, error / steps)
    used = _largest(shares)
    return Judgement(_rms(error) / norm, _largest(error), *bounds, used, used <= 1.0, rule)


def _share(error: float, budget: float) -> float:
    if error == 0.0:
        return 0.0
    return error / budget if budget > 0.0 else math.inf
