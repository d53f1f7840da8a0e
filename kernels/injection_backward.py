"""Gated injection, backward (spec section 2): the edit is made again, head by head, beside its gradient.

A program owns a tile of tokens and goes once over the gradient's rows: that of the latent, of each head's score, and
what each head's edit was multiplied with, which is all that the weights' gradients need of it (`weight_gradients`).

Cost a token and layer with both gates open: ``2·Cr`` elements read, ``4·Cr·d`` FLOPs, half of it the edit itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
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
    long_dot,
    odd,
    padded,
    table_entry,
    target_of,
)
from .injection import gate_scores
from .noise import NO_NOISE, NoiseArguments, soft_gate_tile
from .policy import backward_config
from .projection_backward import edited_rows
from .weight_gradients import up_gradients


@triton.jit(
    do_not_specialize=[
        "row", "seed", "inverse_temperature", "tokens", "sharer_tokens", "first", "last", "tiles", "batch"
    ]
)  # fmt: skip
def injection_gradients_kernel(
    codes,
    grad,
    latent,
    dlatent,
    dscore,
    scale,
    dlogit,
    index,
    up_weight,
    up_bias,
    head_gate_weight,
    head_gate_bias,
    gate_logit,
    row,
    seed,
    inverse_temperature,
    tokens,
    sharer_tokens,
    first,
    last,
    tiles,
    batch,
    LAYERS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_SHARER: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    READS_GATE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one layer, both halves.

    ``grad (open gates, B, H, tokens, D)``, whose slots the codes know; ``latent``, ``dlatent (G, B, N, d)``;
    ``dscore``, ``scale (G, B, N, 2, H)``; ``dlogit (G, B, tiles, 2)``, with HAS_NOISE. READS_GATE: a closed gate is
    known to the device alone, and its gradient is zero.
    """
    HALF: tl.constexpr = WIDTH // 2
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_C - 1) // BLOCK_C
    CR: tl.constexpr = HEADS * HEAD_DIM
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    i_batch = ((i_program // tiles) % batch).to(tl.int64)
    i_layer = i_program // (tiles * batch)
    code = table_entry(codes, i_layer, LAYERS, True)
    i_start = (first + i_tile * BLOCK_T).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_z = tl.arange(0, HALF)
    o_c = tl.arange(0, BLOCK_C)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < HEADS
    m_row, _ = edited_rows(index, i_batch, i_start, o_t, last, tokens, sharer_tokens, HAS_INDEX, HAS_SHARER)
    span = last - first
    m_store = i_tile * BLOCK_T + o_t < span
    i_state = (i_layer * batch + i_batch) * span + i_tile * BLOCK_T
    o_state = i_state * WIDTH + o_t[:, None] * WIDTH + o_z[None, :]
    n_k = cast(tl.load(latent + o_state, mask=m_row[:, None], other=0.0), DTYPE)
    n_v = cast(tl.load(latent + o_state + HALF, mask=m_row[:, None], other=0.0), DTYPE)
    d_k = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
    d_v = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
    for i_kv in tl.static_range(2):
        is_open = ((code >> (36 + i_kv)) & 1) != 0
        along = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)  # a head's gradient along its own edit
        alpha = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        gate = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        d_half = tl.zeros([BLOCK_T, HALF], dtype=tl.float32)
        if is_open:
            alpha = gate_scores(
                n_k, n_v, head_gate_weight + (i_layer * 2 + i_kv) * (HEADS * WIDTH),
                head_gate_bias + (i_layer * 2 + i_kv) * HEADS, HEADS, WIDTH, BLOCK_T, BLOCK_H, DTYPE, PRECISION,
            )  # fmt: skip
            gate += 1.0
            if HAS_NOISE:
                logit = tl.load(gate_logit + i_layer * 2 + i_kv).to(tl.float32)
                gate = soft_gate_tile(
                    seed, inverse_temperature, logit, o_h, i_start + o_t, i_batch, row + i_layer, i_kv
                )  # fmt: skip
            if READS_GATE:
                gate = tl.where(tl.load(gate_logit + i_layer * 2 + i_kv).to(tl.float32) > 0, gate, 0.0)
            slot = (code >> (12 + 12 * i_kv)) & 0xFFF
            p_grad = grad + ((slot * batch + i_batch) * HEADS * tokens + i_start) * HEAD_DIM
            p_up = up_weight + (i_layer * 2 + i_kv) * (CR * HALF)
            p_bias = up_bias + (i_layer * 2 + i_kv) * CR
            for i in range(0, HEADS * CHUNKS):
                i_head = i // CHUNKS
                o_channel = (i % CHUNKS) * BLOCK_C + o_c
                m_channel = o_channel < HEAD_DIM
                o_column = i_head * HEAD_DIM + o_channel
                b_w = cast(
                    tl.load(p_up + o_column[None, :] * HALF + o_z[:, None], mask=m_channel[None, :], other=0.0), DTYPE
                )  # fmt: skip
                b_bias = tl.load(p_bias + o_column, mask=m_channel, other=0.0).to(tl.float32)
                p_g = (p_grad + i_head.to(tl.int64) * tokens * HEAD_DIM) + (
                    o_t[:, None] * HEAD_DIM + o_channel[None, :]
                )  # fmt: skip
                b_grad = tl.load(p_g, mask=m_row[:, None] & m_channel[None, :], other=0.0).to(tl.float32)
                delta = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
                if i_kv == 0:
                    delta = dot(n_k, b_w, delta, PRECISION) + b_bias[None, :]
                else:
                    delta = dot(n_v, b_w, delta, PRECISION) + b_bias[None, :]
                is_head = (o_h == i_head)[None, :]
                along += tl.where(is_head, tl.sum(b_grad * delta, 1)[:, None], 0.0)
                b_scale = tl.sum(tl.where(is_head, alpha * gate, 0.0), 1)
                d_half = long_dot(cast(b_scale[:, None] * b_grad, DTYPE), tl.trans(b_w), d_half, PRECISION)
        d_score = along * gate * alpha * (1.0 - alpha)
        o_head = (i_state + o_t)[:, None] * (2 * HEADS) + i_kv * HEADS + o_h[None, :]
        m_head = m_store[:, None] & m_h[None, :]
        tl.store(dscore + o_head, d_score, mask=m_head)
        tl.store(scale + o_head, tl.where(m_row[:, None], alpha * gate, 0.0), mask=m_head)
        if HAS_NOISE:
            slope = tl.where(m_h[None, :], along * alpha * gate * (1.0 - gate), 0.0) * inverse_temperature
            tl.store(dlogit + ((i_layer * batch + i_batch) * tiles + i_tile) * 2 + i_kv, tl.sum(tl.sum(slope, 1), 0))
        b_score = cast(d_score, DTYPE)
        p_w = head_gate_weight + (i_layer * 2 + i_kv) * (HEADS * WIDTH) + o_h[:, None] * WIDTH + o_z[None, :]
        d_k = dot(b_score, cast(tl.load(p_w, mask=m_h[:, None], other=0.0), DTYPE), d_k, PRECISION)
        d_v = dot(b_score, cast(tl.load(p_w + HALF, mask=m_h[:, None], other=0.0), DTYPE), d_v, PRECISION)
        if i_kv == 0:
            d_k += d_half
        else:
            d_v += d_half
    tl.store(dlatent + o_state, d_k, mask=m_store[:, None])
    tl.store(dlatent + o_state + HALF, d_v, mask=m_store[:, None])


def injection_gradients(
    grad: Tensor,
    codes: Sequence[int],
    latent: Tensor,
    dlatent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    index: Tensor | None,
    sharer_tokens: int | None,
    positions: tuple[int, int],
    noise: NoiseArguments | None,
    row: int,
    reads_gate: bool,
) -> dict[str, Tensor]:
    """Gradients of the injection's parameters, stacked over ``G`` layers, float32; fills ``dlatent (G, B, N, d)``.

    Args:
        grad: ``(open gates, B, H, tokens, D)``, contiguous.
        codes: `fusion_plan.layer_code` of each layer.
        latent: ``(G, B, N, d)`` float32, N the range ``positions``.
        weights: of these layers, stacked and contiguous.
        index: ``(B, tokens)`` int32, negative where a row is not edited; with ``sharer_tokens``, nor at or above those.
        row: what the noise calls the first layer.
        reads_gate: gates that the codes call open may be closed in ``gate_logit``.
    """
    layers, batch, span, width = latent.shape
    heads, tokens, head_dim = grad.shape[2:]
    config = backward_config(width, grad.element_size(), target_of(grad))
    tiles = triton.cdiv(span, config.block_tokens)
    dscore = latent.new_empty((layers, batch, span, 2, heads))
    scale = torch.empty_like(dscore)
    dlogit = latent.new_empty((layers, batch * tiles, 2)) if noise is not None else None
    table = padded(odd(codes))
    names = ("up_weight", "up_bias", "head_gate_weight", "head_gate_bias", "gate_logit")
    seed, _, _, inverse_temperature = NO_NOISE if noise is None else noise
    with device_guard(grad):
        injection_gradients_kernel[(layers * batch * tiles,)](
            table,
            grad,
            latent,
            dlatent,
            dscore,
            scale,
            latent if dlogit is None else dlogit,
            latent if index is None else index,
            *(weights[name] for name in names),
            row,
            seed,
            inverse_temperature,
            tokens,
            0 if sharer_tokens is None else sharer_tokens,
            *positions,
            tiles,
            batch,
            LAYERS=len(table),
            HAS_INDEX=index is not None,
            HAS_SHARER=sharer_tokens is not None,
            HAS_NOISE=noise is not None,
            READS_GATE=reads_gate,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK_T=config.block_tokens,
            BLOCK_C=head_chunk(head_dim, config.block_channels),
            BLOCK_H=heads_block(heads),
            DTYPE=TRITON_DTYPE[grad.dtype],
            PRECISION=dot_precision(grad.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    found = up_gradients(
        grad, codes, latent, scale, index=index, sharer_tokens=sharer_tokens, positions=positions
    )  # fmt: skip
    rows = dscore.view(layers, batch * span, 2 * heads)
    found["head_gate_weight"] = (rows.mT @ latent.reshape(layers, batch * span, width)).view(layers, 2, heads, width)
    found["head_gate_bias"] = rows.sum(1).view(layers, 2, heads)
    found["gate_logit"] = latent.new_zeros((layers, 2)) if dlogit is None else dlogit.sum(1)
    return found
