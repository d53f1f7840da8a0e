"""Reading a KV cache's geometry off a transformers model or config, by attribute only."""

from __future__ import annotations

from typing import Any

from .errors import GeometryError

__all__ = ["MAX_LAYERS", "geometry_fields"]

#: Far above what any model has: a damaged number must not become a list of so many.
MAX_LAYERS = 1 << 12

# Names under which configs list what each layer is. The later names only count where the first is missing.
_TYPE_FIELDS = ("layer_types", "layers_block_type", "block_types")
# Layer types whose cache is one key and one value a token. What else there is (linear_attention, conv, mamba,
# hybrid, moe, mlp, recurrent, indexed_attention, ...) has no such cache or carries more than it.
_KV_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


def geometry_fields(model_or_config: Any) -> tuple[int, int, int]:
    """``(layers, kv_heads, head_dim)`` of a model or config whose layers all have the same key-value cache.

    Raises:
        GeometryError: as :meth:`lcf_fast.config.CacheGeometry.of` says.
    """
    if isinstance(model_or_config, type):
        raise GeometryError("config", expected="a model or its config", got=f"the class {model_or_config.__name__}")
    try:
        return _fields(getattr(model_or_config, "config", model_or_config))
    except GeometryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Configs of vision and audio models have lists and dictionaries, or nothing, under these names.
        got = f"{type(model_or_config).__name__}, of which one cannot be read: {error}"
        raise GeometryError("config", expected="a language model's config", got=got[:300]) from error


