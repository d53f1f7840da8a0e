"""Pooling of a cache to k slots, forward: k learned queries a head in one read of the cache.

``a[j] = softmax over tokens of q_j·K_t / sqrt(D)``, ``K~_j = sum a K``, ``V~_j = sum a V`` for j < k. Two launches for
all layers:

1. `pool_slots_kernel`: a program owns a chunk of tokens of one layer, batch item and head, and carries k softmax states
   ``(max, sum, acc_K, acc_V)`` over it, a step of tokens at a time; each byte of the cache is read once for all slots;
2. `merge_slots_kernel` merges the chunks' states. A context of one chunk needs no second launch.

States of disjoint tokens merge exactly, in any grouping: a context may be pooled in pieces, or on several devices. A
state of no token is ``(-inf, 0, 0, 0)``. ``states`` ``(.., k, 2, D)`` (0 = K, 1 = V) and ``stats`` ``(.., k, 2)`` (max,
sum) are float32.

Groups of tokens, a mask ``(B, P, N)``: a row of the grid is one group of an item, and takes the steps from the group's
first token to its last, so that spans side by side are read once between them, and spans that overlap where they do.

Sums are float32 throughout; float32 factors of 16-bit tiles are split in three (`common.exact_dot`), so nothing is
rounded to 16 bits.

Cost. Bytes: the cache once, ``2·D`` elements a token, layer and head; 2,000 tokens of Qwen3-0.6B (28 layers, 8 heads,
D = 128, bfloat16): 229 MB, 53 us at an H200's 4.3 TB/s. States: ``8·D`` bytes a slot and chunk, written and read:
k = 8, chunks of 256 tokens: 14.7 MB each way, most of it within L2. FLOPs: k is padded to K = 16, 32 or 64; a step has
one product for the scores (the query in the cache's dtype; else three) and three each for K and V: ``14·K·D`` a token
and head. Padding k = 8 to 16: 28,672 FLOPs for 512 bytes, 56 a byte, where the chip's ratio is 184 (790 TFLOP/s, by
HGMMA; HMMA, which K < 64 takes, has less): a third of the bytes' time. K = 32: two thirds. K = 64: 224 a byte, 1.2
times the bytes' time: above 32 slots it is the products that count. Counted, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPE,
    WEIGHT_SCALE,
    address_tables,
    alike_runs,
    device_guard,
    dot,
    dot_precision,
    exact_dot,
    needs_wide_offsets,
    pointer_of,
    row_offsets,
    target_of,
)
from .launching import launch
from .merging import finite_or_zero
from .policy import PROCESSORS, known_target, next_power_of_2
from .slot_policy import SlotPoolConfig, chunk_tokens, slot_pool_config

Pair = tuple[Tensor, Tensor]
#: ``slot_key``, ``slot_value`` and ``stats``.
Pooled = tuple[Tensor, Tensor, Tensor]
#: Most slots a program of groups of tokens: 64 have 18 spills on sm_90, 9 of them in the loop.
GROUPED_SLOTS = 32


@triton.jit(
    do_not_specialize=["tokens", "slots", "slot_blocks", "groups", "chunks", "steps", "batch", "stride_mask_batch"]
)
def pool_slots_kernel(
    keys,
    values,
    query,
    mask,
    first,
    after,
    states,
    stats,
    out_key,
    out_value,
    tokens,
    slots,
    slot_blocks,
    groups,
    chunks,
    steps,
    batch,
    stride_query_layer,
    stride_query_slot,
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
    IS_QUERY_EXACT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reduce ``steps`` tiles of BLOCK_T tokens of one (layer, batch row, head) to a state each of BLOCK_K slots.

    Axis 0: ``[block of slots, chunk, head, batch row, layer]``, block fastest, so that the blocks of a chunk read it at
    the same time. HAS_GROUPS: ``batch`` rows are those of the mask, ``groups`` of each item of the cache.

    ``keys``, ``values``: launch tables. ``query (L, k, H, D)``, its last two axes contiguous; IS_QUERY_EXACT: it has
    more digits than the cache's dtype holds. ``mask (R, N)``; ``first``, ``after`` ``(R)``: of groups, `TokenMask`'s.
    ``states (L, R, H, chunks, k, 2, D)``, ``stats (L, R, H, chunks, k, 2)`` float32. IS_WHOLE: the one chunk is the
    whole context, and the result goes to ``out_key``, ``out_value`` ``(L, R, k, H, D)`` float32 in place of ``states``;
    else those are not written.
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

    p_query = query + i_layer.to(tl.int64) * stride_query_layer + i_head * HEAD_DIM
    b_query = tl.load(p_query + o_k[:, None] * stride_query_slot + o_d[None, :], mask=m_kd, other=0.0)
    if IS_QUERY_EXACT or not IS_HALF:
        b_query = b_query.to(tl.float32)
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

    maximum = tl.full([BLOCK_K], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    acc_key = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    acc_value = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for i in range(0, tl.cdiv(end - begin, BLOCK_T)):
        i_start = begin + i * BLOCK_T
        # Padding is never loaded: what lies there (NaN, too) can not reach a sum.
        m_t = i_start + o_t < end
        if HAS_MASK:
            o_mask = (i_start + o_t).to(tl.int64) * stride_mask_token
            m_t = m_t & (tl.load(p_mask + o_mask, mask=m_t, other=0) != 0)
        m_td = m_t[:, None] & m_d[None, :]
        # The scalar base takes the 64-bit part, so that a tile's offsets, which stay in registers, are 32-bit.
        i_start64 = i_start.to(tl.int64)
        b_key = tl.load((p_key + i_start64 * stride_key_token) + o_key, mask=m_td, other=0.0)
        b_value = tl.load((p_value + i_start64 * stride_value_token) + o_value, mask=m_td, other=0.0)
        b_score = tl.zeros([BLOCK_K, BLOCK_T], dtype=tl.float32)
        if IS_HALF and IS_QUERY_EXACT:
            b_score = exact_dot(b_query, tl.trans(b_key), b_score, DTYPE)
        else:
            b_score = dot(b_query, tl.trans(b_key), b_score, PRECISION)
        b_score = tl.where(m_t[None, :], b_score * SCALE, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(b_score, 1))
        shift = finite_or_zero(new_maximum)
        keep = tl.exp(maximum - shift)
        b_weight = tl.exp(b_score - shift[:, None])
        total = total * keep + tl.sum(b_weight, 1)
        maximum = new_maximum
        acc_key *= keep[:, None]
        acc_value *= keep[:, None]
        if IS_HALF:
            b_weight *= WEIGHT_SCALE
            acc_key = exact_dot(b_weight, b_key, acc_key, DTYPE)
            acc_value = exact_dot(b_weight, b_value, acc_value, DTYPE)
        else:
            acc_key = dot(b_weight, b_key, acc_key, PRECISION)
            acc_value = dot(b_weight, b_value, acc_value, PRECISION)
    if IS_HALF:
        acc_key /= WEIGHT_SCALE
        acc_value /= WEIGHT_SCALE

    o_state = i_program.to(tl.int64) * slots + o_k
    tl.store(stats + 2 * o_state, maximum, mask=m_k)
    tl.store(stats + 2 * o_state + 1, total, mask=m_k)
    if IS_WHOLE:  # no token at all: 0 / 0, NaN
        o_out = ((i_row // HEADS).to(tl.int64) * slots + o_k) * (HEADS * HEAD_DIM) + i_head * HEAD_DIM
        tl.store(out_key + o_out[:, None] + o_d[None, :], acc_key / total[:, None], mask=m_kd)
        tl.store(out_value + o_out[:, None] + o_d[None, :], acc_value / total[:, None], mask=m_kd)
    else:
        p_state = states + (o_state * (2 * HEAD_DIM))[:, None] + o_d[None, :]
        tl.store(p_state, acc_key, mask=m_kd)
        tl.store(p_state + HEAD_DIM, acc_value, mask=m_kd)


@triton.jit(do_not_specialize=["parts", "slots"])
def merge_slots_kernel(
    states,
    stats,
    out_states,
    out_stats,
    out_key,
    out_value,
    parts,
    slots,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    """Merge the ``parts`` states of one slot of one row (layer, batch item, head), BLOCK_P a step.

    ``states (L, B, H, parts, k, 2, D)``, ``stats (L, B, H, parts, k, 2)``, contiguous; ``out_states`` and ``out_stats``
    are without the parts' axis. IS_LAST: the result goes to ``out_key``, ``out_value`` ``(L, B, k, H, D)`` in place of
    ``out_states``.
    """
    i_program = tl.program_id(0)
    i_slot = i_program % slots
    i_row = i_program // slots
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    maximum = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.zeros([], dtype=tl.float32)
    b_key = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_value = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(0, tl.cdiv(parts, BLOCK_P)):
        o_p = i * BLOCK_P + tl.arange(0, BLOCK_P)
        m_p = o_p < parts
        m_pd = m_p[:, None] & m_d[None, :]
        o_state = (i_row.to(tl.int64) * parts + o_p) * slots + i_slot
        part_maximum = tl.load(stats + 2 * o_state, mask=m_p, other=float("-inf"))
        part_total = tl.load(stats + 2 * o_state + 1, mask=m_p, other=0.0)
        p_state = states + (o_state * (2 * HEAD_DIM))[:, None] + o_d[None, :]
        part_key = tl.load(p_state, mask=m_pd, other=0.0)
        part_value = tl.load(p_state + HEAD_DIM, mask=m_pd, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(part_maximum, 0))
        shift = finite_or_zero(new_maximum)
        keep = tl.exp(maximum - shift)
        weight = tl.exp(part_maximum - shift)
        maximum = new_maximum
        total = total * keep + tl.sum(weight * part_total, 0)
        b_key = b_key * keep + tl.sum(weight[:, None] * part_key, 0)
        b_value = b_value * keep + tl.sum(weight[:, None] * part_value, 0)
    o_stat = i_program.to(tl.int64)
    tl.store(out_stats + 2 * o_stat, maximum)
    tl.store(out_stats + 2 * o_stat + 1, total)
    if IS_LAST:  # no token at all: 0 / 0, NaN
        o_out = (i_row // HEADS).to(tl.int64) * slots + i_slot
        o_out = (o_out * HEADS + i_row % HEADS) * HEAD_DIM + o_d
        tl.store(out_key + o_out, b_key / total, mask=m_d)
        tl.store(out_value + o_out, b_value / total, mask=m_d)
    else:
        tl.store(out_states + o_stat * (2 * HEAD_DIM) + o_d, b_key, mask=m_d)
        tl.store(out_states + o_stat * (2 * HEAD_DIM) + HEAD_DIM + o_d, b_value, mask=m_d)


def _launch_pool(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slot_query: Tensor,
    mask: TokenMask | None,
    config: SlotPoolConfig,
    out: Pooled | None,
) -> Pair | None:
    """Launch the pooling of layers that lie alike: to ``out``, or to the chunks' states.

    Returns None if ``out`` was given and one chunk enough, else ``states (L, R, H, chunks, k, 2, D)`` and ``stats``.
    """
    layers = len(keys)
    batch, heads, tokens, head_dim = keys[0].shape
    batch *= groups_of(mask)
    slots = slot_query.shape[1]
    rows = layers * batch * heads
    slot_blocks = -(-slots // config.block_slots)
    processors = PROCESSORS[known_target(target_of(keys[0]))]
    chunk = chunk_tokens(config, rows * slot_blocks, tokens, slots, keys[0].element_size(), processors)
    chunks = -(-tokens // chunk)
    (key_table, value_table), aligned = address_tables(keys, values)
    is_whole = out is not None and chunks == 1
    if out is not None and is_whole:
        states, stats = out[0], out[2]
    else:
        shape = (layers, batch, heads, chunks, slots, 2)
        states = keys[0].new_empty(*shape, head_dim, dtype=torch.float32)
        stats = keys[0].new_empty(shape, dtype=torch.float32)
    tensors = (
        slot_query,
        *mask_arguments(mask, slot_query),
        states,
        stats,
        *((states, states) if out is None else out[:2]),
    )
    numbers = (
        tokens,
        slots,
        slot_blocks,
        groups_of(mask),
        chunks,
        chunk // config.block_tokens,
        batch,
        slot_query.stride(0),
        slot_query.stride(1),
        *keys[0].stride()[:3],
        *values[0].stride()[:3],
        *((0, 0) if mask is None else mask.rows.stride()),
    )
    keywords = {
        "LAYERS": len(key_table),
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_K": config.block_slots,
        "BLOCK_T": config.block_tokens,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "SCALE": head_dim**-0.5,
        "HAS_MASK": mask is not None,
        "HAS_GROUPS": groups_of(mask) > 1,
        "IS_ALIGNED": aligned,
        "IS_WIDE": needs_wide_offsets(config.block_tokens, keys[0], values[0]),
        "IS_QUERY_EXACT": slot_query.dtype != keys[0].dtype,
        "IS_WHOLE": is_whole,
        "DTYPE": TRITON_DTYPE[keys[0].dtype],
        "PRECISION": dot_precision(keys[0].dtype),
    }
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages if mask is None else config.masked_stages,
    }
    programs = rows * chunks * slot_blocks
    launch(pool_slots_kernel, programs, (key_table, value_table), tensors, numbers, keywords, options)
    return None if is_whole else (states, stats)


def _launch_merge(states: Tensor, stats: Tensor, config: SlotPoolConfig, out: Pooled | None) -> Pair:
    """Launch the merge over axis 3 of contiguous states: to ``out``, or to the states without that axis it returns."""
    layers, batch, heads, parts, slots = stats.shape[:5]
    head_dim = states.shape[-1]
    if out is None:
        shape = (layers, batch, heads, slots, 2)
        made = states.new_empty(*shape, head_dim), stats.new_empty(shape)
    else:
        made = out[0], out[2]
    keywords = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_P": config.merge_parts,
        "BLOCK_D": next_power_of_2(head_dim),
        "IS_LAST": out is not None,
    }
    launch(
        merge_slots_kernel,
        layers * batch * heads * slots,
        (),
        (states, stats, *made, *(made if out is None else out[:2])),
        (parts, slots),
        keywords,
        {"num_warps": config.merge_warps},
    )
    return made


def _config(tensor: Tensor, slots: int, mask: TokenMask | None = None) -> SlotPoolConfig:
    """The policy's row for a cache or for states, whose last axis is the head's."""
    if groups_of(mask) > 1:
        slots = min(slots, GROUPED_SLOTS)
    return slot_pool_config(tensor.shape[-1], tensor.element_size(), slots, known_target(target_of(tensor)))


@dataclass(frozen=True)
class TokenMask:
    """A mask as the kernels read it.

    Attributes:
        rows: ``(R, N)``, R = B·P, in elements of at least 4 bytes: the least that a load in a software pipeline takes,
            and the tokens' loads wait for the mask's.
        groups: P, rows an item of the cache.
        first, after: of groups, ``(R)`` int64: the tokens before a row's first and after its last. Where a row has
            none, 0: all tokens are looked at, to no effect.
    """

    rows: Tensor
    groups: int = 1
    first: Tensor | None = None
    after: Tensor | None = None


def loadable_mask(attention_mask: Tensor | None) -> TokenMask | None:
    """``(B, N)`` or ``(B, P, N)`` as a `TokenMask`. One small launch for all layers, of groups four; no wait."""
    if attention_mask is None:
        return None
    groups = attention_mask.shape[1] if attention_mask.dim() == 3 else 1
    if attention_mask.dim() == 3:
        attention_mask = attention_mask.flatten(0, 1)
    if groups > 1 and attention_mask.dtype != torch.bool:  # whose largest is not the first that counts
        attention_mask = attention_mask != 0
    if attention_mask.element_size() < 4:
        attention_mask = attention_mask.to(torch.int32)
    if groups == 1:
        return TokenMask(attention_mask)
    # Of equal ones `argmax` finds the first.
    return TokenMask(attention_mask, groups, attention_mask.argmax(-1), attention_mask.flip(-1).argmax(-1))


def rows_of(cache: Tensor, attention_mask: Tensor | None) -> int:
    """R: batch items, or of groups B·P."""
    if attention_mask is None or attention_mask.dim() == 2:
        return cache.shape[0]
    return cache.shape[0] * attention_mask.shape[1]


def groups_of(mask: TokenMask | None) -> int:
    """Rows an item of the cache."""
    return 1 if mask is None else mask.groups


def mask_arguments(mask: TokenMask | None, unread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' ``mask``, ``first`` and ``after``; ``unread`` in the place of a mask that there is not."""
    if mask is None:
        return unread, unread, unread
    if mask.first is None or mask.after is None:
        return mask.rows, mask.rows, mask.rows
    return mask.rows, mask.first, mask.after


