"""Backward of the fused path, and of projection and injection alone: gradients of every parameter, of the message or
the latent, and of the caches that ask for them.

Between the passes nothing is kept but the forward pass's inputs. The backward pass makes the latents again, some
layers at a time, six launches each: as many as fit into `WORKSPACE` bytes, or a quarter of all, whichever is more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fusion_plan import layer_code
from .injection_backward import injection_gradients
from .noise import NoiseArguments
from .projection_backward import project_gradients, project_states
from .weight_gradients import down_gradient, ffn_gradients

Pair = tuple[Tensor, Tensor]

#: Bytes of latents and their gradients at a time, where that is more than a quarter of all layers'.
WORKSPACE = 48 << 20
#: A quarter of all layers' is a twenty-fifth of what autograd would keep, and fills a GPU in every launch.
PIECES = 4


@dataclass
class FuseGradients:
    """Float32, but for the caches', which have the caches' dtypes.

    Attributes:
        weights: by name, stacked over all layers.
        message: ``(L, B, d)``, with a message.
        sharer, receiver: ``(key, value)`` a layer, where asked for.
    """

    weights: dict[str, Tensor]
    message: Tensor | None
    sharer: list[Pair] | None
    receiver: list[Pair] | None


def fuse_layers_backward(
    grad: Tensor,
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    weights: Mapping[str, Tensor],
    *,
    live: Sequence[tuple[bool, bool]],
    index: Tensor | None,
    message: Tensor | None,
    positions: tuple[int, int],
    norm_eps: float,
    noise: NoiseArguments | None,
    wants_sharer: bool,
    wants_receiver: bool,
) -> FuseGradients:
    """Arguments as of `fusion.fuse_layers`, and ``grad (open gates, B, H, tokens, D)`` of what that returned."""
    batch = receiver[0][0].shape[0]
    first, last = positions
    stacked = {name: tensor.contiguous() for name, tensor in weights.items()}
    found = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in stacked.items()}
    result = FuseGradients(found, None if message is None else torch.zeros_like(message), None, None)
    if wants_receiver:
        result.receiver = [_passed_through(grad, pair, pair_live, at) for pair, pair_live, at in _slots(receiver, live)]
    if wants_sharer and sharer is not None:
        result.sharer = [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in sharer]
    if not grad.numel() or first == last:
        return result
    grad = grad.contiguous()
    sharer_tokens = None if sharer is None else sharer[0][0].shape[2]
    slots = [at for _, _, at in _slots(receiver, live)]
    blocks, width = stacked["norm_weight"].shape[1:]
    most = layers_at_a_time(len(receiver), batch * (last - first), blocks, width, receiver[0][0].element_size())
    for rows in _pieces(sharer, receiver, live, most):
        some = {name: tensor[rows] for name, tensor in stacked.items()}
        own, other = receiver[rows], None if sharer is None else sharer[rows]
        states = project_states(
            other, own, some, index=index, message=None if message is None else message[rows], positions=positions,
            norm_eps=norm_eps, noise=noise, row=rows.start,
        )  # fmt: skip
        dlatent = torch.empty_like(states[-1])
        codes = [layer_code(0, *slots[row], *live[row]) for row in range(rows.start, rows.stop)]
        parts = injection_gradients(
            grad, codes, states[-1], dlatent, some, index=index, sharer_tokens=sharer_tokens, positions=positions,
            noise=noise, row=rows.start, reads_gate=False,
        )  # fmt: skip
        parts |= _projection_parts(states, dlatent, some, own[0][0].dtype, first, norm_eps, noise, rows.start)
        columns = some["down_weight"].shape[2]
        parts["down_weight"] = down_gradient(other, own, dlatent, columns, index=index, positions=positions)
        if result.message is None:
            parts["down_bias"] = dlatent.sum((1, 2))
        else:
            result.message[rows] = dlatent.sum(2)
        for name, part in parts.items():
            found[name][rows] = part
        _add_to_caches(result, rows, dlatent, some["down_weight"], sharer, receiver, index, positions)
    return result


def layers_at_a_time(layers: int, rows: int, blocks: int, width: int, itemsize: int) -> int:
    """Of ``layers``, those whose latents, last latent's gradient and operands exist at once; ``rows``: edited tokens in
    all items, ``itemsize`` of the caches."""
    return max(-(-layers // PIECES), WORKSPACE // ((4 * (blocks + 2) + 2 * itemsize * blocks) * rows * width))


def joint_projection_backward(
    grad: Tensor,
    sharer: Pair | None,
    receiver: Pair,
    weights: Mapping[str, Tensor],
    *,
    index: Tensor | None,
    message: Tensor | None,
    norm_eps: float,
    wants_sharer: bool,
    wants_receiver: bool,
) -> FuseGradients:
    """One layer's, from ``grad (B, N, d)`` of its latent. ``weights`` and ``message (B, d)`` are not stacked, nor is
    what is returned but for the caches' gradients."""
    one = {name: tensor[None].contiguous() for name, tensor in weights.items()}
    found = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in weights.items()}
    result = FuseGradients(found, None if message is None else torch.zeros_like(message), None, None)
    if wants_receiver:
        result.receiver = [(torch.zeros_like(receiver[0]), torch.zeros_like(receiver[1]))]
    if wants_sharer and sharer is not None:
        result.sharer = [(torch.zeros_like(sharer[0]), torch.zeros_like(sharer[1]))]
    if not grad.numel():
        return result
    own, other, positions = [receiver], None if sharer is None else [sharer], (0, receiver[0].shape[2])
    states = project_states(
        other, own, one, index=index, message=None if message is None else message[None], positions=positions,
        norm_eps=norm_eps, noise=None, row=0,
    )  # fmt: skip
    dlatent = torch.empty_like(states[-1])
    dlatent[0].copy_(grad)
    if index is not None:
        rows = index >= 0 if sharer is None else (index >= 0) & (index < sharer[0].shape[2])
        dlatent[0].masked_fill_(~rows[..., None], 0.0)
    parts = _projection_parts(states, dlatent, one, receiver[0].dtype, 0, norm_eps, None, 0)
    columns = weights["down_weight"].shape[1]
    parts["down_weight"] = down_gradient(other, own, dlatent, columns, index=index, positions=positions)
    if result.message is None:
        parts["down_bias"] = dlatent.sum((1, 2))
    else:
        result.message = dlatent[0].sum(1)
    found |= {name: part[0] for name, part in parts.items()}
    _add_to_caches(result, slice(0, 1), dlatent, one["down_weight"], other, own, index, positions)
    return result


