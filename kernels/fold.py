"""The message of LCF-X from the pooled summary: ``c = W_down[:, :2Cs]·[K*;V*] + b_down`` (spec section 4).

One launch for all layers. The summary stays float32; a weight is read once for up to eight batch items. Bytes: the
sharer's half of W_down, ``2·Cs·d`` weights a layer (Qwen3-0.6B, d = 128, 28 layers: 15 MB, 3.4 us on an H200);
``2·2·Cs·d`` FLOPs a layer and item.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .pooling_policy import fold_config


@triton.jit(do_not_specialize=["batch"])
def fold_kernel(
    summary,
    down_weight,
    down_bias,
    latent,
    batch,
    stride_weight_layer,
    stride_weight_row,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_W latent channels of one layer for BLOCK_B batch items, so that a row of weights serves them all.

    ``summary`` ``(L, 2, B, Cs)``, ``latent`` ``(L, B, WIDTH)`` float32, ``down_bias`` ``(L, WIDTH)``, all contiguous.
    Axis 0: ``[width tile, batch tile, layer]``, width fastest.
    """
    STEPS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    TILES: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    i_program = tl.program_id(0)
    batch_tiles = (batch + BLOCK_B - 1) // BLOCK_B
    i_layer = (i_program // TILES // batch_tiles).to(tl.int64)
    o_w = (i_program % TILES) * BLOCK_W + tl.arange(0, BLOCK_W)
    o_b = (i_program // TILES) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    o_c = tl.arange(0, BLOCK_C)
    m_w = o_w < WIDTH
    m_b = o_b < batch
    p_weight = down_weight + i_layer * stride_weight_layer + o_w[:, None] * stride_weight_row
    p_summary = summary + (i_layer * 2 * batch + o_b)[:, None] * CHANNELS
    acc = tl.zeros([BLOCK_B, BLOCK_W, BLOCK_C], dtype=tl.float32)
    for i in tl.range(0, 2 * STEPS, num_stages=STAGES):
        i_side = i // STEPS  # 0: K*, 1: V*
        o_channel = (i % STEPS) * BLOCK_C + o_c
        m_channel = o_channel < CHANNELS
        b_weight = tl.load(
            p_weight + (i_side * CHANNELS + o_channel)[None, :],
            mask=m_w[:, None] & m_channel[None, :],
            other=0.0,
        )
        b_summary = tl.load(
            p_summary + i_side.to(tl.int64) * batch * CHANNELS + o_channel[None, :],
            mask=m_b[:, None] & m_channel[None, :],
            other=0.0,
        )
        acc += b_weight.to(tl.float32)[None, :, :] * b_summary[:, None, :]
    b_bias = tl.load(down_bias + i_layer * WIDTH + o_w, mask=m_w, other=0.0).to(tl.float32)
    p_latent = latent + (i_layer * batch + o_b)[:, None] * WIDTH + o_w[None, :]
    tl.store(p_latent, tl.sum(acc, 2) + b_bias[None, :], mask=m_b[:, None] & m_w[None, :])


def fold(summary: Tensor, down_weight: Tensor, down_bias: Tensor) -> Tensor:
    """Launch `fold_kernel` on the current device. Arguments are checked by ``lcf_fast.ops``.

    ``summary`` ``(L, 2, B, H, D)`` float32, contiguous; ``down_weight`` ``(L, d, 2Cs+2Cr)``, ``down_bias`` ``(L, d)``
    of any dtype. Returns the latent ``(L, B, d)`` float32.
    """
    layers, _, batch, heads, head_dim = summary.shape
    width = down_weight.shape[1]
    if down_weight.stride(2) != 1:
        down_weight = down_weight.contiguous()
    latent = summary.new_empty(layers, batch, width)
    config = fold_config(heads * head_dim, batch)
    tiles = -(-width // config.block_width) * -(-batch // config.block_batch)
    keywords = {
        "CHANNELS": heads * head_dim,
        "WIDTH": width,
        "BLOCK_B": config.block_batch,
        "BLOCK_W": config.block_width,
        "BLOCK_C": config.block_channels,
        "STAGES": config.num_stages,
    }
    launch(
        fold_kernel,
        layers * tiles,
        (),
        (summary, down_weight, down_bias.contiguous(), latent),
        (batch, *down_weight.stride()[:2]),
        keywords,
        {"num_warps": config.num_warps},
    )
    return latent
