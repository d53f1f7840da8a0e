"""Fold and expansion of slots, backward: nothing of the forward pass is kept but its inputs.

A row is (item, slot), as in `slot_projection`: the ``B·k`` of them stand where LCF has the tokens of one item, and go
through its kernels (`projection_backward`, `weight_gradients`). New here are the latents of such rows, made again in
`slot_states_kernel`, and the way back through the up-projection, whose sides both read all of z, in
`up_slots_backward_kernel`. Products run in the gradient's dtype, which is the destination's; what is summed over rows
is summed in float32 and in a fixed order, without atomics: the same bits from run to run.

Cost a row and layer: ``32·d²`` FLOPs for the latents again, ``48·d²`` back through two blocks, ``64·d²`` for their
matrices, ``8·Cr·d`` for the up-projection, ``8·Cs·d`` for the fold. In memory at once: ``4·d`` bytes for each block and
one more, twice, where the gradient itself has ``2·Cr`` numbers a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TRITON_DTYPE, cast, device_guard, dot_precision, head_chunk, long_dot, target_of
from .noise import NoiseArguments, drawn_for
from .policy import backward_config
from .projection_backward import block_launch, project_gradients, states_tile
from .weight_gradients import down_gradient, ffn_gradients

Pair = tuple[Tensor, Tensor]
_BLOCKS = ("norm_weight", "ffn_in_weight", "ffn_out_weight")


@triton.jit(do_not_specialize=["row", "seed", "threshold", "keep_scale", "first", "span", "tiles", "batch", "slots"])
def slot_states_kernel(
    latent,
    states,
    norm_weight,
    ffn_in_weight,
    ffn_out_weight,
    row,
    seed,
    threshold,
    keep_scale,
    first,
    span,
    tiles,
    batch,
    slots,
    stride_block,
    HAS_NOISE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one layer: ``latent (G, B, N, d)`` to ``states (BLOCKS + 1, G, B, N, d)``, float32, contiguous.

    Launched as `projection_backward.block_launch` says.
    """
    HALF: tl.constexpr = WIDTH // 2
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    i_batch = ((i_program // tiles) % batch).to(tl.int64)
    i_layer = i_program // (tiles * batch)
    o_t = tl.arange(0, BLOCK_T)
    o_z = tl.arange(0, HALF)
    o_token, i_item = drawn_for(first + i_tile * BLOCK_T + o_t, i_batch, slots, IS_PACKED)
    m_row = (i_tile * BLOCK_T + o_t < span)[:, None]
    o_state = ((i_layer * batch + i_batch) * span + i_tile * BLOCK_T) * WIDTH + o_t[:, None] * WIDTH + o_z[None, :]
    z_k = tl.load(latent + o_state, mask=m_row, other=0.0)
    z_v = tl.load(latent + o_state + HALF, mask=m_row, other=0.0)
    states_tile(
        z_k, z_v, states + o_state, m_row, stride_block, norm_weight + i_layer * (BLOCKS * WIDTH),
        ffn_in_weight + i_layer * (BLOCKS * HIDDEN * WIDTH), ffn_out_weight + i_layer * (BLOCKS * HIDDEN * WIDTH),
        seed, threshold, keep_scale, o_token, i_item, row + i_layer,
        WIDTH, HIDDEN, BLOCKS, BLOCK_F, EPS, HAS_NOISE, DTYPE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles"])
def up_slots_backward_kernel(
    grad,
    up_weight,
    dlatent,
    rows,
    tiles,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows of one layer: ``dz = grad_K W_up[0] + grad_V W_up[1]``, BLOCK_C channels of one side a step.

    ``grad (L, 2, rows, CHANNELS)``, ``up_weight (L, 2, CHANNELS, WIDTH)``, ``dlatent (L, rows, WIDTH)`` float32; all
    contiguous. Axis 0: ``[row tile, layer]``, tile fastest.
    """
    HALF: tl.constexpr = WIDTH // 2
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    i_layer = (tl.program_id(0) // tiles).to(tl.int64)
    i_start = (tl.program_id(0) % tiles) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    m_r = (i_start + o_r < rows)[:, None]
    o_z = tl.arange(0, HALF)
    o_c = tl.arange(0, BLOCK_C)
    d_k = tl.zeros([BLOCK_R, HALF], dtype=tl.float32)
    d_v = tl.zeros([BLOCK_R, HALF], dtype=tl.float32)
    for i in range(0, 2 * CHUNKS):
        i_side = i_layer * 2 + i // CHUNKS
        o_channel = (i % CHUNKS) * BLOCK_C + o_c
        p_g = grad + (i_side * rows + i_start) * CHANNELS + (o_r[:, None] * CHANNELS + o_channel[None, :])
        p_w = up_weight + i_side * (CHANNELS * WIDTH) + (o_channel[:, None] * WIDTH + o_z[None, :])
        if CHANNELS % BLOCK_C == 0:
            b_grad = tl.load(p_g, mask=m_r, other=0.0)
            b_w_k = tl.load(p_w)
            b_w_v = tl.load(p_w + HALF)
        else:
            m_channel = o_channel < CHANNELS
            b_grad = tl.load(p_g, mask=m_r & m_channel[None, :], other=0.0)
            b_w_k = tl.load(p_w, mask=m_channel[:, None], other=0.0)
            b_w_v = tl.load(p_w + HALF, mask=m_channel[:, None], other=0.0)
        d_k = long_dot(b_grad, cast(b_w_k, DTYPE), d_k, PRECISION)
        d_v = long_dot(b_grad, cast(b_w_v, DTYPE), d_v, PRECISION)
    p_z = dlatent + (i_layer * rows + i_start) * WIDTH + (o_r[:, None] * WIDTH + o_z[None, :])
    tl.store(p_z, d_k, mask=m_r)
    tl.store(p_z + HALF, d_v, mask=m_r)


def _column_gradient(key: Tensor, value: Tensor, dlatent: Tensor) -> Tensor:
    """``sum over rows of dlatent ⊗ [key; value]``, ``(L, d, 2C)`` float32; of ``(L, rows, C)`` and ``(L, rows, d)``.

    To `weight_gradients.down_gradient` they are one item's caches of one wide head.
    """
    pairs = list(zip(key[:, None, None].unbind(0), value[:, None, None].unbind(0)))
    return down_gradient(
        None, pairs, dlatent[:, None], 2 * key.shape[2], index=None, positions=(0, key.shape[1])
    )  # fmt: skip


def fold_slots_backward(
    grad: Tensor, slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor], *, wants_slots: bool
) -> tuple[Pair | None, dict[str, Tensor]]:
    """Gradients of `slot_projection.fold_slots`, whose arguments these are.

    Args:
        grad: of the latent, ``(L, B, k, d)`` float32.
        wants_slots: whether those of the pooled slots are made.

    Returns:
        Those of ``slot_key`` and ``slot_value`` ``(L, B, k, Hs, Ds)``, or None; and of the weights by name, each of its
        weight's shape. All float32.
    """
    layers, batch, slots, width = grad.shape
    rows = batch * slots
    found = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in weights.items()}
    if not grad.numel():
        return (torch.zeros_like(slot_key), torch.zeros_like(slot_value)) if wants_slots else None, found
    flat = grad.contiguous().view(layers, rows, width)
    key, value = (slot.contiguous().view(layers, rows, -1) for slot in (slot_key, slot_value))
    found["down_weight"] = _column_gradient(key, value, flat)
    found["down_bias"] = flat.sum(1)
    found["slot_embedding"][:, :slots] = grad.sum(1)
    if not wants_slots:
        return None, found
    # In float32 whatever the weights' dtype, as the fold itself.
    dkey, dvalue = (torch.bmm(flat, half.float()) for half in weights["down_weight"].split(key.shape[2], 2))
    return (dkey.view(slot_key.shape), dvalue.view(slot_value.shape)), found


def expand_slots_backward(
    grad: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    norm_eps: float,
    noise: NoiseArguments | None = None,
    row: int = 0,
    wants_weights: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of `slot_projection.expand_slots`, whose arguments these are but for the first.

    Args:
        grad: of every layer's keys and values, ``(L, 2, B, Hr, k, Dr)``; the products run in its dtype.
        wants_weights: whether those of the weights are made.

    Returns:
        That of ``latent`` ``(L, B, k, d)``, and those of the weights by name, or none. All float32.
    """
    layers, batch, slots, width = latent.shape
    rows, channels = batch * slots, grad.shape[3] * grad.shape[5]
    stacked = {name: tensor.contiguous() for name, tensor in weights.items()}
    if not grad.numel():
        found = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in stacked.items()}
        return torch.zeros_like(latent, memory_format=torch.contiguous_format), found if wants_weights else {}
    blocks = stacked["norm_weight"].shape[1]
    packed = grad.transpose(3, 4).reshape(layers, 2, rows, channels).contiguous()
    states = latent.new_empty((blocks + 1, layers, 1, rows, width))
    dlatent = torch.empty_like(states[-1])
    arguments, options, tiles = block_launch(states, stacked, 0, grad.dtype, norm_eps, noise, row, slots)
    config = backward_config(width, grad.element_size(), target_of(grad))
    with device_guard(grad):
        slot_states_kernel[(layers * tiles,)](latent.contiguous(), states, *arguments, **options)
        up_slots_backward_kernel[(layers * tiles,)](
            packed,
            stacked["up_weight"],
            dlatent,
            rows,
            tiles,
            CHANNELS=channels,
            WIDTH=width,
            BLOCK_R=config.block_tokens,
            BLOCK_C=head_chunk(channels, config.block_channels),
            DTYPE=TRITON_DTYPE[grad.dtype],
            PRECISION=dot_precision(grad.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if blocks:
        dnorm, operands = project_gradients(
            states, dlatent, stacked, first=0, dtype=grad.dtype, norm_eps=norm_eps, noise=noise, row=row, slots=slots
        )  # fmt: skip
    result = dlatent.view(latent.shape)
    if not wants_weights:
        return result, {}
    up = _column_gradient(packed[:, 0], packed[:, 1], states[-1, :, 0])
    found = {"up_weight": up.mT.unflatten(1, (2, channels)), "up_bias": packed.sum(2, dtype=torch.float32)}
    if not blocks:
        return result, found | {name: torch.zeros_like(stacked[name], dtype=torch.float32) for name in _BLOCKS}
    return result, found | ffn_gradients(operands, stacked) | {"norm_weight": dnorm}
