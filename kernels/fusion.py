"""Projection to injection for all layers in one launch: the hot path (spec sections 2 and 4).

Grid: one program a (layer, batch item, tile of tokens), layers slowest, so that a layer's weights stay in L2 while its
tiles run. Between the caches' rows and the edited rows nothing touches memory: the latent stays in registers, the FFN's
hidden units on chip, and the receiver's rows are read a second time, for the residual, while they are still in L2.

For LCF-X the sharer's whole part is one d-vector a layer and item (the message), so the kernel reads only the receiver.
Layers with both gates closed are not launched; a layer with one open gate does half the injection.
Few tokens take two launches of more programs: `fusion_split`.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, device_guard, dot_precision, pointer_of, row_offsets, table_entry, target_of
from .fusion_plan import Gates, Layers, Sizes, plan_of
from .fusion_split import launch_split
from .fusion_tile import copy_heads, edit_heads, out_places, tile_rows
from .noise import NO_NOISE, NoiseArguments
from .projection import blocks_tile, down_tile


@triton.jit(
    do_not_specialize=[
        "tokens", "sharer_tokens", "begin", "end", "first", "last", "tiles", "batch", "seed", "threshold",
        "keep_scale", "inverse_temperature",
    ]
)  # fmt: skip
def fuse_kernel(
    sharer_keys,
    sharer_values,
    receiver_keys,
    receiver_values,
    codes,
    out,
    index,
    start,
    down_weight,
    norm_weight,
    ffn_in_weight,
    ffn_out_weight,
    up_weight,
    up_bias,
    head_gate_weight,
    head_gate_bias,
    gate_logit,
    seed,
    threshold,
    keep_scale,
    inverse_temperature,
    tokens,
    sharer_tokens,
    begin,
    end,
    first,
    last,
    tiles,
    batch,
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
    IS_INPLACE: tl.constexpr,
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
    BLOCK_H: tl.constexpr,
    EPS: tl.constexpr,
    SHARER_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Edit one tile of one layer: write tokens ``[begin, end)``, edit those in ``[first, last)`` that index allows.

    HAS_NOISE: as in training, with dropout and soft gates (`noise`); else the arguments from ``gate_logit`` to
    ``inverse_temperature`` are not read.
    """
    CS: tl.constexpr = SHARER_HEADS * SHARER_DIM
    CR: tl.constexpr = RECEIVER_HEADS * RECEIVER_DIM
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    i_batch = ((i_program // tiles) % batch).to(tl.int64)
    i_layer = i_program // (tiles * batch)

    code = table_entry(codes, i_layer, LAYERS, True)
    row = code & 0xFFF
    i_start = begin + i_tile * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)
    m_write, m_edit, o_sharer = tile_rows(
        index, i_batch, i_start, o_t, tokens, sharer_tokens, end, first, last, HAS_SHARER, HAS_INDEX
    )  # fmt: skip
    i_start = i_start.to(tl.int64)
    i_sharer = i_start
    if HAS_INDEX:
        i_sharer = i_start * 0
    edits = tl.sum(m_edit.to(tl.int32), 0)

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
                0, RECEIVER_HEADS, RECEIVER_DIM, BLOCK_CR,
            )  # fmt: skip
    else:
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
            o_key,
            o_value,
            stride_receiver_key_head,
            stride_receiver_value_head,
            m_edit,
            start + row * stride_start_layer + i_batch * stride_start_batch,
            down_weight + row * (WIDTH * (2 * CS + 2 * CR)),
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
        o_token = i_start + o_t
        z_k, z_v = blocks_tile(
            z_k, z_v, norm_weight + row * (BLOCKS * WIDTH), ffn_in_weight + row * (BLOCKS * HIDDEN * WIDTH),
            ffn_out_weight + row * (BLOCKS * HIDDEN * WIDTH),
            seed, threshold, keep_scale, o_token, i_batch, row,
            WIDTH, HIDDEN, BLOCKS, BLOCK_F, EPS, HAS_NOISE, DTYPE, PRECISION,
        )  # fmt: skip
        n_k = cast(z_k, DTYPE)
        n_v = cast(z_v, DTYPE)
        # The value first: its rows were read last, and are the likelier ones to be in L2 still.
        if ((code >> 37) & 1) != 0:
            edit_heads(
                1, n_v, n_k, n_v, p_value, o_value, stride_receiver_value_head, p_out_value, o_out_value,
                stride_out_value, m_edit, m_write,
                row, up_weight, up_bias, head_gate_weight, head_gate_bias,
                gate_logit, seed, inverse_temperature, o_token, i_batch, 0, RECEIVER_HEADS,
                HAS_NOISE, RECEIVER_HEADS, RECEIVER_DIM, WIDTH, BLOCK_T, BLOCK_H, BLOCK_CR, DTYPE, PRECISION,
            )  # fmt: skip
        if ((code >> 36) & 1) != 0:
            edit_heads(
                0, n_k, n_k, n_v, p_key, o_key, stride_receiver_key_head, p_out_key, o_out_key, stride_out_key,
                m_edit, m_write,
                row, up_weight, up_bias, head_gate_weight, head_gate_bias,
                gate_logit, seed, inverse_temperature, o_token, i_batch, 0, RECEIVER_HEADS,
                HAS_NOISE, RECEIVER_HEADS, RECEIVER_DIM, WIDTH, BLOCK_T, BLOCK_H, BLOCK_CR, DTYPE, PRECISION,
            )  # fmt: skip


