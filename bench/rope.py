"""The receiver's rotary embedding, for slots: keys are made at no position, and rotated to where they come to lie.

A stand-in for the receiver's own, as the adapter's weights are for trained ones: the module of Qwen3 in transformers,
with the published base, at the head dim of the receiver's cache. So a receiver of any kind, and the interpreted check,
which has caches and no model, are served alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcf_fast import CacheGeometry
from lcf_fast.architectures import published_config, random_model
from lcf_fast.rotary import Rotary


@dataclass(frozen=True)
class Rope:
    """How keys turn, and where to.

    Attributes:
        rotary: what ours is given.
        embedding: the module that it was found in, for who rotates by hand.
        positions: ``(1, k)`` int64.
    """

    rotary: Rotary
    embedding: Any
    positions: Tensor

    def angles(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(1, k, Dr)``, computed in float32, in the dtype of ``like``."""
        cos, sin = self.embedding(like, self.positions)
        return cos, sin


def rotated(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys ``(B, H, k, D)`` turned by angles ``(1, k, D)``, channel i with channel i + D/2 (RoFormer, as in Llama)."""
    first, second = key.chunk(2, -1)
    return key * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def make_rope(receiver: CacheGeometry, first: int, slots: int, device: torch.device) -> Rope:
    """Rotation to positions ``first`` to ``first + slots - 1`` in a receiver of this geometry.

    Raises:
        BackendError: transformers is not installed.
    """
    config = published_config("receiver", vocabulary=8)
    config.update(
        {
            "num_hidden_layers": receiver.layers,
            "layer_types": ["full_attention"] * receiver.layers,
            "head_dim": receiver.head_dim,
            # What `Rotary.of` looks at is one token's keys: a narrow model shows them.
            **{"hidden_size": 16, "intermediate_size": 16},
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), receiver.kv_heads),
        }
    )
    from transformers import AutoModel

    model = random_model(AutoModel, config, device, torch.float32)
    positions = torch.arange(first, first + slots, device=device)[None]
    return Rope(Rotary.of(model), model.rotary_emb, positions)
