"""The torch.library boundary of slots, over all layers: the pooling, the fold to latents, and their expansion.

As in `library`: an op picks its back end when it runs, and each gradient is an op of its own. Kept for it are the
inputs, and of the pooling its result and the softmax's maximum and sum, which are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager_slots
from .backends import current_backend, resolve
from .dispatch import keep, register_gradient
from .errors import BackendError
from .library import like_needed, pairs_of, recompute_gradients, spread, unit_rows
from .noise import TrainingNoise
from .reference import accumulation_dtype

FOLD_WEIGHTS = ("down_weight", "down_bias", "slot_embedding")
EXPANSION_WEIGHTS = ("norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias")
#: Dropout as it crosses the boundary: seed and probability. A negative seed: none.
NO_NOISE = (-1, 0.0)
#: Slots that the kernels serve.
TRITON_SLOTS = 64


def backend_of(like: Tensor, slots: int, width: int | None = None, hidden: int | None = None) -> str:
    """The back end for k ``slots`` of ``like``'s device and dtype; BackendError where Triton was asked for by name and
    cannot serve."""
    backend = resolve(like.device, like.dtype, width, hidden)
    if backend == "eager" or 1 <= slots <= TRITON_SLOTS:
        return backend
    if current_backend() == "triton":
        expected = f"1 to {TRITON_SLOTS} slots, which the Triton kernels serve"
        raise BackendError("backend", expected=expected, got=f"{slots} slots")
    return "eager"


def _own(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient in its input's dtype, contiguous, and no part of something larger: an op's outputs share no memory."""
    grad = grad.to(like.dtype).contiguous()
    return grad.clone() if grad.untyped_storage().nbytes() > grad.nbytes else grad


