"""Few tokens: the fused pass in two launches of many programs instead of one of few.

With one tile a layer 28 programs would pull 1.4 MB of weights each (Qwen2.5-0.5B to Qwen3-0.6B, d = 128, bfloat16)
while a hundred multiprocessors look on. So `down_partial_kernel` splits the down projection over channels: a program
multiplies some of a tile's channels and leaves the product, float32, in a workspace ``(rows, B, parts, n, d)``.
`finish_kernel` adds a tile's parts up, in order, and goes on as `fusion.fuse_kernel` does, with the up-projection split
over KV heads: each program makes z itself. Nothing is added atomically: results are the same to the bit every time.

In place too: the second launch reads of the cache only what its own heads' edits are added to, since the first has
read everything that z is made of.

Counted, not measured (H100, cold weights, one token): a multiprocessor takes 64 bytes a cycle at most, 0.11 TB/s, and
0.09 with 64 KB under way at 0.7 us of latency; every loop starts with an empty pipeline, 0.8 us. One launch: 15 us of
weights, eight loops, 3 us of start: 24 us, 30 where the products of 16 rows, on one multiprocessor, do not hide behind
the loads. Two launches: 4 us for 16.5 MB at the memory's rate, 8 us for a program's 0.7 MB, six loops, twice the start:
21 us. At 128 tokens: 37 us in one, 33 in two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, pointer_of, row_offsets, table_entry
from .fusion_plan import Launch
from .fusion_tile import copy_heads, edit_heads, out_places, tile_rows
from .projection import add_source, blocks_tile


@triton.jit(
    do_not_specialize=[
        "tokens", "sharer_tokens", "begin", "end", "first", "last", "tiles", "batch", "parts", "steps",
    ]
)  # fmt: skip
def down_partial_kernel(
    sharer_keys,
    sharer_values,
    receiver_keys,
    receiver_values,
    codes,
    partials,
    index,
    down_weight,
    tokens,
    sharer_tokens,
    begin,
    end,
    first,
    last,
    tiles,
    batch,
    parts,
    steps,
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
    LAYERS: tl.constexpr,
    HAS_SHARER: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_SHARER_ALIGNED: tl.constexpr,
    IS_RECEIVER_ALIGNED: tl.constexpr,
    SHARER_HEADS: tl.constexpr,
    SHARER_DIM: tl.constexpr,
    RECEIVER_HEADS: tl.constexpr,
    RECEIVER_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CS: tl.constexpr,
    BLOCK_CR: tl.constexpr,
    SHARER_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``W_down x`` over ``steps`` steps of channels from ``part * steps`` on: one part of one tile of one layer.

    Steps go through the sharer's key and value, then the receiver's; see `projection.add_source`. A tile that edits
    nothing leaves its part unwritten: `finish_kernel` does not read it.
    """
    HALF: tl.constexpr = WIDTH // 2
    CS: tl.constexpr = SHARER_HEADS * SHARER_DIM
    CR: tl.constexpr = RECEIVER_HEADS * RECEIVER_DIM
    STRIDE: tl.constexpr = 2 * CS + 2 * CR
    SHARER_STEPS: tl.constexpr = SHARER_HEADS * ((SHARER_DIM + BLOCK_CS - 1) // BLOCK_CS)
    RECEIVER_STEPS: tl.constexpr = RECEIVER_HEADS * ((RECEIVER_DIM + BLOCK_CR - 1) // BLOCK_CR)
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    i_part = (i_program // tiles) % parts
    i_row = i_program // (tiles * parts)
    i_batch = (i_row % batch).to(tl.int64)
    i_layer = i_row // batch

    row = table_entry(codes, i_layer, LAYERS, True) & 0xFFF
    i_start = begin + i_tile * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)
    m_write, m_edit, o_sharer = tile_rows(
        index, i_batch, i_start, o_t, tokens, sharer_tokens, end, first, last, HAS_SHARER, HAS_INDEX
    )  # fmt: skip
    i_start = i_start.to(tl.int64)
    edits = tl.sum(m_edit.to(tl.int32), 0)
    if edits > 0:
        i_first = i_part * steps
        i_last = i_first + steps
        z_k = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
        z_v = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
        p_down = down_weight + row * (WIDTH * STRIDE)
        if HAS_SHARER:
            i_sharer = i_start
            if HAS_INDEX:
                i_sharer = i_start * 0
            p_x = pointer_of(sharer_keys, i_layer, LAYERS, SHARER_DTYPE, IS_SHARER_ALIGNED)
            z_k, z_v = add_source(
                z_k, z_v, p_x + i_batch * stride_sharer_key_batch + i_sharer * stride_sharer_key_token,
                row_offsets(o_sharer, stride_sharer_key_token, IS_WIDE), m_edit, stride_sharer_key_head,
                p_down, STRIDE, i_first, tl.minimum(i_last, SHARER_STEPS),
                SHARER_DIM, WIDTH, BLOCK_CS, DTYPE, PRECISION,
            )  # fmt: skip
            i_first = tl.maximum(i_first - SHARER_STEPS, 0)
            i_last -= SHARER_STEPS
            p_x = pointer_of(sharer_values, i_layer, LAYERS, SHARER_DTYPE, IS_SHARER_ALIGNED)
            z_k, z_v = add_source(
                z_k, z_v, p_x + i_batch * stride_sharer_value_batch + i_sharer * stride_sharer_value_token,
                row_offsets(o_sharer, stride_sharer_value_token, IS_WIDE), m_edit, stride_sharer_value_head,
                p_down + CS, STRIDE, i_first, tl.minimum(i_last, SHARER_STEPS),
                SHARER_DIM, WIDTH, BLOCK_CS, DTYPE, PRECISION,
            )  # fmt: skip
            i_first = tl.maximum(i_first - SHARER_STEPS, 0)
            i_last -= SHARER_STEPS
        p_down += 2 * CS
        p_x = pointer_of(receiver_keys, i_layer, LAYERS, DTYPE, IS_RECEIVER_ALIGNED)
        z_k, z_v = add_source(
            z_k, z_v, p_x + i_batch * stride_receiver_key_batch + i_start * stride_receiver_key_token,
            row_offsets(o_t, stride_receiver_key_token, IS_WIDE), m_edit, stride_receiver_key_head,
            p_down, STRIDE, i_first, tl.minimum(i_last, RECEIVER_STEPS),
            RECEIVER_DIM, WIDTH, BLOCK_CR, DTYPE, PRECISION,
        )  # fmt: skip
        i_first = tl.maximum(i_first - RECEIVER_STEPS, 0)
        i_last -= RECEIVER_STEPS
        p_x = pointer_of(receiver_values, i_layer, LAYERS, DTYPE, IS_RECEIVER_ALIGNED)
        z_k, z_v = add_source(
            z_k, z_v, p_x + i_batch * stride_receiver_value_batch + i_start * stride_receiver_value_token,
            row_offsets(o_t, stride_receiver_value_token, IS_WIDE), m_edit, stride_receiver_value_head,
            p_down + CR, STRIDE, i_first, tl.minimum(i_last, RECEIVER_STEPS),
            RECEIVER_DIM, WIDTH, BLOCK_CR, DTYPE, PRECISION,
        )  # fmt: skip
        extent = end - begin
        p_z = partials + ((i_row.to(tl.int64) * parts + i_part) * extent + i_tile * BLOCK_T) * WIDTH
        p_z += o_t[:, None] * WIDTH + tl.arange(0, HALF)[None, :]
        tl.store(p_z, z_k, mask=m_write[:, None])
        tl.store(p_z + HALF, z_v, mask=m_write[:, None])


@triton.jit(
    do_not_specialize=[
        "tokens", "sharer_tokens", "begin", "end", "first", "last", "tiles", "batch", "parts", "splits", "heads",
    ]
)  # fmt: skip
def finish_kernel(
    receiver_keys,
    receiver_values,
    codes,
    out,
    index,
    start,
    partials,
    norm_weight,
    ffn_in_weight,
    ffn_out_weight,
    up_weight,
    up_bias,
    head_gate_weight,
    head_gate_bias,
    tokens,
    sharer_tokens,
    begin,
    end,
    first,
    last,
    tiles,
    batch,
    parts,
    splits,
    heads,
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
    IS_INPLACE: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_RECEIVER_ALIGNED: tl.constexpr,
    RECEIVER_HEADS: tl.constexpr,
    RECEIVER_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CR: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the parts of z on: FFN blocks, and the edit of ``heads`` heads from ``split * heads`` on, of a tile.

    A tile's programs (``splits`` of them) are neighbours, so that they read the same weights at the same time.
    """
    HALF: tl.constexpr = WIDTH // 2
    i_program = tl.program_id(0)
    i_split = i_program % splits
    i_tile = (i_program // splits) % tiles
    i_row = i_program // (splits * tiles)
    i_batch = (i_row % batch).to(tl.int64)
    i_layer = i_row // batch

    code = table_entry(codes, i_layer, LAYERS, True)
    row = code & 0xFFF
    i_start = begin + i_tile * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)
    m_write, m_edit, _ = tile_rows(
        index, i_batch, i_start, o_t, tokens, sharer_tokens, end, first, last, HAS_SHARER, HAS_INDEX
    )  # fmt: skip
    m_part = m_write
    i_start = i_start.to(tl.int64)
    edits = tl.sum(m_edit.to(tl.int32), 0)
    i_first = i_split * heads
    i_last = tl.minimum(i_first + heads, RECEIVER_HEADS)

    p_key = pointer_of(receiver_keys, i_layer, LAYERS, DTYPE, IS_RECEIVER_ALIGNED)
    p_value = pointer_of(receiver_values, i_layer, LAYERS, DTYPE, IS_RECEIVER_ALIGNED)
    p_key += i_batch * stride_receiver_key_batch + i_start * stride_receiver_key_token
    p_value += i_batch * stride_receiver_value_batch + i_start * stride_receiver_value_token
    o_key = row_offsets(o_t, stride_receiver_key_token, IS_WIDE)
    o_value = row_offsets(o_t, stride_receiver_value_token, IS_WIDE)
    if IS_INPLACE:
        m_write = m_edit
        p_out_key = p_key
        p_out_value = p_value
        o_out_key = o_key
        o_out_value = o_value
        stride_out_key = stride_receiver_key_head
        stride_out_value = stride_receiver_value_head
    else:
        p_out_key, p_out_value, o_out_key, stride_out_key = out_places(
            out, code, i_batch, i_start, o_t, tokens, batch, RECEIVER_HEADS, RECEIVER_DIM
        )  # fmt: skip
        o_out_value = o_out_key
        stride_out_value = stride_out_key

    if edits == 0:
        if not IS_INPLACE:
            copy_heads(
                code, p_key, p_value, o_key, o_value, stride_receiver_key_head, stride_receiver_value_head,
                p_out_key, p_out_value, o_out_key, stride_out_key, m_write,
                i_first, i_last, RECEIVER_DIM, BLOCK_CR,
            )  # fmt: skip
    else:
        o_z = tl.arange(0, HALF)
        p_start = start + row * stride_start_layer + i_batch * stride_start_batch + o_z
        z_k = tl.zeros([BLOCK_T, HALF], dtype=tl.float32) + tl.load(p_start).to(tl.float32)[None, :]
        z_v = tl.zeros([BLOCK_T, HALF], dtype=tl.float32) + tl.load(p_start + HALF).to(tl.float32)[None, :]
        extent = end - begin
        p_z = partials + (i_row.to(tl.int64) * parts * extent + i_tile * BLOCK_T) * WIDTH
        p_z += o_t[:, None] * WIDTH + o_z[None, :]
        for _part in tl.range(0, parts, num_stages=4):
            z_k += tl.load(p_z, mask=m_part[:, None], other=0.0)
            z_v += tl.load(p_z + HALF, mask=m_part[:, None], other=0.0)
            p_z += extent * WIDTH
        o_token = i_start + o_t
        z_k, z_v = blocks_tile(
            z_k, z_v, norm_weight + row * (BLOCKS * WIDTH), ffn_in_weight + row * (BLOCKS * HIDDEN * WIDTH),
            ffn_out_weight + row * (BLOCKS * HIDDEN * WIDTH),
            0, 0, 1.0, o_token, i_batch, row,
            WIDTH, HIDDEN, BLOCKS, BLOCK_F, EPS, False, DTYPE, PRECISION,
        )  # fmt: skip
        n_k = cast(z_k, DTYPE)
        n_v = cast(z_v, DTYPE)
        if ((code >> 36) & 1) != 0:
            edit_heads(
                0, n_k, n_k, n_v, p_key, o_key, stride_receiver_key_head, p_out_key, o_out_key, stride_out_key,
                m_edit, m_write,
                row, up_weight, up_bias, head_gate_weight, head_gate_bias,
                start, 0, 1.0, o_token, i_batch, i_first, i_last,
                False, RECEIVER_HEADS, RECEIVER_DIM, WIDTH, BLOCK_T, BLOCK_H, BLOCK_CR, DTYPE, PRECISION,
            )  # fmt: skip
        if ((code >> 37) & 1) != 0:
            edit_heads(
                1, n_v, n_k, n_v, p_value, o_value, stride_receiver_value_head, p_out_value, o_out_value,
                stride_out_value, m_edit, m_write,
                row, up_weight, up_bias, head_gate_weight, head_gate_bias,
                start, 0, 1.0, o_token, i_batch, i_first, i_last,
                False, RECEIVER_HEADS, RECEIVER_DIM, WIDTH, BLOCK_T, BLOCK_H, BLOCK_CR, DTYPE, PRECISION,
            )  # fmt: skip


def launch_split(
    launch: Launch,
    tables: tuple[tuple[int, ...], ...],
    flags: Mapping[str, bool],
    numbers: tuple[int, ...],
    key: Tensor,
    out: Tensor | None,
    index: Tensor | None,
    start: Tensor,
    weights: Mapping[str, Tensor],
) -> None:
    """Both launches over one plan's layers. Called by `fusion.fuse_layers`.

    Args:
        launch: with a split.
        tables: the sharer's keys and values, the receiver's, and the codes.
        flags: ``IS_SHARER_ALIGNED`` and ``IS_RECEIVER_ALIGNED``.
        numbers: tokens, the sharer's tokens, begin, end, first, last, tiles, batch.
        key: one of the receiver's tensors, in the place of what there is none of.
        out, index: as of `fusion.fuse_layers`.
        start: what z starts from.
        weights: the stacked parameters, contiguous.
    """
    split = launch.split
    assert split is not None
    *_, begin, end, _, _, _, batch = numbers
    width = weights["down_weight"].shape[1]
    size = len(launch.rows) * batch * split.parts * (end - begin) * width
    partials = torch.empty(size, dtype=torch.float32, device=key.device)
    rows = key if index is None else index
    launch.variants(down_partial_kernel).launch(
        split.down_grid,
        tables,
        (partials, rows, weights["down_weight"]),
        (*numbers, split.parts, split.steps, *launch.strides[:12]),
        flags,
        split.down_keywords,
        split.down_options,
    )
    names = ("norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias", "head_gate_weight",
             "head_gate_bias")  # fmt: skip
    launch.variants(finish_kernel).launch(
        split.finish_grid,
        tables[2:],
        (key if out is None else out, rows, start, partials, *[weights[name] for name in names]),
        (*numbers, split.parts, split.splits, split.heads, *launch.strides[6:]),
        {"IS_RECEIVER_ALIGNED": flags["IS_RECEIVER_ALIGNED"]},
        split.finish_keywords,
        split.finish_options,
    )
