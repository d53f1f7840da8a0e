"""Joint K/V projection into the bottleneck, forward (spec section 2).

A program owns a tile of tokens of one layer. The latent lives in registers in float32, as its two halves: ``z_k`` makes
the key's edit and ``z_v`` the value's, so splitting it costs nothing. The sharer's and the receiver's rows are read
where they lie in the models' caches, one head at a time; nothing of x is ever concatenated or transposed.

Cost a token and layer, ``C = 2Cs + 2Cr``: ``C`` elements read, ``2·C·d + 32·d²`` FLOPs for two blocks.
`down_tile` and `blocks_tile` are shared with `fusion`, which goes on from their registers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    cast,
    device_guard,
    dot_precision,
    gelu,
    head_chunk,
    hidden_chunk,
    inlined,
    long_dot,
    needs_wide_offsets,
    row_offsets,
    target_of,
)
from .noise import keep_tile
from .policy import tile_config


@triton.jit
def add_source(
    z_k,
    z_v,
    p_base,
    o_row,
    m_row,
    stride_head,
    p_down,
    stride_down,
    i_first,
    i_last,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z += x W^T`` for one cache: rows (tokens) at ``p_base + o_row``, columns of W_down from ``p_down`` on.

    Rows outside ``m_row`` count as zero. BLOCK_C channels of one head a step, so that a tile never straddles heads;
    steps ``[i_first, i_last)`` of all heads', one head after the other.
    """
    HALF: tl.constexpr = WIDTH // 2
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_C - 1) // BLOCK_C
    o_z = tl.arange(0, HALF)
    o_c = tl.arange(0, BLOCK_C)
    for i in range(i_first, i_last):
        i_head = i // CHUNKS
        o_channel = (i % CHUNKS) * BLOCK_C + o_c
        # The scalar base takes the 64-bit part, so that a tile's offsets, which stay in registers, are 32-bit.
        p_x = (p_base + i_head.to(tl.int64) * stride_head) + (o_row[:, None] + o_channel[None, :])
        p_w = p_down + (i_head * HEAD_DIM + o_channel)[:, None] + o_z[None, :] * stride_down
        if HEAD_DIM % BLOCK_C == 0:
            b_x = tl.load(p_x, mask=m_row[:, None], other=0.0)
            b_wk = tl.load(p_w)
            b_wv = tl.load(p_w + HALF * stride_down)
        else:
            m_channel = o_channel < HEAD_DIM
            b_x = tl.load(p_x, mask=m_row[:, None] & m_channel[None, :], other=0.0)
            b_wk = tl.load(p_w, mask=m_channel[:, None], other=0.0)
            b_wv = tl.load(p_w + HALF * stride_down, mask=m_channel[:, None], other=0.0)
        b_x = cast(b_x, DTYPE)
        z_k = long_dot(b_x, cast(b_wk, DTYPE), z_k, PRECISION)
        z_v = long_dot(b_x, cast(b_wv, DTYPE), z_v, PRECISION)
    return z_k, z_v


@inlined
def upper_lower(x):
    """The upper and the lower half of a tile's rows; where a thread holds rows of both, nothing moves."""
    upper, lower = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), (1, 2, 0)))
    return upper, lower


@inlined
def below(upper, lower):
    """One tile of two, the inverse of `upper_lower`."""
    both = tl.permute(tl.join(upper, lower), (2, 0, 1))
    return tl.reshape(both, [2 * upper.shape[0], upper.shape[1]])


