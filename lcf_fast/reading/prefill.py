"""What a frozen causal LM holds after reading, and going on from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..caches import Pair, cache_argument, cache_layers
from .padding import padding_first

__all__ = [
    "DTYPES",
    "dynamic_cache",
    "forgets_at",
    "positions_of",
    "prefill",
    "read_behind",
    "read_on",
    "sliding_window",
    "turns_at",
]

#: Of frozen models, by the name that settings give a precision.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def positions_of(mask: Tensor) -> Tensor:
    """``(B, N)``: how many real tokens come before each position, of a mask ``(B, N)``."""
    return (mask.long().cumsum(1) - 1).clamp_(min=0)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, mask: Tensor) -> list[Pair]:
    """The cache of a frozen causal LM after reading ``ids (B, N)``; ``mask`` is zero at padding."""
    from transformers import DynamicCache

    cache = DynamicCache()
    read_on(model, cache, ids, mask)
    return cache_layers(cache)


def read_on(model: Any, cache: Any, ids: Tensor, mask: Tensor) -> list[Pair]:
    """What a DynamicCache holds after ``ids (B, n)`` are read behind what it held; ``mask``, of both, is 0 at padding.

    Its layers may be of different lengths.
    """
    # Without the head on top, whose logits nobody reads.
    model.base_model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions_of(mask)[:, mask.shape[1] - ids.shape[1] :],
        use_cache=True,
        **cache_argument(model.base_model, cache),
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def read_behind(model: Any, placed: Sequence[Pair], there: Tensor, ids: Tensor, mask: Tensor) -> list[Pair]:
    """The cache of slots and of a prompt that is read behind them: in each row ``[padding | slots | prompt]``.

    Args:
        placed: the slots' keys and values ``(B, H, k, D)`` a layer.
        there: ``(B, k)``, zero where a row has none.
        ids, mask: ``(B, n)`` prompts, with padding anywhere.
    """
    slots = padding_first([(key.to(model.dtype), value.to(model.dtype)) for key, value in placed], there)
    # Slots are read from the columns before the prompt's, in which padding would widen the gap: it stands behind.
    order = (mask == 0).long().argsort(dim=1, stable=True)
    whole = torch.cat([(there != 0).long().sort(1).values, (mask != 0).long().gather(1, order)], 1)
    return padding_first(read_on(model, dynamic_cache(slots), ids.gather(1, order), whole), whole)


def dynamic_cache(layers: Iterable[Pair]) -> Any:
    """A DynamicCache of transformers that holds copies of these ``(key, value)``, one a layer: to go on from."""
    # Not from transformers, a lazy module, which the compiler of torch 2.11 does not trace.
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for layer, (key, value) in enumerate(layers):
        cache.update(key, value, layer)
    return cache


def sliding_window(model: Any) -> int | None:
    """Positions of the sliding window, where a layer has one."""
    config = model.config
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def forgets_at(model: Any) -> int | None:
    """Tokens beyond which ``generate()`` of a model drops a cache of no more, and reads anew (Phi-3, Phi-MoE).

    They do so in a `prepare_inputs_for_generation` of their own, whatever their rope type.
    """
    from transformers import GenerationMixin

    if getattr(type(model), "prepare_inputs_for_generation", None) is GenerationMixin.prepare_inputs_for_generation:
        return None
    most: int | None = getattr(model.config, "original_max_position_embeddings", None)
    return most


def turns_at(model: Any) -> int | None:
    """Tokens beyond which a call turns its keys by another set of frequencies, where a layer's rope is "longrope"."""
    told = getattr(model.config, "rope_parameters", None) or {}
    kinds = [told, *(own for own in told.values() if isinstance(own, dict))]  # one for each type of layers, or one
    found = [own["original_max_position_embeddings"] for own in kinds if own.get("rope_type") == "longrope"]
    return min(found, default=None)