def _recompute(
    formula: Callable[[Sequence[Any]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    return [_own(grad, grad) for grad in recompute_gradients(formula, inputs, needed, grads)]


# --- the pooling --------------------------------------------------------------------------------------------------


def run_pool_slots(
    sharer: Sequence[Tensor], slot_query: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``sharer``: flat, a key and a value a layer. ``attention_mask``: ``(B, N)``, or ``(B, P, N)`` of token groups.

    Returns ``slot_key``, ``slot_value (L, R, k, Hs, Ds)`` and ``stats (L, R, Hs, k, 2)``; R = B, or B·P of groups."""
    if backend_of(sharer[0], slot_query.shape[1]) == "triton":
        from .kernels import slot_pooling

        rows = sharer if {stride[-1] for stride in map(Tensor.stride, sharer)} == {1} else [*map(unit_rows, sharer)]
        return slot_pooling.pool_slots_with_stats(pairs_of(rows), slot_query, attention_mask=attention_mask)
    states, stats = eager_slots.pool_states(pairs_of(sharer), slot_query, attention_mask)
    slot_key, slot_value = (side.contiguous() for side in eager_slots.finish_states(states, stats))
    return slot_key, slot_value, stats


pool_slots = torch.library.custom_op("lcf_fast::pool_slots", run_pool_slots, mutates_args=())


@pool_slots.register_fake
def _(
    sharer: Sequence[Tensor], slot_query: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    layers, slots = slot_query.shape[:2]
    rows, heads, _, head_dim = sharer[0].shape
    if attention_mask is not None and attention_mask.dim() == 3:
        rows = rows * attention_mask.shape[1]
    dtype = accumulation_dtype(sharer[0].dtype)
    slot_key, slot_value = (sharer[0].new_empty((layers, rows, slots, heads, head_dim), dtype=dtype) for _ in "kv")
    return slot_key, slot_value, sharer[0].new_empty((layers, rows, heads, slots, 2), dtype=dtype)


@torch.library.custom_op("lcf_fast::pool_slots_backward", mutates_args=())
def pool_slots_backward(
    grads: Sequence[Tensor],
    pooled: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    attention_mask: Tensor | None,
) -> list[Tensor]:
    """``grads``: of both pooled sides; ``pooled``: those and the stats; ``inputs``: the query, then the caches, flat.

    The caches' own gradients are the eager formula's: training, whose caches are frozen, never asks.
    """
    slot_query, *caches = inputs
    if not any(needed[1:]) and backend_of(caches[0], slot_query.shape[1]) == "triton":
        from .kernels import slot_pooling_backward

        slot_key, slot_value, stats = pooled
        found = slot_pooling_backward.pool_slots_backward(
            pairs_of([unit_rows(tensor) for tensor in caches]),
            slot_query,
            (slot_key, slot_value),
            stats,
            (grads[0], grads[1]),
            attention_mask=attention_mask,
        )
        return [_own(found, slot_query)] if needed[0] else []

    def formula(leaves: Sequence[Any]) -> Sequence[Tensor]:
        return eager_slots.pool_slots(pairs_of(leaves[1:]), leaves[0], attention_mask)

    return _recompute(formula, inputs, needed, grads)


@pool_slots_backward.register_fake
def _(
    grads: Sequence[Tensor],
    pooled: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    attention_mask: Tensor | None,
) -> list[Tensor]:
    return like_needed(inputs, needed)


def _pool_setup(ctx: Any, inputs: Any, output: Any) -> None:
    sharer, slot_query, attention_mask = inputs
    tensors = [slot_query, *sharer]
    ctx.needed = [t.requires_grad for t in tensors]
    ctx.has_mask = attention_mask is not None
    ctx.mark_non_differentiable(output[2])
    keep(ctx, [*tensors, *output, *([attention_mask] if ctx.has_mask else [])])


def _pool_backward(ctx: Any, grad_key: Tensor, grad_value: Tensor, _: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    mask = tensors.pop() if ctx.has_mask else None
    inputs, pooled = tensors[:-3], tensors[-3:]
    found = pool_slots_backward([grad_key, grad_value], pooled, inputs, ctx.needed, mask)
    query, *sharer = spread(found, ctx.needed)
    return sharer, query, None


register_gradient(pool_slots, _pool_backward, setup_context=_pool_setup)


# --- the fold -----------------------------------------------------------------------------------------------------


def run_fold_slots(slot_key: Tensor, slot_value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``weights``: `FOLD_WEIGHTS`, stacked. Returns the latent ``(L, B, k, d)``."""
    named = dict(zip(FOLD_WEIGHTS, weights))
    if backend_of(slot_key, slot_key.shape[2], weights[0].shape[1]) == "triton":
        from .kernels import slot_projection

        return slot_projection.fold_slots(slot_key.float(), slot_value.float(), named)
    return eager_slots.fold_slots(slot_key, slot_value, named)


fold_slots = torch.library.custom_op("lcf_fast::fold_slots", run_fold_slots, mutates_args=())


@fold_slots.register_fake
def _(slot_key: Tensor, slot_value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    shape = (*slot_key.shape[:3], weights[0].shape[1])
    return slot_key.new_empty(shape, dtype=accumulation_dtype(slot_key.dtype))


@torch.library.custom_op("lcf_fast::fold_slots_backward", mutates_args=())
def fold_slots_backward(grad: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """``inputs``: both pooled sides, then `FOLD_WEIGHTS`."""
    slot_key, slot_value, *weights = inputs
    if backend_of(slot_key, slot_key.shape[2], weights[0].shape[1]) == "triton":
        from .kernels import slot_projection_backward

        slots, found = slot_projection_backward.fold_slots_backward(
            grad.float(),
            slot_key.float(),
            slot_value.float(),
            dict(zip(FOLD_WEIGHTS, weights)),
            wants_slots=needed[0] or needed[1],
        )
        made = [*((None, None) if slots is None else slots), *(found[name] for name in FOLD_WEIGHTS)]
        return [_own(g, x) for g, x, need in zip(made, inputs, needed) if need and g is not None]

    def formula(leaves: Sequence[Any]) -> Sequence[Tensor]:
        return (eager_slots.fold_slots(leaves[0], leaves[1], dict(zip(FOLD_WEIGHTS, leaves[2:]))),)

    return _recompute(formula, inputs, needed, (grad,))


@fold_slots_backward.register_fake
def _(grad: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return like_needed(inputs, needed)


def _fold_setup(ctx: Any, inputs: Any, output: Any) -> None:
    slot_key, slot_value, weights = inputs
    tensors = [slot_key, slot_value, *weights]
    ctx.needed = [t.requires_grad for t in tensors]
    keep(ctx, tensors)


def _fold_backward(ctx: Any, grad: Tensor) -> Any:
    found = fold_slots_backward(grad, list(ctx.saved_tensors), ctx.needed)
    slot_key, slot_value, *weights = spread(found, ctx.needed)
    return slot_key, slot_value, weights


register_gradient(fold_slots, _fold_backward, setup_context=_fold_setup)


# --- the expansion ------------------------------------------------------------------------------------------------


def _noise(seed: int, dropout: float) -> TrainingNoise | None:
    """None too where nothing would be dropped."""
    noise = None if seed < 0 else TrainingNoise(seed, 1.0, dropout)
    return noise if noise is not None and noise.threshold else None


def run_expand_slots(
    latent: Tensor, weights: Sequence[Tensor], kv_heads: int, norm_eps: float, seed: int, dropout: float, row: int
) -> Tensor:
    """``weights``: `EXPANSION_WEIGHTS`, stacked; ``row``: what the noise calls the first layer. Returns the keys and
    values ``(L, 2, B, Hr, k, Dr)``."""
    named, noise = dict(zip(EXPANSION_WEIGHTS, weights)), _noise(seed, dropout)
    layers, batch, slots, width = latent.shape
    if backend_of(latent, slots, width, weights[1].shape[2]) == "triton":
        from .kernels import slot_projection

        shape = (layers, 2, batch, kv_heads, slots, weights[3].shape[2] // kv_heads)
        made = latent.new_empty(shape, dtype=torch.float32)
        slot_projection.expand_slots(
            latent.float(),
            named,
            list(zip(made[:, 0].unbind(0), made[:, 1].unbind(0))),
            norm_eps=norm_eps,
            noise=None if noise is None else noise.arguments,
            row=row,
        )
        return made
    return eager_slots.expand_slots(latent, named, kv_heads, norm_eps, noise, row).contiguous()


expand_slots = torch.library.custom_op("lcf_fast::expand_slots", run_expand_slots, mutates_args=())


@expand_slots.register_fake
def _(
    latent: Tensor, weights: Sequence[Tensor], kv_heads: int, norm_eps: float, seed: int, dropout: float, row: int
) -> Tensor:
    layers, batch, slots, _ = latent.shape
    shape = (layers, 2, batch, kv_heads, slots, weights[3].shape[2] // kv_heads)
    return latent.new_empty(shape, dtype=accumulation_dtype(latent.dtype))


@torch.library.custom_op("lcf_fast::expand_slots_backward", mutates_args=())
def expand_slots_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    kv_heads: int,
    norm_eps: float,
    seed: int,
    dropout: float,
    row: int,
) -> list[Tensor]:
    """``inputs``: the latent, then `EXPANSION_WEIGHTS`."""
    latent, *weights = inputs
    noise = _noise(seed, dropout)
    if backend_of(latent, latent.shape[2], latent.shape[3], weights[1].shape[2]) == "triton":
        from .kernels import slot_projection_backward

        dlatent, found = slot_projection_backward.expand_slots_backward(
            grad.float(),
            latent.float(),
            dict(zip(EXPANSION_WEIGHTS, weights)),
            norm_eps=norm_eps,
            noise=None if noise is None else noise.arguments,
            row=row,
            wants_weights=any(needed[1:]),
        )
        made = [dlatent, *(found.get(name) for name in EXPANSION_WEIGHTS)]
        return [_own(g, x) for g, x, need in zip(made, inputs, needed) if need and g is not None]

    def formula(leaves: Sequence[Any]) -> Sequence[Tensor]:
        named = dict(zip(EXPANSION_WEIGHTS, leaves[1:]))
        return (eager_slots.expand_slots(leaves[0], named, kv_heads, norm_eps, noise, row),)

    return _recompute(formula, inputs, needed, (grad,))


@expand_slots_backward.register_fake
def _(
    grad: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    kv_heads: int,
    norm_eps: float,
    seed: int,
    dropout: float,
    row: int,
) -> list[Tensor]:
    return like_needed(inputs, needed)


def _expand_setup(ctx: Any, inputs: Any, output: Any) -> None:
    latent, weights, *ctx.scalars = inputs
    tensors = [latent, *weights]
    ctx.needed = [t.requires_grad for t in tensors]
    keep(ctx, tensors)


def _expand_backward(ctx: Any, grad: Tensor) -> Any:
    found = expand_slots_backward(grad, list(ctx.saved_tensors), ctx.needed, *ctx.scalars)
    latent, *weights = spread(found, ctx.needed)
    return latent, weights, *[None] * len(ctx.scalars)


register_gradient(expand_slots, _expand_backward, setup_context=_expand_setup)
