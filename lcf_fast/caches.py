"""transformers caches <-> per-layer ``(key, value)`` tensors, without copying.

transformers is never imported here: its caches are recognised by their classes' names, so plain tensors work
without it installed. Nothing is copied on the way in; on the way out a cache of the same kind is made anew
and the given one is left as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS
from .config import CacheGeometry
from .errors import DeviceError, DTypeError, GeometryError, ShapeError

__all__ = ["Pair", "cache_argument", "cache_layers", "check_growth", "check_pairs", "count_filled", "extend_cache"]
__all__ += ["free_room", "is_cache", "rebuild_cache"]

#: One layer: key and value, each ``(B, H, N, D)``.
Pair = tuple[Tensor, Tensor]

# The layers of transformers 5 that hold one key and one value a token and nothing else.
_DYNAMIC = ("DynamicLayer", "DynamicSlidingWindowLayer")
_STATIC = ("StaticLayer", "StaticSlidingWindowLayer")
_EXPECTED_LAYER = "a DynamicLayer or StaticLayer (or their sliding-window kinds while nothing has slid out)"


#: What `_kind_of` found, by class: it is asked once a layer and call.
_KINDS: dict[type, str] = {}


def _kind_of(kind: type) -> str:
    """``"dynamic"``, ``"static"`` or ``""`` for what is not served (quantized, linear attention ...).

    The first class that comes from transformers decides: a user's subclass of DynamicLayer is one,
    transformers' own subclasses carry more state than keys and values.
    """
    found = _KINDS.get(kind)
    if found is None:
        known = [c for c in kind.__mro__ if c.__module__.partition(".")[0] == "transformers"] or kind.__mro__
        name = known[0].__name__
        found = _KINDS[kind] = "dynamic" if name in _DYNAMIC else "static" if name in _STATIC else ""
    return found


def _layer_kind(layer: Any) -> str:
    return _kind_of(type(layer))


def is_cache(cache: Any) -> bool:
    """True for a transformers-like cache, False for a sequence of pairs (or for what is neither)."""
    return hasattr(cache, "layers") or hasattr(cache, "self_attention_cache")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword of a model's ``forward`` and ``generate``, by the name that it has there.

    transformers 5.24 calls it ``cache``, those before ``past_key_values``, which ``forward`` is to lose in 5.40.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def cache_layers(
    cache: Any,
    *,
    name: str = "cache",
    geometry: CacheGeometry | None = None,
    length: int | None = None,
    every_layer: bool = True,
) -> list[Pair]:
    """The layers of a cache as views: one ``(key, value)`` a layer, each ``(B, H, N, D)``.

    Args:
        cache: a transformers ``DynamicCache`` or ``StaticCache``, or a sequence of ``(key, value)``. A
            StaticCache gives views of its filled part, with the strides of its whole buffer.
        name: how the caller calls the cache; errors use it.
        geometry: what the cache must have.
        length: filled positions of a StaticCache, for the caller who knows them. Used only where the cache
            itself keeps them on a GPU, where reading them makes the host wait, and while tracing.
        every_layer: compare every layer with the first. False looks at the first alone: for callers who check
            the layers that they go on to read, since each look costs host time.

    Raises:
        DTypeError: no cache and no sequence of pairs of float tensors, or several dtypes.
        GeometryError: unsupported, uninitialised or truncated layers, or another geometry than the given one.
        ShapeError, DeviceError: layers that disagree.
    """
    pairs = _transformers_layers(cache, name, length) if is_cache(cache) else _plain_layers(cache, name)
    check_pairs(pairs, name, geometry, every_layer)
    return pairs


def rebuild_cache(cache: Any, layers: Sequence[Pair]) -> Any:
    """A new cache of the same kind with these layers, from which the model goes on.

    Args:
        cache: what :func:`cache_layers` read; it stays as it was.
        layers: one ``(key, value)`` a layer, shaped as those that were read.

    Returns:
        A sequence gives a tuple of pairs. A ``DynamicCache`` gives one whose layers hold the given tensors; a
        layer that was not edited may share its storage with the input, which is safe since a DynamicCache
        grows by concatenation (but an in-place edit of one would show in the other). A ``StaticCache`` gives
        one of the same maximum whose buffers are all its own, since the next step writes into them.
    """
    if not is_cache(cache):
        return tuple(map(tuple, layers))
    rebuilt = _copy_with(cache)
    static = {kind for kind in {*map(type, cache.layers)} if _kind_of(kind) == "static"}
    if static:
        rebuilt.layers = [
            _static_layer(old, key, value) if type(old) in static else _copy_with(old, keys=key, values=value)
            for old, (key, value) in zip(cache.layers, layers, strict=True)
        ]
        return rebuilt
    # `_copy_with` written out: one a layer on the hot path.
    rebuilt.layers = [object.__new__(type(old)) for old in cache.layers]
    for new, old, (key, value) in zip(rebuilt.layers, cache.layers, layers, strict=True):
        new.__dict__ = state = old.__dict__.copy()
        state["keys"], state["values"] = key, value
    return rebuilt


def extend_cache(cache: Any, layers: Sequence[Pair], more: Sequence[Pair], name: str = "cache") -> Any:
    """A new cache of the same kind with further positions behind those that it has.

    Args:
        cache: what :func:`cache_layers` read; it stays as it was.
        layers: those that were read.
        more: one ``(key, value)`` a layer, ``(B, H, k, D)``; cast to the cache's dtype.
        name: how the caller calls the cache; errors use it.

    Returns:
        A sequence gives a tuple of pairs, a ``DynamicCache`` a ``DynamicCache``.

    Raises:
        GeometryError: a StaticCache, whose size is fixed; a sliding-window layer out of which positions would slide.
    """
    if more and layers:
        check_growth(cache, layers[0][0].shape[2] + more[0][0].shape[2], name)
    joined = [
        (torch.cat([key, new_key.to(key.dtype)], 2), torch.cat([value, new_value.to(value.dtype)], 2))
        for (key, value), (new_key, new_value) in zip(layers, more, strict=True)
    ]
    if not is_cache(cache):
        return tuple(joined)
    extended = _copy_with(cache)
    extended.layers = []
    for old, (key, value) in zip(cache.layers, joined, strict=True):
        changes: dict[str, Any] = {"keys": key, "values": value}
        if old.is_sliding:
            changes["cumulative_length"] = key.shape[2]
        extended.layers.append(_copy_with(old, **changes))
    return extended


def check_growth(cache: Any, length: int, name: str = "cache") -> None:
    """Raises GeometryError, as :func:`extend_cache` does, unless the cache can grow to ``length`` positions."""
    for i, layer in enumerate(cache.layers if is_cache(cache) else ()):
        if _layer_kind(layer) == "static":
            expected = "a DynamicCache or a sequence of (key, value), which can grow (append_ fills a StaticCache)"
            raise GeometryError(f"{name}.layers[{i}]", expected=expected, got=type(layer).__name__)
        if layer.is_sliding and length >= layer.sliding_window:
            expected = f"fewer than {layer.sliding_window} positions, the sliding window"
            raise GeometryError(f"{name}.layers[{i}]", expected=expected, got=f"{length} with those to come")


def free_room(cache: Any, filled: int, count: int, name: str = "cache") -> list[Pair]:
    """Views of the ``count`` positions of a StaticCache behind those that are filled, ``(B, H, count, D)`` a layer.

    What is written there is not the cache's before :func:`count_filled` says so.

    Args:
        filled: positions that are, as :func:`cache_layers` has read them.

    Raises:
        GeometryError: no StaticCache; a layer of too little room.
    """
    layers = cache.layers if is_cache(cache) else ()
    if not layers or not all(_layer_kind(layer) == "static" for layer in layers):
        expected = "a StaticCache, which has room to write into (append makes a longer one of others)"
        raise GeometryError(name, expected=expected, got=type(cache).__name__)
    for i, layer in enumerate(layers):
        if filled + count > layer.keys.shape[2]:
            expected = f"room for {count} positions behind {filled}"
            raise GeometryError(f"{name}.layers[{i}]", expected=expected, got=f"{layer.keys.shape[2]} in all")
    return [(layer.keys.narrow(2, filled, count), layer.values.narrow(2, filled, count)) for layer in layers]


@torch.inference_mode()  # for counters that were made in it
def count_filled(cache: Any, count: int) -> None:
    """Make ``count`` positions of :func:`free_room` the cache's own; where it counts on a device, without waiting."""
    for layer in cache.layers:
        # Sliding layers of transformers 5 count on the host as well; its first ones find out from what is not zero.
        for counter in ("cumulative_length", "cumulative_length_int"):
            before = getattr(layer, counter, None)
            if isinstance(before, Tensor):
                before.add_(count)  # at its place, which compiled graphs hold on to
            elif before is not None:
                setattr(layer, counter, before + count)