def _rows_contiguous(slot_query: Tensor) -> Tensor:
    """The query with its heads contiguous; slots may be a slice."""
    is_flat = slot_query.stride(-1) == 1 and slot_query.stride(-2) == slot_query.shape[-1]
    return slot_query if is_flat else slot_query.contiguous()


def pool_slots(sharer: Sequence[Pair], slot_query: Tensor, *, attention_mask: Tensor | None = None) -> Pair:
    """`pool_slots_with_stats` without the stats."""
    return pool_slots_with_stats(sharer, slot_query, attention_mask=attention_mask)[:2]


def pool_slots_with_stats(
    sharer: Sequence[Pair], slot_query: Tensor, *, attention_mask: Tensor | None = None
) -> Pooled:
    """Launch the pooling of all layers to k slots. Arguments are checked by ``lcf_fast.ops``.

    Args:
        sharer: one ``(key, value)`` a layer, ``(B, H, N, D)``, last stride 1, ``N >= 1``; one may serve several layers.
            Neighbouring layers with equal strides share a launch.
        slot_query: ``(L, k, H, D)``, k from 1 to 64; of the cache's dtype or float32.
        attention_mask: ``(B, N)`` bool or integer, zero where the token is padding; or ``(B, P, N)``: P groups of an
            item's tokens, which may overlap. R = B·P rows then, else B: row b·P + p is group p of item b.

    Returns:
        ``slot_key, slot_value`` ``(L, R, k, H, D)``, NaN where a row has no token to pool; and the softmax's ``stats
        (L, R, H, k, 2)``, the greatest score and the sum, which the backward starts from. All float32.
    """
    keys, values = [key for key, _ in sharer], [value for _, value in sharer]
    heads, head_dim = keys[0].shape[1], keys[0].shape[3]
    batch = rows_of(keys[0], attention_mask)
    layers, slots = len(keys), slot_query.shape[1]
    shape = (layers, batch, slots, heads, head_dim)
    pooled = (
        keys[0].new_empty(shape, dtype=torch.float32),
        keys[0].new_empty(shape, dtype=torch.float32),
        keys[0].new_empty((layers, batch, heads, slots, 2), dtype=torch.float32),
    )
    if not pooled[0].numel():
        return pooled
    slot_query = _rows_contiguous(slot_query)
    with device_guard(keys[0]):
        mask = loadable_mask(attention_mask)
        config = _config(keys[0], slots, mask)
        for run in alike_runs(keys, values, len(keys)):
            out = pooled[0][run], pooled[1][run], pooled[2][run]
            made = _launch_pool(keys[run], values[run], slot_query[run], mask, config, out)
            if made is not None:
                _launch_merge(*made, config, out)
    return pooled


