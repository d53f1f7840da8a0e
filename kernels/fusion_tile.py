"""What the fused kernels share of a tile: which rows it edits, where it writes, and the edit of keys or values."""

from __future__ import annotations

import triton
import triton.language as tl

from .injection import copy_tile, gate_scores, inject_tile
from .noise import soft_gate_tile


@triton.jit
def tile_rows(
    index,
    i_batch,
    i_start,
    o_t,
    tokens,
    sharer_tokens,
    end,
    first,
    last,
    HAS_SHARER: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    """Of a tile at position ``i_start``: rows to write (below ``end``), rows to edit, and the sharer's row of each."""
    m_write = i_start + o_t < end
    m_edit = m_write & (i_start + o_t >= first) & (i_start + o_t < last)
    o_sharer = o_t
    if HAS_INDEX:
        o_sharer = tl.load(index + i_batch * tokens + i_start + o_t, mask=m_edit, other=-1)
        m_edit = m_edit & (o_sharer >= 0)
        if HAS_SHARER:
            m_edit = m_edit & (o_sharer < sharer_tokens)
    return m_write, m_edit, o_sharer


@triton.jit
def out_places(out, code, i_batch, i_start, o_t, tokens, batch, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where a tile of a layer's new key and value goes: two bases, its rows' offsets, and the stride of heads.

    ``out (open gates, B, H, N, D)`` is contiguous; a layer's code says which of them are its own.
    """
    stride_head = tokens.to(tl.int64) * HEAD_DIM
    p_out = out + i_batch * HEADS * stride_head + i_start * HEAD_DIM
    p_key = p_out + ((code >> 12) & 0xFFF) * batch * HEADS * stride_head
    p_value = p_out + ((code >> 24) & 0xFFF) * batch * HEADS * stride_head
    return p_key, p_value, o_t * HEAD_DIM, stride_head


@triton.jit
def copy_heads(
    code,
    p_key,
    p_value,
    o_key,
    o_value,
    stride_key_head,
    stride_value_head,
    p_out_key,
    p_out_value,
    o_out,
    stride_out_head,
    m_write,
    i_first,
    i_last,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile without an edit, out of place: heads ``[i_first, i_last)`` of what has an open gate, as they are."""
    if ((code >> 36) & 1) != 0:
        copy_tile(
            p_key, o_key, stride_key_head, p_out_key, o_out, stride_out_head, m_write, i_first, i_last,
            HEAD_DIM, BLOCK_C,
        )  # fmt: skip
    if ((code >> 37) & 1) != 0:
        copy_tile(
            p_value, o_value, stride_value_head, p_out_value, o_out, stride_out_head, m_write, i_first, i_last,
            HEAD_DIM, BLOCK_C,
        )  # fmt: skip


@triton.jit
def edit_heads(
    i_kv,
    n_half,
    n_k,
    n_v,
    p_row,
    o_row,
    stride_head,
    p_out,
    o_out,
    stride_out_head,
    m_edit,
    m_write,
    row,
    up_weight,
    up_bias,
    head_gate_weight,
    head_gate_bias,
    gate_logit,
    seed,
    inverse_temperature,
    o_token,
    i_item,
    i_first,
    i_last,
    HAS_NOISE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Edit heads ``[i_first, i_last)`` of a layer's key (``i_kv`` 0, ``n_half`` its half of z) or value (1)."""
    i_row = row * 2 + i_kv
    alpha = gate_scores(
        n_k, n_v, head_gate_weight + i_row * (HEADS * WIDTH), head_gate_bias + i_row * HEADS,
        HEADS, WIDTH, BLOCK_T, BLOCK_H, DTYPE, PRECISION,
    )  # fmt: skip
    if HAS_NOISE:
        logit = tl.load(gate_logit + i_row).to(tl.float32)
        o_h = tl.arange(0, BLOCK_H)
        alpha *= soft_gate_tile(seed, inverse_temperature, logit, o_h, o_token, i_item, row, i_kv)
    inject_tile(
        n_half, alpha, p_row, o_row, stride_head, p_out, o_out, stride_out_head, m_edit, m_write,
        up_weight + i_row * (HEADS * HEAD_DIM * (WIDTH // 2)), up_bias + i_row * (HEADS * HEAD_DIM), i_first, i_last,
        HEAD_DIM, WIDTH, BLOCK_H, BLOCK_C, DTYPE, PRECISION,
    )  # fmt: skip
