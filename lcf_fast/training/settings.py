"""What fixes a training run, with the published values as defaults (spec, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import DTypeError, GeometryError

__all__ = ["TrainingSettings"]

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class TrainingSettings:
    """Protocol of a run; the defaults are those of LCF, `TrainingSettings.cross_context` has those of LCF-X.

    Args:
        steps: optimizer steps.
        batch_size: examples a step, over all devices.
        micro_batch_size: examples that one device handles at a time. Gradients add up over the micro-batches of a
            step, each token weighing the same, so this changes memory and speed, and the loss only by rounding (and
            by the noise of gate and dropout, which is drawn by the micro-batch).
        learning_rate, weight_decay: of AdamW. The rate rises over the first ``warmup`` of the steps (a fraction) and
            then falls, both linearly.
        clip_norm: largest norm of the gradient.
        seed: of the order of the data and of the training noise.
        max_tokens: longest sequence.
        gate_temperature_start, gate_temperature_end: of the training gate, annealed geometrically over the steps.
        precision: ``"bf16"`` or ``"fp32"``: of the two frozen models, and with them of their caches and of the
            adapter's products. The adapter's parameters, the optimizer, the loss and its sums are float32 in both.
        device: where the run lives; None: a GPU if there is one, else the CPU.

    Dropout is a property of the adapter (``LCFConfig.dropout``), 0.1 by default.

    Raises:
        GeometryError: a value out of range. DTypeError: one of another type. Both name the field.
    """

    steps: int = 300
    batch_size: int = 260
    micro_batch_size: int = 4
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip_norm: float = 1.0
    seed: int = 42
    max_tokens: int = 2048
    gate_temperature_start: float = 1.0
    gate_temperature_end: float = 0.001
    precision: str = "bf16"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "max_tokens"):
            _in_range(name, getattr(self, name), int, 1, None)
        _in_range("seed", self.seed, int, 0, 2**63 - 1)
        _in_range("learning_rate", self.learning_rate, float, 0, None)
        _in_range("weight_decay", self.weight_decay, float, 0, None)
        _in_range("warmup", self.warmup, float, 0, 1)
        for name in ("clip_norm", "gate_temperature_start", "gate_temperature_end"):
            _in_range(name, getattr(self, name), float, math.ulp(0.0), None)
        if self.precision not in PRECISIONS:
            raise GeometryError("precision", expected=f"one of {', '.join(PRECISIONS)}", got=repr(self.precision))
        if self.micro_batch_size > self.batch_size:
            expected = f"no more than batch_size, {self.batch_size}"
            raise GeometryError("micro_batch_size", expected=expected, got=str(self.micro_batch_size))

    @classmethod
    def cross_context(cls, **changes: Any) -> TrainingSettings:
        """The published protocol of LCF-X: one epoch of HotpotQA-bridge, 276 steps of 256 examples."""
        return cls(**{"steps": 276, "batch_size": 256, **changes})

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step; the last may be smaller."""
        return -(-self.batch_size // self.micro_batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingSettings:
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise GeometryError("settings", expected="known fields", got=f"also {', '.join(unknown)}")
        return cls(**data)


def _in_range(name: str, value: Any, kind: type, least: float, most: float | None) -> None:
    accepted = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise DTypeError(name, expected="a number" if kind is float else "an int", got=repr(value))
    if not math.isfinite(value) or value < least or (most is not None and value > most):
        bound = "above 0" if least == math.ulp(0.0) else f"{least} or more"
        raise GeometryError(name, expected=bound if most is None else f"{bound} and up to {most}", got=str(value))