def pool_slot_states(sharer: Sequence[Pair], slot_query: Tensor, *, attention_mask: Tensor | None = None) -> Pair:
    """Pool a piece of a context to states that merge with others' (`merge_slot_states`). Arguments of `pool_slots`.

    Returns ``states (L, R, H, k, 2, D)`` and ``stats (L, R, H, k, 2)``, float32.
    """
    keys, values = [key for key, _ in sharer], [value for _, value in sharer]
    heads, head_dim = keys[0].shape[1], keys[0].shape[3]
    shape = (len(keys), rows_of(keys[0], attention_mask), heads, slot_query.shape[1], 2)
    states = keys[0].new_empty(*shape, head_dim, dtype=torch.float32)
    stats = keys[0].new_empty(shape, dtype=torch.float32)
    if not stats.numel():
        return states, stats
    slot_query = _rows_contiguous(slot_query)
    with device_guard(keys[0]):
        mask = loadable_mask(attention_mask)
        config = _config(keys[0], shape[3], mask)
        for run in alike_runs(keys, values, len(keys)):
            made = _launch_pool(keys[run], values[run], slot_query[run], mask, config, None)
            assert made is not None
            if made[1].shape[3] > 1:
                made = _launch_merge(*made, config, None)
            states[run] = made[0].view_as(states[run])
            stats[run] = made[1].view_as(stats[run])
    return states, stats


