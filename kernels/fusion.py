"""Projection to injection for all layers in one launch: the hot path (spec sections 2 and 4).

Grid: one program a (layer, batch item, tile of tokens), layers slowest, so that a layer's weights stay in L2 while its
tiles run. Between the caches' rows and the edited rows nothing touches memory: the latent stays in registers, the FFN's
hidden units on chip, and the receiver's rows are read a second time, for the residual, while they are still in L2.

For LCF-X the sharer's whole part is one d-vector a layer and item (the message), so the kernel reads only the receiver.
Layers with both gates closed are not launched; a layer with one open gate does half the injection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    address_tables,
    cast,
    device_guard,
    dot_precision,
    head_chunk,
    heads_block,
    hidden_chunk,
    needs_wide_offsets,
    odd,
    padded,
    pointer_of,
    row_offsets,
    table_entry,
    target_of,
)
from .injection import copy_tile, gate_scores, inject_tile
from .noise import NO_NOISE, NoiseArguments, soft_gate_tile
from .policy import backward_config, tile_config
from .projection import blocks_tile, down_tile

Pair = tuple[Tensor, Tensor]

# A layer's launch code: its row in the stacked weights, the output slots of its key and value, and its open gates.
# Bit 40 makes every code a 64-bit integer, so that all layers' codes have one type.
_SLOT_BITS = 12
_CODE_MARK = 1 << 40


def layer_code(row: int, slot_key: int, slot_value: int, open_key: bool, open_value: bool) -> int:
    """Pack what the kernel must know of one layer into an integer; `fuse_kernel` unpacks it."""
    assert max(row, slot_key, slot_value) < 1 << _SLOT_BITS
    return _CODE_MARK | open_value << 37 | open_key << 36 | slot_value << 24 | slot_key << 12 | row


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
    HALF: tl.constexpr = WIDTH // 2
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
    m_write = i_start + o_t < end
    m_edit = m_write & (i_start + o_t >= first) & (i_start + o_t < last)
    i_start = i_start.to(tl.int64)
    i_sharer = i_start
    o_sharer = o_t
    if HAS_INDEX:
        i_sharer = i_start * 0
        o_sharer = tl.load(index + i_batch * tokens + i_start + o_t, mask=m_edit, other=-1)
        m_edit = m_edit & (o_sharer >= 0)
        if HAS_SHARER:
            m_edit = m_edit & (o_sharer < sharer_tokens)
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
        # out is (open gates, B, H, N, D), contiguous; a layer's code says which of them are its own
        stride_out_key = tokens.to(tl.int64) * RECEIVER_DIM
        stride_out_value = stride_out_key
        p_out = out + i_batch * RECEIVER_HEADS * stride_out_key + i_start * RECEIVER_DIM
        p_out_key = p_out + ((code >> 12) & 0xFFF) * batch * RECEIVER_HEADS * stride_out_key
        p_out_value = p_out + ((code >> 24) & 0xFFF) * batch * RECEIVER_HEADS * stride_out_key
        o_out_key = o_t * RECEIVER_DIM
        o_out_value = o_out_key
    is_key_open = ((code >> 36) & 1) != 0
    is_value_open = ((code >> 37) & 1) != 0

    if edits == 0:
        if not IS_INPLACE:
            if is_key_open:
                copy_tile(
                    p_key, o_key, stride_receiver_key_head, p_out_key, o_out_key, stride_out_key, m_write,
                    RECEIVER_HEADS, RECEIVER_DIM, BLOCK_CR,
                )  # fmt: skip
            if is_value_open:
                copy_tile(
                    p_value, o_value, stride_receiver_value_head, p_out_value, o_out_value, stride_out_value, m_write,
                    RECEIVER_HEADS, RECEIVER_DIM, BLOCK_CR,
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
        p_up = up_weight + row * (2 * CR * HALF)
        p_up_bias = up_bias + row * (2 * CR)
        p_gate = head_gate_weight + row * (2 * RECEIVER_HEADS * WIDTH)
        p_gate_bias = head_gate_bias + row * (2 * RECEIVER_HEADS)
        if is_key_open:
            alpha = gate_scores(
                n_k, n_v, p_gate, p_gate_bias, RECEIVER_HEADS, WIDTH, BLOCK_T, BLOCK_H, DTYPE, PRECISION
            )  # fmt: skip
            if HAS_NOISE:
                logit = tl.load(gate_logit + 2 * row).to(tl.float32)
                o_h = tl.arange(0, BLOCK_H)
                alpha *= soft_gate_tile(seed, inverse_temperature, logit, o_h, o_token, i_batch, row, 0)
            inject_tile(
                n_k, alpha, p_key, o_key, stride_receiver_key_head, p_out_key, o_out_key, stride_out_key,
                m_edit, m_write,
                p_up, p_up_bias, RECEIVER_HEADS, RECEIVER_DIM, WIDTH, BLOCK_H, BLOCK_CR, DTYPE, PRECISION,
            )  # fmt: skip
        if is_value_open:
            p_gate += RECEIVER_HEADS * WIDTH
            p_gate_bias += RECEIVER_HEADS
            alpha = gate_scores(
                n_k, n_v, p_gate, p_gate_bias, RECEIVER_HEADS, WIDTH, BLOCK_T, BLOCK_H, DTYPE, PRECISION
            )  # fmt: skip
            if HAS_NOISE:
                logit = tl.load(gate_logit + 2 * row + 1).to(tl.float32)
                o_h = tl.arange(0, BLOCK_H)
                alpha *= soft_gate_tile(seed, inverse_temperature, logit, o_h, o_token, i_batch, row, 1)
            inject_tile(
                n_v, alpha, p_value, o_value, stride_receiver_value_head, p_out_value, o_out_value, stride_out_value,
                m_edit, m_write,
                p_up + CR * HALF, p_up_bias + CR,
                RECEIVER_HEADS, RECEIVER_DIM, WIDTH, BLOCK_H, BLOCK_CR, DTYPE, PRECISION,
            )  # fmt: skip


_STACKED = ("down_weight", "norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias",
            "head_gate_weight", "head_gate_bias", "gate_logit")  # fmt: skip


def fuse_layers(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    weights: Mapping[str, Tensor],
    *,
    live: Sequence[tuple[bool, bool]],
    index: Tensor | None,
    message: Tensor | None,
    positions: tuple[int, int],
    inplace: bool,
    norm_eps: float,
    noise: NoiseArguments | None = None,
) -> Tensor | None:
    """Launch `fuse_kernel` over every layer with an open gate. Arguments are checked by ``lcf_fast.ops``.

    Args:
        sharer, receiver: one ``(key, value)`` a kept layer; ``sharer`` is ``None`` with ``message``.
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
    key = receiver[0][0]
    batch, heads, tokens, head_dim = key.shape
    slots: list[tuple[int, int]] = []
    open_gates = 0
    for open_key, open_value in live:
        slots.append((open_gates, open_gates + open_key))
        open_gates += open_key + open_value
    out = None if inplace else key.new_empty(open_gates, batch, heads, tokens, head_dim)
    if not open_gates or not batch or not tokens or (inplace and positions[0] >= positions[1]):
        return out

    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row, gates in enumerate(live):
        if any(gates):
            pairs = receiver[row] if sharer is None else (*receiver[row], *sharer[row])
            groups.setdefault(tuple(tensor.stride() for tensor in pairs), []).append(row)
    stacked = {name: weights[name].contiguous() for name in (*_STACKED, "down_bias")}
    with device_guard(key):
        for rows in groups.values():
            codes = [layer_code(row, *slots[row], *live[row]) for row in rows]
            _launch(sharer, receiver, rows, codes, out, stacked, index, message, positions, norm_eps, noise)
    return out