@triton.jit
def rms_norm_tile(z_k, z_v, p_norm, WIDTH: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """``rmsnorm(z)`` as matrix operands, its two halves, and ``1 / rms`` of each row."""
    HALF: tl.constexpr = WIDTH // 2
    o_z = tl.arange(0, HALF)
    mean_square = (tl.sum(z_k * z_k, 1) + tl.sum(z_v * z_v, 1)) / WIDTH
    scale = 1.0 / tl.sqrt(mean_square + EPS)
    n_k = cast(z_k * scale[:, None] * tl.load(p_norm + o_z).to(tl.float32)[None, :], DTYPE)
    n_v = cast(z_v * scale[:, None] * tl.load(p_norm + HALF + o_z).to(tl.float32)[None, :], DTYPE)
    return n_k, n_v, scale


@inlined
def unit_weights(p_in, p_out, o_hidden, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, DTYPE: tl.constexpr):
    """Of some hidden units, the parts of W_in and W_out as matrix operands, each in its two halves."""
    HALF: tl.constexpr = WIDTH // 2
    o_z = tl.arange(0, HALF)
    p_in = p_in + o_hidden[None, :] * WIDTH + o_z[:, None]
    p_out = p_out + o_z[None, :] * HIDDEN + o_hidden[:, None]
    b_in_k = cast(tl.load(p_in), DTYPE)
    b_in_v = cast(tl.load(p_in + HALF), DTYPE)
    b_out_k = cast(tl.load(p_out), DTYPE)
    b_out_v = cast(tl.load(p_out + HALF * HIDDEN), DTYPE)
    return b_in_k, b_in_v, b_out_k, b_out_v


@inlined
def add_units(
    n_k,
    n_v,
    out_k,
    out_v,
    b_in_k,
    b_in_v,
    b_out_k,
    b_out_v,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out + W_out gelu(W_in n)`` of some hidden units, whose `unit_weights` are given."""
    hidden = tl.zeros([n_k.shape[0], b_in_k.shape[1]], dtype=tl.float32)
    hidden = long_dot(n_k, b_in_k, hidden, PRECISION)
    hidden = long_dot(n_v, b_in_v, hidden, PRECISION)
    hidden = cast(gelu(hidden, DTYPE), DTYPE)
    out_k = long_dot(hidden, b_out_k, out_k, PRECISION)
    out_v = long_dot(hidden, b_out_v, out_v, PRECISION)
    return out_k, out_v


@triton.jit
def ffn_block(
    z_k,
    z_v,
    p_norm,
    p_in,
    p_out,
    i_block,
    seed,
    threshold,
    keep_scale,
    o_token,
    i_item,
    row,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z + dropout(W_out gelu(W_in rmsnorm(z)))``, BLOCK_F hidden units at a time: they never exist all at once.

    Without HAS_NOISE there is no dropout, the products are added to z itself, and the arguments from ``seed`` to
    ``row`` are not read.
    """
    HALF: tl.constexpr = WIDTH // 2
    o_z = tl.arange(0, HALF)
    o_f = tl.arange(0, BLOCK_F)
    n_k, n_v, _ = rms_norm_tile(z_k, z_v, p_norm, WIDTH, EPS, DTYPE)
    out_k = z_k
    out_v = z_v
    if HAS_NOISE:
        out_k = tl.zeros_like(z_k)
        out_v = tl.zeros_like(z_v)
    for i in range(0, HIDDEN // BLOCK_F):
        b_in_k, b_in_v, b_out_k, b_out_v = unit_weights(p_in, p_out, i * BLOCK_F + o_f, WIDTH, HIDDEN, DTYPE)
        out_k, out_v = add_units(n_k, n_v, out_k, out_v, b_in_k, b_in_v, b_out_k, b_out_v, DTYPE, PRECISION)
    if HAS_NOISE:
        keep = keep_tile(seed, threshold, o_z, o_token, i_item, row, i_block)
        out_k = z_k + tl.where(keep, out_k * keep_scale, 0.0)
        keep = keep_tile(seed, threshold, HALF + o_z, o_token, i_item, row, i_block)
        out_v = z_v + tl.where(keep, out_v * keep_scale, 0.0)
    return out_k, out_v


@triton.jit
def ffn_block_pair(
    a_k,
    a_v,
    b_k,
    b_v,
    p_norm,
    p_in,
    p_out,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`ffn_block` of two tiles, without noise: weights are read once for both, hidden units exist of one at a time."""
    o_f = tl.arange(0, BLOCK_F)
    na_k, na_v, _ = rms_norm_tile(a_k, a_v, p_norm, WIDTH, EPS, DTYPE)
    nb_k, nb_v, _ = rms_norm_tile(b_k, b_v, p_norm, WIDTH, EPS, DTYPE)
    for i in range(0, HIDDEN // BLOCK_F):
        b_in_k, b_in_v, b_out_k, b_out_v = unit_weights(p_in, p_out, i * BLOCK_F + o_f, WIDTH, HIDDEN, DTYPE)
        a_k, a_v = add_units(na_k, na_v, a_k, a_v, b_in_k, b_in_v, b_out_k, b_out_v, DTYPE, PRECISION)
        b_k, b_v = add_units(nb_k, nb_v, b_k, b_v, b_in_k, b_in_v, b_out_k, b_out_v, DTYPE, PRECISION)
    return a_k, a_v, b_k, b_v


@triton.jit
def down_tile(
    p_sharer_key,
    p_sharer_value,
    o_sharer_key,
    o_sharer_value,
    stride_sharer_key_head,
    stride_sharer_value_head,
    p_receiver_key,
    p_receiver_value,
    o_receiver_key,
    o_receiver_value,
    stride_receiver_key_head,
    stride_receiver_value_head,
    m_row,
    p_start,
    p_down,
    HAS_SHARER: tl.constexpr,
    SHARER_HEADS: tl.constexpr,
    SHARER_DIM: tl.constexpr,
    RECEIVER_HEADS: tl.constexpr,
    RECEIVER_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CS: tl.constexpr,
    BLOCK_CR: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``W_down x + b_down`` of a tile, ``(z_k, z_v)``, each ``(BLOCK_T, d/2)`` float32.

    ``p_*``: the item's base in each cache; ``o_*``: (BLOCK_T,) offsets of the tile's rows. ``p_start``: d floats that
    z starts from: ``b_down``, or for LCF-X (HAS_SHARER false) the message, which holds that and the sharer's part.
    """
    HALF: tl.constexpr = WIDTH // 2
    CS: tl.constexpr = SHARER_HEADS * SHARER_DIM
    CR: tl.constexpr = RECEIVER_HEADS * RECEIVER_DIM
    STRIDE: tl.constexpr = 2 * CS + 2 * CR
    SHARER_STEPS: tl.constexpr = SHARER_HEADS * ((SHARER_DIM + BLOCK_CS - 1) // BLOCK_CS)
    RECEIVER_STEPS: tl.constexpr = RECEIVER_HEADS * ((RECEIVER_DIM + BLOCK_CR - 1) // BLOCK_CR)
    o_z = tl.arange(0, HALF)
    zeros = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
    z_k = zeros + tl.load(p_start + o_z).to(tl.float32)[None, :]
    z_v = zeros + tl.load(p_start + HALF + o_z).to(tl.float32)[None, :]
    if HAS_SHARER:
        z_k, z_v = add_source(
            z_k, z_v, p_sharer_key, o_sharer_key, m_row, stride_sharer_key_head, p_down, STRIDE,
            0, SHARER_STEPS, SHARER_DIM, WIDTH, BLOCK_CS, DTYPE, PRECISION,
        )  # fmt: skip
        z_k, z_v = add_source(
            z_k, z_v, p_sharer_value, o_sharer_value, m_row, stride_sharer_value_head, p_down + CS, STRIDE,
            0, SHARER_STEPS, SHARER_DIM, WIDTH, BLOCK_CS, DTYPE, PRECISION,
        )  # fmt: skip
    p_down += 2 * CS
    z_k, z_v = add_source(
        z_k, z_v, p_receiver_key, o_receiver_key, m_row, stride_receiver_key_head, p_down, STRIDE,
        0, RECEIVER_STEPS, RECEIVER_DIM, WIDTH, BLOCK_CR, DTYPE, PRECISION,
    )  # fmt: skip
    z_k, z_v = add_source(
        z_k, z_v, p_receiver_value, o_receiver_value, m_row, stride_receiver_value_head, p_down + CR, STRIDE,
        0, RECEIVER_STEPS, RECEIVER_DIM, WIDTH, BLOCK_CR, DTYPE, PRECISION,
    )  # fmt: skip
    return z_k, z_v


@triton.jit
def blocks_tile(
    z_k,
    z_v,
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
    """All FFN blocks of a layer on a tile; see `ffn_block`.

    More than 128 tokens are two tiles here: the hidden units of all would not fit in registers beside z.
    """
    if z_k.shape[0] > 128 and not HAS_NOISE:
        a_k, b_k = upper_lower(z_k)
        a_v, b_v = upper_lower(z_v)
        for i in tl.static_range(BLOCKS):
            a_k, a_v, b_k, b_v = ffn_block_pair(
                a_k, a_v, b_k, b_v, p_norm + i * WIDTH, p_in + i * HIDDEN * WIDTH, p_out + i * HIDDEN * WIDTH,
                WIDTH, HIDDEN, BLOCK_F, EPS, DTYPE, PRECISION,
            )  # fmt: skip
        z_k = below(a_k, b_k)
        z_v = below(a_v, b_v)
    else:
        for i in tl.static_range(BLOCKS):
            z_k, z_v = ffn_block(
                z_k, z_v, p_norm + i * WIDTH, p_in + i * HIDDEN * WIDTH, p_out + i * HIDDEN * WIDTH,
                i, seed, threshold, keep_scale, o_token, i_item, row,
                WIDTH, HIDDEN, BLOCK_F, EPS, HAS_NOISE, DTYPE, PRECISION,
            )  # fmt: skip
    return z_k, z_v


@triton.jit(do_not_specialize=["tokens", "sharer_tokens", "tiles"])
def joint_projection_kernel(
    sharer_key,
    sharer_value,
    receiver_key,
    receiver_value,
    index,
    latent,
    start,
    down_weight,
    norm_weight,
    ffn_in_weight,
    ffn_out_weight,
    tokens,
    sharer_tokens,
    tiles,
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
    stride_start_batch,
    HAS_SHARER: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    IS_WIDE: tl.constexpr,
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
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one layer; ``latent`` is ``(B, N, d)`` float32, contiguous. Rows without a sharer row get zeros."""
    HALF: tl.constexpr = WIDTH // 2
    i_program = tl.program_id(0)
    i_batch = (i_program // tiles).to(tl.int64)
    i_start = ((i_program % tiles) * BLOCK_T).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    m_t = i_start + o_t < tokens
    m_row = m_t
    i_sharer = i_start
    o_sharer = o_t
    if HAS_INDEX:
        i_sharer = i_start * 0
        o_sharer = tl.load(index + i_batch * tokens + i_start + o_t, mask=m_t, other=-1)
        m_row = m_t & (o_sharer >= 0) & (o_sharer < sharer_tokens)
    z_k, z_v = down_tile(
        sharer_key + i_batch * stride_sharer_key_batch + i_sharer * stride_sharer_key_token,
        sharer_value + i_batch * stride_sharer_value_batch + i_sharer * stride_sharer_value_token,
        row_offsets(o_sharer, stride_sharer_key_token, IS_WIDE),
        row_offsets(o_sharer, stride_sharer_value_token, IS_WIDE),
        stride_sharer_key_head,
        stride_sharer_value_head,
        receiver_key + i_batch * stride_receiver_key_batch + i_start * stride_receiver_key_token,
        receiver_value + i_batch * stride_receiver_value_batch + i_start * stride_receiver_value_token,
        row_offsets(o_t, stride_receiver_key_token, IS_WIDE),
        row_offsets(o_t, stride_receiver_value_token, IS_WIDE),
        stride_receiver_key_head,
        stride_receiver_value_head,
        m_row,
        start + i_batch * stride_start_batch,
        down_weight,
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
    z_k, z_v = blocks_tile(
        z_k, z_v, norm_weight, ffn_in_weight, ffn_out_weight, 0, 0, 1.0, o_t, i_batch, 0,
        WIDTH, HIDDEN, BLOCKS, BLOCK_F, EPS, False, DTYPE, PRECISION,
    )  # fmt: skip
    if HAS_INDEX:
        z_k = tl.where(m_row[:, None], z_k, 0.0)
        z_v = tl.where(m_row[:, None], z_v, 0.0)
    p_z = latent + (i_batch * tokens + i_start) * WIDTH + o_t[:, None] * WIDTH + tl.arange(0, HALF)[None, :]
    tl.store(p_z, z_k, mask=m_t[:, None])
    tl.store(p_z + HALF, z_v, mask=m_t[:, None])


def joint_projection(
    sharer_key: Tensor | None,
    sharer_value: Tensor | None,
    receiver_key: Tensor,
    receiver_value: Tensor,
    weights: Mapping[str, Tensor],
    *,
    index: Tensor | None,
    message: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """Launch `joint_projection_kernel` for one layer. Arguments are checked by ``lcf_fast.ops``.

    ``index (B, N)`` int32 contiguous; ``message (B, d)`` float32 with unit last stride, instead of a sharer.
    Returns the latent ``(B, N, d)`` float32.
    """
    batch, heads, tokens, head_dim = receiver_key.shape
    stacked = [weights[name].contiguous() for name in ("down_weight", "norm_weight", "ffn_in_weight", "ffn_out_weight")]
    width, columns = stacked[0].shape
    latent = receiver_key.new_empty(batch, tokens, width, dtype=torch.float32)
    if not latent.numel():
        return latent
    if sharer_key is None or sharer_value is None:
        assert message is not None
        sharer_key, sharer_value = receiver_key, receiver_value
        # Only the product matters here: where the receiver's columns of W_down begin.
        sharer_heads, sharer_dim = 1, columns // 2 - heads * head_dim
    else:
        sharer_heads, sharer_dim = sharer_key.shape[1], sharer_key.shape[3]
    sizes = receiver_key.element_size(), weights["down_weight"].element_size()
    config = tile_config(width, sizes[0], target_of(receiver_key), batch, tokens, sizes[1])
    tiles = triton.cdiv(tokens, config.block_tokens)
    with device_guard(receiver_key):
        joint_projection_kernel[(batch * tiles,)](
            sharer_key,
            sharer_value,
            receiver_key,
            receiver_value,
            index if index is not None else latent,
            latent,
            weights["down_bias"].contiguous() if message is None else message,
            *stacked,
            tokens,
            sharer_key.shape[2],
            tiles,
            *sharer_key.stride()[:3],
            *sharer_value.stride()[:3],
            *receiver_key.stride()[:3],
            *receiver_value.stride()[:3],
            0 if message is None else message.stride(0),
            HAS_SHARER=message is None,
            HAS_INDEX=index is not None,
            IS_WIDE=needs_wide_offsets(config.block_tokens, receiver_key, receiver_value)
            or needs_wide_offsets(
                config.block_tokens if index is None else sharer_key.shape[2], sharer_key, sharer_value
            ),
            SHARER_HEADS=sharer_heads,
            SHARER_DIM=sharer_dim,
            RECEIVER_HEADS=heads,
            RECEIVER_DIM=head_dim,
            WIDTH=width,
            HIDDEN=stacked[2].shape[1],
            BLOCKS=stacked[1].shape[0],
            BLOCK_T=config.block_tokens,
            BLOCK_CS=head_chunk(sharer_dim, config.block_channels),
            BLOCK_CR=head_chunk(head_dim, config.block_channels),
            BLOCK_F=hidden_chunk(stacked[2].shape[1], config.block_hidden),
            EPS=norm_eps,
            DTYPE=TRITON_DTYPE[receiver_key.dtype],
            PRECISION=dot_precision(receiver_key.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return latent
