"""What can stop a training run, as typed errors."""

from __future__ import annotations

from pathlib import Path

from ..errors import LCFError

__all__ = ["LossError", "RunError"]


class RunError(LCFError, RuntimeError):
    """A run's folder, its checkpoints or its prefills are not as the run needs them, or cannot be written."""


class LossError(LCFError, ArithmeticError):
    """The loss or its gradient is not finite. The adapter is as it was before the step.

    Attributes:
        step: the step that failed, 1 the first.
        ids: examples of the micro-batches that failed on this rank.
        checkpoint: the last good checkpoint, None before the first.
    """

    step: int
    ids: tuple[str, ...]
    checkpoint: Path | None

    @classmethod
    def at(cls, step: int, ids: tuple[str, ...], checkpoint: Path | None, found: str) -> LossError:
        shown = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        where = f"at step {step}, in " + (f"the examples {shown}" if ids else "another rank's examples")
        last = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        error = cls("loss", expected="a finite loss and gradient", got=f"{found} {where}; {last}")
        error.step, error.ids, error.checkpoint = step, ids, checkpoint
        return error