def _copy_with(original: Any, **changes: Any) -> Any:
    # What copy.copy and setattr do for such objects, at a fifth of the cost: one a layer on the hot path.
    copy = object.__new__(type(original))
    copy.__dict__ = {**original.__dict__, **changes}
    return copy


def _static_layer(old: Any, key: Tensor, value: Tensor) -> Any:
    """A layer with its own buffers, allocated and tagged for torch.compile by its own initialisation."""
    filled = getattr(old, "cumulative_length", None)
    layer = _copy_with(old)
    if isinstance(filled, Tensor):
        layer.cumulative_length = filled.clone()  # counted up in place by the next step
    layer.lazy_initialization(key, value)
    length = key.shape[2]
    layer.keys[:, :, :length] = key
    layer.values[:, :, :length] = value
    return layer


def _plain_layers(cache: Any, name: str) -> list[Pair]:
    if isinstance(cache, (Tensor, str)) or not isinstance(cache, Sequence):
        raise DTypeError(
            name,
            expected="a transformers DynamicCache or StaticCache, or a sequence of (key, value)",
            got=type(cache).__name__,
        )
    pairs: list[Pair] = []
    if not torch.compiler.is_compiling() and {*map(type, cache)} == {tuple} and {*map(len, cache)} == {2}:
        return list(cache)
    for i, layer in enumerate(cache):
        if not isinstance(layer, (tuple, list)) or len(layer) != 2:
            size = f" of {len(layer)}" if isinstance(layer, (tuple, list)) else ""
            raise DTypeError(f"{name}[{i}]", expected="a (key, value) pair", got=type(layer).__name__ + size)
        pairs.append((layer[0], layer[1]))
    return pairs


