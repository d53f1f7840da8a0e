"""Joint K/V projection, backward (spec section 2): nothing of the forward pass is kept, its latents are made again.

Over some layers at a time, `project_states` makes the latent before each FFN block and after the last, ``states (blocks
+ 1, G, B, N, d)`` float32, and `project_gradients` goes back through the blocks, from the last latent's gradient to the
first's. N is the edited range; a row that is not edited has a gradient of zero. What it makes of a row on the way, the
normalised latent before each block and the gradient of what the block adds, it leaves as matrix operands to
`weight_gradients`, whose programs would each make them again.

Cost a token and layer for two blocks, beside the forward pass made again: ``48·d²`` FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    address_tables,
    cast,
    device_guard,
    dot_precision,
    gelu_slope,
    head_chunk,
    hidden_chunk,
    long_dot,
    needs_wide_offsets,
    pointer_of,
    row_offsets,
    target_of,
)
from .noise import NO_NOISE, NoiseArguments, drawn_for, keep_tile
from .policy import backward_config
from .projection import down_tile, ffn_block, rms_norm_tile

Pair = tuple[Tensor, Tensor]


@triton.jit
def edited_rows(
    index, i_item, i_start, o_t, last, tokens, sharer_tokens, HAS_INDEX: tl.constexpr, HAS_SHARER: tl.constexpr
):
    """Which rows of a tile are edited, and the sharer's rows: from ``i_start`` on, or with an index from 0 on."""
    m_row = i_start + o_t < last
    o_sharer = o_t
    if HAS_INDEX:
        o_sharer = tl.load(index + i_item * tokens + i_start + o_t, mask=m_row, other=-1)
        m_row = m_row & (o_sharer >= 0)
        if HAS_SHARER:
            m_row = m_row & (o_sharer < sharer_tokens)
    return m_row, o_sharer


