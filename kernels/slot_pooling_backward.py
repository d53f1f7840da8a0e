"""Backward of the pooling to slots with respect to the queries; the caches are frozen.

With ``a`` the slot's softmax and ``g_t = dK~·K_t + dV~·V_t``: ``dq = sum_t a_t (g_t - g) K_t / sqrt(D)``, where the
mean ``g = sum_t a_t g_t = dK~·K~ + dV~·V~`` is known before any token is read. So one read of the cache is enough: a
program owns a chunk of tokens of one layer, batch item and head, as in `slot_pooling`, and makes the weights again from
the state's maximum and sum. Rounded, g is off by what ``sum_t a_t (g_t - g)`` then is, times ``K~``: that is taken off,
or else keys of a large mean would lose digits. Chunks and batch items are added up in a fixed order, without atomics.

Cost a token, layer and head: ``2·D`` elements read, ``24·K·D`` FLOPs, of which 6 are the scores' with a float32 query,
12 those of g; K = 16: 96 FLOPs a byte, half of what the chip has for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    address_tables,
    alike_runs,
    device_guard,
    dot,
    dot_precision,
    exact_dot,
    needs_wide_offsets,
    pointer_of,
    row_offsets,
    row_scale,
    target_of,
)
from .policy import PROCESSORS, known_target
from .slot_policy import chunk_tokens, slot_backward_config
from .slot_pooling import groups_of, loadable_mask, mask_arguments, rows_of

Pair = tuple[Tensor, Tensor]


@triton.jit(
    do_not_specialize=["tokens", "slots", "slot_blocks", "groups", "chunks", "steps", "batch", "stride_mask_batch"]
)
def pool_slots_backward_kernel(
    keys,
    values,
    query,
    stats,
    centers,
    grad_key,
    grad_value,
    mask,
    first,
    after,
    partials,
    residuals,
    tokens,
    slots,
    slot_blocks,
    groups,
    chunks,
    steps,
    batch,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_mask_batch,
    stride_mask_token,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk's part of ``sum_t a_t (g_t - g) K_t`` in ``partials (L, R, H, chunks, k, D)``, of the same without
    ``K_t`` in ``residuals (L, R, H, chunks, k)``, float32.

    ``keys``, ``values``: launch tables. ``query (L, k, H, D)`` float32, ``stats (L, R, H, k, 2)``, ``centers
    (L, R, H, k)``: the means g; ``grad_key``, ``grad_value`` ``(L, R, k, H, D)`` float32; all contiguous.
    Axis 0, ``mask``, ``first`` and ``after`` as of `pool_slots_kernel`.
    """
    IS_HALF: tl.constexpr = tl.float32 != DTYPE
    i_block = tl.program_id(0) % slot_blocks
    i_program = tl.program_id(0) // slot_blocks
    i_chunk = i_program % chunks
    i_row = i_program // chunks  # (layer, batch row, head)
    i_head = i_row % HEADS
    i_batch = (i_row // HEADS) % batch
    i_layer = i_row // (HEADS * batch)
    i_item = i_batch
    if HAS_GROUPS:
        i_item = i_batch // groups
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < slots
    m_kd = m_k[:, None] & m_d[None, :]
    o_t = tl.arange(0, BLOCK_T)
    begin = i_chunk * steps * BLOCK_T
    end = tl.minimum(begin + steps * BLOCK_T, tokens)

    o_query = ((i_layer.to(tl.int64) * slots + o_k) * HEADS + i_head) * HEAD_DIM
    b_query = tl.load(query + o_query[:, None] + o_d[None, :], mask=m_kd, other=0.0)
    o_grad = (((i_row // HEADS).to(tl.int64) * slots + o_k) * HEADS + i_head) * HEAD_DIM
    b_grad_key = tl.load(grad_key + o_grad[:, None] + o_d[None, :], mask=m_kd, other=0.0)
    b_grad_value = tl.load(grad_value + o_grad[:, None] + o_d[None, :], mask=m_kd, other=0.0)
    o_state = i_row.to(tl.int64) * slots + o_k
    maximum = tl.load(stats + 2 * o_state, mask=m_k, other=0.0)
    total = tl.load(stats + 2 * o_state + 1, mask=m_k, other=1.0)
    center = tl.load(centers + o_state, mask=m_k, other=0.0)
    if IS_HALF:
        # Gradients may be of any size, and float16 has few exponents.
        scale, inverse = row_scale(tl.maximum(tl.abs(b_grad_key), tl.abs(b_grad_value)))
        b_grad_key *= scale[:, None]
        b_grad_value *= scale[:, None]

    p_key = pointer_of(keys, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_key += i_item.to(tl.int64) * stride_key_batch + i_head.to(tl.int64) * stride_key_head
    p_value = pointer_of(values, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_value += i_item.to(tl.int64) * stride_value_batch + i_head.to(tl.int64) * stride_value_head
    o_key = row_offsets(o_t, stride_key_token, IS_WIDE)[:, None] + o_d[None, :]
    o_value = row_offsets(o_t, stride_value_token, IS_WIDE)[:, None] + o_d[None, :]
    if HAS_MASK:
        p_mask = mask + i_batch.to(tl.int64) * stride_mask_batch
    if HAS_GROUPS:
        # Steps before a group's first token and after its last are left out; the others stay where they were.
        i_first = tl.load(first + i_batch).to(tl.int32)
        begin += tl.maximum(i_first - begin, 0) // BLOCK_T * BLOCK_T
        end = tl.minimum(end, tokens - tl.load(after + i_batch).to(tl.int32))

    acc = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    residual = tl.zeros([BLOCK_K], dtype=tl.float32)
    for i in range(0, tl.cdiv(end - begin, BLOCK_T)):
        i_start = begin + i * BLOCK_T
        m_t = i_start + o_t < end
        if HAS_MASK:
            o_mask = (i_start + o_t).to(tl.int64) * stride_mask_token
            m_t = m_t & (tl.load(p_mask + o_mask, mask=m_t, other=0) != 0)
        m_td = m_t[:, None] & m_d[None, :]
        i_start64 = i_start.to(tl.int64)
        b_key = tl.load((p_key + i_start64 * stride_key_token) + o_key, mask=m_td, other=0.0)
        b_value = tl.load((p_value + i_start64 * stride_value_token) + o_value, mask=m_td, other=0.0)
        b_score = tl.zeros([BLOCK_K, BLOCK_T], dtype=tl.float32)
        b_grad = tl.zeros([BLOCK_K, BLOCK_T], dtype=tl.float32)
        if IS_HALF:
            b_score = exact_dot(b_query, tl.trans(b_key), b_score, DTYPE)
            b_grad = exact_dot(b_grad_key, tl.trans(b_key), b_grad, DTYPE)
            b_grad = exact_dot(b_grad_value, tl.trans(b_value), b_grad, DTYPE) * inverse[:, None]
        else:
            b_score = dot(b_query, tl.trans(b_key), b_score, PRECISION)
            b_grad = dot(b_grad_key, tl.trans(b_key), b_grad, PRECISION)
            b_grad = dot(b_grad_value, tl.trans(b_value), b_grad, PRECISION)
        b_weight = tl.exp(b_score * SCALE - maximum[:, None]) / total[:, None]
        b_weight = tl.where(m_t[None, :], b_weight * (b_grad - center[:, None]), 0.0)
        residual += tl.sum(b_weight, 1)
        if IS_HALF:
            weight_scale, weight_inverse = row_scale(b_weight)
            part = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
            acc += exact_dot(b_weight * weight_scale[:, None], b_key, part, DTYPE) * weight_inverse[:, None]
        else:
            acc = dot(b_weight, b_key, acc, PRECISION)
    o_part = i_program.to(tl.int64) * slots + o_k
    tl.store(residuals + o_part, residual, mask=m_k)
    tl.store(partials + (o_part * HEAD_DIM)[:, None] + o_d[None, :], acc, mask=m_kd)


def pool_slots_backward(
    sharer: Sequence[Pair],
    slot_query: Tensor,
    pooled: Pair,
    stats: Tensor,
    grad: Pair,
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Launch `pool_slots_backward_kernel` on all layers.

    Args:
        sharer, slot_query, attention_mask: as `slot_pooling.pool_slots` had them.
        pooled: ``slot_key, slot_value`` ``(L, R, k, H, D)``, its result; R: rows, B or of groups B·P.
        stats: ``(L, R, H, k, 2)`` of `slot_pooling.pool_slot_states`.
        grad: gradients of ``pooled``, like it.

    Returns:
        The gradient of ``slot_query``, ``(L, k, H, D)`` float32. Rows without a token to pool have no part in it.
    """
    keys, values = [key for key, _ in sharer], [value for _, value in sharer]
    _, heads, tokens, head_dim = keys[0].shape
    layers, slots = slot_query.shape[:2]
    gradient = slot_query.new_zeros(layers, slots, heads, head_dim, dtype=torch.float32)
    batch = rows_of(keys[0], attention_mask)
    if not gradient.numel() or not batch:
        return gradient
    query = slot_query.float().contiguous()
    grad_key, grad_value = grad[0].float().contiguous(), grad[1].float().contiguous()
    centers = (grad_key * pooled[0] + grad_value * pooled[1]).sum(-1).transpose(2, 3)  # (L, R, H, k)
    has_token = stats[..., 1] != 0
    centers = torch.where(has_token, centers, 0.0).contiguous()
    # Of no token nothing is added up; (0, 1) keeps its numbers finite.
    stats = torch.where(has_token[..., None], stats, torch.arange(2.0, device=stats.device)).contiguous()
    means = torch.where(has_token[..., None], pooled[0].transpose(2, 3), 0.0)
    target, size = known_target(target_of(keys[0])), keys[0].element_size()
    config = slot_backward_config(head_dim, size, slots, target)
    slot_blocks = triton.cdiv(slots, config.block_slots)
    with device_guard(keys[0]):
        mask = loadable_mask(attention_mask)
        for run in alike_runs(keys, values, layers):
            key, value = keys[run.start], values[run.start]
            rows = (run.stop - run.start) * batch * heads
            chunk = chunk_tokens(config, rows * slot_blocks, tokens, slots, size, PROCESSORS[target])
            chunks = triton.cdiv(tokens, chunk)
            (key_table, value_table), aligned = address_tables(keys[run], values[run])
            shape = (run.stop - run.start, batch, heads, chunks, slots, head_dim)
            partials = key.new_empty(shape, dtype=torch.float32)
            residuals = key.new_empty(shape[:-1], dtype=torch.float32)
            pool_slots_backward_kernel[(rows * chunks * slot_blocks,)](
                key_table,
                value_table,
                query[run],
                stats[run],
                centers[run],
                grad_key[run],
                grad_value[run],
                *mask_arguments(mask, query),
                partials,
                residuals,
                tokens,
                slots,
                slot_blocks,
                groups_of(mask),
                chunks,
                chunk // config.block_tokens,
                batch,
                *key.stride()[:3],
                *value.stride()[:3],
                *((0, 0) if mask is None else mask.rows.stride()),
                LAYERS=len(key_table),
                HEADS=heads,
                HEAD_DIM=head_dim,
                BLOCK_K=config.block_slots,
                BLOCK_T=config.block_tokens,
                BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
                SCALE=head_dim**-0.5,
                HAS_MASK=mask is not None,
                HAS_GROUPS=groups_of(mask) > 1,
                IS_ALIGNED=aligned,
                IS_WIDE=needs_wide_offsets(config.block_tokens, key, value),
                DTYPE=TRITON_DTYPE[key.dtype],
                PRECISION=dot_precision(key.dtype),
                num_warps=config.num_warps,
                num_stages=config.num_stages if mask is None else config.masked_stages,
            )
            found = partials.sum(3) - residuals.sum(3)[..., None] * means[run]
            gradient[run] = found.sum(1).transpose(1, 2) * head_dim**-0.5
    return gradient
