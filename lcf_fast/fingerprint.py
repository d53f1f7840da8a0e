"""Which adapter a message is for: digests of configuration and weights.

An LCF-X adapter has two halves. The sharer's (the pool's queries, the sharer's columns of ``W_down``) makes messages;
the receiver's (everything else) gives their numbers a meaning. Each half has a digest of its own, since several
sharers may write to one receiver: the receiver's must be the same on both sides, the sharer's must be one it knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_has_memory
from .config import CacheGeometry

__all__ = ["Origin", "digest_of", "is_digest", "receiver_digest", "sharer_digest"]
__all__ += ["slots_receiver_digest", "slots_sharer_digest"]

#: Of a slots adapter, the parameters of the sharer's half; all others are the receiver's.
SHARER_OF_SLOTS = ("slot_query", "slot_embedding", "down_weight", "down_bias")

#: Hex digits of a digest: 128 bits, which is far beyond chance and keeps a message's header short.
DIGITS = 32


@dataclass(frozen=True)
class Origin:
    """Where a message comes from and whom it is for, as digests of 32 lower-case hex digits.

    Attributes:
        adapter: of the receiver's half of the adapter that the message is for.
        sharer: of the sharer's half that made it.
    """

    adapter: str
    sharer: str


def is_digest(value: Any) -> bool:
    """Whether ``value`` has the form of a digest."""
    return isinstance(value, str) and len(value) == DIGITS and set(value) <= set("0123456789abcdef")


def digest_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest of JSON-like settings and of tensors with their names, dtypes, shapes and bits; waits for a device."""
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        check_has_memory(name, tensors[name])
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:DIGITS]


def sharer_digest(
    sharer: CacheGeometry,
    receiver_layers: Sequence[int],
    sharer_layers: Sequence[int],
    weights: Mapping[str, Tensor],
) -> str:
    """Digest of the sharer's half. ``weights``: ``span_query``, ``global_query``, ``down_weight (L, d, >= 2Cs)``."""
    settings = {
        "half": "sharer",
        "sharer": [sharer.layers, sharer.kv_heads, sharer.head_dim],
        "receiver_layers": list(receiver_layers),
        "sharer_layers": list(sharer_layers),
    }
    tensors = {
        "span_query": weights["span_query"],
        "global_query": weights["global_query"],
        "down_weight": weights["down_weight"][:, :, : 2 * sharer.channels],
    }
    return digest_of(settings, tensors)


def receiver_digest(
    receiver: CacheGeometry, receiver_layers: Sequence[int], norm_eps: float, weights: Mapping[str, Tensor]
) -> str:
    """Digest of the receiver's half. ``weights``: the adapter's, of whose ``down_weight`` the last 2Cr columns."""
    settings = {
        "half": "receiver",
        "receiver": [receiver.layers, receiver.kv_heads, receiver.head_dim],
        "receiver_layers": list(receiver_layers),
        "norm_eps": norm_eps,
    }
    tensors = {name: tensor for name, tensor in weights.items() if name not in ("span_query", "global_query")}
    down = tensors["down_weight"]
    tensors["down_weight"] = down[:, :, down.shape[2] - 2 * receiver.channels :]
    return digest_of(settings, tensors)


def slots_sharer_digest(sharer: CacheGeometry, sharer_layers: Sequence[int], weights: Mapping[str, Tensor]) -> str:
    """Digest of the sharer's half of slots. ``weights``: those of `SHARER_OF_SLOTS`, among others or not."""
    settings = {"half": "sharer of slots", "sharer": _sizes(sharer), "sharer_layers": list(sharer_layers)}
    return digest_of(settings, {name: weights[name] for name in SHARER_OF_SLOTS})


def slots_receiver_digest(receiver: CacheGeometry, norm_eps: float, weights: Mapping[str, Tensor]) -> str:
    """Digest of the receiver's half of slots, by the adapter's stacked ``weights``; every layer has its slots."""
    own = {name: tensor for name, tensor in weights.items() if name not in SHARER_OF_SLOTS}
    return digest_of({"half": "receiver of slots", "receiver": _sizes(receiver), "norm_eps": norm_eps}, own)


def _sizes(geometry: CacheGeometry) -> list[int]:
    return [geometry.layers, geometry.kv_heads, geometry.head_dim]