@triton.jit
def states_tile(
    z_k,
    z_v,
    p_state,
    m_row,
    stride_block,
    p_norm,
    p_in,
    p_out,
    seed,
    threshold,
    keep_scale,
    o_token,
    i_item,
    row,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`projection.blocks_tile`, the latent stored before each block and after the last, ``stride_block`` apart."""
    HALF: tl.constexpr = WIDTH // 2
    for i in tl.static_range(BLOCKS):
        tl.store(p_state, z_k, mask=m_row)
        tl.store(p_state + HALF, z_v, mask=m_row)
        p_state += stride_block
        z_k, z_v = ffn_block(
            z_k, z_v, p_norm + i * WIDTH, p_in + i * HIDDEN * WIDTH, p_out + i * HIDDEN * WIDTH,
            i, seed, threshold, keep_scale, o_token, i_item, row,
            WIDTH, HIDDEN, BLOCK_F, EPS, HAS_NOISE, DTYPE, PRECISION,
        )  # fmt: skip
    tl.store(p_state, z_k, mask=m_row)
    tl.store(p_state + HALF, z_v, mask=m_row)


@triton.jit(
    do_not_specialize=[
        "row", "seed", "threshold", "keep_scale", "tokens", "sharer_tokens", "first", "last", "tiles", "batch"
    ]
)  # fmt: skip
def states_kernel(
    sharer_keys,
    sharer_values,
    receiver_keys,
    receiver_values,
    states,
    index,
    start,
    down_weight,
    norm_weight,
    ffn_in_weight,
    ffn_out_weight,
    row,
    seed,
    threshold,
    keep_scale,
    tokens,
    sharer_tokens,
    first,
    last,
    tiles,
    batch,
    stride_block,
    stride_sharer_key_batch,
    stride_sharer_key_head,
    stride_sharer_key_token,
    stride_sharer_value_batch,
    stride_sharer_value_head,
    stride_sharer_value_token,
    stride_receiver_key_batch,
    stride_receiver_key_head,
    stride_receiver_key_token,
    stride_receiver_value_batch,
    stride_receiver_value_head,
    stride_receiver_value_token,
    stride_start_layer,
    stride_start_batch,
    LAYERS: tl.constexpr,
    HAS_SHARER: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_SHARER_ALIGNED: tl.constexpr,
    IS_RECEIVER_ALIGNED: tl.constexpr,
    SHARER_HEADS: tl.constexpr,
    SHARER_DIM: tl.constexpr,
    RECEIVER_HEADS: tl.constexpr,
    RECEIVER_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CS: tl.constexpr,
    BLOCK_CR: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EPS: tl.constexpr,
    SHARER_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The latents of one tile of one layer, before each block and after the last. A layer's rows: ``row + i_layer``."""
    HALF: tl.constexpr = WIDTH // 2
    C: tl.constexpr = 2 * SHARER_HEADS * SHARER_DIM + 2 * RECEIVER_HEADS * RECEIVER_DIM
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    i_batch = ((i_program // tiles) % batch).to(tl.int64)
    i_layer = i_program // (tiles * batch)
    i_start = (first + i_tile * BLOCK_T).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_z = tl.arange(0, HALF)
    m_row, o_sharer = edited_rows(
        index, i_batch, i_start, o_t, last, tokens, sharer_tokens, HAS_INDEX, HAS_SHARER
    )  # fmt: skip
    i_sharer = i_start
    if HAS_INDEX:
        i_sharer = i_start * 0
    p_key = pointer_of(receiver_keys, i_layer, LAYERS, DTYPE, IS_RECEIVER_ALIGNED)
    p_value = pointer_of(receiver_values, i_layer, LAYERS, DTYPE, IS_RECEIVER_ALIGNED)
    p_key += i_batch * stride_receiver_key_batch + i_start * stride_receiver_key_token
    p_value += i_batch * stride_receiver_value_batch + i_start * stride_receiver_value_token
    if HAS_SHARER:
        p_sharer_key = pointer_of(sharer_keys, i_layer, LAYERS, SHARER_DTYPE, IS_SHARER_ALIGNED)
        p_sharer_value = pointer_of(sharer_values, i_layer, LAYERS, SHARER_DTYPE, IS_SHARER_ALIGNED)
        p_sharer_key += i_batch * stride_sharer_key_batch + i_sharer * stride_sharer_key_token
        p_sharer_value += i_batch * stride_sharer_value_batch + i_sharer * stride_sharer_value_token
    else:
        p_sharer_key = p_key
        p_sharer_value = p_value
    z_k, z_v = down_tile(
        p_sharer_key,
        p_sharer_value,
        row_offsets(o_sharer, stride_sharer_key_token, IS_WIDE),
        row_offsets(o_sharer, stride_sharer_value_token, IS_WIDE),
        stride_sharer_key_head,
        stride_sharer_value_head,
        p_key,
        p_value,
        row_offsets(o_t, stride_receiver_key_token, IS_WIDE),
        row_offsets(o_t, stride_receiver_value_token, IS_WIDE),
        stride_receiver_key_head,
        stride_receiver_value_head,
        m_row,
        start + i_layer * stride_start_layer + i_batch * stride_start_batch,
        down_weight + i_layer * (WIDTH * C),
        HAS_SHARER,
        SHARER_HEADS,
        SHARER_DIM,
        RECEIVER_HEADS,
        RECEIVER_DIM,
        WIDTH,
        BLOCK_T,
        BLOCK_CS,
        BLOCK_CR,
        DTYPE,
        PRECISION,
    )
    span = last - first
    m_store = (i_tile * BLOCK_T + o_t < span)[:, None]
    p_state = states + ((i_layer * batch + i_batch) * span + i_tile * BLOCK_T) * WIDTH
    p_state += o_t[:, None] * WIDTH + o_z[None, :]
    states_tile(
        z_k, z_v, p_state, m_store, stride_block, norm_weight + i_layer * (BLOCKS * WIDTH),
        ffn_in_weight + i_layer * (BLOCKS * HIDDEN * WIDTH), ffn_out_weight + i_layer * (BLOCKS * HIDDEN * WIDTH),
        seed, threshold, keep_scale, i_start + o_t, i_batch, row + i_layer,
        WIDTH, HIDDEN, BLOCKS, BLOCK_F, EPS, HAS_NOISE, DTYPE, PRECISION,
    )  # fmt: skip


@triton.jit
def block_output_gradient(
    d_k, d_v, i_block, seed, threshold, keep_scale, o_token, i_item, row,
    WIDTH: tl.constexpr, HAS_NOISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of what a block adds, as matrix operands: the latent's, less what dropout dropped."""
    HALF: tl.constexpr = WIDTH // 2
    if HAS_NOISE:
        o_z = tl.arange(0, HALF)
        keep = keep_tile(seed, threshold, o_z, o_token, i_item, row, i_block)
        d_k = tl.where(keep, d_k * keep_scale, 0.0)
        keep = keep_tile(seed, threshold, HALF + o_z, o_token, i_item, row, i_block)
        d_v = tl.where(keep, d_v * keep_scale, 0.0)
    return cast(d_k, DTYPE), cast(d_v, DTYPE)


@triton.jit(do_not_specialize=["row", "seed", "threshold", "keep_scale", "first", "span", "tiles", "batch", "slots"])
def gradients_kernel(
    states,
    dlatent,
    operands,
    dnorm,
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
    """One tile of one layer, from the last latent's gradient to the first's, which takes its place in ``dlatent``.

    ``operands (2, BLOCKS, G, B, N, d)``: see `project_gradients`; ``dnorm (G, B, tiles, BLOCKS, d)``. IS_PACKED: as
    `block_launch` says of ``slots``.
    """
    HALF: tl.constexpr = WIDTH // 2
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    i_batch = ((i_program // tiles) % batch).to(tl.int64)
    i_layer = i_program // (tiles * batch)
    o_t = tl.arange(0, BLOCK_T)
    o_z = tl.arange(0, HALF)
    o_f = tl.arange(0, BLOCK_F)
    o_token, i_item = drawn_for((first + i_tile * BLOCK_T).to(tl.int64) + o_t, i_batch, slots, IS_PACKED)
    m_row = (i_tile * BLOCK_T + o_t < span)[:, None]
    o_state = ((i_layer * batch + i_batch) * span + i_tile * BLOCK_T) * WIDTH
    o_tile = o_t[:, None] * WIDTH + o_z[None, :]
    stride_block = tl.cast(stride_block, tl.int64)  # a few of them may pass 2^31
    p_state = states + o_state + BLOCKS * stride_block + o_tile
    p_operand = operands + o_state + BLOCKS * stride_block + o_tile
    p_dlatent = dlatent + o_state + o_tile
    d_k = tl.load(p_dlatent, mask=m_row, other=0.0)
    d_v = tl.load(p_dlatent + HALF, mask=m_row, other=0.0)
    for i in tl.static_range(BLOCKS):
        i_block = BLOCKS - 1 - i
        p_state -= stride_block
        p_operand -= stride_block
        p_norm = norm_weight + (i_layer * BLOCKS + i_block) * WIDTH
        p_in = ffn_in_weight + (i_layer * BLOCKS + i_block) * (HIDDEN * WIDTH)
        p_out = ffn_out_weight + (i_layer * BLOCKS + i_block) * (HIDDEN * WIDTH)
        z_k = tl.load(p_state, mask=m_row, other=0.0)
        z_v = tl.load(p_state + HALF, mask=m_row, other=0.0)
        n_k, n_v, scale = rms_norm_tile(z_k, z_v, p_norm, WIDTH, EPS, DTYPE)
        u_k, u_v = block_output_gradient(
            d_k, d_v, i_block, seed, threshold, keep_scale, o_token, i_item, row + i_layer, WIDTH, HAS_NOISE, DTYPE
        )  # fmt: skip
        tl.store(p_operand, n_k, mask=m_row)
        tl.store(p_operand + HALF, n_v, mask=m_row)
        tl.store(p_operand + BLOCKS * stride_block, u_k, mask=m_row)
        tl.store(p_operand + (BLOCKS * stride_block + HALF), u_v, mask=m_row)
        e_k = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
        e_v = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
        for j in range(0, HIDDEN // BLOCK_F):
            o_hidden = j * BLOCK_F + o_f
            p_w = p_in + o_hidden[None, :] * WIDTH + o_z[:, None]
            w_k = cast(tl.load(p_w), DTYPE)
            w_v = cast(tl.load(p_w + HALF), DTYPE)
            hidden = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
            hidden = long_dot(n_k, w_k, hidden, PRECISION)
            hidden = long_dot(n_v, w_v, hidden, PRECISION)
            p_w = p_out + o_z[:, None] * HIDDEN + o_hidden[None, :]
            d_hidden = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
            d_hidden = long_dot(u_k, cast(tl.load(p_w), DTYPE), d_hidden, PRECISION)
            d_hidden = long_dot(u_v, cast(tl.load(p_w + HALF * HIDDEN), DTYPE), d_hidden, PRECISION)
            d_hidden = cast(d_hidden * gelu_slope(hidden, DTYPE), DTYPE)
            e_k = long_dot(d_hidden, tl.trans(w_k), e_k, PRECISION)
            e_v = long_dot(d_hidden, tl.trans(w_v), e_v, PRECISION)
        y_k = tl.load(p_state, mask=m_row, other=0.0) * scale[:, None]
        y_v = tl.load(p_state + HALF, mask=m_row, other=0.0) * scale[:, None]
        p_dnorm = dnorm + (((i_layer * batch + i_batch) * tiles + i_tile) * BLOCKS + i_block) * WIDTH + o_z
        tl.store(p_dnorm, tl.sum(e_k * y_k, 0))
        tl.store(p_dnorm + HALF, tl.sum(e_v * y_v, 0))
        e_k *= tl.load(p_norm + o_z).to(tl.float32)[None, :]
        e_v *= tl.load(p_norm + HALF + o_z).to(tl.float32)[None, :]
        along = (tl.sum(e_k * y_k, 1) + tl.sum(e_v * y_v, 1)) / WIDTH
        d_k += scale[:, None] * (e_k - y_k * along[:, None])
        d_v += scale[:, None] * (e_v - y_v * along[:, None])
    tl.store(p_dlatent, d_k, mask=m_row)
    tl.store(p_dlatent + HALF, d_v, mask=m_row)


def project_states(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    weights: Mapping[str, Tensor],
    *,
    index: Tensor | None,
    message: Tensor | None,
    positions: tuple[int, int],
    norm_eps: float,
    noise: NoiseArguments | None,
    row: int,
) -> Tensor:
    """Latents ``(blocks + 1, G, B, N, d)`` float32 of ``G`` layers of the same strides, N the range ``positions``.

    Args:
        weights: of these layers, stacked and contiguous.
        message: ``(G, B, d)`` float32.
        row: what the noise calls the first of them.
    """
    key, value = receiver[0]
    layers, (batch, heads, tokens, head_dim) = len(receiver), key.shape
    first, last = positions
    blocks, width = weights["norm_weight"].shape[1:]
    columns, hidden = weights["down_weight"].shape[2], weights["ffn_in_weight"].shape[2]
    states = key.new_empty((blocks + 1, layers, batch, last - first, width), dtype=torch.float32)
    config = backward_config(width, key.element_size(), target_of(key))
    tiles = triton.cdiv(last - first, config.block_tokens)
    receiver_tables, is_receiver_aligned = address_tables(*zip(*receiver))
    if sharer is None:
        assert message is not None
        sharer_key, sharer_value = key, value
        sharer_tables, is_sharer_aligned = receiver_tables, is_receiver_aligned
        start, start_strides = message, (message.stride(0), message.stride(1))
        sharer_heads, sharer_dim = 1, columns // 2 - heads * head_dim
    else:
        sharer_key, sharer_value = sharer[0]
        sharer_tables, is_sharer_aligned = address_tables(*zip(*sharer))
        start, start_strides = weights["down_bias"], (width, 0)
        sharer_heads, sharer_dim = sharer_key.shape[1], sharer_key.shape[3]
    sharer_rows = sharer_key.shape[2] if index is not None else config.block_tokens
    names = ("down_weight", "norm_weight", "ffn_in_weight", "ffn_out_weight")
    with device_guard(key):
        states_kernel[(layers * batch * tiles,)](
            *sharer_tables,
            *receiver_tables,
            states,
            index if index is not None else key,
            start,
            *(weights[name] for name in names),
            row,
            *(NO_NOISE if noise is None else noise)[:3],
            tokens,
            sharer_key.shape[2],
            first,
            last,
            tiles,
            batch,
            states.stride(0),
            *sharer_key.stride()[:3],
            *sharer_value.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *start_strides,
            LAYERS=len(receiver_tables[0]),
            HAS_SHARER=sharer is not None,
            HAS_INDEX=index is not None,
            HAS_NOISE=noise is not None,
            IS_WIDE=needs_wide_offsets(config.block_tokens, key, value)
            or needs_wide_offsets(sharer_rows, sharer_key, sharer_value),
            IS_SHARER_ALIGNED=is_sharer_aligned,
            IS_RECEIVER_ALIGNED=is_receiver_aligned,
            SHARER_HEADS=sharer_heads,
            SHARER_DIM=sharer_dim,
            RECEIVER_HEADS=heads,
            RECEIVER_DIM=head_dim,
            WIDTH=width,
            HIDDEN=hidden,
            BLOCKS=blocks,
            BLOCK_T=config.block_tokens,
            BLOCK_CS=head_chunk(sharer_dim, config.block_channels),
            BLOCK_CR=head_chunk(head_dim, config.block_channels),
            BLOCK_F=hidden_chunk(hidden, config.block_hidden),
            EPS=norm_eps,
            SHARER_DTYPE=TRITON_DTYPE[sharer_key.dtype],
            DTYPE=TRITON_DTYPE[key.dtype],
            PRECISION=dot_precision(key.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return states


def project_gradients(
    states: Tensor,
    dlatent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    first: int,
    dtype: torch.dtype,
    norm_eps: float,
    noise: NoiseArguments | None,
    row: int,
    slots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Back through the blocks: ``dlatent (G, B, N, d)`` float32, the last latent's gradient, becomes the first's.

    ``first``: the position of the first row, which the noise goes by; ``dtype``: of the products; ``slots``: as of
    `block_launch`.

    Returns:
        The norms' gradient ``(G, blocks, d)`` float32; and ``(2, blocks, G, B, N, d)`` in ``dtype``, matrix operands of
        the weights' gradients: rows as they enter each block, normalised, and the gradient of what the block adds.
    """
    layers, batch, span, width = states.shape[1:]
    blocks = states.shape[0] - 1
    operands = states.new_empty((2, blocks, layers, batch, span, width), dtype=dtype)
    arguments, options, tiles = block_launch(states, weights, first, dtype, norm_eps, noise, row, slots)
    dnorm = states.new_empty((layers, batch * tiles, blocks, width))
    with device_guard(states):
        gradients_kernel[(layers * batch * tiles,)](states, dlatent, operands, dnorm, *arguments, **options)
    return dnorm.sum(1), operands


def block_launch(
    states: Tensor,
    weights: Mapping[str, Tensor],
    first: int,
    dtype: torch.dtype,
    norm_eps: float,
    noise: NoiseArguments | None,
    row: int,
    slots: int | None,
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """What the kernels that go through the blocks are launched with: arguments from the norms' weights on, compile-time
    arguments and options, and tiles an item.

    ``slots``: the rows are (item, slot), so many an item, packed as those of one item; the noise goes by both.
    """
    batch, span, width = states.shape[2:]
    blocks, hidden = weights["ffn_in_weight"].shape[1:3]
    config = backward_config(width, dtype.itemsize, target_of(states))
    tiles = triton.cdiv(span, config.block_tokens)
    arguments = (
        *(weights[name] for name in ("norm_weight", "ffn_in_weight", "ffn_out_weight")),
        row,
        *(NO_NOISE if noise is None else noise)[:3],
        first,
        span,
        tiles,
        batch,
        1 if slots is None else slots,
        states.stride(0),
    )
    options = {
        "HAS_NOISE": noise is not None,
        "IS_PACKED": slots is not None,
        "WIDTH": width,
        "HIDDEN": hidden,
        "BLOCKS": blocks,
        "BLOCK_T": config.block_tokens,
        "BLOCK_F": hidden_chunk(hidden, config.block_hidden),
        "EPS": norm_eps,
        "DTYPE": TRITON_DTYPE[dtype],
        "PRECISION": dot_precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return arguments, options, tiles
