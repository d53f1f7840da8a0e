"""Attention pooling of spans to a fixed-size summary, forward (spec section 4).

Two launches for all layers, whatever the number of spans (a third, in `fold`, makes the message of the summary):

1. `pool_chunk_kernel`: a program reads one chunk of tokens of one layer, batch item and head, each byte of the cache
   once, and reduces it to a partial state.
2. `merge_kernel`: states merge, 32 chunks at a time; a longer sequence takes one more launch for every factor of 31.

The state of a token range has three parts, each a softmax state ``(max, sum, acc_K, acc_V)``:

- LEFT: the range's part of the span that began before it and reaches into it;
- RIGHT: the range's part of the span that begins in it and goes on after it;
- INNER: the cross-span state of the spans that lie wholly inside, each weighed as a whole by ``q_global``;

and a flag, through: one span covers the range and goes on at both ends (it is LEFT then, and the others are empty).
States of neighbouring ranges merge exactly, in any grouping. So the buffers grow with the length, never with the spans.

No vector is kept for a span: ``q_global·K~_p`` is the mean of ``q_global·K_t`` under the span's weights, so two numbers
a token give a span's score, and every token's final weight is known before any key or value is summed up. The parts'
tokens are disjoint. A chunk needs two products and one weighted sum a token, be it one span or a span a token.

Sums are float32 throughout; float32 factors of 16-bit tiles are split in three, so nothing is rounded to 16 bits.
Cost a token, layer and KV head: ``2·D`` elements read, ``8·D`` FLOPs. A chunk writes, and the merge reads, ``8·D``
bytes for each part that is there, mostly one of three. Floor: the cache's bytes at the copy bandwidth (2,000 tokens of
Qwen3-0.6B, 28 layers: 229 MB, 53 us on an H200).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TRITON_DTYPE, address_tables, cast, device_guard, dot, inlined, pointer_of, target_of
from .fold import fold
from .pooling_policy import pooling_config

#: Parts of a state, and floats a chunk in the statistics: (max, sum) a part, the through flag, one unused.
PARTS = tl.constexpr(3)
STATS = tl.constexpr(8)
LEFT = tl.constexpr(0)
RIGHT = tl.constexpr(1)
INNER = tl.constexpr(2)
#: Most memory that the states of one launch may take; beyond it layers are pooled in turns. A launch of that size takes
#: hundreds of microseconds, so that one more costs nothing.
STATE_BYTES = 256 << 20
#: Weights are at most 1: scaled by this power of two, float16 holds those down to 1/4096 as well as float32 does.
WEIGHT_SCALE = tl.constexpr(4096.0)
#: Offsets probed at once by `spans_ended`: one warp's lanes.
PROBES = tl.constexpr(32)


@inlined
def load_offset(p_offsets, i, tokens):
    """A span offset, clamped into the sequence: whatever the offsets hold, nothing outside is ever addressed."""
    return tl.minimum(tl.maximum(tl.load(p_offsets + i), 0), tokens)


@triton.jit
def spans_ended(p_offsets, position, spans, tokens):
    """How many spans end at or before ``position``: the first span that reaches beyond it, or ``spans``."""
    low = tl.full([], 0, dtype=tl.int32)
    high = spans
    o_probe = tl.arange(0, PROBES) + 1
    while low < high:  # invariant: the answer is in [low, high]
        step = (high - low + PROBES - 1) // PROBES
        o_span = low + o_probe * step
        end = tl.load(p_offsets + o_span, mask=o_span <= high, other=0)
        ended = (tl.minimum(tl.maximum(end, 0), tokens) <= position) & (o_span <= high)
        count = tl.sum(ended.to(tl.int32), 0)
        high = tl.minimum(high, low + (count + 1) * step - 1)
        low += count * step
    return low


@inlined
def exact_dot(rows, tile, DTYPE: tl.constexpr):
    """``rows @ tile`` for float32 ``rows`` and a 16-bit ``tile``, as exact as in float32.

    Three 16-bit numbers that add up hold a float32: 24 bits are 3 x 8 for bfloat16, and 2 x 11 and some for float16,
    but there not below 2**-25: scale small rows up.
    """
    first = rows.to(DTYPE)
    rows -= first.to(tl.float32)
    second = rows.to(DTYPE)
    third = (rows - second.to(tl.float32)).to(DTYPE)
    acc = tl.zeros([rows.shape[0], tile.shape[1]], dtype=tl.float32)
    acc = dot(third, tile, acc, "ieee")
    acc = dot(second, tile, acc, "ieee")
    acc = dot(first, tile, acc, "ieee")
    return acc


@inlined
def finite_or_zero(maximum):
    """What to subtract from logits: their maximum, but 0 for an empty set, where ``exp(-inf - max)`` must be 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(do_not_specialize=["tokens", "spans", "chunks", "batch", "stride_offsets", "stride_mask_batch"])