def merge_slot_states(states: Tensor, stats: Tensor) -> Pair:
    """Merge R states of disjoint tokens: ``states (L, B, H, R, k, 2, D)``, ``stats (L, B, H, R, k, 2)``, float32.

    Returns both without the R axis; R = 0 gives the state of no token.
    """
    if not stats.shape[:3].numel() * stats.shape[4]:
        return states.sum(3), stats.sum(3)
    with device_guard(states):
        return _launch_merge(states.contiguous(), stats.contiguous(), _config(states, stats.shape[4]), None)


def finish_slot_states(states: Tensor, stats: Tensor) -> Pair:
    """``slot_key, slot_value`` ``(L, B, k, H, D)`` of whole contexts' states ``(L, B, H, k, 2, D)``, ``(.., k, 2)``.

    NaN where a row has no token.
    """
    layers, batch, heads, slots = stats.shape[:4]
    shape = (layers, batch, slots, heads, states.shape[-1])
    pooled = states.new_empty(shape), states.new_empty(shape)
    if pooled[0].numel():
        with device_guard(states):
            out = (*pooled, torch.empty_like(stats, memory_format=torch.contiguous_format))
            parts = states.contiguous().unsqueeze(3), stats.contiguous().unsqueeze(3)
            _launch_merge(*parts, _config(states, slots), out)
    return pooled