def _fields(whole: Any) -> tuple[int, int, int]:
    config = _text_config(whole)
    kind = type(config).__name__
    if getattr(whole, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        got = f"{type(whole).__name__}, an encoder-decoder model"
        raise GeometryError("config", expected="a decoder-only model", got=got)
    crossing = _first(config, "cross_attention_layers")
    if crossing:
        got = f"{kind} with cross-attention in {_layers(crossing)}"
        raise GeometryError("config", expected="self-attention in every layer", got=got)
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    if layers is None:
        raise GeometryError("config", expected="num_hidden_layers", got=f"{kind} without it")
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise GeometryError("config", expected=f"1 to {MAX_LAYERS} layers", got=f"{kind} with {layers!r}"[:200])
    _refuse_other_layer_types(config, kind, layers)
    _refuse_shared_layers(config, kind, layers)

    shapes = [_layer_shape(layer, kind) for layer in _layer_configs(config, layers)]
    if len(set(shapes)) > 1:
        listed = "; ".join(
            f"{heads} KV heads of {dim} in {_layers(t for t, s in enumerate(shapes) if s == (heads, dim))}"
            for heads, dim in dict.fromkeys(shapes)
        )
        raise GeometryError("config", expected="layers of one geometry", got=f"{kind} with {listed}")
    return (layers, *shapes[0])


def _text_config(config: Any) -> Any:
    """The language model's part of a multimodal config, the config itself otherwise."""
    get = getattr(config, "get_text_config", None)
    if get is None:
        return config
    try:
        return get(decoder=True)
    except TypeError:  # a config of one's own whose method takes no arguments
        return get()


def _first(config: Any, *names: str) -> Any:
    """The first of these attributes that is there and not None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def _layers(indices: Any) -> str:
    """``layers 0, 1, 2 and 17 more``: enough to find the place, short enough to read."""
    listed = [str(t) for t in indices]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ("layers " if len(listed) > 1 else "layer ") + ", ".join(listed[:4]) + more


def _refuse_other_layer_types(config: Any, kind: str, layers: int) -> None:
    types = _first(config, *_TYPE_FIELDS)
    if types is None:
        return
    pattern = list(types)
    types = [pattern[t % len(pattern)] for t in range(layers)]  # block_types may be one period of a pattern
    for name in dict.fromkeys(types):
        if name not in _KV_TYPES:
            where = _layers(t for t, other in enumerate(types) if other == name)
            raise GeometryError(
                "config",
                expected="attention layers that each hold keys and values and nothing else",
                got=f"{kind} (of {layers} layers) with type {name!r} in {where}",
            )


def _refuse_shared_layers(config: Any, kind: str, layers: int) -> None:
    modes = _first(config, "kv_sharing_modes")
    if modes is not None:
        sharing = [t for t, mode in enumerate(modes) if mode is not None and str(mode).startswith("reuse")]
    else:
        shared = _first(config, "num_kv_shared_layers") or 0
        sharing = list(range(layers - shared, layers))
    if sharing:
        raise GeometryError(
            "config",
            expected="a cache of its own in every layer",
            got=f"{kind} (of {layers} layers) that reuses another layer's in {_layers(sharing)}",
        )


def _layer_configs(config: Any, layers: int) -> list[Any]:
    """One config a layer; the same object for all where nothing differs."""
    per_layer = getattr(config, "per_layer_config", None)  # transformers: a sequence of resolved configs
    if per_layer is not None and not isinstance(per_layer, dict) and len(per_layer) == layers:
        return [per_layer[t] for t in range(layers)]
    listed = ("num_key_value_heads", "num_kv_heads", "head_dim", "num_attention_heads")
    if any(isinstance(getattr(config, name, None), (list, tuple)) for name in listed):
        return [_View(config, t, ()) for t in range(layers)]
    # Gemma-4-like: full attention has a head dim and (with attention_k_eq_v) KV heads of its own.
    own = []
    if _first(config, "global_head_dim") is not None:
        own.append(("head_dim", "global_head_dim"))
    if _first(config, "num_global_key_value_heads") is not None and getattr(config, "attention_k_eq_v", True):
        own.append(("num_key_value_heads", "num_global_key_value_heads"))
    if own:
        types = _first(config, *_TYPE_FIELDS) or ["full_attention"] * layers
        full = _View(config, 0, tuple(own))
        return [full if types[t] == "full_attention" else config for t in range(layers)]
    return [config] * layers


class _View:
    """A config as one layer sees it: lists indexed by the layer, some attributes read under another name."""

    def __init__(self, config: Any, layer: int, renamed: tuple[tuple[str, str], ...]) -> None:
        self._config, self._layer, self._renamed = config, layer, dict(renamed)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, self._renamed.get(name, name))
        return value[self._layer] if isinstance(value, (list, tuple)) else value


def _layer_shape(config: Any, kind: str) -> tuple[int, int]:
    """``(kv_heads, head_dim)`` of one layer."""
    if any("att" in str(part) for part in getattr(config, "skip", None) or ()):
        raise GeometryError("config", expected="attention in every layer", got=f"{kind} with layers that skip it")
    if _first(config, "kv_lora_rank") is not None:
        raise GeometryError(
            "config",
            expected="keys and values of one head dim",
            got=f"{kind} with multi-head latent attention (kv_lora_rank), whose keys and values differ",
        )
    heads = _first(config, "num_attention_heads", "n_head")
    if heads is None:
        raise GeometryError(
            "config", expected="a model with key-value caches (num_attention_heads)", got=f"{kind} without it"
        )
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads")
    falcon_40b = getattr(config, "new_decoder_architecture", None)
    if falcon_40b is not None:  # Falcon repeats its keys for every query head before it caches them
        kv_heads = None
    if getattr(config, "multi_query", False) and not falcon_40b:
        kv_heads = 1
    head_dim = _first(config, "head_dim")
    if head_dim is None:
        hidden = _first(config, "hidden_size", "n_embd")
        if hidden is None:
            raise GeometryError("config", expected="head_dim or hidden_size", got=f"{kind} without them")
        head_dim = hidden // heads
    value_dim = _first(config, "v_head_dim")
    if value_dim is not None and value_dim != head_dim:
        raise GeometryError(
            "config",
            expected="keys and values of one head dim",
            got=f"{kind} with keys of {head_dim} and values of {value_dim}",
        )
    return (heads if kv_heads is None else kv_heads, head_dim)
