"""The torch.library boundary of pooling: one layer, and all layers folded to a message.

The gradients are closed forms with kernels of their own; nothing but the inputs (and the summary, which is small) is
kept for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager_pooling, reference
from .backends import resolve
from .dispatch import keep, register_gradient
from .layouts import Layers
from .library import Pair, like_needed, pairs_of, spread, unit_rows, with_unit_rows

SUMMARY_WEIGHTS = ("span_query", "global_query", "down_weight", "down_bias")


def run_attention_pool(
    key: Tensor,
    value: Tensor,
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if resolve(key.device, key.dtype) == "triton":
        from .kernels import pooling

        return pooling.attention_pool(
            unit_rows(key), unit_rows(value), span_query, global_query, span_offsets, attention_mask
        )
    return eager_pooling.attention_pool(
        key, value, span_query, global_query, span_offsets, attention_mask=attention_mask
    )


attention_pool = torch.library.custom_op("lcf_fast::attention_pool", run_attention_pool, mutates_args=())


@attention_pool.register_fake
def _(
    key: Tensor,
    value: Tensor,
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (key.shape[0], key.shape[1], key.shape[3])
    return key.new_empty(shape), value.new_empty(shape)


def run_pool_backward(
    caches: Sequence[Pair],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
    grad: Tensor,
    wants_cache: bool,
) -> tuple[Tensor, Tensor, list[Pair]]:
    """Gradients of both queries ``(L, H, D)``, and of the caches or none, for ``grad (L, 2, B, H, D)``."""
    key = caches[0][0]
    if resolve(key.device, key.dtype) != "triton":
        return eager_pooling.pool_backward(
            caches, span_query, global_query, span_offsets, attention_mask, grad, wants_cache
        )
    from .kernels import pooling_backward

    offsets, mask = eager_pooling.with_tracks(span_offsets, attention_mask)
    entries = eager_pooling.span_of_token(offsets, mask, key.shape[2])
    pairs = [(unit_rows(k), unit_rows(v)) for k, v in caches]
    return pooling_backward.pool_backward(
        [k for k, _ in pairs],
        [v for _, v in pairs],
        span_query,
        global_query,
        offsets.to(torch.int32).contiguous(),
        entries.to(torch.int32).contiguous(),
        grad,
        wants_cache,
    )


@torch.library.custom_op("lcf_fast::attention_pool_backward", mutates_args=())
def attention_pool_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> list[Tensor]:
    key, value, span_query, global_query = inputs
    dtype = reference.accumulation_dtype(key.dtype)
    found = run_pool_backward(
        [(key, value)],
        span_query[None],
        global_query[None],
        span_offsets,
        attention_mask,
        torch.stack([grad.to(dtype) for grad in grads])[None],
        needed[0] or needed[1],
    )
    cache = found[2][0] if found[2] else (None, None)
    made = (*cache, found[0][0].to(span_query.dtype), found[1][0].to(global_query.dtype))
    return [_own(grad) for grad, need in zip(made, needed) if need and grad is not None]


def _own(grad: Tensor) -> Tensor:
    """No two outputs of an op may share memory."""
    return grad.clone(memory_format=torch.contiguous_format) if grad._is_view() else grad


@attention_pool_backward.register_fake
def _(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> list[Tensor]:
    return like_needed(inputs, needed)


def _pool_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, span_offsets, attention_mask = inputs
    ctx.needed = [t.requires_grad for t in tensors]
    ctx.has_mask = attention_mask is not None
    keep(ctx, [*tensors, span_offsets, *([attention_mask] if ctx.has_mask else [])])


def _pool_backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    mask = tensors.pop() if ctx.has_mask else None
    offsets = tensors.pop()
    found = attention_pool_backward([grad_key, grad_value], tensors, ctx.needed, offsets, mask)
    return *spread(found, ctx.needed), None, None


register_gradient(attention_pool, _pool_backward, setup_context=_pool_setup)


# --- all layers ---------------------------------------------------------------------------------------------------


def run_summarize_layers(
    sharer: Sequence[Tensor], weights: Sequence[Tensor], span_offsets: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `summarize_checked`."""
    return summarize_checked(Layers.of(sharer), weights, span_offsets, attention_mask)


