"""Gated injection into the receiver's cache, forward (spec section 2).

``R_i + gate_i · sigmoid(W_a_i z + b_a_i) · (W_up_i z_i + b_up_i)`` for i in K, V. A program owns a tile of tokens; it
makes one head's edit at a time and adds it to the receiver's rows on the way, so delta never exists in memory.

Cost a token and layer with both gates open: ``4·Cr`` elements moved (read and written once), ``2·Cr·d`` FLOPs and
``4·Hr·d`` for the head gates. `gate_scores` and `inject_tile` are shared with `fusion`.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    cast,
    device_guard,
    dot,
    dot_precision,
    head_chunk,
    heads_block,
    inlined,
    needs_wide_offsets,
    row_offsets,
    target_of,
)
from .policy import injection_config


@triton.jit
def gate_scores(
    n_k,
    n_v,
    p_weight,
    p_bias,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``alpha = sigmoid(W_a z + b_a)``: (BLOCK_T, BLOCK_H) float32, heads padded to a tensor instruction's width."""
    HALF: tl.constexpr = WIDTH // 2
    o_z = tl.arange(0, HALF)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < HEADS
    p_w = p_weight + o_h[None, :] * WIDTH + o_z[:, None]
    score = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    score = dot(n_k, cast(tl.load(p_w, mask=m_h[None, :], other=0.0), DTYPE), score, PRECISION)
    score = dot(n_v, cast(tl.load(p_w + HALF, mask=m_h[None, :], other=0.0), DTYPE), score, PRECISION)
    score += tl.load(p_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    return 1.0 / (1.0 + tl.exp(-score))


@inlined
def load_rows(p_head, o_row, m_row, I_CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """The ``I_CHUNK``-th BLOCK_C channels of a head, of a tile's rows."""
    o_channel = I_CHUNK * BLOCK_C + tl.arange(0, BLOCK_C)
    m_tile = m_row[:, None]
    if (I_CHUNK + 1) * BLOCK_C > HEAD_DIM:
        m_tile = m_tile & (o_channel < HEAD_DIM)[None, :]
    p_tile = p_head + (o_row[:, None] + o_channel[None, :])
    return tl.load(p_tile, mask=m_tile, other=0.0, eviction_policy="evict_first")


@triton.jit
def inject_tile(
    n_half,
    alpha,
    p_base,
    o_row,
    stride_head,
    p_out,
    o_out,
    stride_out_head,
    m_edit,
    m_write,
    p_up,
    p_bias,
    i_first,
    i_last,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``row + alpha · (W_up z_half + b_up)`` where ``m_edit``, and ``row`` itself elsewhere in ``m_write``.

    Of heads ``[i_first, i_last)``, the last one first: `fusion` has read its rows last, and the likeliest to be in the
    L2 cache still are taken first. They are not read again, nor is what is written: both may leave it first.
    An unedited row is selected, not multiplied by zero: what a padded row holds (NaN, infinity) never spreads.
    """
    HALF: tl.constexpr = WIDTH // 2
    # Rows read, edited and asked for ahead are in registers at once: of 256 tokens, 32 channels fit.
    STEP: tl.constexpr = 32 if n_half.shape[0] > 128 and BLOCK_C > 32 else BLOCK_C
    CHUNKS: tl.constexpr = (HEAD_DIM + STEP - 1) // STEP
    o_z = tl.arange(0, HALF)
    o_c = tl.arange(0, STEP)
    o_h = tl.arange(0, BLOCK_H)
    m_keep = m_write & ~m_edit
    # Scalar bases take what differs between heads, and step from one to the next: a tile's offsets stay the same.
    i_last_head = tl.cast(i_last - 1, tl.int64)
    p_head = p_base + i_last_head * stride_head
    p_out_head = p_out + i_last_head * stride_out_head
    p_up_head = p_up + i_last_head * (HEAD_DIM * HALF)
    p_bias_head = p_bias + i_last_head * HEAD_DIM
    b_next = load_rows(p_head, o_row, m_write, 0, HEAD_DIM, STEP)
    for i_done in range(0, i_last - i_first):
        i_head = i_last - 1 - i_done
        b_alpha = tl.sum(tl.where(o_h[None, :] == i_head, alpha, 0.0), 1)
        for i in tl.static_range(CHUNKS):
            # Rows are asked for a step ahead: Triton pipelines only what it multiplies.
            b_row = b_next
            if i + 1 < CHUNKS:
                b_next = load_rows(p_head, o_row, m_write, i + 1, HEAD_DIM, STEP)
            else:
                p_head -= stride_head
                b_next = load_rows(p_head, o_row, m_write & (i_head > i_first), 0, HEAD_DIM, STEP)
            o_channel = i * STEP + o_c
            m_channel = o_channel < HEAD_DIM
            p_w = p_up_head + (o_channel[None, :] * HALF + o_z[:, None])
            if (i + 1) * STEP <= HEAD_DIM:
                b_w = tl.load(p_w)
                b_bias = tl.load(p_bias_head + o_channel)
            else:
                b_w = tl.load(p_w, mask=m_channel[None, :], other=0.0)
                b_bias = tl.load(p_bias_head + o_channel, mask=m_channel, other=0.0)
            delta = tl.zeros([n_half.shape[0], STEP], dtype=tl.float32)
            delta = dot(n_half, cast(b_w, DTYPE), delta, PRECISION)
            edited = b_row.to(tl.float32) + b_alpha[:, None] * b_bias.to(tl.float32)[None, :]
            edited = cast(edited + b_alpha[:, None] * delta, DTYPE)
            p_row = p_out_head + (o_out[:, None] + o_channel[None, :])
            m_tile = m_keep[:, None] & m_channel[None, :]
            tl.store(p_row, b_row, mask=m_tile, eviction_policy="evict_first")
            m_tile = m_edit[:, None] & m_channel[None, :]
            tl.store(p_row, edited, mask=m_tile, eviction_policy="evict_first")
        p_out_head -= stride_out_head
        p_up_head -= HEAD_DIM * HALF
        p_bias_head -= HEAD_DIM


@triton.jit
def copy_tile(
    p_base,
    o_row,
    stride_head,
    p_out,
    o_out,
    stride_out_head,
    m_write,
    i_first,
    i_last,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copy a tile's rows of heads ``[i_first, i_last)``: what an out-of-place edit owes the tokens that it leaves."""
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_C - 1) // BLOCK_C
    o_c = tl.arange(0, BLOCK_C)
    for i in range(i_first * CHUNKS, i_last * CHUNKS):
        i_head = i // CHUNKS
        o_head = i_head.to(tl.int64)
        o_channel = (i % CHUNKS) * BLOCK_C + o_c
        m_tile = m_write[:, None] & (o_channel < HEAD_DIM)[None, :]
        b_row = tl.load((p_base + o_head * stride_head) + (o_row[:, None] + o_channel[None, :]), mask=m_tile)
        tl.store((p_out + o_head * stride_out_head) + (o_out[:, None] + o_channel[None, :]), b_row, mask=m_tile)


@triton.jit
def inject_side(
    receiver,
    out,
    latent,
    edit_mask,
    up_weight,
    up_bias,
    head_gate_weight,
    head_gate_bias,
    gate_logit,
    tokens,
    i_tile,
    i_batch,
    stride_batch,
    stride_head,
    stride_token,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    KV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_INPLACE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the key (KV 0) or the value (1), from a latent in memory.

    The gate is read here, on the device: a closed one costs a copy out of place and nothing in place.
    """
    HALF: tl.constexpr = WIDTH // 2
    i_start = (i_tile * BLOCK_T).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    m_write = i_start + o_t < tokens
    m_edit = m_write
    if HAS_MASK:
        m_edit = m_write & (tl.load(edit_mask + i_batch * tokens + i_start + o_t, mask=m_write, other=0) != 0)
    p_row = receiver + i_batch * stride_batch + i_start * stride_token
    p_out = out + i_batch * stride_out_batch + i_start * stride_out_token
    o_row = row_offsets(o_t, stride_token, IS_WIDE)
    o_out = row_offsets(o_t, stride_out_token, IS_WIDE)
    is_open = tl.load(gate_logit + KV).to(tl.float32) > 0
    edits = tl.sum(m_edit.to(tl.int32), 0)
    if is_open & (edits > 0):
        o_z = tl.arange(0, HALF)
        p_z = latent + (i_batch * tokens + i_start) * WIDTH + o_t[:, None] * WIDTH + o_z[None, :]
        n_k = cast(tl.load(p_z, mask=m_edit[:, None], other=0.0), DTYPE)
        n_v = cast(tl.load(p_z + HALF, mask=m_edit[:, None], other=0.0), DTYPE)
        alpha = gate_scores(
            n_k, n_v, head_gate_weight + KV * (HEADS * WIDTH), head_gate_bias + KV * HEADS,
            HEADS, WIDTH, BLOCK_T, BLOCK_H, DTYPE, PRECISION,
        )  # fmt: skip
        n_half = cast(tl.load(p_z + KV * HALF, mask=m_edit[:, None], other=0.0), DTYPE)
        if IS_INPLACE:
            m_write = m_edit
        inject_tile(
            n_half, alpha, p_row, o_row, stride_head, p_out, o_out, stride_out_head, m_edit, m_write,
            up_weight + KV * (HEADS * HEAD_DIM * HALF), up_bias + KV * (HEADS * HEAD_DIM),
            0, HEADS, HEAD_DIM, WIDTH, BLOCK_H, BLOCK_C, DTYPE, PRECISION,
        )  # fmt: skip
    elif not IS_INPLACE:
        copy_tile(p_row, o_row, stride_head, p_out, o_out, stride_out_head, m_write, 0, HEADS, HEAD_DIM, BLOCK_C)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def gated_injection_kernel(
    receiver_key,
    receiver_value,
    out_key,
    out_value,
    latent,
    edit_mask,
    up_weight,
    up_bias,
    head_gate_weight,
    head_gate_bias,
    gate_logit,
    tokens,
    tiles,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_out_key_batch,
    stride_out_key_head,
    stride_out_key_token,
    stride_out_value_batch,
    stride_out_value_head,
    stride_out_value_token,
    HAS_MASK: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_INPLACE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one layer, key or value (the grid's fastest half), from a latent in memory ``(B, N, d)``."""
    i_program = tl.program_id(0)
    i_tile = (i_program // 2) % tiles
    i_batch = (i_program // (2 * tiles)).to(tl.int64)
    # Each side in a branch of its own: of a pointer that is chosen by a branch Triton 3.6 forgets the alignment.
    if i_program % 2 == 0:
        inject_side(
            receiver_key, out_key, latent, edit_mask,
            up_weight, up_bias, head_gate_weight, head_gate_bias, gate_logit, tokens, i_tile, i_batch,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_out_key_batch, stride_out_key_head, stride_out_key_token, 0,
            HAS_MASK, IS_WIDE, IS_INPLACE, HEADS, HEAD_DIM, WIDTH, BLOCK_T, BLOCK_C, BLOCK_H, DTYPE, PRECISION,
        )  # fmt: skip
    else:
        inject_side(
            receiver_value, out_value, latent, edit_mask,
            up_weight, up_bias, head_gate_weight, head_gate_bias, gate_logit, tokens, i_tile, i_batch,
            stride_value_batch, stride_value_head, stride_value_token,
            stride_out_value_batch, stride_out_value_head, stride_out_value_token, 1,
            HAS_MASK, IS_WIDE, IS_INPLACE, HEADS, HEAD_DIM, WIDTH, BLOCK_T, BLOCK_C, BLOCK_H, DTYPE, PRECISION,
        )  # fmt: skip


def gated_injection(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    edit_mask: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `gated_injection_kernel` for one layer. Arguments are checked by ``lcf_fast.ops``.

    ``latent (B, N, d)`` float; ``edit_mask (B, N)`` bool. Returns new contiguous tensors, or the given ones, edited.
    """
    batch, heads, tokens, head_dim = receiver_key.shape
    if inplace:
        out_key, out_value = receiver_key, receiver_value
    else:
        out_key = receiver_key.new_empty(receiver_key.shape)
        out_value = receiver_key.new_empty(receiver_key.shape)
    if not receiver_key.numel():
        return out_key, out_value
    names = ("up_weight", "up_bias", "head_gate_weight", "head_gate_bias", "gate_logit")
    width = latent.shape[2]
    sizes = receiver_key.element_size(), weights["up_weight"].element_size()
    config = injection_config(width, sizes[0], target_of(receiver_key), 2 * batch, tokens, sizes[1])
    tiles = triton.cdiv(tokens, config.block_tokens)
    latent = latent.contiguous()
    with device_guard(receiver_key):
        gated_injection_kernel[(2 * batch * tiles,)](
            receiver_key,
            receiver_value,
            out_key,
            out_value,
            latent,
            edit_mask.contiguous() if edit_mask is not None else latent,
            *(weights[name].contiguous() for name in names),
            tokens,
            tiles,
            *receiver_key.stride()[:3],
            *receiver_value.stride()[:3],
            *out_key.stride()[:3],
            *out_value.stride()[:3],
            HAS_MASK=edit_mask is not None,
            IS_WIDE=needs_wide_offsets(config.block_tokens, receiver_key, receiver_value, out_key, out_value),
            IS_INPLACE=inplace,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK_T=config.block_tokens,
            BLOCK_C=head_chunk(head_dim, config.block_channels),
            BLOCK_H=heads_block(heads),
            DTYPE=TRITON_DTYPE[receiver_key.dtype],
            PRECISION=dot_precision(receiver_key.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out_key, out_value
