"""Merging partial pools: softmax states of neighbouring token ranges, exactly, in any grouping (spec section 4).

The state of a token range has three parts, each a softmax state ``(max, sum, acc_K, acc_V)``:

- LEFT: the range's part of the span that began before it and reaches into it;
- RIGHT: the range's part of the span that begins in it and goes on after it;
- INNER: the cross-span state of the spans that lie wholly inside, each weighed as a whole by ``q_global``;

and a flag, through: one span covers the range and goes on at both ends (it is LEFT then, and the others are empty).
A range may be a chunk of one launch, a piece of a context that grows, or one process's share of a long one: its state
has a fixed size. Overlapping spans lie in tracks; each track has states of its own, and its last range ends its spans.

``states``: ``(rows, chunks, PARTS, 2, D)`` float32, ``stats``: ``(rows, chunks, STATS)`` float32: (max, sum) a part,
then the flag. The vectors of a part whose sum is 0 hold nothing, and no reader may touch them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import TRITON_DTYPE, cast, inlined
from .launching import launch
from .policy import next_power_of_2
from .pooling_policy import PoolingConfig

#: Parts of a state, and floats a state in the statistics: (max, sum) a part, the through flag, one unused.
PARTS = tl.constexpr(3)
STATS = tl.constexpr(8)
LEFT = tl.constexpr(0)
RIGHT = tl.constexpr(1)
INNER = tl.constexpr(2)


@inlined
def finite_or_zero(maximum):
    """What to subtract from logits: their maximum, but 0 for an empty set, where ``exp(-inf - max)`` must be 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


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


@triton.jit(do_not_specialize=["chunks", "groups", "batch", "tracks"])
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
    tracks,
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
    """Merge the states of up to FAN_IN neighbouring chunks of one row: (layer, batch item, head, track).

    IS_LAST: they are the whole sequence, of all tracks one after another (then ``tracks`` is 1 here), and the result
    is ``K*, V*`` in ``out_key``, ``out_value`` ``(L, B, H, D)``.
    Else it is a state in ``out_states``, ``out_stats``, laid out as the given ones.

    A span that crosses chunks is named by the chunk in which it ends. One that does not end here is named BLOCK_C - 1,
    so no chunk may have that place (FAN_IN = BLOCK_C - 1); in the last merge every span ends.
    """
    FAN_IN: tl.constexpr = BLOCK_C if IS_LAST else BLOCK_C - 1
    OPEN: tl.constexpr = BLOCK_C - 1
    i_program = tl.program_id(0)
    i_group = i_program % groups
    i_row = i_program // groups
    i_pool = i_row // tracks  # (layer, batch item, head)
    i_head = i_pool % HEADS
    i_batch = (i_pool // HEADS) % batch
    i_layer = i_pool // (HEADS * batch)
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


def merge(
    states: Tensor,
    stats: Tensor,
    global_query: Tensor,
    config: PoolingConfig,
    shape: tuple[int, int, int],
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch merges until one state a row is left: 32 at a time, so one launch up to 32 and mostly two beyond.

    Args:
        states, stats: ``(rows, chunks, ..)`` as above, rows in the order (layer, batch item, head, track).
        global_query: ``(L, H, D)`` contiguous.
        shape: layers L, batch B, heads H.
        out: where ``K*`` and ``V*`` go, ``(L, B, H, D)``, the last two axes contiguous: then rows have no track axis,
            chunks of the tracks follow each other, and every span ends with the last chunk. None: states are made.

    Returns:
        ``out``, or the states ``(rows, 1, ..)``; rows of a single chunk are returned as they are.
    """
    layers, batch, heads = shape
    head_dim = states.shape[-1]
    rows, chunks = stats.shape[:2]
    is_last = False
    while not is_last and (out is not None or chunks > 1):
        is_last = out is not None and chunks <= config.merge_chunks
        groups = 1 if is_last else -(-chunks // (config.merge_chunks - 1))
        merged = states, stats
        if not is_last:
            merged = states.new_empty(rows, groups, *states.shape[2:]), stats.new_empty(rows, groups, STATS.value)
        target = merged if out is None else out  # out is not read where it is not the last merge
        strides = (0, 0) if out is None else out[0].stride()[:2]
        keywords = {
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "BLOCK_C": config.merge_chunks,
            "BLOCK_D": next_power_of_2(head_dim),
            "SCALE": head_dim**-0.5,
            "IS_LAST": is_last,
            "OUT_DTYPE": TRITON_DTYPE[target[0].dtype],
        }
        launch(
            merge_kernel,
            rows * groups,
            (),
            (states, stats, global_query, *merged, *target),
            (chunks, groups, batch, rows // (layers * batch * heads), *strides),
            keywords,
            {"num_warps": config.merge_warps},
        )
        (states, stats), chunks = merged, groups
    return (states, stats) if out is None else out