_STACKED = ("down_weight", "norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias",
            "head_gate_weight", "head_gate_bias", "gate_logit")  # fmt: skip


def fuse_layers(
    sharer: Layers | None,
    receiver: Layers,
    weights: Mapping[str, Tensor],
    *,
    live: Gates,
    index: Tensor | None,
    message: Tensor | None,
    positions: tuple[int, int],
    inplace: bool,
    norm_eps: float,
    noise: NoiseArguments | None = None,
) -> Tensor | None:
    """Launch `fuse_kernel` over every layer with an open gate, or of few tokens the two of `fusion_split`.

    Arguments are checked by ``lcf_fast.ops``.

    Args:
        sharer, receiver: the kept layers' caches; ``sharer`` is ``None`` with ``message``.
        weights: the stacked parameters.
        live: which of a layer's two gates are open, on the host.
        index: ``(B, N)`` int32, contiguous: the sharer's row, negative where the position must stay as it is.
        message: ``(L, B, d)`` float32, contiguous (LCF-X).
        positions: half-open range to edit.
        inplace: edit ``receiver``; otherwise write new tensors.
        noise: makes it a training pass, whose gates ``live`` must all call open.

    Returns:
        Out of place: ``(open gates, B, H, N, D)``, key before value, layer by layer. In place: ``None``.
    """
    key, layout = receiver.tensors[0], receiver.layout
    batch, _, tokens, _ = layout.shape
    begin, end = positions if inplace else (0, tokens)
    stacked = {name: weights[name].contiguous() for name in _STACKED}
    _, width, columns = weights["down_weight"].shape
    _, blocks, hidden, _ = weights["ffn_in_weight"].shape
    plan = plan_of(
        layout,
        None if sharer is None else sharer.layout,
        Sizes(width, hidden, blocks, columns, weights["down_weight"].element_size()),
        live,
        end - begin,
        index is not None,
        inplace,
        noise is not None,
        norm_eps,
        dot_precision(layout.dtype),
        target_of(key),
    )
    out = None if inplace else key.new_empty((plan.open_gates, *layout.shape))
    if not plan.launches:
        return out
    other = receiver if sharer is None else sharer
    start = message if message is not None else weights["down_bias"].contiguous()
    with device_guard(key):
        for launch in plan.launches:
            receiver_keys, receiver_values, is_receiver_aligned = launch.receiver(receiver)
            sharer_keys, sharer_values, is_sharer_aligned = receiver_keys, receiver_values, is_receiver_aligned
            if sharer is not None:
                sharer_keys, sharer_values, is_sharer_aligned = launch.sharer(sharer)
            tables = (sharer_keys, sharer_values, receiver_keys, receiver_values, launch.codes)
            flags = {"IS_SHARER_ALIGNED": is_sharer_aligned, "IS_RECEIVER_ALIGNED": is_receiver_aligned}
            numbers = (tokens, other.layout.shape[2], begin, end, *positions, launch.tiles, batch)
            if launch.split is not None:
                launch_split(launch, tables, flags, numbers, key, out, index, start, stacked)
                continue
            tensors = (key if out is None else out, key if index is None else index, start, *stacked.values())
            rest = (*(NO_NOISE if noise is None else noise), *numbers, *launch.strides)
            if noise is not None:  # a seed may be of any size, and so of any integer type
                options = {**flags, **launch.keywords, **launch.options}
                fuse_kernel[launch.grid](*tables, *tensors, *rest, **options)
                continue
            launch.variants(fuse_kernel).launch(
                launch.grid, tables, tensors, rest, flags, launch.keywords, launch.options
            )  # fmt: skip
    return out