def _transformers_layers(cache: Any, name: str, length: int | None) -> list[Pair]:
    if hasattr(cache, "self_attention_cache"):
        raise DTypeError(
            name,
            expected="the cache of a decoder-only model",
            got=f"{type(cache).__name__} (of an encoder-decoder)",
        )
    if getattr(cache, "offloading", False):
        raise DeviceError(
            name,
            expected="a cache that stays on its device",
            got=f"{type(cache).__name__} with offloading=True",
        )
    if not isinstance(cache.layers, (list, tuple)):
        raise GeometryError(f"{name}.layers", expected="a list of layers", got=type(cache.layers).__name__)
    pairs = _growing_layers(cache.layers)
    if pairs is not None:
        return pairs
    pairs = []
    filled = -1
    for i, layer in enumerate(cache.layers):
        kind = _layer_kind(layer)
        if not kind:
            raise GeometryError(f"{name}.layers[{i}]", expected=_EXPECTED_LAYER, got=type(layer).__name__)
        key, value = layer.keys, layer.values
        if key is None or value is None or key.dim() < 4:
            raise GeometryError(
                f"{name}.layers[{i}]",
                expected="keys and values (the model's prefill fills them)",
                got=f"an uninitialised {type(layer).__name__}",
            )
        if kind == "static":
            if filled < 0:
                filled = _filled(layer, f"{name}.layers[{i}]", length)
            if filled > key.shape[2]:
                _refuse_truncated(f"{name}.layers[{i}]", layer, filled, key.shape[2])
            if filled < key.shape[2]:
                key, value = key.narrow(2, 0, filled), value.narrow(2, 0, filled)
        elif layer.is_sliding and layer.cumulative_length != key.shape[2]:
            _refuse_truncated(f"{name}.layers[{i}]", layer, layer.cumulative_length, key.shape[2])
        pairs.append((key, value))
    return pairs


def _growing_layers(layers: Any) -> list[Pair] | None:
    """Layers that are all filled DynamicLayers without a window: `_transformers_layers` in a few looks at them all.

    None where any of them is anything else, or while tracing.
    """
    kinds = {*map(type, layers)} if not torch.compiler.is_compiling() else set()
    if len(kinds) != 1 or _kind_of(*kinds) != "dynamic" or True in [layer.is_sliding for layer in layers]:
        return None
    pairs = [(layer.keys, layer.values) for layer in layers]
    if {*map(type, chain.from_iterable(pairs))} != {Tensor}:
        return None
    return pairs if min(map(Tensor.dim, [key for key, _ in pairs])) >= 4 else None


