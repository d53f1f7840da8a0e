"""The definition of slots, line by line in any dtype, and a slot adapter's weights: what the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import Pair
from lcf_fast.noise import TrainingNoise

Weights = dict[str, Tensor]
EPS = 1e-6


def pool_formula(sharer: Sequence[Pair], query: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Pair:
    """The definition, in ``dtype``; masked tokens are left out, so that what they hold does not matter."""
    pooled = []
    for (key, value), q in zip(sharer, query.to(dtype)):
        rows = []
        for b in range(key.shape[0]):
            keep = slice(None) if mask is None else mask[b] != 0
            k, v = key[b, :, keep].to(dtype), value[b, :, keep].to(dtype)
            weights = (torch.einsum("jhd,hnd->jhn", q, k) * key.shape[-1] ** -0.5).softmax(-1)
            rows.append(torch.stack([torch.einsum("jhn,hnd->jhd", weights, x) for x in (k, v)]))
        pooled.append(torch.stack(rows, 1))
    slot_key, slot_value = torch.stack(pooled, 1)
    return slot_key, slot_value


def make_slot_weights(
    layers: int,
    slots: int,
    width: int,
    sharer_channels: int,
    channels: int,
    generator: torch.Generator,
    *,
    blocks: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Weights:
    """A slot adapter's stacked parameters; activations come out of order 1."""

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(layers, *shape, generator=generator) * scale

    weights = {
        "slot_embedding": draw(slots, width, scale=0.5),
        "down_weight": draw(width, 2 * sharer_channels, scale=(2 * sharer_channels) ** -0.5),
        "down_bias": draw(width, scale=0.1),
        "norm_weight": 1.0 + draw(blocks, width, scale=0.1),
        "ffn_in_weight": draw(blocks, 4 * width, width, scale=width**-0.5),
        "ffn_out_weight": draw(blocks, width, 4 * width, scale=(4 * width) ** -0.5),
        "up_weight": draw(2, channels, width, scale=width**-0.5),
        "up_bias": draw(2, channels, scale=0.1),
    }
    return {name: tensor.to(device, dtype) for name, tensor in weights.items()}


def fold_formula(slot_key: Tensor, slot_value: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """``W_down·[K~; V~] + b_down + e`` in ``dtype``, K before V, heads head-major."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    x = torch.cat([slot_key.flatten(3), slot_value.flatten(3)], -1).to(dtype)
    slots = x.shape[2]
    projected = torch.einsum("lbkc,ldc->lbkd", x, w["down_weight"])
    return projected + w["down_bias"][:, None, None] + w["slot_embedding"][:, None, :slots]


def expand_formula(
    latent: Tensor,
    weights: Weights,
    heads: int,
    dtype: torch.dtype,
    noise: TrainingNoise | None = None,
    row: int = 0,
) -> list[Pair]:
    """The definition with products in ``dtype``, and sums, norms and residual in at least float32.

    ``row``: what the noise calls the first layer.
    """
    accumulate = torch.promote_types(dtype, torch.float32)
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    pairs = []
    for i, z in enumerate(latent.to(accumulate)):
        for block in range(w["norm_weight"].shape[1]):
            scale = weights["norm_weight"][i, block].to(accumulate)
            normed = (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS) * scale).to(dtype)
            hidden = F.gelu(F.linear(normed, w["ffn_in_weight"][i, block]))
            added = F.linear(hidden, w["ffn_out_weight"][i, block]).to(accumulate)
            if noise is not None:
                keep = noise.keep(row + i, block, (z.shape[0], z.shape[1], z.shape[2]), z.device)
                added = torch.where(keep, added * noise.keep_scale, 0.0)
            z = z + added
        key, value = (F.linear(z.to(dtype), w["up_weight"][i, side], w["up_bias"][i, side]) for side in (0, 1))
        pairs.append((key.unflatten(-1, (heads, -1)).transpose(1, 2), value.unflatten(-1, (heads, -1)).transpose(1, 2)))
    return pairs


FOLD = ("down_weight", "down_bias", "slot_embedding")
EXPANSION = ("norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias")


def fold_gradients(
    grad: Tensor, slot_key: Tensor, slot_value: Tensor, weights: Weights, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Autograd's of `fold_formula`, by name."""
    named = {"slot_key": slot_key, "slot_value": slot_value} | {name: weights[name] for name in FOLD}
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in named.items()}
    latent = fold_formula(leaves["slot_key"], leaves["slot_value"], {name: leaves[name] for name in FOLD}, dtype)
    return dict(zip(leaves, torch.autograd.grad(latent, list(leaves.values()), grad.to(dtype))))


def expand_gradients(
    grad: Tensor,
    latent: Tensor,
    weights: Weights,
    dtype: torch.dtype,
    noise: TrainingNoise | None = None,
    row: int = 0,
) -> dict[str, Tensor]:
    """Autograd's of `expand_formula`, by name, from ``grad (L, 2, B, H, k, D)``.

    In at least float32: that a gradient is rounded to its weight's dtype comes later.
    """
    named = {"latent": latent} | {name: weights[name] for name in EXPANSION}
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {name: tensor.detach().to(wide).requires_grad_() for name, tensor in named.items()}
    pairs = expand_formula(leaves["latent"], leaves, grad.shape[3], dtype, noise, row)
    made = torch.stack([torch.stack(pair) for pair in pairs])
    found = torch.autograd.grad(made, list(leaves.values()), grad.to(made.dtype), allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found)}
