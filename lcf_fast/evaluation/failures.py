"""What an evaluation refuses, as a typed error."""

from __future__ import annotations

from ..errors import LCFError

__all__ = ["EvaluationError"]


class EvaluationError(LCFError, ValueError):
    """Questions, answers, scores or a run's records are not as the evaluation needs them."""
