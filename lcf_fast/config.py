"""Geometry of a KV cache, configuration of an adapter, layer maps and exact parameter counts.

Imports neither torch nor transformers: what is read off a model is read by attribute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .errors import DTypeError, GeometryError, IndexRangeError
from .geometry import MAX_LAYERS, geometry_fields

__all__ = ["MAX_LAYERS", "CacheGeometry", "LCFConfig", "c2c_parameters_per_layer", "layer_map"]

LAYER_MAPS = ("last_aligned", "relative_depth")


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DTypeError(name, expected="an int", got=f"{value!r} ({type(value).__name__})")
    if value < 1:
        raise GeometryError(name, expected="an int of at least 1", got=str(value))


def _finite_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DTypeError(name, expected="a number", got=f"{value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:  # an int beyond any float
        number = math.inf
    if not math.isfinite(number):
        raise GeometryError(name, expected="a finite number", got=f"{number}")
    return number


@dataclass(frozen=True)
class CacheGeometry:
    """Shape of a model's KV cache: per layer, keys and values of shape ``(B, kv_heads, N, head_dim)``.

    Args:
        layers: number of layers that hold keys and values.
        kv_heads: key-value heads (not query heads).
        head_dim: channels a head.

    Raises:
        DTypeError: a field is no int.
        GeometryError: a field is below 1, or more layers than ``MAX_LAYERS``.
    """

    layers: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_positive_int(field.name, getattr(self, field.name))
        if self.layers > MAX_LAYERS:
            raise GeometryError("layers", expected=f"at most {MAX_LAYERS}", got=str(self.layers))

    @property
    def channels(self) -> int:
        """``kv_heads * head_dim``: channels of one token's keys (or values) in one layer."""
        return self.kv_heads * self.head_dim

    @classmethod
    def of(cls, model_or_config: Any) -> CacheGeometry:
        """Read the geometry off a transformers model or config (duck-typed; transformers is not imported).

        ``num_key_value_heads`` falls back to the attention heads, ``head_dim`` to hidden size // heads, and
        multimodal configs are entered through ``get_text_config``.

        Raises:
            GeometryError: a field is missing, or not all layers hold a key-value cache of one shape (head
                counts or dims that differ, layers that reuse another layer's cache, linear-attention or
                state-space layers, latent attention whose keys and values differ, encoder-decoder models).
                The text says which layers.
        """
        if isinstance(model_or_config, cls):
            return model_or_config
        layers, kv_heads, head_dim = geometry_fields(model_or_config)
        return cls(layers=layers, kv_heads=kv_heads, head_dim=head_dim)