def _launch(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    rows: list[int],
    codes: list[int],
    out: Tensor | None,
    stacked: Mapping[str, Tensor],
    index: Tensor | None,
    message: Tensor | None,
    positions: tuple[int, int],
    norm_eps: float,
    noise: NoiseArguments | None,
) -> None:
    """One launch: layers whose tensors have the same strides."""
    key, value = receiver[rows[0]]
    batch, heads, tokens, head_dim = key.shape
    width = stacked["down_weight"].shape[1]
    begin, end = positions if out is None else (0, tokens)
    target, size = target_of(key), key.element_size()
    config = tile_config(width, size, target, len(rows) * batch, end - begin)
    if noise is not None:
        config = backward_config(width, size, target)
    tiles = triton.cdiv(end - begin, config.block_tokens)

    receiver_tables, is_receiver_aligned = address_tables(*zip(*(receiver[row] for row in rows)))
    if sharer is None:
        assert message is not None
        sharer_key, sharer_value = key, value
        sharer_tables, is_sharer_aligned = receiver_tables, is_receiver_aligned
        start, start_strides = message, (message.stride(0), message.stride(1))
        # Only the product matters here: where the receiver's columns of W_down begin.
        sharer_heads, sharer_dim = 1, stacked["down_weight"].shape[2] // 2 - heads * head_dim
    else:
        sharer_key, sharer_value = sharer[rows[0]]
        sharer_tables, is_sharer_aligned = address_tables(*zip(*(sharer[row] for row in rows)))
        start, start_strides = stacked["down_bias"], (width, 0)
        sharer_heads, sharer_dim = sharer_key.shape[1], sharer_key.shape[3]

    fuse_kernel[(len(rows) * batch * tiles,)](
        *sharer_tables,
        *receiver_tables,
        padded(odd(codes)),
        out if out is not None else key,
        index if index is not None else key,
        start,
        *(stacked[name] for name in _STACKED),
        *(NO_NOISE if noise is None else noise),
        tokens,
        sharer_key.shape[2],
        begin,
        end,
        positions[0],
        positions[1],
        tiles,
        batch,
        *sharer_key.stride()[:3],
        *sharer_value.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *start_strides,
        LAYERS=len(receiver_tables[0]),
        HAS_SHARER=sharer is not None,
        HAS_INDEX=index is not None,
        HAS_NOISE=noise is not None,
        IS_INPLACE=out is None,
        IS_WIDE=needs_wide_offsets(config.block_tokens, key, value)
        or needs_wide_offsets(
            sharer_key.shape[2] if index is not None else config.block_tokens, sharer_key, sharer_value
        ),
        IS_SHARER_ALIGNED=is_sharer_aligned,
        IS_RECEIVER_ALIGNED=is_receiver_aligned,
        SHARER_HEADS=sharer_heads,
        SHARER_DIM=sharer_dim,
        RECEIVER_HEADS=heads,
        RECEIVER_DIM=head_dim,
        WIDTH=width,
        HIDDEN=stacked["ffn_in_weight"].shape[2],
        BLOCKS=stacked["norm_weight"].shape[1],
        BLOCK_T=config.block_tokens,
        BLOCK_CS=head_chunk(sharer_dim, config.block_channels),
        BLOCK_CR=head_chunk(head_dim, config.block_channels),
        BLOCK_F=hidden_chunk(stacked["ffn_in_weight"].shape[2], config.block_hidden),
        BLOCK_H=heads_block(heads),
        EPS=norm_eps,
        SHARER_DTYPE=TRITON_DTYPE[sharer_key.dtype],
        DTYPE=TRITON_DTYPE[key.dtype],
        PRECISION=dot_precision(key.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
