"""What fixes a C2C fuser's parameters and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import CacheGeometry, _finite_float, check_geometry, check_positive_int, layer_map
from ..errors import GeometryError

__all__ = ["C2CConfig"]


@dataclass(frozen=True)
class C2CConfig:
    """Widths, geometries and layer map of a fuser; the defaults are those of the published ones.

    Args:
        sharer, receiver: geometries of the two models.
        hidden: width of both networks.
        intermediate: inner width of their blocks, but for the weight branch's, whose is ``hidden``.
        num_layers: the update branch has ``num_layers - 2`` blocks; at least 3.
        dropout: probability, used in training only.
        layer_map: see :func:`lcf_fast.config.layer_map`.
        initial_temperature, final_temperature, anneal_steps: of the training gates, as their trainer anneals them.
            A fresh fuser starts at the first; the other two are only carried along in checkpoints, since ours anneals
            by its own settings.

    Raises:
        GeometryError, DTypeError, IndexRangeError: naming the field.
    """

    sharer: CacheGeometry
    receiver: CacheGeometry
    hidden: int = 1024
    intermediate: int = 1024
    num_layers: int = 3
    dropout: float = 0.1
    layer_map: str | Sequence[int] = "last_aligned"
    initial_temperature: float = 1.0
    final_temperature: float = 0.001
    anneal_steps: int = 1929

    #: What training asks of an adapter: C2C fuses position by position, as LCF does.
    cross_context = False
    slots = 0

    def __post_init__(self) -> None:
        for name in ("sharer", "receiver"):
            check_geometry(name, getattr(self, name))
        for name in ("hidden", "intermediate", "num_layers", "anneal_steps"):
            check_positive_int(name, getattr(self, name))
        if self.num_layers < 3:
            raise GeometryError("num_layers", expected="3 or more", got=str(self.num_layers))
        if not 0 <= _finite_float("dropout", self.dropout) < 1:
            raise GeometryError("dropout", expected="a probability in [0, 1)", got=str(self.dropout))
        for name in ("initial_temperature", "final_temperature"):
            if _finite_float(name, getattr(self, name)) <= 0:
                raise GeometryError(name, expected="a number above 0", got=str(getattr(self, name)))
        resolved = layer_map(self.layer_map, self.sharer.layers, self.receiver.layers)
        if not isinstance(self.layer_map, str):
            # A tuple, so that the configuration is hashable and nobody can edit it through the caller's list.
            object.__setattr__(self, "layer_map", resolved)
        object.__setattr__(self, "_sharer_layers", resolved)

    @property
    def sharer_layers(self) -> tuple[int, ...]:
        """The resolved layer map: entry t is the sharer layer that receiver layer t reads."""
        resolved: tuple[int, ...] = self._sharer_layers  # type: ignore[attr-defined]
        return resolved

    @property
    def update_blocks(self) -> int:
        """Blocks of the update branch."""
        return self.num_layers - 2