def gated_injection_backward(
    grad_key: Tensor, grad_value: Tensor, latent: Tensor, weights: Mapping[str, Tensor], *, edit_mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One layer's, from the gradients ``(B, H, N, D)`` of its edited key and value: the latent's and the weights'."""
    one = {name: tensor[None].contiguous() for name, tensor in weights.items()}
    dlatent = torch.zeros_like(latent, dtype=torch.float32, memory_format=torch.contiguous_format)[None]
    if not grad_key.numel():
        return dlatent[0], {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in weights.items()}
    parts = injection_gradients(
        torch.stack([grad_key, grad_value]),
        [layer_code(0, 0, 1, True, True)],
        latent.float().contiguous()[None],
        dlatent,
        one,
        index=None if edit_mask is None else torch.where(edit_mask, 0, -1).int().contiguous(),
        sharer_tokens=None,
        positions=(0, grad_key.shape[2]),
        noise=None,
        row=0,
        reads_gate=True,
    )
    return dlatent[0], {name: part[0] for name, part in parts.items()}


def _projection_parts(
    states: Tensor,
    dlatent: Tensor,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    first: int,
    norm_eps: float,
    noise: NoiseArguments | None,
    row: int,
) -> dict[str, Tensor]:
    """Back through the blocks: ``dlatent`` becomes the first latent's; returns their parameters' gradients."""
    dnorm, operands = project_gradients(
        states, dlatent, weights, first=first, dtype=dtype, norm_eps=norm_eps, noise=noise, row=row
    )  # fmt: skip
    return {"norm_weight": dnorm, **ffn_gradients(operands, weights)}


def _slots(
    receiver: Sequence[Pair], live: Sequence[tuple[bool, bool]]
) -> Iterator[tuple[Pair, tuple[bool, bool], tuple[int, int]]]:
    """Each layer, its gates, and where its gradients lie in ``grad``."""
    used = 0
    for pair, (key, value) in zip(receiver, live):
        yield pair, (key, value), (used, used + key)
        used += key + value


def _pieces(
    sharer: Sequence[Pair] | None, receiver: Sequence[Pair], live: Sequence[tuple[bool, bool]], most: int
) -> Iterator[slice]:
    """Runs of at most ``most`` layers with an open gate, of nearly one length, whose caches have the same strides."""

    def kind(row: int) -> object:
        pairs = (receiver[row],) if sharer is None else (receiver[row], sharer[row])
        return any(live[row]), tuple(tensor.stride() for pair in pairs for tensor in pair)

    start = 0
    while start < len(receiver):
        stop = start + 1
        while stop < len(receiver) and kind(stop) == kind(start):
            stop += 1
        if any(live[start]):
            pieces = -(-(stop - start) // most)
            cuts = [start + (stop - start) * i // pieces for i in range(pieces + 1)]
            yield from map(slice, cuts[:-1], cuts[1:])
        start = stop


def _passed_through(grad: Tensor, pair: Pair, live: tuple[bool, bool], at: tuple[int, int]) -> Pair:
    """An edit adds to what it edits: the result's gradient is its own. A closed gate's tensor is no result."""
    key, value = (
        grad[slot].clone() if is_open else torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        for tensor, is_open, slot in zip(pair, live, at)
    )
    return key, value


def _add_to_caches(
    result: FuseGradients,
    rows: slice,
    dlatent: Tensor,
    down: Tensor,
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    index: Tensor | None,
    positions: tuple[int, int],
) -> None:
    """What reaches the caches through the projection. By torch: training, whose caches are frozen, never asks."""
    first, last = positions
    batch, heads, _, head_dim = receiver[0][0].shape
    own = 2 * heads * head_dim
    for row in range(rows.start, rows.stop):
        d, w = dlatent[row - rows.start], down[row - rows.start].float()
        if result.receiver is not None:
            dx = (d @ w[:, w.shape[1] - own :]).unflatten(-1, (2, heads, head_dim)).permute(2, 0, 3, 1, 4)
            for tensor, part in zip(result.receiver[row], dx):
                tensor[:, :, first:last] = (tensor[:, :, first:last].float() + part).to(tensor.dtype)
        if result.sharer is not None and sharer is not None:
            key = sharer[row][0]
            dx = d @ w[:, : w.shape[1] - own]
            if index is None:
                there = torch.nn.functional.pad(dx, (0, 0, first, key.shape[2] - last))
            else:
                at = index[:, first:last].long()
                at = torch.where((at >= 0) & (at < key.shape[2]), at, key.shape[2])  # a last row for what has none
                there = dx.new_zeros((batch, key.shape[2] + 1, dx.shape[2]))
                there.scatter_add_(1, at[..., None].expand_as(dx), dx)
                there = there[:, :-1]
            there = there.unflatten(-1, (2, key.shape[1], key.shape[3])).permute(2, 0, 3, 1, 4)
            for tensor, part in zip(result.sharer[row], there):
                tensor.copy_(part)