def pool_chunk_kernel(
    keys,
    values,
    span_query,
    global_query,
    offsets,
    mask,
    states,
    stats,
    tokens,
    spans,
    chunks,
    batch,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_offsets,
    stride_mask_batch,
    stride_mask_token,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Reduce one chunk of BLOCK_T tokens of one (layer, batch item, head) to its state.

    ``keys``, ``values``: launch tables. ``span_query``, ``global_query`` ``(L, H, D)`` contiguous. ``states``
    ``(L, B, H, chunks, PARTS, 2, D)`` and ``stats`` ``(L, B, H, chunks, STATS)``, float32. The vectors of an empty part
    are NOT written; its sum is 0, and no reader may touch them.
    """
    USE_DOT: tl.constexpr = tl.float32 != DTYPE  # tensor instructions; float32 has none that are exact
    ROWS: tl.constexpr = 16 if USE_DOT else 4  # >= PARTS, and what a tensor instruction takes
    i_program = tl.program_id(0)
    i_chunk = i_program % chunks
    i_row = i_program // chunks  # (layer, batch item, head)
    i_head = i_row % HEADS
    i_batch = (i_row // HEADS) % batch
    i_layer = i_row // (HEADS * batch)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    begin = i_chunk * BLOCK_T
    end = tl.minimum(begin + BLOCK_T, tokens)
    o_t = begin + tl.arange(0, BLOCK_T)

    # Tokens of no span and padding are never loaded: what lies there (NaN, too) can not reach a sum.
    p_offsets = offsets + i_batch.to(tl.int64) * stride_offsets
    m_t = (o_t >= load_offset(p_offsets, 0, tokens)) & (o_t < load_offset(p_offsets, spans, tokens))
    if HAS_MASK:
        p_mask = mask + i_batch.to(tl.int64) * stride_mask_batch + o_t.to(tl.int64) * stride_mask_token
        m_t = m_t & (tl.load(p_mask, mask=m_t, other=0) != 0)
    m_td = m_t[:, None] & m_d[None, :]
    p_key = pointer_of(keys, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_key += i_batch.to(tl.int64) * stride_key_batch + i_head.to(tl.int64) * stride_key_head
    p_value = pointer_of(values, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_value += i_batch.to(tl.int64) * stride_value_batch + i_head.to(tl.int64) * stride_value_head
    o_t64 = o_t.to(tl.int64)
    b_key = tl.load(p_key + o_t64[:, None] * stride_key_token + o_d[None, :], mask=m_td, other=0.0)
    b_value = tl.load(p_value + o_t64[:, None] * stride_value_token + o_d[None, :], mask=m_td, other=0.0)

    # While the rows are under way: which spans cross the chunk's ends, which lie inside. [left_end, right_begin) holds
    # the inner ones; spans first_inner .. last-1 are those.
    first = spans_ended(p_offsets, begin, spans, tokens)
    last = spans_ended(p_offsets, end, spans, tokens)
    left_end = load_offset(p_offsets, first, tokens)
    right_begin = load_offset(p_offsets, last, tokens)
    has_left = (first < spans) & (left_end < begin)
    has_right = (last < spans) & (right_begin < end)
    is_through = has_left & has_right & (first == last)
    has_right = has_right & (is_through == 0)
    if has_left:
        left_end = load_offset(p_offsets, first + 1, tokens)
    first_inner = first + has_left.to(tl.int32)

    p_query = (i_layer * HEADS + i_head) * HEAD_DIM + o_d
    b_span_query = tl.load(span_query + p_query, mask=m_d, other=0.0).to(tl.float32)
    b_global_query = tl.load(global_query + p_query, mask=m_d, other=0.0).to(tl.float32)
    if USE_DOT:
        o_r = tl.arange(0, ROWS)
        b_query = tl.where((o_r == 0)[:, None], b_span_query[None, :], 0.0)
        b_query = tl.where((o_r == 1)[:, None], b_global_query[None, :], b_query)
        b_scores = exact_dot(b_query, tl.trans(b_key), DTYPE) * SCALE
        b_score = tl.sum(tl.where((o_r == 0)[:, None], b_scores, 0.0), 0)
        b_global = tl.sum(tl.where((o_r == 1)[:, None], b_scores, 0.0), 0)
    else:
        b_score = tl.sum(b_key * b_span_query[None, :], 1) * SCALE
        b_global = tl.sum(b_key * b_global_query[None, :], 1) * SCALE

    # Each token's part, logit and weight: softmax over a part of weight * exp(logit) is what the token counts for.
    # Outside INNER that is the span's own softmax; inside it is the span's logit and the token's share of the span.
    m_inner = (o_t >= left_end) & (o_t < right_begin)
    b_part = tl.where(m_inner, INNER, tl.where(o_t < left_end, LEFT, RIGHT))
    b_logit = tl.where(m_inner, 0.0, b_score)
    b_weight = tl.where(m_inner, 0.0, 1.0)
    i_span = first_inner
    while i_span < last:
        o_span = i_span + tl.arange(0, GROUP)
        m_span = o_span < last
        span_begin = tl.load(p_offsets + o_span, mask=m_span, other=0)
        span_end = tl.load(p_offsets + o_span + 1, mask=m_span, other=0)
        m_member = (o_t[None, :] >= span_begin[:, None]) & (o_t[None, :] < span_end[:, None])
        m_member = m_member & m_span[:, None] & m_t[None, :] & m_inner[None, :]
        b_member = tl.where(m_member, b_score[None, :], float("-inf"))
        b_member = tl.exp(b_member - finite_or_zero(tl.max(b_member, 1))[:, None])
        total = tl.sum(b_member, 1)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        b_member = b_member * inverse[:, None]
        span_logit = tl.sum(b_member * b_global[None, :], 1)
        b_weight += tl.sum(b_member, 0)
        b_logit += tl.sum(tl.where(m_member, span_logit[:, None], 0.0), 0)
        i_span += GROUP

    i_state = i_row.to(tl.int64) * chunks + i_chunk
    p_stats = stats + i_state * STATS
    p_state = states + i_state * (PARTS * 2 * HEAD_DIM)
    tl.store(p_stats + 2 * PARTS, is_through.to(tl.float32))
    o_part = tl.arange(0, ROWS)
    m_part = m_t[None, :] & (b_part[None, :] == o_part[:, None])
    b_sum = tl.where(m_part, b_logit[None, :], float("-inf"))
    maximum = tl.max(b_sum, 1)
    b_sum = tl.exp(b_sum - finite_or_zero(maximum)[:, None]) * b_weight[None, :]
    total = tl.sum(b_sum, 1)
    tl.store(p_stats + 2 * o_part, maximum, mask=o_part < PARTS)
    tl.store(p_stats + 2 * o_part + 1, total, mask=o_part < PARTS)
    if USE_DOT:
        p_part = p_state + (o_part * (2 * HEAD_DIM))[:, None] + o_d[None, :]
        m_part_d = (total != 0.0)[:, None] & m_d[None, :]
        b_sum *= WEIGHT_SCALE
        tl.store(p_part, exact_dot(b_sum, b_key, DTYPE) / WEIGHT_SCALE, mask=m_part_d)
        tl.store(p_part + HEAD_DIM, exact_dot(b_sum, b_value, DTYPE) / WEIGHT_SCALE, mask=m_part_d)
    else:
        for i_part in tl.static_range(PARTS):
            is_present = has_left
            if i_part == RIGHT:
                is_present = has_right
            if i_part == INNER:
                is_present = first_inner < last
            if is_present:
                b_part_sum = tl.sum(tl.where((o_part == i_part)[:, None], b_sum, 0.0), 0)[:, None]
                p_part = p_state + i_part * (2 * HEAD_DIM) + o_d
                tl.store(p_part, tl.sum(b_part_sum * b_key, 0), mask=m_d)
                tl.store(p_part + HEAD_DIM, tl.sum(b_part_sum * b_value, 0), mask=m_d)


@inlined
def load_stats(p_stats, m_chunk, PART: tl.constexpr):
    """``(max, sum, present)`` of one part of a tile of chunks; a part that is not there weighs nothing."""
    maximum = tl.load(p_stats + 2 * PART, mask=m_chunk, other=float("-inf"))
    total = tl.load(p_stats + 2 * PART + 1, mask=m_chunk, other=0.0)
    present = total != 0.0  # a NaN is there, and must be seen
    return tl.where(present, maximum, float("-inf")), total, present


@inlined
def weighted_rows(p_state, b_left, b_right, b_inner, m_left, m_right, m_inner, HEAD_DIM: tl.constexpr):
    """The weighted sum over a tile of chunks of all three parts' vectors; absent ones are not loaded."""
    row = tl.load(p_state + LEFT * 2 * HEAD_DIM, mask=m_left, other=0.0) * b_left[:, None]
    row += tl.load(p_state + RIGHT * 2 * HEAD_DIM, mask=m_right, other=0.0) * b_right[:, None]
    row += tl.load(p_state + INNER * 2 * HEAD_DIM, mask=m_inner, other=0.0) * b_inner[:, None]
    return tl.sum(row, 0)


@triton.jit(do_not_specialize=["chunks", "groups", "batch"])
def merge_kernel(
    states,
    stats,
    global_query,
    out_states,
    out_stats,
    out_key,
    out_value,
    chunks,
    groups,
    batch,
    stride_out_layer,
    stride_out_batch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    IS_LAST: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
):
    """Merge the states of up to FAN_IN neighbouring chunks of one (layer, batch item, head).

    IS_LAST: they are the whole sequence, and the result is ``K*, V*`` in ``out_key``, ``out_value`` ``(L, B, H, D)``.
    Else it is a state in ``out_states``, ``out_stats``, laid out as the given ones.

    A span that crosses chunks is named by the chunk in which it ends. One that does not end here is named BLOCK_C - 1,
    so no chunk may have that place (FAN_IN = BLOCK_C - 1); in the last merge every span ends.
    """
    FAN_IN: tl.constexpr = BLOCK_C if IS_LAST else BLOCK_C - 1
    OPEN: tl.constexpr = BLOCK_C - 1
    i_program = tl.program_id(0)
    i_group = i_program % groups
    i_row = i_program // groups
    i_head = i_row % HEADS
    i_batch = (i_row // HEADS) % batch
    i_layer = i_row // (HEADS * batch)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_c = tl.arange(0, BLOCK_C)
    m_c = (o_c < FAN_IN) & (i_group * FAN_IN + o_c < chunks)
    o_state = i_row.to(tl.int64) * chunks + i_group * FAN_IN + o_c

    p_stats = stats + o_state * STATS
    left_max, left_sum, has_left = load_stats(p_stats, m_c, LEFT)
    right_max, right_sum, has_right = load_stats(p_stats, m_c, RIGHT)
    inner_max, inner_sum, has_inner = load_stats(p_stats, m_c, INNER)
    is_through = tl.load(p_stats + 2 * PARTS, mask=m_c, other=1.0) != 0.0
    m_left = has_left[:, None] & m_d[None, :]
    m_right = has_right[:, None] & m_d[None, :]
    m_inner = has_inner[:, None] & m_d[None, :]
    p_state = states + (o_state * (PARTS * 2 * HEAD_DIM))[:, None] + o_d[None, :]
    b_query = tl.load(global_query + (i_layer * HEADS + i_head) * HEAD_DIM + o_d, mask=m_d, other=0.0)
    b_query = b_query.to(tl.float32) * SCALE
    b_left = tl.load(p_state + LEFT * 2 * HEAD_DIM, mask=m_left, other=0.0)
    b_right = tl.load(p_state + RIGHT * 2 * HEAD_DIM, mask=m_right, other=0.0)
    left_logit = tl.sum(b_left * b_query[None, :], 1)
    right_logit = tl.sum(b_right * b_query[None, :], 1)

    # [span, chunk] from here on: which chunks' parts make up which span, and with what weight.
    o_span = tl.arange(0, BLOCK_C)
    b_stop = tl.where(is_through, OPEN, o_c)
    left_span = tl.min(tl.where(o_span[:, None] >= o_c[None, :], b_stop[:, None], OPEN), 0)
    right_span = tl.min(tl.where(o_span[:, None] > o_c[None, :], b_stop[:, None], OPEN), 0)
    m_span_left = (left_span[None, :] == o_span[:, None]) & has_left[None, :]
    m_span_right = (right_span[None, :] == o_span[:, None]) & has_right[None, :]
    b_span_left = tl.where(m_span_left, left_max[None, :], float("-inf"))
    b_span_right = tl.where(m_span_right, right_max[None, :], float("-inf"))
    span_max = tl.maximum(tl.max(b_span_left, 1), tl.max(b_span_right, 1))
    b_span_left = tl.exp(b_span_left - finite_or_zero(span_max)[:, None])
    b_span_right = tl.exp(b_span_right - finite_or_zero(span_max)[:, None])
    span_sum = tl.sum(b_span_left * left_sum[None, :] + b_span_right * right_sum[None, :], 1)
    inverse = 1.0 / tl.where(span_sum == 0.0, 1.0, span_sum)
    span_logit = tl.sum(b_span_left * left_logit[None, :] + b_span_right * right_logit[None, :], 1) * inverse

    # Spans that end here and began here are complete: they join INNER. The one that began before ends in `left_stop`.
    is_complete = span_sum != 0.0
    left_stop = tl.min(b_stop, 0)
    if not IS_LAST:
        is_complete = is_complete & (o_span != OPEN) & (o_span != left_stop)
    span_logit = tl.where(is_complete, span_logit, float("-inf"))
    maximum = tl.maximum(tl.max(span_logit, 0), tl.max(inner_max, 0))
    shift = finite_or_zero(maximum)
    span_weight = tl.where(is_complete, tl.exp(span_logit - shift), 0.0)
    inner_weight = tl.exp(inner_max - shift)
    total = tl.sum(span_weight, 0) + tl.sum(inner_weight * inner_sum, 0)
    span_weight *= inverse
    left_weight = tl.sum(span_weight[:, None] * b_span_left, 0)
    right_weight = tl.sum(span_weight[:, None] * b_span_right, 0)
    p_key = p_state
    p_value = p_state + HEAD_DIM
    b_key = weighted_rows(p_key, left_weight, right_weight, inner_weight, m_left, m_right, m_inner, HEAD_DIM)
    b_value = weighted_rows(p_value, left_weight, right_weight, inner_weight, m_left, m_right, m_inner, HEAD_DIM)
    if IS_LAST:  # no span at all: 0 / 0, NaN
        o_out = i_layer.to(tl.int64) * stride_out_layer + i_batch.to(tl.int64) * stride_out_batch
        o_out += i_head * HEAD_DIM + o_d
        tl.store(out_key + o_out, cast(b_key / total, OUT_DTYPE), mask=m_d)
        tl.store(out_value + o_out, cast(b_value / total, OUT_DTYPE), mask=m_d)
    else:
        i_out = i_row.to(tl.int64) * groups + i_group
        p_out = out_states + i_out * (PARTS * 2 * HEAD_DIM) + o_d
        p_out_stats = out_stats + i_out * STATS
        tl.store(p_out_stats + 2 * PARTS, (left_stop == OPEN).to(tl.float32))
        tl.store(p_out_stats + 2 * INNER, maximum)
        tl.store(p_out_stats + 2 * INNER + 1, total)
        tl.store(p_out + INNER * 2 * HEAD_DIM, b_key, mask=m_d)
        tl.store(p_out + INNER * 2 * HEAD_DIM + HEAD_DIM, b_value, mask=m_d)
        for i_part in tl.static_range(2):
            i_span = left_stop if i_part == 0 else OPEN
            m_one = o_span == i_span
            if i_part == 1:
                m_one = m_one & (left_stop != OPEN)
            left_weight = tl.sum(tl.where(m_one[:, None], b_span_left, 0.0), 0)
            right_weight = tl.sum(tl.where(m_one[:, None], b_span_right, 0.0), 0)
            tl.store(p_out_stats + 2 * i_part, tl.max(tl.where(m_one, span_max, float("-inf")), 0))
            tl.store(p_out_stats + 2 * i_part + 1, tl.sum(tl.where(m_one, span_sum, 0.0), 0))
            none = tl.zeros([BLOCK_C], dtype=tl.float32)
            b_key = weighted_rows(p_key, left_weight, right_weight, none, m_left, m_right, m_inner, HEAD_DIM)
            b_value = weighted_rows(p_value, left_weight, right_weight, none, m_left, m_right, m_inner, HEAD_DIM)
            tl.store(p_out + i_part * 2 * HEAD_DIM, b_key, mask=m_d)
            tl.store(p_out + i_part * 2 * HEAD_DIM + HEAD_DIM, b_value, mask=m_d)


def _pool(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """Pool layers that lie alike into ``out_key``, ``out_value`` ``(L, B, H, D)``, the last two axes contiguous."""
    layers = len(keys)
    batch, heads, tokens, head_dim = keys[0].shape
    config = pooling_config(head_dim, keys[0].element_size(), target_of(keys[0]))
    block_d = triton.next_power_of_2(head_dim)
    chunks = triton.cdiv(tokens, config.block_tokens)
    rows = layers * batch * heads
    (key_table, value_table), aligned = address_tables(keys, values)
    states = keys[0].new_empty(rows, chunks, PARTS.value, 2, head_dim, dtype=torch.float32)
    stats = keys[0].new_empty(rows, chunks, STATS.value, dtype=torch.float32)
    pool_chunk_kernel[(rows * chunks,)](
        key_table,
        value_table,
        span_query,
        global_query,
        span_offsets,
        span_offsets if attention_mask is None else attention_mask,
        states,
        stats,
        tokens,
        span_offsets.shape[1] - 1,
        chunks,
        batch,
        *keys[0].stride()[:3],
        *values[0].stride()[:3],
        span_offsets.stride(0),
        *((0, 0) if attention_mask is None else attention_mask.stride()),
        LAYERS=len(key_table),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_T=config.block_tokens,
        BLOCK_D=block_d,
        GROUP=config.group_spans,
        SCALE=head_dim**-0.5,
        HAS_MASK=attention_mask is not None,
        IS_ALIGNED=aligned,
        DTYPE=TRITON_DTYPE[keys[0].dtype],
        num_warps=config.num_warps,
    )
    is_last = False
    while not is_last:
        is_last = chunks <= config.merge_chunks
        groups = 1 if is_last else triton.cdiv(chunks, config.merge_chunks - 1)
        merged = states, stats
        if not is_last:
            merged = states.new_empty(rows, groups, *states.shape[2:]), stats.new_empty(rows, groups, STATS.value)
        merge_kernel[(rows * groups,)](
            states,
            stats,
            global_query,
            *merged,
            out_key,
            out_value,
            chunks,
            groups,
            batch,
            out_key.stride(0),
            out_key.stride(1),
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_C=config.merge_chunks,
            BLOCK_D=block_d,
            SCALE=head_dim**-0.5,
            IS_LAST=is_last,
            OUT_DTYPE=TRITON_DTYPE[out_key.dtype],
            num_warps=config.merge_warps,
        )
        (states, stats), chunks = merged, groups


def attention_pool(
    key: Tensor,
    value: Tensor,
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the pooling of one layer. Arguments are checked by ``lcf_fast.ops``.

    ``key``, ``value`` ``(B, H, N, D)``, last stride 1, ``N >= 1``; ``span_query``, ``global_query`` ``(H, D)``;
    ``span_offsets`` ``(B, P+1)`` int32, last stride 1, ``P >= 1``; ``attention_mask`` ``(B, N)`` bool or integer.
    Returns ``K*, V*`` ``(B, H, D)`` in the key's dtype; NaN where a row has no token to pool.
    """
    batch, heads, _, head_dim = key.shape
    pooled = key.new_empty(batch, heads, head_dim), key.new_empty(batch, heads, head_dim)
    if pooled[0].numel():
        with device_guard(key):
            _pool(
                [key],
                [value],
                span_query.contiguous(),
                global_query.contiguous(),
                span_offsets,
                attention_mask,
                pooled[0][None],
                pooled[1][None],
            )
    return pooled


def _runs(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[slice]:
    """Neighbouring layers that can share a launch: equal strides, and states that fit `STATE_BYTES`."""
    config = pooling_config(keys[0].shape[3], keys[0].element_size(), target_of(keys[0]))
    chunks = triton.cdiv(keys[0].shape[2], config.block_tokens)
    layer_bytes = keys[0].shape[0] * keys[0].shape[1] * chunks * PARTS.value * 2 * keys[0].shape[3] * 4
    most = max(1, STATE_BYTES // max(layer_bytes, 1))
    start = 0
    for i in range(1, len(keys) + 1):
        is_alike = i < len(keys) and i - start < most
        is_alike = is_alike and keys[i].stride() == keys[start].stride()
        if not (is_alike and values[i].stride() == values[start].stride()):
            yield slice(start, i)
            start = i


def summarize_layers(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    span_query: Tensor,
    global_query: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the pooling of all layers and its fold through W_down. Arguments are checked by ``lcf_fast.ops``.

    ``keys``, ``values``: a ``(B, H, N, D)`` tensor a layer, last stride 1, ``N >= 1``; one may serve several layers.
    ``span_query``, ``global_query`` ``(L, H, D)``; ``down_weight`` ``(L, d, 2Cs+2Cr)``; ``down_bias`` ``(L, d)``;
    ``span_offsets``, ``attention_mask`` as for `attention_pool`. Neighbouring layers with equal strides share launches.
    Returns the latent ``(L, B, d)`` and the summary ``(L, 2, B, H, D)``, both float32.
    """
    batch, heads, _, head_dim = keys[0].shape
    summary = keys[0].new_empty(len(keys), 2, batch, heads, head_dim, dtype=torch.float32)
    if not summary.numel():
        return summary.new_empty(len(keys), batch, down_weight.shape[1]), summary
    span_query, global_query = span_query.contiguous(), global_query.contiguous()
    with device_guard(keys[0]):
        for run in _runs(keys, values):
            _pool(
                keys[run],
                values[run],
                span_query[run],
                global_query[run],
                span_offsets,
                attention_mask,
                summary[run, 0],
                summary[run, 1],
            )
        return fold(summary, down_weight, down_bias), summary
