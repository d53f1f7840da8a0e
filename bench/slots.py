"""Who computes the cases of slots: ours through the public names, the naive reference, and other ways to the same.

Groups: ``slots_summarize`` (a context to a message), ``slots_deliver`` (a message to positions with rotated keys),
``slots_append`` (to a new cache that ends with them) and ``slots`` (both sides).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcf_fast import reference

from .cases import SLOTS
from .inputs import Operands
from .rope import Rope, rotated

Run = Callable[[Operands], Any]
Pair = tuple[Tensor, Tensor]


def _rope(o: Operands) -> Rope:
    assert o.rope is not None
    return o.rope


# --- ours ---------------------------------------------------------------------------------------------------------


def _place(o: Operands, message: Any) -> Any:
    return o.slots_adapter.place(_rope(o).rotary, message, _rope(o).positions)


#: By case name.
OURS: dict[str, Run] = {
    f"slots.summarize (k = {SLOTS})": lambda o: o.slots_adapter.summarize(o.sharer_cache),
    f"slots.place (k = {SLOTS})": lambda o: _place(o, o.sent),
    f"slots.append (k = {SLOTS})": lambda o: o.slots_adapter.append(_rope(o).rotary, o.receiver_cache, o.sent),
    f"slots.summarize+place (k = {SLOTS})": lambda o: _place(o, o.slots_adapter.summarize(o.sharer_cache)),
}


# --- the naive reference ------------------------------------------------------------------------------------------


def _expanded(o: Operands, message: Tensor) -> list[Pair]:
    """Positions with rotated keys, a layer at a time."""
    cos, sin = _rope(o).angles(message)
    made = reference.expand_slots_layers(message, o.weights, kv_heads=o.config.receiver.kv_heads)
    return [(rotated(key, cos, sin), value) for key, value in made]


def _message(o: Operands) -> Tensor:
    assert o.message is not None
    return o.message


def _behind(key: Tensor, value: Tensor, new_key: Tensor, new_value: Tensor) -> Pair:
    return torch.cat([key, new_key.to(key.dtype)], 2), torch.cat([value, new_value.to(value.dtype)], 2)


#: By group name. In float64 this is the truth, but for the angles, which are those of float32.
REFERENCE: dict[str, Run] = {
    "slots_summarize": lambda o: reference.summarize_slots_layers(o.sharer, o.weights),
    "slots_deliver": lambda o: _expanded(o, _message(o)),
    "slots_append": lambda o: [_behind(*own, *new) for own, new in zip(o.receiver, _expanded(o, _message(o)))],
    "slots": lambda o: _expanded(o, reference.summarize_slots_layers(o.sharer, o.weights)),
}


# --- torch.compile of the reference, a layer a graph --------------------------------------------------------------


def _summarize_layer(key: Tensor, value: Tensor, weights: dict[str, Tensor]) -> Tensor:
    one = {name: weights[name][None] for name in ("slot_query", "slot_embedding", "down_weight", "down_bias")}
    return reference.summarize_slots_layers([(key, value)], one)[0]


def _deliver_layer(latent: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor) -> Pair:
    kv_heads = weights["up_bias"].shape[1] // cos.shape[2]
    key, value = reference.expand_slots(latent, weights, kv_heads=kv_heads)
    return rotated(key, cos, sin), value


def _append_layer(own: Pair, latent: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor) -> Pair:
    return _behind(*own, *_deliver_layer(latent, weights, cos, sin))


def compiled(group: str, compiles: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Run:
    """The reference, its layers through ``compiles``, by group name; angles are made once for all layers."""
    summary, delivery, append = compiles(_summarize_layer), compiles(_deliver_layer), compiles(_append_layer)

    def summarize(o: Operands) -> Tensor:
        return torch.stack([summary(*pair, weights) for pair, weights in zip(o.sharer, o.layer_weights)])

    def deliver(o: Operands, message: Tensor) -> list[Pair]:
        angles = _rope(o).angles(message)
        return [delivery(latent, weights, *angles) for latent, weights in zip(message, o.layer_weights)]

    def appended(o: Operands) -> list[Pair]:
        angles = _rope(o).angles(_message(o))
        layers = zip(o.receiver, _message(o), o.layer_weights)
        return [append(own, latent, weights, *angles) for own, latent, weights in layers]

    runs: dict[str, Run] = {
        "slots_summarize": summarize,
        "slots_deliver": lambda o: deliver(o, _message(o)),
        "slots_append": appended,
        "slots": lambda o: deliver(o, summarize(o)),
    }
    return runs[group]


# --- pooling by attention kernels ---------------------------------------------------------------------------------


def sdpa_summarize(o: Operands) -> Tensor:
    """Slots by ``scaled_dot_product_attention``: a head's k queries over its tokens; once for V, once for K."""
    latents = []
    for (key, value), weights in zip(o.sharer, o.layer_weights):
        query = weights["slot_query"].to(key.dtype).transpose(0, 1)[None]  # (1, H, k, D)
        pooled = [F.scaled_dot_product_attention(query, key, one).transpose(1, 2).flatten(2) for one in (key, value)]
        latent = F.linear(torch.cat(pooled, -1), weights["down_weight"], weights["down_bias"])
        latents.append(latent + weights["slot_embedding"])
    return torch.stack(latents).float()
