"""Which layers KVComm shares: those whose attention to a context is greatest, with a liking for the middle ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, GeometryError
from ..files import write_whole

__all__ = ["LayerSelection", "alpha_for", "layer_scores", "top_layers"]

VERSION = 1
#: Width of the prior, in layers.
SIGMA = 10.0


@dataclass(frozen=True)
class LayerSelection:
    """What a calibration found.

    Attributes:
        layers: chosen, ascending.
        ratio: share of the model's layers that was asked for.
        alpha: weight of the attention mass against the prior.
        mass: a layer's mean attention of the question's tokens to the context, in ``[0, 1]``.
        scores: a layer's, of which the greatest were chosen.
        model: which model it is for, as `lcf_fast.reading.model_fingerprint.model_sample` tells.
    """

    layers: tuple[int, ...]
    ratio: float
    alpha: float
    mass: tuple[float, ...]
    scores: tuple[float, ...]
    model: str

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        text = json.dumps({"kvcomm_selection": VERSION, **asdict(self)}, indent=1)
        write_whole(Path(path), text.encode() + b"\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LayerSelection:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or of an unknown version.
        """
        where = str(path)
        try:
            found = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            expected = "a file that KVCommChannel.calibrate's selection was saved to"
            raise CheckpointError(where, expected=expected, got=f"{type(error).__name__}: {error}") from error
        if not isinstance(found, dict) or found.pop("kvcomm_selection", None) != VERSION:
            raise CheckpointError(where, expected=f"a selection of layers, version {VERSION}", got="another file")
        try:
            read = cls(
                layers=tuple(_whole(layer) for layer in found["layers"]),
                ratio=float(found["ratio"]),
                alpha=float(found["alpha"]),
                mass=tuple(float(value) for value in found["mass"]),
                scores=tuple(float(value) for value in found["scores"]),
                model=str(found["model"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            expected = "a whole selection of layers (calibrate anew)"
            raise CheckpointError(where, expected=expected, got=f"{type(error).__name__}: {error}") from error
        count = len(read.scores)
        if not read.layers or len(read.mass) != count or not all(0 <= layer < count for layer in read.layers):
            expected = f"layers among {count}, and a mass for each (calibrate anew)"
            raise CheckpointError(where, expected=expected, got=f"{read.layers}, {len(read.mass)} masses")
        return read


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"a layer {value!r}")
    return value


def alpha_for(config: Any) -> float:
    """What KVComm's authors weigh the attention mass with: 0.8 for Qwen, 1 for Llama and, here, all others."""
    return 0.8 if str(getattr(config, "model_type", "")).startswith("qwen") else 1.0


def layer_scores(mass: Sequence[float], alpha: float) -> list[float]:
    """``alpha * m + (1 - alpha) * p`` a layer: m the mass from 0 for the least to 1 for the greatest (0 where all are
    alike), p a Gaussian around the middle layer ``L / 2``.

    Raises:
        GeometryError: an alpha out of ``[0, 1]``, no layer, or a mass that is no number.
    """
    if not 0.0 <= alpha <= 1.0:
        raise GeometryError("alpha", expected="a weight in [0, 1]", got=str(alpha))
    if not mass or not all(map(math.isfinite, mass)):
        raise GeometryError("mass", expected="a finite number for each layer", got=str(list(mass))[:80])
    least, span = min(mass), max(mass) - min(mass)
    scaled = [(value - least) / span if span > 0 else 0.0 for value in mass]
    prior = [math.exp(-((layer - len(mass) / 2) ** 2) / (2 * SIGMA**2)) for layer in range(len(mass))]
    return [alpha * m + (1 - alpha) * p for m, p in zip(scaled, prior)]


def top_layers(scores: Sequence[float], ratio: float) -> tuple[int, ...]:
    """The ``ratio`` of layers with the greatest scores, ascending: the nearest number, at least one; of two alike the
    earlier.

    Raises:
        GeometryError: a ratio that is not in ``(0, 1]``.
    """
    if not 0.0 < ratio <= 1.0:
        raise GeometryError("ratio", expected="a share of the layers in (0, 1]", got=str(ratio))
    count = max(1, math.floor(ratio * len(scores) + 0.5))
    ranked = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(ranked[:count]))
