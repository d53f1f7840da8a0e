"""The eager back end of slots: products over all layers at once, differentiable, on any device.

A layer's cache is read as often as two products need it; what is as small as a message (summaries, latents, the
receiver's half) goes through one batched product for all layers.

Masks: ``(B, N)`` bool, False at padding, which may hold anything; or ``(B, P, N)``, P groups of an item's tokens, which
may overlap, each pooled by itself. Results then have R = B·P rows for B, row b·P + p of group p of item b. Scores are
made once for all groups, and P·k softmaxes of them; what is of no group may hold anything. A number that is not finite
in one group would reach the others of its item by a weight of zero: where a result is not finite, groups are pooled one
by one. That is seen on a CPU only, and not while tracing; elsewhere looking would wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .noise import TrainingNoise
from .reference import Pair, accumulation_dtype, rms_norm

__all__ = ["expand_slots", "finish_states", "fold_slots", "merge_states", "pool_slots", "pool_states", "slot_weights"]

# A layer of up to this many elements is cheaper to copy next to its neighbours than to launch alone.
_STACK_ELEMENTS = 1 << 16


@without_autocast
def pool_slots(sharer: Sequence[Pair], slot_query: Tensor, attention_mask: Tensor | None) -> Pair:
    """``K~, V~ (L, R, k, Hs, Ds)`` in float32 (float64 for float64 caches).

    Args:
        sharer: one ``(key, value)``, ``(B, Hs, N, Ds)`` each, a layer.
        slot_query: ``(L, k, Hs, Ds)``.
        attention_mask: bool, as above.
    """
    parts = [_pool(key, value, query, attention_mask) for key, value, query in _stacks(sharer, slot_query)]
    keys, values = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts))
    return keys, values


@without_autocast
def pool_states(sharer: Sequence[Pair], slot_query: Tensor, attention_mask: Tensor | None) -> Pair:
    """``states (L, R, Hs, k, 2, Ds)`` and ``stats (L, R, Hs, k, 2)`` of a piece of a context; no token: 0, -inf and 0.

    Arguments as `pool_slots`'. N may be 0.
    """
    found = []
    for key, value, query in _stacks(sharer, slot_query):
        found.append(_state(key, value, query, attention_mask))
    states, stats = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*found))
    return states, stats


def _state(key: Tensor, value: Tensor, query: Tensor, mask: Tensor | None) -> Pair:
    cleared = _cleared(key, mask), _cleared(value, mask)
    scores = _scores(cleared[0], query, mask)
    nothing = scores.new_full((*scores.shape[:-1], 1), -torch.inf)  # a piece may be empty
    greatest = torch.cat([scores, nothing], -1).amax(-1)
    weights = (scores - _finite(greatest)[..., None]).exp()
    states = torch.stack([torch.matmul(weights, side) for side in cleared], 4)
    stats = torch.stack([greatest, weights.sum(-1)], -1)
    found = [_rows(states, mask), _rows(stats, mask)]
    if _must_part(found[:1], mask):
        assert mask is not None
        found = _interleaved([_state(key, value, query, group) for group in mask.unbind(1)])
    return found[0], found[1]


def merge_states(states: Tensor, stats: Tensor) -> Pair:
    """States ``(L, B, Hs, R, k, 2, Ds)`` of disjoint tokens and ``stats (L, B, Hs, R, k, 2)`` without the R axis."""
    greatest = stats[..., 0].amax(3, keepdim=True)
    scale = (stats[..., 0] - _finite(greatest)).exp()
    total = (scale * stats[..., 1]).sum(3)
    return (scale[..., None, None] * states).sum(3), torch.stack([greatest.squeeze(3), total], -1)


def finish_states(states: Tensor, stats: Tensor) -> Pair:
    """``K~, V~``, each ``(L, B, k, Hs, Ds)``, of whole contexts' states; NaN where a row has no token."""
    key, value = states.unbind(4)
    total = stats[..., 1:]
    return (key / total).transpose(2, 3), (value / total).transpose(2, 3)


def _finite(greatest: Tensor) -> Tensor:
    """What to take off scores; of no score 0, since infinity less infinity is no number."""
    return greatest.masked_fill(greatest == -torch.inf, 0.0)


@without_autocast
def slot_weights(sharer: Sequence[Pair], slot_query: Tensor, attention_mask: Tensor | None) -> Tensor:
    """What each token weighs in each slot: ``(L, R, Hs, k, N)`` in float32 (or float64), 0 at padding."""
    parts = []
    for key, _, query in _stacks(sharer, slot_query):
        parts.append(_rows(_weights(_cleared(key, attention_mask), query, attention_mask), attention_mask))
    return torch.cat(parts)