def summarize_checked(
    sharer: Layers, weights: Sequence[Tensor], span_offsets: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``weights``: `SUMMARY_WEIGHTS`, stacked. Returns ``latent (L, B, d)`` and ``summary (L, 2, B, Hs, Ds)``."""
    flat = sharer.tensors
    if resolve(flat[0].device, flat[0].dtype) == "triton":
        from .kernels import pooling

        flat = with_unit_rows(sharer).tensors
        span_query, global_query, down_weight, down_bias = weights
        return pooling.summarize_layers(
            flat[0::2], flat[1::2], span_query, global_query, down_weight, down_bias, span_offsets, attention_mask
        )
    named = dict(zip(SUMMARY_WEIGHTS, weights))
    return eager_pooling.summarize_layers(pairs_of(flat), named, span_offsets, attention_mask=attention_mask)


summarize_layers = torch.library.custom_op("lcf_fast::summarize_layers", run_summarize_layers, mutates_args=())


@summarize_layers.register_fake
def _(
    sharer: Sequence[Tensor], weights: Sequence[Tensor], span_offsets: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    layers = len(sharer) // 2
    batch, heads, _, head_dim = sharer[0].shape
    dtype = reference.accumulation_dtype(sharer[0].dtype)
    latent = sharer[0].new_empty((layers, batch, weights[2].shape[1]), dtype=dtype)
    return latent, sharer[0].new_empty((layers, 2, batch, heads, head_dim), dtype=dtype)


@torch.library.custom_op("lcf_fast::summarize_layers_backward", mutates_args=())
def summarize_layers_backward(
    grads: Sequence[Tensor],
    summary: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> list[Tensor]:
    """``grads``: of the latent and of the summary. ``inputs``: `SUMMARY_WEIGHTS`, then the caches, flat."""
    grad_latent, grad_summary = grads
    span_query, global_query, down_weight, down_bias = inputs[:4]
    count = 2 * summary.shape[3] * summary.shape[4]
    flat = summary.transpose(1, 2).flatten(2)  # (L, B, 2Cs)
    found: list[Tensor | None] = [None] * len(inputs)
    if needed[2]:
        columns = torch.bmm(grad_latent.mT, flat).to(down_weight.dtype)
        found[2] = torch.nn.functional.pad(columns, (0, down_weight.shape[2] - count))
    if needed[3]:
        found[3] = grad_latent.sum(1).to(down_bias.dtype)
    if any(needed[:2]) or any(needed[4:]):
        folded = torch.bmm(grad_latent, down_weight[:, :, :count].to(grad_latent.dtype))
        folded = folded.view(*flat.shape[:2], *summary.shape[1:2], *summary.shape[3:]).transpose(1, 2)
        caches = pairs_of(inputs[4:])
        span, other, cache = run_pool_backward(
            caches, span_query, global_query, span_offsets, attention_mask, grad_summary + folded, any(needed[4:])
        )
        found[0], found[1] = span.to(span_query.dtype), other.to(global_query.dtype)
        found[4:] = [grad for pair in cache for grad in pair]
    return [_own(grad) for grad, need in zip(found, needed) if need and grad is not None]


@summarize_layers_backward.register_fake
def _(
    grads: Sequence[Tensor],
    summary: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> list[Tensor]:
    return like_needed(inputs, needed)


def _summarize_setup(ctx: Any, inputs: Any, output: Any) -> None:
    sharer, weights, span_offsets, attention_mask = inputs
    tensors = [*weights, *sharer]
    ctx.needed = [t.requires_grad for t in tensors]
    ctx.weights, ctx.has_mask = len(weights), attention_mask is not None
    keep(ctx, [*tensors, output[1], span_offsets, *([attention_mask] if ctx.has_mask else [])])


def _summarize_backward(ctx: Any, grad_latent: Tensor, grad_summary: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    mask = tensors.pop() if ctx.has_mask else None
    offsets, summary = tensors.pop(), tensors.pop()
    found = summarize_layers_backward([grad_latent, grad_summary], summary, tensors, ctx.needed, offsets, mask)
    grads = spread(found, ctx.needed)
    return grads[ctx.weights :], grads[: ctx.weights], None, None


register_gradient(summarize_layers, _summarize_backward, setup_context=_summarize_setup)