def _filled(layer: Any, name: str, length: int | None) -> int:
    """Filled positions of a static layer; the caller's ``length`` where reading the layer's own has its price."""
    own = getattr(layer, "cumulative_length_int", None)  # sliding layers keep an int as well
    if own is None:
        own = getattr(layer, "cumulative_length", None)
    if own is None:
        # transformers 5.0 counts rows that are not zero, on the device; a padded row may well be zero.
        own = layer.get_seq_length() if length is None else length
    is_here = not isinstance(own, Tensor) or (own.device.type == "cpu" and not torch.compiler.is_compiling())
    if is_here or length is None:
        return int(own)
    capacity = layer.keys.shape[2]
    if not 0 <= length <= capacity:
        raise ShapeError(name, expected=f"a length in [0, {capacity}], the buffer's", got=str(length))
    return length


def _refuse_truncated(name: str, layer: Any, seen: int, held: int) -> None:
    raise GeometryError(
        name,
        expected="a layer that still holds every position (a prompt shorter than the sliding window, or a"
        " cache made without one)",
        got=f"{type(layer).__name__} that holds {held} of {seen} positions",
    )


def check_pairs(pairs: list[Pair], name: str, geometry: CacheGeometry | None, every_layer: bool = True) -> None:
    """All layers alike and as the geometry says; raises as `cache_layers` does."""
    if geometry is not None and len(pairs) != geometry.layers:
        raise GeometryError(name, expected=f"{geometry.layers} layers", got=str(len(pairs)))
    if not pairs:
        return
    first = pairs[0][0]
    if not isinstance(first, Tensor) or first.dim() != 4 or first.dtype not in FLOATS or first.layout != torch.strided:
        _refuse(pairs, name, geometry)
    shape, dtype, device = first.shape, first.dtype, first.device
    if geometry is not None and (shape[1] != geometry.kv_heads or shape[3] != geometry.head_dim):
        _refuse(pairs, name, geometry)
    for key, value in pairs if every_layer else pairs[:1]:
        if (
            not isinstance(key, Tensor)
            or not isinstance(value, Tensor)
            or key.shape != shape
            or value.shape != shape
            or key.dtype is not dtype
            or value.dtype is not dtype
            or key.device != device
            or value.device != device
        ):
            _refuse(pairs, name, geometry)


def _refuse(pairs: list[Pair], name: str, geometry: CacheGeometry | None) -> None:
    """Find the first tensor that is wrong and say what is wrong with it."""
    first: Tensor | None = None
    for i, pair in enumerate(pairs):
        for part, tensor in zip(("key", "value"), pair):
            where = f"{name} layer {i} {part}"
            if not isinstance(tensor, Tensor):
                raise DTypeError(where, expected="a tensor", got=type(tensor).__name__)
            if tensor.dim() != 4:
                raise ShapeError(where, expected="(B, H, N, D)", got=str(tuple(tensor.shape)))
            if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
                got = f"{tensor.dtype}, {tensor.layout}"
                raise DTypeError(where, expected="a dense tensor of a float dtype that caches have", got=got)
            if geometry is not None and (tensor.shape[1], tensor.shape[3]) != (
                geometry.kv_heads,
                geometry.head_dim,
            ):
                raise GeometryError(
                    where,
                    expected=f"{geometry.kv_heads} KV heads of {geometry.head_dim}",
                    got=f"{tensor.shape[1]} of {tensor.shape[3]}",
                )
            first = tensor if first is None else first
            if tensor.shape != first.shape:
                expected = f"{tuple(first.shape)} as in layer 0"
                raise ShapeError(where, expected=expected, got=str(tuple(tensor.shape)))
            if tensor.dtype != first.dtype:
                raise DTypeError(where, expected=f"{first.dtype} as in layer 0", got=str(tensor.dtype))
            if tensor.device != first.device:
                raise DeviceError(where, expected=f"{first.device} as in layer 0", got=str(tensor.device))
    raise AssertionError("unreachable: called only where a tensor is wrong")
