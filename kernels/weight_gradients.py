"""Gradients of the adapter's matrices, summed over all rows of the batch.

A program owns some of a weight and walks over all rows in a fixed order: no atomics, so that every run gives the same
bits. Rows come as matrix operands, in the caches' dtype, since several programs read the same ones.

Cost a token and layer for two blocks: ``2·C·d + 64·d²`` FLOPs for the projection, ``2·Cr·d`` for both up-projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    address_tables,
    cast,
    device_guard,
    dot,
    dot_precision,
    gelu,
    gelu_slope,
    head_chunk,
    hidden_chunk,
    needs_wide_offsets,
    odd,
    padded,
    pointer_of,
    row_offsets,
    table_entry,
    target_of,
)
from .policy import columns_config, ffn_weights_config
from .projection_backward import edited_rows

Pair = tuple[Tensor, Tensor]


@triton.jit(do_not_specialize=["rows", "layers"])
def ffn_weights_kernel(
    operands,
    dffn_in,
    dffn_out,
    ffn_in_weight,
    ffn_out_weight,
    rows,
    layers,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_F hidden units of one block of one layer: their gradients in both matrices, summed over all rows.

    ``operands (2, BLOCKS, G, rows, d)``: what enters the block, and the gradient of what it adds.
    """
    HALF: tl.constexpr = WIDTH // 2
    CHUNKS: tl.constexpr = HIDDEN // BLOCK_F
    i_program = tl.program_id(0)
    i_chunk = i_program % CHUNKS
    i_block = (i_program // CHUNKS) % BLOCKS
    i_layer = i_program // (CHUNKS * BLOCKS)
    o_t = tl.arange(0, BLOCK_T)
    o_z = tl.arange(0, HALF)
    o_hidden = i_chunk * BLOCK_F + tl.arange(0, BLOCK_F)
    i_weight = (i_layer * BLOCKS + i_block).to(tl.int64)
    o_in = i_weight * (HIDDEN * WIDTH) + o_hidden[None, :] * WIDTH + o_z[:, None]
    o_out = i_weight * (HIDDEN * WIDTH) + o_z[:, None] * HIDDEN + o_hidden[None, :]
    in_k = cast(tl.load(ffn_in_weight + o_in), DTYPE)
    in_v = cast(tl.load(ffn_in_weight + o_in + HALF), DTYPE)
    out_k = cast(tl.load(ffn_out_weight + o_out), DTYPE)
    out_v = cast(tl.load(ffn_out_weight + o_out + HALF * HIDDEN), DTYPE)
    din_k = tl.zeros([HALF, BLOCK_F], dtype=tl.float32)
    din_v = tl.zeros([HALF, BLOCK_F], dtype=tl.float32)
    dout_k = tl.zeros([HALF, BLOCK_F], dtype=tl.float32)
    dout_v = tl.zeros([HALF, BLOCK_F], dtype=tl.float32)
    p_n = operands + (i_block * layers + i_layer).to(tl.int64) * rows * WIDTH
    p_u = operands + ((BLOCKS + i_block) * layers + i_layer).to(tl.int64) * rows * WIDTH
    o_tile = o_t[:, None] * WIDTH + o_z[None, :]
    for i in range(0, tl.cdiv(rows, BLOCK_T)):
        m_row = (i * BLOCK_T + o_t < rows)[:, None]
        o_row = tl.cast(i, tl.int64) * (BLOCK_T * WIDTH)
        n_k = tl.load((p_n + o_row) + o_tile, mask=m_row, other=0.0)
        n_v = tl.load((p_n + o_row) + (HALF + o_tile), mask=m_row, other=0.0)
        u_k = tl.load((p_u + o_row) + o_tile, mask=m_row, other=0.0)
        u_v = tl.load((p_u + o_row) + (HALF + o_tile), mask=m_row, other=0.0)
        hidden = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
        hidden = dot(n_k, in_k, hidden, PRECISION)
        hidden = dot(n_v, in_v, hidden, PRECISION)
        d_hidden = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
        d_hidden = dot(u_k, out_k, d_hidden, PRECISION)
        d_hidden = dot(u_v, out_v, d_hidden, PRECISION)
        d_hidden = cast(d_hidden * gelu_slope(hidden, DTYPE), DTYPE)
        hidden = cast(gelu(hidden, DTYPE), DTYPE)
        din_k = dot(tl.trans(n_k), d_hidden, din_k, PRECISION)
        din_v = dot(tl.trans(n_v), d_hidden, din_v, PRECISION)
        dout_k = dot(tl.trans(u_k), hidden, dout_k, PRECISION)
        dout_v = dot(tl.trans(u_v), hidden, dout_v, PRECISION)
    tl.store(dffn_in + o_in, din_k)
    tl.store(dffn_in + o_in + HALF, din_v)
    tl.store(dffn_out + o_out, dout_k)
    tl.store(dffn_out + o_out + HALF * HIDDEN, dout_v)


@triton.jit
def down_columns(
    p_cache,
    p_z,
    index,
    p_w,
    tokens,
    sharer_tokens,
    first,
    last,
    tiles,
    batch,
    columns,
    stride_batch,
    stride_token,
    o_channel,
    HAS_INDEX: tl.constexpr,
    HAS_SHARER: tl.constexpr,
    IS_SHARER: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Channels ``o_channel`` of the head at ``p_cache``: ``p_w`` gets their columns, ``p_z`` is the layer's dlatent."""
    HALF: tl.constexpr = WIDTH // 2
    o_t = tl.arange(0, BLOCK_T)
    o_z = tl.arange(0, HALF)
    m_channel = o_channel < HEAD_DIM
    span = last - first
    d_k = tl.zeros([HALF, o_channel.shape[0]], dtype=tl.float32)
    d_v = tl.zeros([HALF, o_channel.shape[0]], dtype=tl.float32)
    for i in range(0, batch * tiles):
        i_item = (i // tiles).to(tl.int64)
        i_row = (i % tiles) * BLOCK_T
        i_start = (first + i_row).to(tl.int64)
        m_row, o_row = edited_rows(
            index, i_item, i_start, o_t, last, tokens, sharer_tokens, HAS_INDEX, HAS_SHARER
        )  # fmt: skip
        if not IS_SHARER:
            o_row = o_t
        i_base = i_start
        if IS_SHARER and HAS_INDEX:
            i_base = i_start * 0
        o_rows = row_offsets(o_row, stride_token, IS_WIDE)
        p_x = (p_cache + i_item * stride_batch + i_base * stride_token) + o_rows[:, None] + o_channel[None, :]
        x = cast(tl.load(p_x, mask=m_row[:, None] & m_channel[None, :], other=0.0), DTYPE)
        p_row = p_z + (i_item * span + i_row) * WIDTH + o_t[:, None] * WIDTH + o_z[None, :]
        z_k = cast(tl.load(p_row, mask=m_row[:, None], other=0.0), DTYPE)
        z_v = cast(tl.load(p_row + HALF, mask=m_row[:, None], other=0.0), DTYPE)
        d_k = dot(tl.trans(z_k), x, d_k, PRECISION)
        d_v = dot(tl.trans(z_v), x, d_v, PRECISION)
    p_w += o_z[:, None] * columns + o_channel[None, :]
    tl.store(p_w, d_k, mask=m_channel[None, :])
    tl.store(p_w + HALF * columns, d_v, mask=m_channel[None, :])


@triton.jit(do_not_specialize=["tokens", "sharer_tokens", "first", "last", "tiles", "batch", "column"])
def down_weight_kernel(
    keys,
    values,
    dlatent,
    ddown,
    index,
    tokens,
    sharer_tokens,
    first,
    last,
    tiles,
    batch,
    column,
    columns,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    LAYERS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SHARER: tl.constexpr,
    IS_SHARER: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CACHE_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_C channels of one head of one model's keys or values: their columns of W_down's gradient, over all rows.

    ``column``: where this model's keys begin in W_down, which has ``columns``; the values follow the keys.
    """
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    i_head = (i_program // CHUNKS) % HEADS
    i_kv = (i_program // (CHUNKS * HEADS)) % 2
    i_layer = i_program // (2 * CHUNKS * HEADS)
    o_channel = (i_program % CHUNKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_z = dlatent + i_layer.to(tl.int64) * batch * (last - first) * WIDTH
    p_w = ddown + i_layer.to(tl.int64) * columns * WIDTH + column + (i_kv * HEADS + i_head) * HEAD_DIM
    # Each side in a branch of its own: of a pointer that is chosen by a branch Triton 3.6 forgets the alignment.
    if i_kv == 0:
        down_columns(
            pointer_of(keys, i_layer, LAYERS, CACHE_DTYPE, IS_ALIGNED) + i_head.to(tl.int64) * stride_key_head,
            p_z, index, p_w, tokens, sharer_tokens, first, last, tiles, batch, columns,
            stride_key_batch, stride_key_token, o_channel,
            HAS_INDEX, HAS_SHARER, IS_SHARER, IS_WIDE, HEAD_DIM, WIDTH, BLOCK_T, DTYPE, PRECISION,
        )  # fmt: skip
    else:
        down_columns(
            pointer_of(values, i_layer, LAYERS, CACHE_DTYPE, IS_ALIGNED) + i_head.to(tl.int64) * stride_value_head,
            p_z, index, p_w, tokens, sharer_tokens, first, last, tiles, batch, columns,
            stride_value_batch, stride_value_token, o_channel,
            HAS_INDEX, HAS_SHARER, IS_SHARER, IS_WIDE, HEAD_DIM, WIDTH, BLOCK_T, DTYPE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "sharer_tokens", "first", "last", "tiles", "batch"])
def up_weight_kernel(
    codes,
    grad,
    latent,
    scale,
    dup,
    dbias,
    index,
    tokens,
    sharer_tokens,
    first,
    last,
    tiles,
    batch,
    LAYERS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SHARER: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_C channels of one head of the key or the value: their rows of W_up's gradient and of b_up's, over all rows.

    ``grad (open gates, B, H, tokens, D)``, whose slots the codes know (`fusion_plan.layer_code`);
    ``scale (G, B, N, 2, H)`` float32, what each head's edit was multiplied with.
    """
    HALF: tl.constexpr = WIDTH // 2
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    i_chunk = i_program % CHUNKS
    i_head = (i_program // CHUNKS) % HEADS
    i_kv = (i_program // (CHUNKS * HEADS)) % 2
    i_layer = i_program // (2 * CHUNKS * HEADS)
    code = table_entry(codes, i_layer, LAYERS, True)
    slot = (code >> (12 + 12 * i_kv)) & 0xFFF
    is_open = ((code >> (36 + i_kv)) & 1) != 0
    o_t = tl.arange(0, BLOCK_T)
    o_z = tl.arange(0, HALF)
    o_channel = i_chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < HEAD_DIM
    span = last - first
    d_up = tl.zeros([BLOCK_C, HALF], dtype=tl.float32)
    d_bias = tl.zeros([BLOCK_C], dtype=tl.float32)
    rounds = batch * tiles
    if not is_open:
        rounds = rounds * 0
    for i in range(0, rounds):
        i_item = (i // tiles).to(tl.int64)
        i_row = (i % tiles) * BLOCK_T
        i_start = (first + i_row).to(tl.int64)
        m_row, _ = edited_rows(index, i_item, i_start, o_t, last, tokens, sharer_tokens, HAS_INDEX, HAS_SHARER)
        p_grad = grad + (((slot * batch + i_item) * HEADS + i_head) * tokens + i_start) * HEAD_DIM
        p_grad += o_t[:, None] * HEAD_DIM + o_channel[None, :]
        b_grad = tl.load(p_grad, mask=m_row[:, None] & m_channel[None, :], other=0.0).to(tl.float32)
        i_state = (i_layer.to(tl.int64) * batch + i_item) * span + i_row
        b_scale = tl.load(scale + (i_state + o_t) * (2 * HEADS) + i_kv * HEADS + i_head, mask=m_row, other=0.0)
        b_grad *= b_scale[:, None]
        p_z = latent + i_state * WIDTH + i_kv * HALF + o_t[:, None] * WIDTH + o_z[None, :]
        z_half = cast(tl.load(p_z, mask=m_row[:, None], other=0.0), DTYPE)
        d_up = dot(tl.trans(cast(b_grad, DTYPE)), z_half, d_up, PRECISION)
        d_bias += tl.sum(b_grad, 0)
    o_row = ((i_layer.to(tl.int64) * 2 + i_kv) * HEADS + i_head) * HEAD_DIM + o_channel
    tl.store(dup + o_row[:, None] * HALF + o_z[None, :], d_up, mask=m_channel[:, None])
    tl.store(dbias + o_row, d_bias, mask=m_channel)


def ffn_gradients(operands: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of ``ffn_in_weight`` and ``ffn_out_weight``, stacked over ``G`` layers, float32.

    ``operands``: those of `projection_backward.project_gradients`.
    """
    _, blocks, layers, batch, span, width = operands.shape
    names = ("ffn_in_weight", "ffn_out_weight")
    stacked = [weights[name] for name in names]
    hidden = stacked[0].shape[2]
    config = ffn_weights_config(width, operands.element_size(), target_of(operands))
    chunk = hidden_chunk(hidden, config.block_hidden)
    found = {name: torch.empty_like(weight, dtype=torch.float32) for name, weight in zip(names, stacked)}
    with device_guard(operands):
        ffn_weights_kernel[(layers * blocks * (hidden // chunk),)](
            operands,
            *found.values(),
            *stacked,
            batch * span,
            layers,
            WIDTH=width,
            HIDDEN=hidden,
            BLOCKS=blocks,
            BLOCK_T=config.block_tokens,
            BLOCK_F=chunk,
            DTYPE=TRITON_DTYPE[operands.dtype],
            PRECISION=dot_precision(operands.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return found


def down_gradient(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    dlatent: Tensor,
    columns: int,
    *,
    index: Tensor | None,
    positions: tuple[int, int],
) -> Tensor:
    """Gradient of ``down_weight``, ``(G, d, columns)`` float32; without a sharer its columns are zero.

    ``dlatent (G, B, N, d)`` float32: of the latent before the first block.
    """
    key, _ = receiver[0]
    dlatent = dlatent.to(key.dtype)  # once, and not in every program that reads it
    own = 2 * key.shape[1] * key.shape[3]
    width = dlatent.shape[3]
    ddown = dlatent.new_empty((len(receiver), width, columns), dtype=torch.float32)
    if sharer is None:
        ddown[:, :, : columns - own].zero_()
    config = columns_config(width, key.element_size(), target_of(key))
    tiles = triton.cdiv(positions[1] - positions[0], config.block_tokens)
    for caches, column in ((sharer, 0), (receiver, columns - own)):
        if caches is None:
            continue
        key, value = caches[0]
        batch, heads, _, head_dim = key.shape
        chunk = head_chunk(head_dim, config.block_channels)
        tables, is_aligned = address_tables(*zip(*caches))
        is_sharer = caches is sharer
        rows = key.shape[2] if is_sharer and index is not None else config.block_tokens
        with device_guard(key):
            down_weight_kernel[(len(caches) * 2 * heads * triton.cdiv(head_dim, chunk),)](
                *tables,
                dlatent,
                ddown,
                index if index is not None else dlatent,
                receiver[0][0].shape[2],
                0 if sharer is None else sharer[0][0].shape[2],
                *positions,
                tiles,
                batch,
                column,
                columns,
                *key.stride()[:3],
                *value.stride()[:3],
                LAYERS=len(tables[0]),
                HAS_INDEX=index is not None,
                HAS_SHARER=sharer is not None,
                IS_SHARER=is_sharer,
                IS_WIDE=needs_wide_offsets(rows, key, value),
                IS_ALIGNED=is_aligned,
                HEADS=heads,
                HEAD_DIM=head_dim,
                WIDTH=width,
                BLOCK_T=config.block_tokens,
                BLOCK_C=chunk,
                CACHE_DTYPE=TRITON_DTYPE[key.dtype],
                DTYPE=TRITON_DTYPE[receiver[0][0].dtype],
                PRECISION=dot_precision(receiver[0][0].dtype),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    return ddown


def up_gradients(
    grad: Tensor,
    codes: Sequence[int],
    latent: Tensor,
    scale: Tensor,
    *,
    index: Tensor | None,
    sharer_tokens: int | None,
    positions: tuple[int, int],
) -> dict[str, Tensor]:
    """Gradients of ``up_weight (G, 2, C, d/2)`` and ``up_bias (G, 2, C)``, float32.

    Args:
        grad: ``(open gates, B, H, tokens, D)``, contiguous.
        codes: `fusion_plan.layer_code` of each layer.
        latent, scale: ``(G, B, N, d)`` and ``(G, B, N, 2, H)``, float32.
    """
    layers, batch, span, width = latent.shape
    heads, tokens, head_dim = grad.shape[2:]
    config = columns_config(width, grad.element_size(), target_of(grad))
    chunk = head_chunk(head_dim, config.block_channels)
    dup = scale.new_empty((layers, 2, heads * head_dim, width // 2))
    dbias = scale.new_empty((layers, 2, heads * head_dim))
    latent = latent.to(grad.dtype)  # once, and not in every program that reads it
    table = padded(odd(codes))
    with device_guard(grad):
        up_weight_kernel[(layers * 2 * heads * triton.cdiv(head_dim, chunk),)](
            table,
            grad,
            latent,
            scale,
            dup,
            dbias,
            index if index is not None else latent,
            tokens,
            0 if sharer_tokens is None else sharer_tokens,
            *positions,
            triton.cdiv(span, config.block_tokens),
            batch,
            LAYERS=len(table),
            HAS_INDEX=index is not None,
            HAS_SHARER=sharer_tokens is not None,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK_T=config.block_tokens,
            BLOCK_C=chunk,
            DTYPE=TRITON_DTYPE[grad.dtype],
            PRECISION=dot_precision(grad.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return {"up_weight": dup, "up_bias": dbias}
