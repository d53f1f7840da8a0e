"""From pooled slots to key-value pairs of the receiver, forward: the fold to latents, and their expansion.

``c_j = W_down·[K~_j; V~_j] + b_down + e_j`` is what a message carries; then z = c, in each FFN block
``z = z + W_out·gelu(W_in·rmsnorm(z))``, and ``key_j = W_up[0]·z + b_up[0]``, ``value_j = W_up[1]·z + b_up[1]``. One
launch each for all layers. The rows of all batch items are packed: a row is (item, slot), and one read of the weights
serves 16 rows or more. Keys and values are written where they are to lie: a slice of a preallocated cache, or a page.

The fold is as exact as in float32 whatever the weights' dtype (`common.exact_dot`). The expansion's products run in the
destination's dtype, with sums, latent, norms and residual in float32, as in `projection`, whose FFN blocks it uses.

Cost for the published pair (Qwen3-0.6B to Qwen3-0.6B: L = 28, Cs = Cr = 1024, d = 128; k = 8, one item, bfloat16), on
an H200 (4.3 TB/s): the weights are what is read.
Fold: ``2·Cs·d`` weights a layer, 14.7 MB, and 1.8 MB of slots: 3.8 us. FLOPs ``12·Cs·d`` a row, padded to 16: 0.7 G,
0.9 us.
Expansion: ``16·d² + 2·Cr·d`` weights a layer, 29.4 MB, 0.9 MB written: 7.1 us. FLOPs ``32·d² + 4·Cr·d`` a row, padded
to 16: 0.5 G, 0.6 us. What bounds it is how fast few programs pull: see `slot_policy.slot_expand_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    address_tables,
    alike_runs,
    cast,
    device_guard,
    dot,
    dot_precision,
    exact_dot,
    head_chunk,
    hidden_chunk,
    long_dot,
    pointer_of,
    row_scale,
    target_of,
)
from .launching import launch
from .noise import NO_NOISE, NoiseArguments
from .policy import PROCESSORS, known_target
from .projection import blocks_tile
from .slot_policy import slot_expand_config, slot_fold_config

Pair = tuple[Tensor, Tensor]


@triton.jit
def add_slots(
    z,
    p_slot,
    p_down,
    m_r,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z += x W^T`` for float32 rows at ``p_slot`` (rows, 1) and weights at ``p_down`` (1, latent channels)."""
    o_c = tl.arange(0, BLOCK_C)
    for i in range(0, (CHANNELS + BLOCK_C - 1) // BLOCK_C):
        o_channel = i * BLOCK_C + o_c
        if CHANNELS % BLOCK_C == 0:
            b_slot = tl.load(p_slot + o_channel[None, :], mask=m_r[:, None], other=0.0)
            b_down = tl.load(p_down + o_channel[:, None])
        else:
            m_c = o_channel < CHANNELS
            b_slot = tl.load(p_slot + o_channel[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
            b_down = tl.load(p_down + o_channel[:, None], mask=m_c[:, None], other=0.0)
        if DTYPE == tl.float32:  # noqa: SIM300
            z = long_dot(b_slot, b_down, z, PRECISION)
        elif DTYPE == tl.bfloat16:  # noqa: SIM300
            z = exact_dot(b_slot, b_down, z, DTYPE)
        else:
            scale, inverse = row_scale(b_slot)
            part = tl.zeros([z.shape[0], z.shape[1]], dtype=tl.float32)
            z += exact_dot(b_slot * scale[:, None], b_down, part, DTYPE) * inverse[:, None]
    return z


@triton.jit(do_not_specialize=["rows", "slots", "tiles"])
def fold_slots_kernel(
    slot_key,
    slot_value,
    down_weight,
    down_bias,
    slot_embedding,
    latent,
    rows,
    slots,
    tiles,
    stride_weight_layer,
    stride_weight_row,
    stride_embedding_layer,
    stride_embedding_slot,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_W latent channels of BLOCK_R rows of one layer.

    ``slot_key``, ``slot_value`` ``(L, rows, CHANNELS)`` and ``latent (L, rows, WIDTH)`` float32, ``down_bias
    (L, WIDTH)``, contiguous; ``down_weight`` and ``slot_embedding`` with last stride 1.
    Axis 0: ``[width tile, row tile, layer]``, width fastest.
    """
    WIDTH_TILES: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    i_program = tl.program_id(0)
    o_w = (i_program % WIDTH_TILES) * BLOCK_W + tl.arange(0, BLOCK_W)
    o_r = (i_program // WIDTH_TILES) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    i_layer = (i_program // WIDTH_TILES // tiles).to(tl.int64)
    m_r = o_r < rows
    m_rw = m_r[:, None] & (o_w < WIDTH)[None, :]
    o_slot = ((i_layer * rows + o_r) * CHANNELS)[:, None]
    # Channels beyond d are the last one again, and are not stored: loads without a mask are the wide ones.
    p_down = down_weight + i_layer * stride_weight_layer + (tl.minimum(o_w, WIDTH - 1) * stride_weight_row)[None, :]
    z = tl.zeros([BLOCK_R, BLOCK_W], dtype=tl.float32)
    z = add_slots(z, slot_key + o_slot, p_down, m_r, CHANNELS, BLOCK_C, DTYPE, PRECISION)
    z = add_slots(z, slot_value + o_slot, p_down + CHANNELS, m_r, CHANNELS, BLOCK_C, DTYPE, PRECISION)
    z += tl.load(down_bias + i_layer * WIDTH + o_w, mask=o_w < WIDTH, other=0.0).to(tl.float32)[None, :]
    p_embedding = slot_embedding + i_layer * stride_embedding_layer + (o_r % slots)[:, None] * stride_embedding_slot
    z += tl.load(p_embedding + o_w[None, :], mask=m_rw, other=0.0).to(tl.float32)
    tl.store(latent + (i_layer * rows + o_r)[:, None] * WIDTH + o_w[None, :], z, mask=m_rw)


@triton.jit
def up_columns(
    n_k,
    n_v,
    p_up,
    p_bias,
    p_out,
    o_out,
    stride_head,
    m_r,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write steps ``[first, last)`` of ``W_up z + b_up`` for one side, BLOCK_C channels of one head a step.

    ``n_k``, ``n_v``: the halves of z as matrix operands; ``p_out + o_out``: the rows (64-bit offsets).
    """
    HALF: tl.constexpr = WIDTH // 2
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_C - 1) // BLOCK_C
    o_z = tl.arange(0, HALF)
    o_c = tl.arange(0, BLOCK_C)
    for i in range(first, last):
        i_head = i // CHUNKS
        o_channel = (i % CHUNKS) * BLOCK_C + o_c
        o_column = i_head * HEAD_DIM + o_channel
        p_w = p_up + o_column[None, :] * WIDTH + o_z[:, None]
        m_out = m_r[:, None]
        if HEAD_DIM % BLOCK_C == 0:
            b_w_k = tl.load(p_w)
            b_w_v = tl.load(p_w + HALF)
            b_bias = tl.load(p_bias + o_column)
        else:
            m_channel = o_channel < HEAD_DIM
            m_out = m_out & m_channel[None, :]
            b_w_k = tl.load(p_w, mask=m_channel[None, :], other=0.0)
            b_w_v = tl.load(p_w + HALF, mask=m_channel[None, :], other=0.0)
            b_bias = tl.load(p_bias + o_column, mask=m_channel, other=0.0)
        out = tl.zeros([n_k.shape[0], BLOCK_C], dtype=tl.float32)
        out = dot(n_k, cast(b_w_k, DTYPE), out, PRECISION)
        out = dot(n_v, cast(b_w_v, DTYPE), out, PRECISION) + b_bias.to(tl.float32)[None, :]
        p_tile = (p_out + i_head.to(tl.int64) * stride_head) + (o_out[:, None] + o_channel[None, :])
        tl.store(p_tile, cast(out, DTYPE), mask=m_out)


@triton.jit(
    do_not_specialize=["rows", "slots", "tiles", "first_layer", "noise_row", "seed", "threshold", "keep_scale"]
)  # fmt: skip
def expand_slots_kernel(
    latent,
    keys,
    values,
    norm_weight,
    ffn_in_weight,
    ffn_out_weight,
    up_weight,
    up_bias,
    rows,
    slots,
    tiles,
    first_layer,
    noise_row,
    seed,
    threshold,
    keep_scale,
    stride_key_batch,
    stride_key_head,
    stride_key_slot,
    stride_value_batch,
    stride_value_head,
    stride_value_slot,
    LAYERS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SPLITS: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows of one layer, and one of SPLITS parts of its keys and values.

    ``latent (layers, rows, WIDTH)`` float32; ``keys``, ``values``: launch tables of the destinations from layer
    ``first_layer`` on; all else from layer 0 on. All but destinations are contiguous. ``noise_row``: what the noise
    calls layer 0; it and the three behind it are read with HAS_NOISE alone.
    Axis 0: ``[split, row tile, layer]``, split fastest: the programs of a layer share its weights in L2.
    """
    HALF: tl.constexpr = WIDTH // 2
    CR: tl.constexpr = HEADS * HEAD_DIM
    STEPS: tl.constexpr = HEADS * ((HEAD_DIM + BLOCK_C - 1) // BLOCK_C)  # of one side
    SHARE: tl.constexpr = (2 * STEPS + SPLITS - 1) // SPLITS
    i_program = tl.program_id(0)
    i_split = i_program % SPLITS
    i_tile = (i_program // SPLITS) % tiles
    i_entry = i_program // (SPLITS * tiles)
    row = (first_layer + i_entry).to(tl.int64)
    o_r = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    o_z = tl.arange(0, HALF)

    p_z = latent + ((row * rows + o_r) * WIDTH)[:, None] + o_z[None, :]
    z_k = tl.load(p_z, mask=m_r[:, None], other=0.0)
    z_v = tl.load(p_z + HALF, mask=m_r[:, None], other=0.0)
    z_k, z_v = blocks_tile(
        z_k, z_v, norm_weight + row * (BLOCKS * WIDTH), ffn_in_weight + row * (BLOCKS * HIDDEN * WIDTH),
        ffn_out_weight + row * (BLOCKS * HIDDEN * WIDTH),
        seed, threshold, keep_scale, o_r % slots, (o_r // slots)[:, None], noise_row + row,
        WIDTH, HIDDEN, BLOCKS, BLOCK_F, EPS, HAS_NOISE, DTYPE, PRECISION,
    )  # fmt: skip
    n_k = cast(z_k, DTYPE)
    n_v = cast(z_v, DTYPE)

    o_batch = (o_r // slots).to(tl.int64)
    o_slot = (o_r % slots).to(tl.int64)
    p_up = up_weight + row * (2 * CR * WIDTH)
    p_bias = up_bias + row * (2 * CR)
    first = i_split * SHARE
    last = tl.minimum(first + SHARE, 2 * STEPS)
    up_columns(
        n_k, n_v, p_up, p_bias, pointer_of(keys, i_entry, LAYERS, DTYPE, IS_ALIGNED),
        o_batch * stride_key_batch + o_slot * stride_key_slot, stride_key_head, m_r,
        tl.minimum(first, STEPS), tl.minimum(last, STEPS), HEAD_DIM, WIDTH, BLOCK_C, DTYPE, PRECISION,
    )  # fmt: skip
    up_columns(
        n_k, n_v, p_up + CR * WIDTH, p_bias + CR, pointer_of(values, i_entry, LAYERS, DTYPE, IS_ALIGNED),
        o_batch * stride_value_batch + o_slot * stride_value_slot, stride_value_head, m_r,
        tl.maximum(first - STEPS, 0), tl.maximum(last - STEPS, 0), HEAD_DIM, WIDTH, BLOCK_C, DTYPE, PRECISION,
    )  # fmt: skip


def _last_axis_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def fold_slots(slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Launch `fold_slots_kernel` on all layers. Arguments are checked by ``lcf_fast.ops``.

    Args:
        slot_key, slot_value: ``(L, B, k, Hs, Ds)`` float32, as `slot_pooling.pool_slots` returns them.
        weights: ``down_weight (L, d, 2Cs)``, ``down_bias (L, d)``, ``slot_embedding (L, k, d)``, of one dtype.

    Returns:
        The latent ``(L, B, k, d)`` float32.
    """
    latent = slot_key.new_empty(*slot_key.shape[:3], weights["down_weight"].shape[1])
    if latent.numel():
        _launch_fold(slot_key, slot_value, weights, latent)
    return latent


def _launch_fold(slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor], latent: Tensor) -> None:
    layers, batch, slots, heads, head_dim = slot_key.shape
    down_weight = _last_axis_contiguous(weights["down_weight"])
    slot_embedding = _last_axis_contiguous(weights["slot_embedding"])
    width = down_weight.shape[1]
    rows = batch * slots
    config = slot_fold_config(down_weight.element_size(), rows, known_target(target_of(slot_key)))
    tiles = -(-rows // config.block_rows)
    channels = heads * head_dim
    tensors = (
        slot_key.contiguous(),
        slot_value.contiguous(),
        down_weight,
        weights["down_bias"].contiguous(),
        slot_embedding,
        latent,
    )
    keywords = {
        "CHANNELS": channels,
        "WIDTH": width,
        "BLOCK_R": config.block_rows,
        "BLOCK_W": config.block_width,
        "BLOCK_C": head_chunk(channels, config.block_channels),
        "DTYPE": TRITON_DTYPE[down_weight.dtype],
        "PRECISION": dot_precision(down_weight.dtype),
    }
    numbers = (rows, slots, tiles, *down_weight.stride()[:2], *slot_embedding.stride()[:2])
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    programs = layers * tiles * -(-width // config.block_width)
    with device_guard(slot_key):
        launch(fold_slots_kernel, programs, (), tensors, numbers, keywords, options)


_STACKED = ("norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias")


def expand_slots(
    latent: Tensor,
    weights: Mapping[str, Tensor],
    destinations: Sequence[Pair],
    *,
    norm_eps: float,
    noise: NoiseArguments | None = None,
    row: int = 0,
) -> None:
    """Launch `expand_slots_kernel`: every layer's keys and values. Arguments are checked by ``lcf_fast.ops``.

    Args:
        latent: ``(L, B, k, d)`` float32.
        weights: ``norm_weight (L, blocks, d)``, ``ffn_in_weight (L, blocks, 4d, d)``, ``ffn_out_weight
            (L, blocks, d, 4d)``, ``up_weight (L, 2, Cr, d)``, ``up_bias (L, 2, Cr)``, of any dtype.
        destinations: one ``(key, value)`` a layer, ``(B, Hr, k, Dr)``, last stride 1, no two elements in one place; all
            of one dtype, in which the products run. Neighbouring layers with equal strides share a launch.
        noise: dropout on what each block adds; ``row``: what the noise calls the first layer.
    """
    layers, batch, slots, width = latent.shape
    if not latent.numel():
        return
    keys, values = [key for key, _ in destinations], [value for _, value in destinations]
    heads, head_dim = keys[0].shape[1], keys[0].shape[3]
    stacked = [weights[name].contiguous() for name in _STACKED]
    hidden, blocks = weights["ffn_in_weight"].shape[2], weights["norm_weight"].shape[1]
    latent = latent.contiguous()
    rows = batch * slots
    target, size = known_target(target_of(latent)), keys[0].element_size()
    with device_guard(latent):
        for run in alike_runs(keys, values, layers):
            count = run.stop - run.start
            config = slot_expand_config(
                width,
                size,
                weights["up_weight"].element_size(),
                target,
                count,
                rows,
                PROCESSORS[target],
                has_noise=noise is not None,
            )
            tiles = triton.cdiv(rows, config.block_rows)
            (key_table, value_table), aligned = address_tables(keys[run], values[run])
            expand_slots_kernel[(count * tiles * config.splits,)](
                latent,
                key_table,
                value_table,
                *stacked,
                rows,
                slots,
                tiles,
                run.start,
                row,
                *(NO_NOISE if noise is None else noise)[:3],
                *keys[run.start].stride()[:3],
                *values[run.start].stride()[:3],
                LAYERS=len(key_table),
                IS_ALIGNED=aligned,
                HAS_NOISE=noise is not None,
                HEADS=heads,
                HEAD_DIM=head_dim,
                WIDTH=width,
                HIDDEN=hidden,
                BLOCKS=blocks,
                BLOCK_R=config.block_rows,
                BLOCK_C=head_chunk(head_dim, config.block_channels),
                BLOCK_F=hidden_chunk(hidden, config.block_hidden),
                SPLITS=config.splits,
                EPS=norm_eps,
                DTYPE=TRITON_DTYPE[keys[0].dtype],
                PRECISION=dot_precision(keys[0].dtype),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
