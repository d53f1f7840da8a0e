"""What fixes a training run, with the published values as defaults (spec, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import DTypeError, GeometryError
from ..placement import check_placement

__all__ = ["TrainingSettings"]

PRECISIONS = ("bf16", "fp32")
#: Fields that the first runs did not have, and what those did.
_LATER = {"placement": "append", "slot_dropout": False, "guard_weight": 0.0, "guard_margin": 1.0}


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
        placement: where slots stand, ``"append"`` or ``"prefix"`` (`lcf_fast.placement`). The adapter's folder says so.
        slot_dropout: whether a micro-batch sends the first k' of k slots alone, k' drawn evenly from 1 to k: what is
            trained with it can send any number of them.
        guard_weight: of the guard loss, 0 is none: for each item the hinge ``max(0, guard_margin - (matched -
            mismatched))`` on the response's mean log-likelihoods (nats a token) under its own message and under that
            of the item before it in the micro-batch. It punishes a gain that another item's message gives as well.
            Weighs each response token alike, as the loss that it is added to. LCF-X and slots.
        guard_margin: of the guard loss, in nats a token.

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
    placement: str = "append"
    slot_dropout: bool = False
    guard_weight: float = 0.0
    guard_margin: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "max_tokens"):
            _in_range(name, getattr(self, name), int, 1, None)
        _in_range("seed", self.seed, int, 0, 2**63 - 1)
        _in_range("learning_rate", self.learning_rate, float, 0, None)
        _in_range("weight_decay", self.weight_decay, float, 0, None)
        _in_range("warmup", self.warmup, float, 0, 1)
        for name in ("clip_norm", "gate_temperature_start", "gate_temperature_end"):
            _in_range(name, getattr(self, name), float, math.ulp(0.0), None)
        _in_range("guard_weight", self.guard_weight, float, 0, None)
        _in_range("guard_margin", self.guard_margin, float, math.ulp(0.0), None)
        check_placement(self.placement)
        if not isinstance(self.slot_dropout, bool):
            raise DTypeError("slot_dropout", expected="a bool", got=repr(self.slot_dropout))
        if self.guard_weight and self.micro_batch_size < 2:
            expected = "2 or more, since the guard loss takes another item's message"
            raise GeometryError("micro_batch_size", expected=expected, got=str(self.micro_batch_size))
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
        # Of what came later only what is set: a run from before then goes on.
        return {name: value for name, value in asdict(self).items() if _LATER.get(name, ...) != value}

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