def layer_map(spec: str | Iterable[int], sharer_layers: int, receiver_layers: int) -> tuple[int, ...]:
    """Which sharer layer each receiver layer reads: ``receiver_layers`` ints in ``[0, sharer_layers)``.

    Args:
        spec: ``"last_aligned"``: the last layers pair up, ``clamp(t + Ls - Lr, 0, Ls - 1)`` (spec, section
            1). ``"relative_depth"``: the sharer layer nearest to ``t * (Ls - 1) / (Lr - 1)``, so first goes
            to first and last to last; halfway between two, the deeper one; a receiver of one layer reads the
            sharer's last. Or one sharer layer per receiver layer, as ints.
        sharer_layers: ``Ls``.
        receiver_layers: ``Lr``.

    Raises:
        GeometryError: unknown name, or a list of the wrong length.
        DTypeError: an entry is no int.
        IndexRangeError: an entry is not a sharer layer.
    """
    check_positive_int("sharer_layers", sharer_layers)
    check_positive_int("receiver_layers", receiver_layers)
    if isinstance(spec, str):
        if spec == "last_aligned":
            return tuple(
                min(max(t + sharer_layers - receiver_layers, 0), sharer_layers - 1) for t in range(receiver_layers)
            )
        if spec == "relative_depth":
            if receiver_layers == 1:
                return (sharer_layers - 1,)
            # floor(x + 1/2) in integers, so that a tie does not hang on a rounding of floats.
            last = receiver_layers - 1
            return tuple((2 * t * (sharer_layers - 1) + last) // (2 * last) for t in range(receiver_layers))
        raise GeometryError("layer_map", expected=f"one of {LAYER_MAPS} or a list of ints", got=repr(spec))
    if not isinstance(spec, Iterable):
        raise DTypeError("layer_map", expected=f"one of {LAYER_MAPS} or a list of ints", got=type(spec).__name__)
    try:
        entries = tuple(spec)
    except TypeError:  # an array of no axis only looks like one that can be gone through
        raise DTypeError("layer_map", expected="a list of ints", got=type(spec).__name__) from None
    for t, entry in enumerate(entries):
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise DTypeError(f"layer_map[{t}]", expected="an int", got=f"{entry!r} ({type(entry).__name__})")
    if len(entries) != receiver_layers:
        raise GeometryError(
            "layer_map",
            expected=f"{receiver_layers} entries, one a receiver layer",
            got=f"{len(entries)} entries",
        )
    for t, entry in enumerate(entries):
        if not 0 <= entry < sharer_layers:
            raise IndexRangeError(f"layer_map[{t}]", expected=f"a sharer layer in [0, {sharer_layers})", got=str(entry))
    return entries


def check_routing(
    kept: Sequence[int], reads: Sequence[int], receiver: CacheGeometry, sharer: CacheGeometry, prefix: str = ""
) -> None:
    """Kept receiver layers, and the sharer layer that each reads, as buffers and files have them.

    Raises:
        IndexRangeError, GeometryError: naming ``receiver_layers`` or ``sharer_layers``, behind ``prefix``.
    """
    for name, layers, geometry in (("receiver_layers", kept, receiver), ("sharer_layers", reads, sharer)):
        if not all(0 <= t < geometry.layers for t in layers):
            raise IndexRangeError(prefix + name, expected=f"layers in [0, {geometry.layers})", got=str(layers))
    if not kept or list(kept) != sorted(set(kept)):
        raise GeometryError(f"{prefix}receiver_layers", expected="ascending layers", got=str(kept))
    if len(reads) != len(kept):
        raise GeometryError(f"{prefix}sharer_layers", expected=f"{len(kept)} layers", got=str(reads))


def check_geometry(name: str, geometry: Any) -> CacheGeometry:
    if not isinstance(geometry, CacheGeometry):
        got = type(geometry).__name__
        raise DTypeError(name, expected="a CacheGeometry (CacheGeometry.of(model) makes one)", got=got)
    return geometry


def check_layer_list(name: str, layers: Any) -> tuple[int, ...]:
    """Layers as a tuple; whether there are such layers, `check_routing` says."""
    is_list = isinstance(layers, Sequence) and not isinstance(layers, (str, bytes))
    if not is_list or any(type(layer) is not int for layer in layers):
        raise DTypeError(name, expected="a list of ints", got=repr(layers)[:80])
    return tuple(layers)


def kept_layers(keep_layers: Any, held: tuple[int, ...]) -> tuple[int, ...]:
    """``keep_layers``, a tensor of them too, ascending: receiver layers among ``held``, each once, at least one."""
    if hasattr(keep_layers, "tolist"):
        keep_layers = keep_layers.tolist()
    if not isinstance(keep_layers, Iterable):
        raise DTypeError("keep_layers", expected="ints", got=type(keep_layers).__name__)
    layers = tuple(keep_layers)
    for t in layers:
        if isinstance(t, bool) or not isinstance(t, int):
            raise DTypeError("keep_layers", expected="ints", got=f"{t!r} ({type(t).__name__})")
        if t not in held:
            raise IndexRangeError("keep_layers", expected=f"receiver layers among {held}", got=str(t))
    if not layers or len(set(layers)) < len(layers):
        got = f"{layers}" if layers else "none"
        raise GeometryError("keep_layers", expected="at least one receiver layer, each once", got=got)
    return tuple(sorted(layers))


@dataclass(frozen=True)
class LCFConfig:
    """Everything that fixes an adapter's parameters and arithmetic (spec, sections 2 to 4).

    Args:
        sharer, receiver: geometries of the two models.
        bottleneck: width d of the latent; even, since its halves feed keys and values.
        layer_map: see :func:`layer_map`.
        cross_context: False for LCF (shared context), True for LCF-X (pooled spans of another context).
        slots: above 0, a slots adapter (`lcf_fast.slots`): so many learned slots pool another context, and become as
            many positions of the receiver's cache. Sets ``cross_context``.
        per_span: of slots: so many for each span of the context, which they pool by itself, and not for all of it.
        ffn_blocks, ffn_expansion: residual blocks in the bottleneck and their inner width over d.
        norm_eps: added to the mean square in the RMS norm.
        dropout: probability, used in training only.
        gate_init: initial gate logit. None is resolved on construction: 0.0 for LCF, +1.0 for LCF-X (spec,
            section 4); pass None again when ``dataclasses.replace`` switches ``cross_context``.

    Raises:
        GeometryError, DTypeError, IndexRangeError: naming the field.
    """

    sharer: CacheGeometry
    receiver: CacheGeometry
    bottleneck: int = 128
    layer_map: str | Sequence[int] = "last_aligned"
    cross_context: bool = False
    ffn_blocks: int = 2
    ffn_expansion: int = 4
    norm_eps: float = 1e-6
    dropout: float = 0.1
    gate_init: float | None = None
    slots: int = 0
    per_span: bool = False

    def __post_init__(self) -> None:
        for name in ("sharer", "receiver"):
            check_geometry(name, getattr(self, name))
        for name in ("bottleneck", "ffn_blocks", "ffn_expansion"):
            check_positive_int(name, getattr(self, name))
        if self.bottleneck % 2:
            raise GeometryError("bottleneck", expected="an even number", got=str(self.bottleneck))
        if not isinstance(self.cross_context, bool):
            raise DTypeError("cross_context", expected="a bool", got=repr(self.cross_context))
        if type(self.slots) is not int or self.slots != 0:
            check_positive_int("slots", self.slots)
            object.__setattr__(self, "cross_context", True)
        if not isinstance(self.per_span, bool):
            raise DTypeError("per_span", expected="a bool", got=repr(self.per_span))
        if self.per_span and not self.slots:
            raise GeometryError("per_span", expected="slots beside it", got="slots=0")
        if _finite_float("norm_eps", self.norm_eps) < 0:
            raise GeometryError("norm_eps", expected="a number >= 0", got=str(self.norm_eps))
        if not 0 <= _finite_float("dropout", self.dropout) < 1:
            raise GeometryError("dropout", expected="a probability in [0, 1)", got=str(self.dropout))
        gate_init = self.gate_init
        if gate_init is None:
            gate_init = 1.0 if self.cross_context else 0.0
        object.__setattr__(self, "gate_init", _finite_float("gate_init", gate_init))
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
    def mode(self) -> Literal["lcf", "lcf_x", "slots"]:
        """What the adapter does: edits with the same context, edits with another one, or adds slots of another one."""
        if self.slots:
            return "slots"
        return "lcf_x" if self.cross_context else "lcf"

    @property
    def in_channels(self) -> int:
        """Input channels of the projector: ``2 Cs + 2 Cr``, in the order S_K, S_V, R_K, R_V; of slots ``2 Cs``."""
        return 2 * self.sharer.channels + (0 if self.slots else 2 * self.receiver.channels)

    @property
    def parameters_per_layer(self) -> int:
        """Parameters of one receiver layer: projector (spec, section 3), queries of the pool, slot embeddings."""
        d, cr, hr = self.bottleneck, self.receiver.channels, self.receiver.kv_heads
        down = self.in_channels * d + d
        ffn = self.ffn_blocks * (2 * self.ffn_expansion * d * d + d)
        if self.slots:  # both sides read all of the latent, and no gate stands between
            return self.slots * (self.sharer.channels + d) + down + ffn + 2 * (d * cr + cr)
        up = 2 * (d // 2 * cr + cr)
        head_gates = 2 * (d * hr + hr)
        gates = 2
        queries = 2 * self.sharer.channels if self.cross_context else 0
        return down + ffn + up + head_gates + gates + queries

    def parameter_count(self, layers: int | None = None) -> int:
        """Parameters of an adapter with ``layers`` kept receiver layers (None: all of them)."""
        count = self.receiver.layers if layers is None else layers
        if type(count) is not int:
            raise DTypeError("layers", expected="an int or None", got=type(layers).__name__)
        return count * self.parameters_per_layer

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reads it back to an equal configuration."""
        data = asdict(self)
        if not self.slots:  # so what has none is written as it was before there were any
            del data["slots"]
        if not self.per_span:
            del data["per_span"]
        if not isinstance(self.layer_map, str):
            data["layer_map"] = list(self.layer_map)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LCFConfig:
        """Inverse of :meth:`to_dict`. Fields with a default may be left out; unknown ones are an error."""
        values = _known_keys(cls, data, "config")
        for name in ("sharer", "receiver"):
            if name in values:
                values[name] = CacheGeometry(**_known_keys(CacheGeometry, values[name], f"config.{name}"))
        return cls(**values)


def _known_keys(cls: type, data: Any, name: str) -> dict[str, Any]:
    """``data`` as a dict that has the required fields of a dataclass and no others than its fields."""
    if not isinstance(data, Mapping):
        raise DTypeError(name, expected="a mapping", got=type(data).__name__)
    known = {field.name: field for field in fields(cls)}
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise GeometryError(name, expected=f"only the keys {', '.join(known)}", got=f"also {', '.join(unknown)}")
    required = ("layers", "kv_heads", "head_dim", "sharer", "receiver")
    missing = [key for key in required if key in known and key not in data]
    if missing:
        raise GeometryError(name, expected=f"the keys {', '.join(missing)} too", got=f"only {sorted(data)}")
    return dict(data)


def c2c_parameters_per_layer(
    sharer: CacheGeometry, receiver: CacheGeometry, *, hidden: int = 1024, intermediate: int = 1024
) -> int:
    """Parameters of one layer of the C2C fuser (arXiv 2510.03215), for comparison.

    For keys and for values separately: ``in (Cs + Cr -> hidden)``, a block, then a weight branch (a block of
    inner width ``hidden``, a head ``hidden -> Hr``) and an update branch (a block, ``out hidden -> Cr``);
    linears outside the blocks have biases. A block is an RMS norm and two bias-free linears. Two gate logits.
    """

    def block(width: int) -> int:
        return hidden + 2 * hidden * width

    joint = (sharer.channels + receiver.channels) * hidden + hidden
    weight = block(hidden) + hidden * receiver.kv_heads + receiver.kv_heads
    update = block(intermediate) + hidden * receiver.channels + receiver.channels
    return 2 * (joint + block(intermediate) + weight + update) + 2
