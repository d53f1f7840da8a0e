"""The torch.library boundary of `fuse_layers`, over all layers.

Caches cross as flat lists ``[k0, v0, k1, v1, ...]`` over the kept layers, hard gates as host bools ``[k0, v0, ...]``,
so that a fake knows the output's shape. Out of place, `fuse_layers` returns the edited tensors only, stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor

from . import eager, reference
from .backends import resolve
from .dispatch import count_edits, keep, register_gradient
from .layouts import Layers
from .library import (
    WEIGHTS,
    Pair,
    like_needed,
    pairs_of,
    recompute_gradients,
    spread,
    unit_rows,
    with_unit_rows,
)
from .noise import TrainingNoise

#: A training pass's noise as it crosses the boundary: seed, temperature, dropout. A negative seed: no noise.
NO_NOISE = (-1, 1.0, 0.0)


def _noise(seed: int, temperature: float, dropout: float) -> TrainingNoise | None:
    return None if seed < 0 else TrainingNoise(seed, temperature, dropout)


def fuse_checked(
    backend: str,
    sharer: Layers | None,
    receiver: Layers,
    weights: Sequence[Tensor],
    gates: tuple[tuple[bool, bool], ...],
    index: Tensor | None,
    message: Tensor | None,
    first: int,
    last: int,
    norm_eps: float,
    noise: TrainingNoise | None,
    inplace: bool,
) -> Tensor | None:
    """Run a back end. ``index (B, N)`` int32 is negative where a position must stay; without a sharer it only masks."""
    named = dict(zip(WEIGHTS, weights))
    key = receiver.tensors[0]
    if backend == "triton":
        from .kernels import fusion

        out = fusion.fuse_layers(
            None if sharer is None else with_unit_rows(sharer),
            receiver if inplace else with_unit_rows(receiver),
            named,
            live=gates,
            index=index,
            message=None if message is None else message.float().contiguous(),
            positions=(first, last),
            inplace=inplace,
            norm_eps=norm_eps,
            noise=None if noise is None else noise.arguments,
        )
        if inplace:
            count_edits(compress(receiver.tensors, chain.from_iterable(gates)))
        return out
    is_mask = sharer is None and index is not None
    options: dict[str, Any] = {
        "sharer_index": None if sharer is None else index,
        "message": message,
        "edit_mask": index >= 0 if is_mask and index is not None else None,
        "positions": (first, last),
        "norm_eps": norm_eps,
    }
    pairs = None if sharer is None else pairs_of(sharer.tensors)
    own = pairs_of(receiver.tensors)
    fused: Sequence[tuple[Tensor, Tensor]]
    if noise is not None:
        fused = reference.fuse_layers(pairs, own, named, noise=noise, **options)
    else:
        run = eager.fuse_layers_ if inplace else eager.fuse_layers
        fused = run(pairs, own, named, live=gates, **options)
    if inplace:
        return None
    edited = [tensor for pair, opened in zip(fused, gates) for tensor, is_open in zip(pair, opened) if is_open]
    return torch.stack(edited) if edited else key.new_empty(0, *key.shape)


def _fuse(
    sharer: Sequence[Tensor],
    receiver: Sequence[Tensor],
    weights: Sequence[Tensor],
    live: Sequence[bool],
    *arguments: Any,
) -> Tensor | None:
    """`fuse_checked` from behind the boundary, where only tensors and numbers come."""
    key = receiver[0]
    backend = resolve(key.device, key.dtype, weights[0].shape[1], weights[3].shape[2])
    other = Layers.of(sharer) if sharer else None
    gates = tuple(zip(live[0::2], live[1::2]))
    return fuse_checked(backend, other, Layers.of(receiver), weights, gates, *arguments)


def run_fuse_layers(
    sharer: Sequence[Tensor],
    receiver: Sequence[Tensor],
    weights: Sequence[Tensor],
    live: Sequence[bool],
    index: Tensor | None,
    message: Tensor | None,
    first: int,
    last: int,
    norm_eps: float,
    seed: int,
    temperature: float,
    dropout: float,
) -> Tensor:
    noise = _noise(seed, temperature, dropout)
    out = _fuse(sharer, receiver, weights, live, index, message, first, last, norm_eps, noise, False)
    assert out is not None
    return out


fuse_layers = torch.library.custom_op("lcf_fast::fuse_layers", run_fuse_layers, mutates_args=())


@fuse_layers.register_fake
def _(
    sharer: Sequence[Tensor],
    receiver: Sequence[Tensor],
    weights: Sequence[Tensor],
    live: Sequence[bool],
    index: Tensor | None,
    message: Tensor | None,
    first: int,
    last: int,
    norm_eps: float,
    seed: int,
    temperature: float,
    dropout: float,
) -> Tensor:
    return receiver[0].new_empty(sum(live), *receiver[0].shape)


def run_fuse_layers_(
    sharer: Sequence[Tensor],
    receiver: Sequence[Tensor],
    weights: Sequence[Tensor],
    live: Sequence[bool],
    index: Tensor | None,
    message: Tensor | None,
    first: int,
    last: int,
    norm_eps: float,
) -> None:
    _fuse(sharer, receiver, weights, live, index, message, first, last, norm_eps, None, True)


fuse_layers_ = torch.library.custom_op("lcf_fast::fuse_layers_", run_fuse_layers_, mutates_args=("receiver",))


@fuse_layers_.register_fake
def _(
    sharer: Sequence[Tensor],
    receiver: Sequence[Tensor],
    weights: Sequence[Tensor],
    live: Sequence[bool],
    index: Tensor | None,
    message: Tensor | None,
    first: int,
    last: int,
    norm_eps: float,
) -> None:
    return None


@torch.library.custom_op("lcf_fast::fuse_layers_backward", mutates_args=())
def fuse_layers_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    layers: int,
    live: Sequence[bool],
    index: Tensor | None,
    has_message: bool,
    first: int,
    last: int,
    norm_eps: float,
    seed: int,
    temperature: float,
    dropout: float,
) -> list[Tensor]:
    noise = _noise(seed, temperature, dropout)
    key, down, ffn_in = inputs[0], inputs[2 * layers], inputs[2 * layers + 3]
    if resolve(key.device, key.dtype, down.shape[1], ffn_in.shape[2]) == "triton":
        return _kernel_gradients(grad, inputs, needed, layers, live, index, has_message, (first, last), norm_eps, noise)

    def formula(leaves: Sequence[Any]) -> Sequence[Tensor]:
        receiver, weights, sharer, message = _split(leaves, layers, has_message)
        fused = reference.fuse_layers(
            sharer,
            receiver,
            weights,
            sharer_index=None if has_message else index,
            message=message,
            edit_mask=index >= 0 if has_message and index is not None else None,
            positions=(first, last),
            norm_eps=norm_eps,
            noise=noise,
        )
        return [tensor for tensor, is_open in zip((t for pair in fused for t in pair), live) if is_open]

    return recompute_gradients(formula, inputs, needed, list(grad.unbind(0)))


def _split(
    tensors: Sequence[Any], layers: int, has_message: bool
) -> tuple[list[Pair], dict[str, Any], list[Pair] | None, Any]:
    """What `_fuse_setup` saved: receiver, weights, sharer, message."""
    receiver, rest = pairs_of(tensors[: 2 * layers]), tensors[2 * layers :]
    weights, rest = dict(zip(WEIGHTS, rest)), rest[len(WEIGHTS) :]
    return receiver, weights, None if has_message else pairs_of(rest), rest[0] if has_message else None


def _kernel_gradients(
    grad: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    layers: int,
    live: Sequence[bool],
    index: Tensor | None,
    has_message: bool,
    positions: tuple[int, int],
    norm_eps: float,
    noise: TrainingNoise | None,
) -> list[Tensor]:
    from .kernels.fusion_backward import fuse_layers_backward

    rows = [unit_rows(tensor) for tensor in inputs[: 2 * layers]]
    receiver, weights, sharer, message = _split([*rows, *inputs[2 * layers :]], layers, has_message)
    first_sharer = 2 * layers + len(WEIGHTS)
    found = fuse_layers_backward(
        grad,
        None if sharer is None else [(unit_rows(key), unit_rows(value)) for key, value in sharer],
        receiver,
        weights,
        live=list(zip(live[0::2], live[1::2])),
        index=index,
        message=None if message is None else message.float().contiguous(),
        positions=positions,
        norm_eps=norm_eps,
        noise=None if noise is None else noise.arguments,
        wants_sharer=not has_message and any(needed[first_sharer:]),
        wants_receiver=any(needed[: 2 * layers]),
    )
    nothing: list[Any] = [None] * (2 * layers)
    flat = [t for pair in found.receiver for t in pair] if found.receiver is not None else list(nothing)
    flat += [found.weights[name] for name in WEIGHTS]
    flat += [found.message] if has_message else list(nothing)
    if found.sharer is not None:
        flat[first_sharer:] = [t for pair in found.sharer for t in pair]
    return [gradient.to(x.dtype) for gradient, x, need in zip(flat, inputs, needed) if need]


@fuse_layers_backward.register_fake
def _(
    grad: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    layers: int,
    live: Sequence[bool],
    index: Tensor | None,
    has_message: bool,
    first: int,
    last: int,
    norm_eps: float,
    seed: int,
    temperature: float,
    dropout: float,
) -> list[Tensor]:
    return like_needed(inputs, needed)


def _fuse_setup(ctx: Any, inputs: Any, output: Any) -> None:
    sharer, receiver, weights, live, index, message, *ctx.scalars = inputs
    tensors = [*receiver, *weights, *([message] if message is not None else sharer)]
    ctx.needed = [t.requires_grad for t in tensors]
    ctx.layers, ctx.live, ctx.has_index = len(receiver) // 2, list(live), index is not None
    ctx.has_message, ctx.sharers = message is not None, len(sharer)
    ctx.weights = len(weights)
    keep(ctx, [*tensors, *([index] if index is not None else [])])


def _fuse_backward(ctx: Any, grad: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    index = tensors.pop() if ctx.has_index else None
    found = fuse_layers_backward(grad, tensors, ctx.needed, ctx.layers, ctx.live, index, ctx.has_message, *ctx.scalars)
    grads = spread(found, ctx.needed)
    receiver, grads = grads[: 2 * ctx.layers], grads[2 * ctx.layers :]
    weights, grads = grads[: ctx.weights], grads[ctx.weights :]
    sharer, message = ([], grads[0]) if ctx.has_message else (grads, None)
    return sharer, receiver, weights, None, None, message, *[None] * len(ctx.scalars)


register_gradient(fuse_layers, _fuse_backward, setup_context=_fuse_setup)