def _stacks(sharer: Sequence[Pair], slot_query: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values ``(l, B, H, N, D)`` and queries ``(l, H, k, D)`` in their wide dtype: all layers, or one by one."""
    dtype = accumulation_dtype(sharer[0][0].dtype)
    queries = slot_query.to(dtype).transpose(1, 2)
    if len(sharer) > 1 and sharer[0][0].numel() <= _STACK_ELEMENTS:
        keys, values = (torch.stack(side).to(dtype) for side in zip(*sharer))
        return [(keys, values, queries)]
    return [(key[None].to(dtype), value[None].to(dtype), query[None]) for (key, value), query in zip(sharer, queries)]


def _cleared(cache: Tensor, mask: Tensor | None) -> Tensor:
    """``(l, B, H, N, D)`` with zeros at padding: a weight of zero would not hide what is not finite there."""
    if mask is None:
        return cache
    pooled = mask if mask.dim() == 2 else mask.any(1)
    return cache.masked_fill(~pooled[:, None, :, None], 0.0)


def _scores(key: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """``(l, B, H, k, N)``, -inf where masked; of groups ``(l, B, H, P·k, N)``, as of so many slots."""
    scores = torch.matmul(query[:, None] * key.shape[-1] ** -0.5, key.mT)
    if mask is None:
        return scores
    if mask.dim() == 2:
        return scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.where(mask[:, None, :, None], scores[:, :, :, None], -torch.inf).flatten(3, 4)


def _rows(found: Tensor, mask: Tensor | None) -> Tensor:
    """Groups out of the slots' axis into the rows': ``(l, B, H, P·k, ..)`` to ``(l, B·P, H, k, ..)``."""
    if mask is None or mask.dim() == 2:
        return found
    groups = mask.shape[1]
    return found.unflatten(3, (groups, found.shape[3] // groups)).transpose(2, 3).flatten(1, 2)


def _weights(key: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    return _scores(key, query, mask).softmax(-1)


def _pool(key: Tensor, value: Tensor, query: Tensor, mask: Tensor | None) -> Pair:
    cleared = _cleared(key, mask), _cleared(value, mask)
    weights = _weights(cleared[0], query, mask)
    pooled = [_rows(torch.matmul(weights, side), mask).transpose(2, 3) for side in cleared]
    if _must_part(pooled, mask):
        assert mask is not None
        pooled = _interleaved([_pool(key, value, query, group) for group in mask.unbind(1)])
    return pooled[0], pooled[1]


def _must_part(found: Sequence[Tensor], mask: Tensor | None) -> bool:
    """Whether groups must be pooled one by one, since what is not finite in one may have reached another."""
    if mask is None or mask.dim() == 2 or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not all(bool(side.detach().isfinite().all()) for side in found)


def _interleaved(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One result ``(l, B, ..)`` a group as one of all rows, ``(l, B·P, ..)``."""
    return [torch.stack(side, 2).flatten(1, 2) for side in zip(*groups)]


@without_autocast
def fold_slots(slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """``(L, B, k, Hs, Ds)`` twice to the latent ``(L, B, k, d)``; ``k`` may be fewer than ``slot_embedding`` has."""
    layers, batch, slots = slot_key.shape[:3]
    dtype = accumulation_dtype(slot_key.dtype)
    flat = torch.cat([slot_key.flatten(3), slot_value.flatten(3)], -1).to(dtype).flatten(1, 2)
    down = weights["down_weight"].to(dtype)
    latent = torch.baddbmm(weights["down_bias"].to(dtype)[:, None], flat, down.mT)
    embedding = weights["slot_embedding"][:, None, :slots].to(dtype)
    return latent.view(layers, batch, slots, down.shape[1]) + embedding


@without_autocast
def expand_slots(
    latent: Tensor,
    weights: Mapping[str, Tensor],
    kv_heads: int,
    norm_eps: float,
    noise: TrainingNoise | None,
    row: int = 0,
) -> Tensor:
    """``(L, B, k, d)`` to keys and values ``(L, 2, B, Hr, k, Dr)``; all layers in each product.

    ``row``: what the noise calls the first layer.
    """
    layers, batch, slots, width = latent.shape
    dtype = accumulation_dtype(latent.dtype)
    z = latent.to(dtype).flatten(1, 2)  # (L, B·k, d)
    for block in range(weights["norm_weight"].shape[1]):
        scale, w_in, w_out = (
            weights[name][:, block].to(dtype) for name in ("norm_weight", "ffn_in_weight", "ffn_out_weight")
        )
        added = torch.bmm(F.gelu(torch.bmm(rms_norm(z, scale[:, None], norm_eps), w_in.mT)), w_out.mT)
        if noise is not None and noise.threshold:
            shape = (batch, slots, width)
            kept = torch.stack([noise.keep(row + i, block, shape, z.device) for i in range(layers)])
            added = torch.where(kept.view_as(z), added * noise.keep_scale, 0.0)
        z = z + added
    up, bias = weights["up_weight"].to(dtype).flatten(1, 2), weights["up_bias"].to(dtype).flatten(1)
    head_dim = up.shape[1] // (2 * kv_heads)
    flat = torch.baddbmm(bias[:, None], z, up.mT).view(layers, batch, slots, 2, kv_heads, head_dim)
    return flat.permute(0, 3, 1, 4, 2, 5)
