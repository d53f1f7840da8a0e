"""Attention pooling of spans, forward (spec section 4): to a fixed-size summary, or to a state that others merge with.

Two launches for all layers, whatever the number of spans (a third, in `fold`, makes the message of the summary):

1. `pool_chunk_kernel`: a program reads chunks of tokens of one layer, batch item and head, each byte of the cache
   once, and reduces each to a partial state;
2. `merge_kernel` in `merging`, which also says what a state is: states merge, 32 chunks at a time; a longer sequence
   takes one more launch for every factor of 31.

The buffers grow with the length, never with the spans. No vector is kept for a span: ``q_global·K~_p`` is the mean of
``q_global·K_t`` under the span's weights, so two numbers a token give a span's score, and every token's final weight is
known before any key or value is summed up. A state's parts have disjoint tokens. So a chunk needs two products and one
weighted sum a token, be it one span or a span a token.

Overlapping spans lie in tracks, within each of which they do not overlap. A program serves one track; those of a chunk
run side by side, so that the cache comes from memory once and from the L2 cache for the other tracks.

Sums are float32 throughout; float32 factors of 16-bit tiles are split in three, so nothing is rounded to 16 bits. The
thirds are rows of one product, which a tensor instruction would pad with zeros anyway.
Cost a token, layer and KV head: ``2·D`` elements read, ``8·D`` FLOPs a track. A chunk writes, and the merge reads,
``8·D`` bytes for each part that is there, mostly one of three. Floor: the cache's bytes at the copy bandwidth (2,000
tokens of Qwen3-0.6B, 28 layers: 229 MB, 53 us on an H200).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    inlined,
    needs_wide_offsets,
    pointer_of,
    row_offsets,
    target_of,
    third_of,
)
from .fold import fold
from .launching import launch
from .merging import INNER, LEFT, PARTS, RIGHT, STATS, finite_or_zero, merge
from .policy import next_power_of_2
from .pooling_policy import PoolingConfig, pooling_config, turns

#: Most memory that the states of one launch may take; beyond it layers are pooled in turns. A launch of that size takes
#: hundreds of microseconds, so that one more costs nothing.
STATE_BYTES = 256 << 20
#: Offsets probed at once by `spans_ended`: one warp's lanes.
PROBES = tl.constexpr(32)


@inlined
def load_offset(p_offsets, i, tokens, SLACK: tl.constexpr):
    """A span offset, clamped: to the sequence, or by SLACK = 1 beyond, which tells that a span goes on there."""
    return tl.minimum(tl.maximum(tl.load(p_offsets + i), -SLACK), tokens + SLACK)


@triton.jit
def spans_ended(p_offsets, position, spans, tokens, SLACK: tl.constexpr):
    """How many spans end at or before ``position``: the first span that reaches beyond it, or ``spans``."""
    low = tl.full([], 0, dtype=tl.int32)
    high = spans
    o_probe = tl.arange(0, PROBES) + 1
    while low < high:  # invariant: the answer is in [low, high]
        step = (high - low + PROBES - 1) // PROBES
        o_span = low + o_probe * step
        end = tl.load(p_offsets + o_span, mask=o_span <= high, other=0)
        ended = (tl.minimum(tl.maximum(end, -SLACK), tokens + SLACK) <= position) & (o_span <= high)
        count = tl.sum(ended.to(tl.int32), 0)
        high = tl.minimum(high, low + (count + 1) * step - 1)
        low += count * step
    return low


@triton.jit(
    do_not_specialize=[
        "tokens",
        "spans",
        "chunks",
        "groups",
        "each",
        "batch",
        "tracks",
        "stride_offsets_batch",
        "stride_offsets_track",
        "stride_mask_batch",
        "stride_mask_track",
    ]
)
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
    groups,
    each,
    batch,
    tracks,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_offsets_batch,
    stride_offsets_track,
    stride_mask_batch,
    stride_mask_track,
    stride_mask_token,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SLACK: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Reduce ``each`` chunks of BLOCK_T tokens of one (layer, batch item, head, track), one after the other, to their
    states; ``groups`` programs share a track.

    ``keys``, ``values``: launch tables. ``span_query``, ``global_query`` ``(L, H, D)`` contiguous. ``states``
    ``(L, B, H, tracks, chunks, PARTS, 2, D)``, ``stats`` ``(L, B, H, tracks, chunks, STATS)``, float32; the vectors of
    an empty part are NOT written. SLACK = 1: the tokens are a piece of a sequence, and an offset below 0 or beyond
    ``tokens`` belongs to a span that began before the piece or goes on after it.
    """
    USE_DOT: tl.constexpr = tl.float32 != DTYPE  # tensor instructions; float32 has none that are exact
    ROWS: tl.constexpr = 16 if USE_DOT else 4  # 4 > PARTS; 16 are what a tensor instruction takes
    i_program = tl.program_id(0)
    i_track = i_program % tracks
    i_first = (i_program // tracks) % groups * each
    i_row = i_program // (tracks * groups)  # (layer, batch item, head)
    i_head = i_row % HEADS
    i_batch = (i_row // HEADS) % batch
    i_layer = i_row // (HEADS * batch)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_offsets = offsets + i_batch.to(tl.int64) * stride_offsets_batch + i_track * stride_offsets_track
    p_key = pointer_of(keys, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_key += i_batch.to(tl.int64) * stride_key_batch + i_head.to(tl.int64) * stride_key_head
    p_value = pointer_of(values, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_value += i_batch.to(tl.int64) * stride_value_batch + i_head.to(tl.int64) * stride_value_head
    o_key = row_offsets(tl.arange(0, BLOCK_T), stride_key_token, IS_WIDE)
    o_value = row_offsets(tl.arange(0, BLOCK_T), stride_value_token, IS_WIDE)
    p_query = (i_layer * HEADS + i_head) * HEAD_DIM + o_d
    b_span_query = tl.load(span_query + p_query, mask=m_d, other=0.0).to(tl.float32)
    b_global_query = tl.load(global_query + p_query, mask=m_d, other=0.0).to(tl.float32)
    o_r = tl.arange(0, ROWS)
    if USE_DOT:
        # Rows 0 and 1 of each four are the two queries, the fours the numbers that add up to them.
        b_query = tl.where((o_r % 4 == 1)[:, None], b_global_query[None, :], 0.0)
        b_query = tl.where((o_r % 4 == 0)[:, None], b_span_query[None, :], b_query)
        b_query = third_of(b_query, (o_r // 4)[:, None], DTYPE)
    covered = load_offset(p_offsets, 0, tokens, 0)
    ended = load_offset(p_offsets, spans, tokens, 0)
    i_state = (i_row.to(tl.int64) * tracks + i_track) * chunks

    first = spans_ended(p_offsets, i_first * BLOCK_T, spans, tokens, SLACK)
    for i_chunk in range(i_first, tl.minimum(i_first + each, chunks)):
        begin = i_chunk * BLOCK_T
        end = tl.minimum(begin + BLOCK_T, tokens)
        o_t = begin + tl.arange(0, BLOCK_T)

        # Tokens of no span and padding are never loaded: what lies there (NaN, too) can not reach a sum.
        m_t = (o_t >= covered) & (o_t < ended)
        if HAS_MASK:
            p_mask = mask + i_batch.to(tl.int64) * stride_mask_batch + i_track.to(tl.int64) * stride_mask_track
            p_mask += o_t.to(tl.int64) * stride_mask_token
            m_t = m_t & (tl.load(p_mask, mask=m_t, other=0) != 0)
        m_td = m_t[:, None] & m_d[None, :]
        # The scalar base takes what differs between chunks: a tile's offsets are the same for all, and 32-bit.
        p_tile = p_key + begin.to(tl.int64) * stride_key_token
        b_key = tl.load(p_tile + (o_key[:, None] + o_d[None, :]), mask=m_td, other=0.0)
        p_tile = p_value + begin.to(tl.int64) * stride_value_token
        b_value = tl.load(p_tile + (o_value[:, None] + o_d[None, :]), mask=m_td, other=0.0)

        # While the rows are under way: which spans cross the chunk's ends, which lie inside. [left_end, right_begin)
        # holds the inner ones; spans first_inner .. last-1 are those.
        last = spans_ended(p_offsets, end, spans, tokens, SLACK)
        left_end = load_offset(p_offsets, first, tokens, SLACK)
        right_begin = load_offset(p_offsets, last, tokens, SLACK)
        has_left = (first < spans) & (left_end < begin)
        has_right = (last < spans) & (right_begin < end)
        is_through = has_left & has_right & (first == last)
        has_right = has_right & (is_through == 0)
        if has_left:
            left_end = load_offset(p_offsets, first + 1, tokens, SLACK)
        first_inner = first + has_left.to(tl.int32)

        if USE_DOT:
            b_scores = dot(b_query, tl.trans(b_key), tl.zeros([ROWS, BLOCK_T], dtype=tl.float32), "ieee") * SCALE
            b_score = tl.sum(tl.where((o_r % 4 == 0)[:, None], b_scores, 0.0), 0)
            b_global = tl.sum(tl.where((o_r % 4 == 1)[:, None], b_scores, 0.0), 0)
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

        p_stats = stats + (i_state + i_chunk) * STATS
        p_state = states + (i_state + i_chunk) * (PARTS * 2 * HEAD_DIM)
        tl.store(p_stats + 2 * PARTS, is_through.to(tl.float32))
        m_part = m_t[None, :] & (b_part[None, :] == (o_r % 4)[:, None])
        b_sum = tl.where(m_part, b_logit[None, :], float("-inf"))
        maximum = tl.max(b_sum, 1)
        b_sum = tl.exp(b_sum - finite_or_zero(maximum)[:, None]) * b_weight[None, :]
        total = tl.sum(b_sum, 1)
        tl.store(p_stats + 2 * o_r, maximum, mask=o_r < PARTS)
        tl.store(p_stats + 2 * o_r + 1, total, mask=o_r < PARTS)
        if USE_DOT:
            b_sum = third_of(b_sum * WEIGHT_SCALE, (o_r // 4)[:, None], DTYPE)
            o_part = tl.arange(0, 4)
            m_there = (tl.sum(tl.reshape(total, [ROWS // 4, 4]), 0) != 0.0) & (o_part < PARTS)
            p_part = p_state + (o_part * (2 * HEAD_DIM))[:, None] + o_d[None, :]
            m_part_d = m_there[:, None] & m_d[None, :]
            zeros = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
            b_keys = tl.reshape(dot(b_sum, b_key, zeros, "ieee"), [ROWS // 4, 4, BLOCK_D])
            tl.store(p_part, tl.sum(b_keys, 0) / WEIGHT_SCALE, mask=m_part_d)
            b_values = tl.reshape(dot(b_sum, b_value, zeros, "ieee"), [ROWS // 4, 4, BLOCK_D])
            tl.store(p_part + HEAD_DIM, tl.sum(b_values, 0) / WEIGHT_SCALE, mask=m_part_d)
        else:
            for i_part in tl.static_range(PARTS):
                is_present = has_left
                if i_part == RIGHT:
                    is_present = has_right
                if i_part == INNER:
                    is_present = first_inner < last
                if is_present:
                    b_part_sum = tl.sum(tl.where((o_r == i_part)[:, None], b_sum, 0.0), 0)[:, None]
                    p_part = p_state + i_part * (2 * HEAD_DIM) + o_d
                    tl.store(p_part, tl.sum(b_part_sum * b_key, 0), mask=m_d)
                    tl.store(p_part + HEAD_DIM, tl.sum(b_part_sum * b_value, 0), mask=m_d)
        first = last


def _pool_chunks(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
    config: PoolingConfig,
    slack: int,
) -> tuple[Tensor, Tensor]:
    """Launch the chunk kernel on layers that lie alike: ``states (L·B·H, T, chunks, ..)`` and their ``stats``."""
    layers = len(keys)
    batch, heads, tokens, head_dim = keys[0].shape
    tracks = span_offsets.shape[1] if span_offsets.dim() == 3 else 1
    chunks = -(-tokens // config.block_tokens)
    rows = layers * batch * heads
    (key_table, value_table), aligned = address_tables(keys, values)
    # A piece's only chunk is handed out as it is: nothing that memory held before may be in it.
    make = keys[0].new_zeros if slack and chunks == 1 else keys[0].new_empty
    states = make(rows, tracks, chunks, PARTS.value, 2, head_dim, dtype=torch.float32)
    stats = make(rows, tracks, chunks, STATS.value, dtype=torch.float32)
    mask_strides = (0, 0, 0) if attention_mask is None else _with_track(attention_mask.stride())
    each = turns(config, rows * tracks * chunks, target_of(keys[0]))
    groups = -(-chunks // each)
    mask = span_offsets if attention_mask is None else attention_mask
    numbers = (
        tokens,
        span_offsets.shape[-1] - 1,
        chunks,
        groups,
        each,
        batch,
        tracks,
        *keys[0].stride()[:3],
        *values[0].stride()[:3],
        *_with_track(span_offsets.stride())[:2],
        *mask_strides,
    )
    keywords = {
        "LAYERS": len(key_table),
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_T": config.block_tokens,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),  # a product takes no fewer
        "GROUP": config.group_spans,
        "SCALE": head_dim**-0.5,
        "HAS_MASK": attention_mask is not None,
        "SLACK": slack,
        "IS_WIDE": needs_wide_offsets(config.block_tokens, keys[0], values[0]),
        "IS_ALIGNED": aligned,
        "DTYPE": TRITON_DTYPE[keys[0].dtype],
    }
    options = {"num_warps": config.num_warps}
    if not torch.version.hip:
        options["maxnreg"] = config.max_registers
    launch(
        pool_chunk_kernel,
        rows * tracks * groups,
        (key_table, value_table),
        (span_query, global_query, span_offsets, mask, states, stats),
        numbers,
        keywords,
        options,
    )
    return states, stats


def _with_track(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides over (batch item, track, ..) of a tensor that may have no axis for tracks."""
    return strides if len(strides) == 3 else (strides[0], 0, strides[1])


def _config(tensor: Tensor) -> PoolingConfig:
    """The policy's row for a cache or for states, whose last axis is the head's."""
    return pooling_config(tensor.shape[-1], tensor.element_size(), target_of(tensor))


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
    config = _config(keys[0])
    states, stats = _pool_chunks(keys, values, span_query, global_query, span_offsets, attention_mask, config, 0)
    # Every span ends within its track, so the tracks may follow each other like chunks of one sequence.
    states, stats = states.flatten(1, 2), stats.flatten(1, 2)
    shape = (len(keys), keys[0].shape[0], keys[0].shape[1])
    merge(states, stats, global_query, config, shape, (out_key, out_value))


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
    ``span_offsets`` ``(B, P+1)`` or, of overlapping spans, ``(B, T, P+1)`` int32, last stride 1, ``P >= 1``;
    ``attention_mask`` ``(B, N)`` or ``(B, T, N)`` bool or integer.
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


def _runs(keys: Sequence[Tensor], values: Sequence[Tensor], tracks: int) -> Iterator[slice]:
    """Neighbouring layers that can share a launch: equal strides, and states that fit `STATE_BYTES`."""
    chunks = tracks * -(-keys[0].shape[2] // _config(keys[0]).block_tokens)
    layer_bytes = keys[0].shape[0] * keys[0].shape[1] * chunks * PARTS.value * 2 * keys[0].shape[3] * 4
    most = max(1, STATE_BYTES // max(layer_bytes, 1))
    return alike_runs(keys, values, most)


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
        for run in _runs(keys, values, span_offsets.shape[1] if span_offsets.dim() == 3 else 1):
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


def pool_range(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool a piece of a sequence to its state (see `merging`). Arguments as for `summarize_layers`.

    Offsets count from the piece's first token; one below 0 or beyond N belongs to a span that goes on there.
    Returns ``states (L, B, H, T, PARTS, 2, D)`` and ``stats (L, B, H, T, STATS)``, float32.
    """
    batch, heads, _, head_dim = keys[0].shape
    tracks = span_offsets.shape[1] if span_offsets.dim() == 3 else 1
    layers = len(keys)
    states = keys[0].new_empty(layers, batch, heads, tracks, PARTS.value, 2, head_dim, dtype=torch.float32)
    stats = keys[0].new_empty(layers, batch, heads, tracks, STATS.value, dtype=torch.float32)
    if not stats.numel():
        return states, stats
    span_query, global_query = span_query.contiguous(), global_query.contiguous()
    config = _config(keys[0])
    with device_guard(keys[0]):
        for run in _runs(keys, values, tracks):
            made = _pool_chunks(
                keys[run], values[run], span_query[run], global_query[run], span_offsets, attention_mask, config, 1
            )
            shape = (len(keys[run]), batch, heads)
            merged = merge(made[0].flatten(0, 1), made[1].flatten(0, 1), global_query[run], config, shape)
            states[run] = merged[0].view(-1, *states.shape[1:])
            stats[run] = merged[1].view(-1, *stats.shape[1:])
    return states, stats


def merge_ranges(states: Tensor, stats: Tensor, global_query: Tensor) -> tuple[Tensor, Tensor]:
    """Merge neighbouring ranges: ``states (L, B, H, T, R, ..)``, ``stats (L, B, H, T, R, STATS)``, without the R axis.

    ``global_query`` ``(L, H, D)``; all contiguous, float32 states.
    """
    layers, batch, heads, tracks = stats.shape[:4]
    if not stats.numel():
        return states[:, :, :, :, 0], stats[:, :, :, :, 0]
    config = _config(states)
    with device_guard(states):
        merged = merge(
            states.flatten(0, 3), stats.flatten(0, 3), global_query.contiguous(), config, (layers, batch, heads)
        )
    shape = (layers, batch, heads, tracks)
    return merged[0].view(*shape, *states.shape[5:]), merged[1].view(*shape, STATS.value)


def finish_ranges(states: Tensor, stats: Tensor, global_query: Tensor) -> Tensor:
    """``K*, V*`` as ``summary (L, 2, B, H, D)`` float32 of the states of whole sequences ``(L, B, H, T, ..)``.

    What is still open ends here. NaN where a row has no token.
    """
    layers, batch, heads, tracks = stats.shape[:4]
    head_dim = states.shape[-1]
    summary = states.new_empty(layers, 2, batch, heads, head_dim)
    if not summary.numel():
        return summary
    if tracks > 1:  # an empty range after each track ends its open span before the next track's begins
        states = torch.stack([states, torch.zeros_like(states)], 4)
        stats = torch.stack([stats, torch.zeros_like(stats)], 4)
    config = _config(states)
    rows = layers * batch * heads
    with device_guard(states):
        merge(
            states.reshape(rows, -1, *states.shape[-3:]),
            stats.reshape(rows, -1, STATS.value),
            global_query.contiguous(),
            config,
            (layers, batch, heads),
            (summary[:, 0], summary[:, 1]),
        )
    return summary
