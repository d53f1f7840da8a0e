"""Attention pooling, backward: gradients of both queries, and of the cache where it is asked for (spec section 4).

With ``l_t = q_span·K_t/√D``, ``u_t = q_global·K_t/√D`` and ``g_t = dK*·K_t + dV*·V_t``, three numbers a token and head
say all that the cache says. A span's: ``a_t`` its softmax of ``l``, ``s`` and ``G`` the means of ``u`` and ``g`` under
it, ``β`` its share in the cross-span softmax of ``s``, and ``δ = β (G - Σ β G)``, the gradient of ``s``. Then

    dl_t = a_t (β (g_t - G) + δ (u_t - s))        dq_span   = Σ dl_t K_t / √D
    du_t = a_t δ                                  dq_global = Σ du_t K_t / √D
    dK_t = a_t β dK* + (dl_t q_span + du_t q_global) / √D          dV_t = a_t β dV*

summed over the spans that a token is in. Nothing is saved in the forward pass. Four launches for all layers that lie
alike, whatever the number of spans: the three numbers (reads the cache once), the spans' numbers, the cross-span
softmax, and the sums (reads the keys again): 1.5 times the forward's bytes. Partial sums go to memory and are added in
a fixed order: no atomics, so the same bits from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TRITON_DTYPE, address_tables, cast, device_guard, pointer_of
from .merging import finite_or_zero
from .pooling import _runs
from .pooling_policy import pooling_backward_config

#: A token's numbers l, u, g; a span's max of l, 1/Σexp, s, G, β, δ and two unused.
TOKEN = tl.constexpr(3)
SPAN = tl.constexpr(8)
#: Tokens, or spans, that a program looks at together where it walks along one row of numbers.
WALK = 1024


@triton.jit(do_not_specialize=["tokens", "chunks", "batch", "tracks", "none"])
def token_numbers_kernel(
    keys,
    values,
    span_query,
    global_query,
    grad,
    entries,
    numbers,
    tokens,
    chunks,
    batch,
    tracks,
    none,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``numbers (L, B, H, TOKEN, N)`` of a chunk of one (layer, batch item, head).

    ``grad``: ``(L, 2, B, H, D)`` float32. ``entries (B, tracks, N)`` int32: each token's span, ``none`` for no span; a
    token of no span in any track is not loaded, so what lies there (NaN, too) reaches nothing.
    """
    i_program = tl.program_id(0)
    i_chunk = i_program % chunks
    i_row = i_program // chunks
    i_head = i_row % HEADS
    i_batch = (i_row // HEADS) % batch
    i_layer = i_row // (HEADS * batch)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_t = i_chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < 0
    for i_track in range(tracks):
        p_entry = entries + (i_batch.to(tl.int64) * tracks + i_track) * tokens + o_t
        m_t = m_t | (tl.load(p_entry, mask=o_t < tokens, other=none) != none)
    m_td = m_t[:, None] & m_d[None, :]
    o_t64 = o_t.to(tl.int64)
    p_key = pointer_of(keys, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_key += i_batch.to(tl.int64) * stride_key_batch + i_head.to(tl.int64) * stride_key_head
    p_value = pointer_of(values, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_value += i_batch.to(tl.int64) * stride_value_batch + i_head.to(tl.int64) * stride_value_head
    b_key = tl.load(p_key + o_t64[:, None] * stride_key_token + o_d[None, :], mask=m_td, other=0.0)
    b_value = tl.load(p_value + o_t64[:, None] * stride_value_token + o_d[None, :], mask=m_td, other=0.0)
    b_key = b_key.to(tl.float32)
    p_query = (i_layer * HEADS + i_head) * HEAD_DIM + o_d
    b_span_query = tl.load(span_query + p_query, mask=m_d, other=0.0).to(tl.float32)
    b_global_query = tl.load(global_query + p_query, mask=m_d, other=0.0).to(tl.float32)
    p_grad = grad + ((i_layer * 2 * batch + i_batch) * HEADS + i_head) * HEAD_DIM + o_d
    b_grad_key = tl.load(p_grad, mask=m_d, other=0.0)
    b_grad_value = tl.load(p_grad + batch * HEADS * HEAD_DIM, mask=m_d, other=0.0)
    b_product = b_key * b_grad_key[None, :] + b_value.to(tl.float32) * b_grad_value[None, :]
    p_number = numbers + i_row.to(tl.int64) * TOKEN * tokens + o_t
    m_store = o_t < tokens
    tl.store(p_number, tl.sum(b_key * b_span_query[None, :], 1) * SCALE, mask=m_store)
    tl.store(p_number + tokens, tl.sum(b_key * b_global_query[None, :], 1) * SCALE, mask=m_store)
    tl.store(p_number + 2 * tokens, tl.sum(b_product, 1), mask=m_store)


@triton.jit(do_not_specialize=["tokens", "spans", "tracks", "stride_offsets_batch", "stride_offsets_track", "items"])
def span_numbers_kernel(
    numbers,
    entries,
    offsets,
    span_numbers,
    tokens,
    spans,
    tracks,
    items,
    stride_offsets_batch,
    stride_offsets_track,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first four of ``span_numbers (L, B, H, tracks, spans, SPAN)``, of one span."""
    i_program = tl.program_id(0)
    i_span = i_program % spans
    i_track = (i_program // spans) % tracks
    i_row = i_program // (spans * tracks)
    i_batch = (i_row // HEADS) % items
    p_offsets = offsets + i_batch.to(tl.int64) * stride_offsets_batch + i_track * stride_offsets_track + i_span
    start = tl.minimum(tl.maximum(tl.load(p_offsets), 0), tokens)
    stop = tl.minimum(tl.maximum(tl.load(p_offsets + 1), 0), tokens)
    p_number = numbers + i_row.to(tl.int64) * TOKEN * tokens
    p_entry = entries + (i_batch.to(tl.int64) * tracks + i_track) * tokens
    b_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BLOCK], dtype=tl.float32)
    b_global = tl.zeros([BLOCK], dtype=tl.float32)
    b_grad = tl.zeros([BLOCK], dtype=tl.float32)
    while start < stop:  # BLOCK softmax states side by side, so that sums stay short; merged below
        o_t = start + tl.arange(0, BLOCK)
        m_t = o_t < stop
        m_t = m_t & (tl.load(p_entry + o_t, mask=m_t, other=-1) == i_span)
        b_score = tl.load(p_number + o_t, mask=m_t, other=float("-inf"))
        b_new = tl.maximum(b_max, b_score)
        b_keep = tl.exp(b_max - finite_or_zero(b_new))
        b_weight = tl.exp(b_score - finite_or_zero(b_new))
        b_total = b_total * b_keep + b_weight
        b_global = b_global * b_keep + b_weight * tl.load(p_number + tokens + o_t, mask=m_t, other=0.0)
        b_grad = b_grad * b_keep + b_weight * tl.load(p_number + 2 * tokens + o_t, mask=m_t, other=0.0)
        b_max = b_new
        start += BLOCK
    maximum = tl.max(b_max, 0)
    b_keep = tl.exp(b_max - finite_or_zero(maximum))
    total = tl.sum(b_total * b_keep, 0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    p_span = span_numbers + i_program.to(tl.int64) * SPAN
    tl.store(p_span, finite_or_zero(maximum))
    tl.store(p_span + 1, inverse)
    tl.store(p_span + 2, tl.sum(b_global * b_keep, 0) * inverse)
    tl.store(p_span + 3, tl.sum(b_grad * b_keep, 0) * inverse)


@triton.jit(do_not_specialize=["spans"])
def cross_span_kernel(span_numbers, spans, BLOCK: tl.constexpr):
    """``β`` and ``δ`` of all spans of one (layer, batch item, head); ``spans`` counts those of all tracks."""
    p_row = span_numbers + tl.program_id(0).to(tl.int64) * spans * SPAN
    b_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BLOCK], dtype=tl.float32)
    b_grad = tl.zeros([BLOCK], dtype=tl.float32)
    i = 0
    while i < spans:
        o_s = i + tl.arange(0, BLOCK)
        m_s = (o_s < spans) & (tl.load(p_row + o_s * SPAN + 1, mask=o_s < spans, other=0.0) != 0.0)
        b_score = tl.load(p_row + o_s * SPAN + 2, mask=m_s, other=float("-inf"))
        b_new = tl.maximum(b_max, b_score)
        b_keep = tl.exp(b_max - finite_or_zero(b_new))
        b_weight = tl.exp(b_score - finite_or_zero(b_new))
        b_total = b_total * b_keep + b_weight
        b_grad = b_grad * b_keep + b_weight * tl.load(p_row + o_s * SPAN + 3, mask=m_s, other=0.0)
        b_max = b_new
        i += BLOCK
    maximum = tl.max(b_max, 0)
    b_keep = tl.exp(b_max - finite_or_zero(maximum))
    total = tl.sum(b_total * b_keep, 0)
    mean = tl.sum(b_grad * b_keep, 0) / total
    i = 0
    while i < spans:
        o_s = i + tl.arange(0, BLOCK)
        m_in = o_s < spans
        m_s = m_in & (tl.load(p_row + o_s * SPAN + 1, mask=m_in, other=0.0) != 0.0)
        b_score = tl.load(p_row + o_s * SPAN + 2, mask=m_s, other=float("-inf"))
        b_share = tl.exp(b_score - finite_or_zero(maximum)) / total
        b_delta = b_share * (tl.load(p_row + o_s * SPAN + 3, mask=m_s, other=0.0) - mean)
        tl.store(p_row + o_s * SPAN + 4, tl.where(m_s, b_share, 0.0), mask=m_in)
        tl.store(p_row + o_s * SPAN + 5, tl.where(m_s, b_delta, 0.0), mask=m_in)
        i += BLOCK


@triton.jit(do_not_specialize=["tokens", "spans", "chunks", "batch", "tracks"])
def pool_backward_kernel(
    keys,
    span_query,
    global_query,
    grad,
    numbers,
    entries,
    span_numbers,
    partials,
    grad_key,
    grad_value,
    tokens,
    spans,
    chunks,
    batch,
    tracks,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_CACHE_GRAD: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One chunk's share of both queries' gradients, and its rows of the cache's.

    ``partials (L, B, H, chunks, 2, D)`` float32; ``grad_key``, ``grad_value (L, B, H, N, D)`` in the cache's dtype.
    """
    i_program = tl.program_id(0)
    i_chunk = i_program % chunks
    i_row = i_program // chunks
    i_head = i_row % HEADS
    i_batch = (i_row // HEADS) % batch
    i_layer = i_row // (HEADS * batch)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_t = i_chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    p_number = numbers + i_row.to(tl.int64) * TOKEN * tokens + o_t
    b_score = tl.load(p_number, mask=m_t, other=0.0)
    b_global = tl.load(p_number + tokens, mask=m_t, other=0.0)
    b_product = tl.load(p_number + 2 * tokens, mask=m_t, other=0.0)
    b_dl = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_du = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_share = tl.zeros([BLOCK_T], dtype=tl.float32)
    m_any = o_t < 0
    for i_track in range(tracks):
        p_entry = entries + (i_batch.to(tl.int64) * tracks + i_track) * tokens + o_t
        b_entry = tl.load(p_entry, mask=m_t, other=spans)
        m_in = b_entry != spans
        m_any = m_any | m_in
        p_span = span_numbers + ((i_row.to(tl.int64) * tracks + i_track) * spans + b_entry) * SPAN
        b_max = tl.load(p_span, mask=m_in, other=0.0)
        b_inverse = tl.load(p_span + 1, mask=m_in, other=0.0)
        b_beta = tl.load(p_span + 4, mask=m_in, other=0.0)
        b_delta = tl.load(p_span + 5, mask=m_in, other=0.0)
        b_weight = tl.where(m_in, tl.exp(tl.where(m_in, b_score - b_max, 0.0)), 0.0) * b_inverse
        b_pull = b_beta * (b_product - tl.load(p_span + 3, mask=m_in, other=0.0))
        b_pull += b_delta * (b_global - tl.load(p_span + 2, mask=m_in, other=0.0))
        b_dl += b_weight * b_pull
        b_du += b_weight * b_delta
        b_share += b_weight * b_beta
    m_td = m_any[:, None] & m_d[None, :]
    o_t64 = o_t.to(tl.int64)
    p_key = pointer_of(keys, i_layer, LAYERS, DTYPE, IS_ALIGNED)
    p_key += i_batch.to(tl.int64) * stride_key_batch + i_head.to(tl.int64) * stride_key_head
    b_key = tl.load(p_key + o_t64[:, None] * stride_key_token + o_d[None, :], mask=m_td, other=0.0).to(tl.float32)
    p_partial = partials + i_program.to(tl.int64) * 2 * HEAD_DIM + o_d
    tl.store(p_partial, tl.sum(b_key * b_dl[:, None], 0) * SCALE, mask=m_d)
    tl.store(p_partial + HEAD_DIM, tl.sum(b_key * b_du[:, None], 0) * SCALE, mask=m_d)
    if HAS_CACHE_GRAD:
        p_query = (i_layer * HEADS + i_head) * HEAD_DIM + o_d
        b_span_query = tl.load(span_query + p_query, mask=m_d, other=0.0).to(tl.float32) * SCALE
        b_global_query = tl.load(global_query + p_query, mask=m_d, other=0.0).to(tl.float32) * SCALE
        p_grad = grad + ((i_layer * 2 * batch + i_batch) * HEADS + i_head) * HEAD_DIM + o_d
        b_grad_key = tl.load(p_grad, mask=m_d, other=0.0)
        b_grad_value = tl.load(p_grad + batch * HEADS * HEAD_DIM, mask=m_d, other=0.0)
        b_dk = b_share[:, None] * b_grad_key[None, :] + b_dl[:, None] * b_span_query[None, :]
        b_dk += b_du[:, None] * b_global_query[None, :]
        p_out = (i_row.to(tl.int64) * tokens + o_t64)[:, None] * HEAD_DIM + o_d[None, :]
        m_out = m_t[:, None] & m_d[None, :]
        tl.store(grad_key + p_out, cast(b_dk, DTYPE), mask=m_out)
        tl.store(grad_value + p_out, cast(b_share[:, None] * b_grad_value[None, :], DTYPE), mask=m_out)


def pool_backward(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    entries: Tensor,
    grad: Tensor,
    wants_cache: bool,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Launch the backward of the pooling of all layers. Arguments are checked by ``lcf_fast.ops``.

    Args:
        keys, values: a ``(B, H, N, D)`` tensor a layer, last stride 1.
        span_query, global_query: ``(L, H, D)``.
        span_offsets: ``(B, T, P+1)`` int32, last stride 1.
        entries: ``(B, T, N)`` int32 contiguous: the span of each token, P for none.
        grad: ``(L, 2, B, H, D)``, of ``K*`` and ``V*``.
        wants_cache: whether the cache's gradients are made.

    Returns:
        Gradients of the queries, ``(L, H, D)`` float32, and a (key, value) a layer in the cache's dtype, or none.
    """
    layers = len(keys)
    batch, heads, tokens, head_dim = keys[0].shape
    tracks, spans = span_offsets.shape[1], span_offsets.shape[2] - 1
    grads = keys[0].new_zeros(2, layers, heads, head_dim, dtype=torch.float32)
    caches: list[tuple[Tensor, Tensor]] = []
    if not keys[0].numel():
        return grads[0], grads[1], [(k.new_zeros(k.shape), k.new_zeros(k.shape)) for k in keys] if wants_cache else []
    span_query, global_query = span_query.contiguous(), global_query.contiguous()
    grad = grad.float().contiguous()
    config = pooling_backward_config(head_dim, keys[0].element_size())
    chunks = triton.cdiv(tokens, config.block_tokens)
    block_d = triton.next_power_of_2(head_dim)
    with device_guard(keys[0]):
        for run in _runs(keys, values, tracks):
            here = len(keys[run])
            rows = here * batch * heads
            (key_table, value_table), aligned = address_tables(keys[run], values[run])
            (key_only,), key_aligned = address_tables(keys[run])
            numbers = keys[0].new_empty(rows, TOKEN.value, tokens, dtype=torch.float32)
            span_numbers = keys[0].new_empty(rows, tracks, spans, SPAN.value, dtype=torch.float32)
            partials = keys[0].new_empty(here, batch, heads, chunks, 2, head_dim, dtype=torch.float32)
            made = partials, partials  # not written without WANTS
            if wants_cache:
                stacked = keys[0].new_empty(2, here, batch, heads, tokens, head_dim)
                made = stacked[0], stacked[1]
                caches += list(zip(stacked[0].unbind(0), stacked[1].unbind(0)))
            shape = {
                "LAYERS": len(key_table),
                "HEADS": heads,
                "HEAD_DIM": head_dim,
                "BLOCK_T": config.block_tokens,
                "BLOCK_D": block_d,
                "SCALE": head_dim**-0.5,
                "DTYPE": TRITON_DTYPE[keys[0].dtype],
                "num_warps": config.num_warps,
            }
            token_numbers_kernel[(rows * chunks,)](
                key_table,
                value_table,
                span_query[run],
                global_query[run],
                grad[run],
                entries,
                numbers,
                tokens,
                chunks,
                batch,
                tracks,
                spans,
                *keys[run][0].stride()[:3],
                *values[run][0].stride()[:3],
                IS_ALIGNED=aligned,
                **shape,
            )
            block = min(WALK, triton.next_power_of_2(tokens))
            span_numbers_kernel[(rows * tracks * spans,)](
                numbers,
                entries,
                span_offsets,
                span_numbers,
                tokens,
                spans,
                tracks,
                batch,
                *span_offsets.stride()[:2],
                HEADS=heads,
                BLOCK=block,
                num_warps=4,
            )
            block = min(WALK, triton.next_power_of_2(tracks * spans))
            cross_span_kernel[(rows,)](span_numbers, tracks * spans, BLOCK=block, num_warps=4)
            pool_backward_kernel[(rows * chunks,)](
                key_only,
                span_query[run],
                global_query[run],
                grad[run],
                numbers,
                entries,
                span_numbers,
                partials,
                *made,
                tokens,
                spans,
                chunks,
                batch,
                tracks,
                *keys[run][0].stride()[:3],
                HAS_CACHE_GRAD=wants_cache,
                IS_ALIGNED=key_aligned,
                **shape,
            )
            grads[:, run] = partials.sum((1, 3)).permute(2, 0, 1, 3)
    return grads[0], grads[1], caches
