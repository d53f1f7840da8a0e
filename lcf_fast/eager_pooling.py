"""The eager back end's attention pooling, forward and backward.

No span summary is made. A span's global score is the weighted mean of its tokens' global scores, so one product gives
both scores of every token, and one weighted sum over the tokens, with the two stages' weights multiplied, gives ``K*``
or ``V*``. Nothing loops over spans or tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .autocast import without_autocast
from .eager_tiles import TILE_ROWS, Workspace, cut_tiles
from .reference import Pair, accumulation_dtype

# Pooling: a layer up to this many elements is cheaper to copy next to its neighbours than to launch alone ...
_STACK_ELEMENTS = 1 << 16
# ... and this many are worked on at a time, so that the second read of a key comes from the last-level cache.
_POOL_ELEMENTS = 1 << 21
# On a CPU, sums over the tokens of more elements a layer than this are taken in blocks of so many tokens.
_BLOCKED_ELEMENTS = 1 << 20
_BLOCK = 64


def with_tracks(span_offsets: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Offsets ``(B, T, P+1)`` int64 and a bool mask that broadcasts to ``(B, T, N)``, whichever form was given."""
    offsets = span_offsets.long()
    mask = None if attention_mask is None else attention_mask != 0
    return (
        offsets if offsets.dim() == 3 else offsets[:, None],
        mask if mask is None or mask.dim() == 3 else mask[:, None],
    )


def span_of_token(offsets: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """``(B, T, N)``: the span of each token; ``P``, one past the last, for padding and for what lies in no span."""
    token = torch.arange(length, device=offsets.device).expand(*offsets.shape[:2], length).contiguous()
    span = torch.searchsorted(offsets[..., 1:].contiguous(), token, right=True)
    outside = token < offsets[..., :1]
    if mask is not None:
        outside |= ~mask
    return span.masked_fill_(outside, offsets.shape[2] - 1)


def _token_weights(scores: Tensor, span: Tensor, spans: int) -> Tensor:
    """What each token weighs in ``K*`` and ``V*``: the two stages' softmax weights, multiplied. ``(..., n)``.

    Args:
        scores: ``(G, items, H, 1 or 2, n)``: span scores and, for more spans than one, global scores.
        span: ``(items, n)`` int64; ``spans`` for tokens that weigh nothing.
    """
    local = scores[..., 0, :]
    index = span[:, None].expand_as(local)
    if spans == 1:
        return local.masked_fill(index == 1, -torch.inf).softmax(-1)
    shape = (*local.shape[:-1], spans + 1)
    peak = local.new_full(shape, -torch.inf).scatter_reduce_(-1, index, local, "amax")
    weight = (local - peak.gather(-1, index)).exp_()
    # Sums run token by token, so in float64: a long span would lose three digits.
    wide = local.dtype if local.device.type == "mps" else torch.float64
    total = torch.zeros(shape, dtype=wide, device=local.device).scatter_add_(-1, index, weight.to(wide))
    score = torch.zeros_like(total).scatter_add_(-1, index, (weight * scores[..., 1, :]).to(wide)).div_(total)
    tokens = torch.zeros((len(span), spans + 1), dtype=torch.int64, device=span.device)
    empty = tokens.scatter_add_(-1, span, torch.ones_like(span)) == 0
    empty[:, spans] = True
    outer = score.masked_fill_(empty[:, None], -torch.inf).softmax(-1)
    factor = outer.div_(total).masked_fill_(empty[:, None], 0.0).to(local.dtype)
    return weight.mul_(factor.gather(-1, index))


def _weighted_sum(x: Tensor, weight: Tensor, product: Tensor) -> Tensor:
    """``x (..., n, D)`` times ``weight (..., n)``, added up over the tokens; ``product``: room for it, or ``x`` itself.

    Not one product of matrices: that of one row adds token by token. In blocks it is as exact as torch's sums, and
    reads once what no cache holds, where a product and its sum move it three times.
    """
    blocks = x.shape[-2] // _BLOCK
    if x[0].numel() <= _BLOCKED_ELEMENTS or not blocks or x.device.type != "cpu":
        return torch.mul(x, weight[..., None], out=product).sum(-2)
    whole = blocks * _BLOCK
    heads = itertools.product(*map(range, x.shape[:-2]))  # one by one: their strides may be any
    sums = [
        torch.bmm(weight[head][:whole].view(blocks, 1, _BLOCK), x[head][:whole].unflatten(0, (blocks, _BLOCK)))
        for head in heads
    ]
    found = torch.stack(sums).sum((1, 2)).view(*x.shape[:-2], -1)
    if whole < x.shape[-2]:
        found += torch.mul(x[..., whole:, :], weight[..., whole:, None]).sum(-2)
    return found


def _pool(
    caches: Sequence[Pair],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> Tensor:
    """``K*`` and ``V*`` of some layers: ``(L, 2, B, H, D)``, float32 (float64). Queries are ``(L, H, D)``."""
    key = caches[0][0]
    batch, heads, length, dim = key.shape
    device = key.device
    dtype = accumulation_dtype(key.dtype)
    offsets, mask = with_tracks(span_offsets, attention_mask)
    tracks, ranges = offsets.shape[1], offsets.shape[2] - 1
    spans = tracks * ranges
    span = span_of_token(offsets, mask, length)
    inside = (span < ranges).any(1)
    if tracks > 1:  # one numbering over all tracks, in each of which a token has an entry
        span = torch.where(span < ranges, span + torch.arange(tracks, device=device)[:, None] * ranges, spans)
    queries = torch.stack([span_query, global_query][: min(spans, 2)], 2).to(dtype) * dim**-0.5
    pooled = torch.full((len(caches), 2, batch, heads, dim), torch.nan, dtype=dtype, device=device)
    zero = pooled.new_zeros(())
    space = Workspace(device)
    for tile in cut_tiles(inside, batch, (0, length), max(TILE_ROWS, length), device):
        items, tokens = tile.shape
        size = items * heads * tokens * dim
        stacks = key.dtype != dtype or size <= _STACK_ELEMENTS  # another dtype is copied anyway
        most = max(1, _POOL_ELEMENTS // size) if stacks else 1
        some = heads if items > 1 else min(heads, max(1, heads * _POOL_ELEMENTS // size))
        for first in range(0, len(caches), most):
            layers = slice(first, min(len(caches), first + most))
            for head in range(0, heads, some):
                part = slice(head, min(heads, head + some))
                shape = (layers.stop - first, items, part.stop - head, tokens, dim)
                weight = None
                for half in (0, 1):
                    rows = [pair[half][tile.items, part, tile.tokens] for pair in caches[layers]]
                    product = space("product", shape, dtype)
                    if stacks:
                        for target, source in zip(product.unbind(0), rows):
                            target.copy_(source)
                    x = product if stacks else rows[0][None]
                    if tile.keep is not None:  # a weight of zero does not stop a NaN in the padding
                        x = torch.where(tile.keep[:, None, :, None], x, zero, out=product)
                    if weight is None:
                        query = queries[layers, None, part].expand(-1, items, -1, -1, -1).flatten(0, 2)
                        scores = torch.bmm(query, x.reshape(-1, tokens, dim).mT).view(*shape[:3], -1, tokens)
                        entry = span[tile.items, :, tile.tokens].flatten(1)
                        weight = _token_weights(scores if tracks == 1 else scores.tile(tracks), entry, spans)
                        weight = weight.unflatten(-1, (tracks, tokens)).sum(-2)
                    pooled[layers, half, tile.items, part] = _weighted_sum(x, weight, product)
    return pooled.masked_fill_(~inside.any(1)[:, None, None], torch.nan)


@without_autocast
@torch.no_grad()
def attention_pool(
    key: Tensor,
    value: Tensor,
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> Pair:
    """As `lcf_fast.reference.attention_pool`: ``K*, V*``, each ``(B, H, D)`` in the cache's dtype."""
    pooled = _pool([(key, value)], span_query[None], global_query[None], span_offsets, attention_mask)
    pooled_key, pooled_value = pooled[0].to(key.dtype).unbind(0)
    return pooled_key, pooled_value.clone()  # memory of its own


@without_autocast
@torch.no_grad()
def summarize_layers(
    sharer: Sequence[Pair],
    weights: Mapping[str, Tensor],
    span_offsets: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `lcf_fast.reference.summarize_layers`: ``latent (L, B, d)`` and ``summary (L, 2, B, Hs, Ds)``."""
    summary = _pool(sharer, weights["span_query"], weights["global_query"], span_offsets, attention_mask)
    flat = summary.transpose(1, 2).flatten(2)  # (L, B, 2Cs): K* then V*, heads head-major
    down = weights["down_weight"][:, :, : flat.shape[2]].to(flat.dtype)
    return torch.baddbmm(weights["down_bias"].to(flat.dtype)[:, None], flat, down.mT), summary


@without_autocast
@torch.no_grad()
def pool_backward(
    caches: Sequence[Pair],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
    grad: Tensor,
    wants_cache: bool,
) -> tuple[Tensor, Tensor, list[Pair]]:
    """Gradients of the pooling, in closed form; `lcf_fast.kernels.pooling_backward` has the formulas.

    Args:
        caches: one ``(key, value)``, ``(B, H, N, D)`` each, a layer.
        span_query, global_query: ``(L, H, D)``.
        span_offsets, attention_mask: as in `attention_pool`.
        grad: ``(L, 2, B, H, D)``, of ``K*`` and ``V*``.
        wants_cache: whether the cache's gradients are made.

    Returns:
        Gradients of the queries, ``(L, H, D)`` in the accumulation dtype, and a (key, value) a layer, or none.
    """
    key = caches[0][0]
    batch, heads, length, dim = key.shape
    dtype = accumulation_dtype(key.dtype)
    offsets, mask = with_tracks(span_offsets, attention_mask)
    tracks, ranges = offsets.shape[1], offsets.shape[2] - 1
    span = span_of_token(offsets, mask, length)
    outside = (span == ranges).all(1)[:, None, :, None]
    spans = tracks * ranges
    span = torch.where(span < ranges, span + torch.arange(tracks, device=key.device)[:, None] * ranges, spans)
    index = span.flatten(1)[:, None].expand(-1, heads, -1)  # (B, H, T·N)
    shape = (batch, heads, spans + 1)
    span_grads, global_grads, cache_grads = [], [], []
    for layer, pair in enumerate(caches):
        k, v = (tensor.to(dtype).masked_fill(outside, 0.0) for tensor in pair)
        grad_key, grad_value = grad[layer].to(dtype).unbind(0)  # (B, H, D)
        queries = torch.stack([span_query[layer], global_query[layer]], 1).to(dtype) * dim**-0.5  # (H, 2, D)
        columns = torch.cat([queries.expand(batch, -1, -1, -1), grad_key[:, :, None]], 2)
        local, other, product = (k @ columns.mT).unbind(-1)
        product = product + (v @ grad_value[..., None])[..., 0]
        local, other, product = (x.tile(tracks) for x in (local, other, product))
        peak = local.new_full(shape, -torch.inf).scatter_reduce_(2, index, local, "amax")
        weight = (local - peak.gather(2, index)).exp().masked_fill(index == spans, 0.0)

        def span_sum(x: Tensor) -> Tensor:
            wide = dtype if key.device.type == "mps" else torch.float64  # sums by span run token by token
            return torch.zeros(shape, dtype=wide, device=key.device).scatter_add_(2, index, x.to(wide))

        total = span_sum(weight)
        absent = total == 0
        total = total.masked_fill(absent, 1.0)
        score, mean = (span_sum(weight * x) / total for x in (other, product))
        share = score.masked_fill(absent, -torch.inf).softmax(2).nan_to_num(0.0)
        delta = share * (mean - (share * mean).sum(2, keepdim=True))
        total, score, mean, share, delta = (x.to(dtype).gather(2, index) for x in (total, score, mean, share, delta))
        weight /= total
        d_local = weight * (share * (product - mean) + delta * (other - score))
        parts = (d_local, weight * delta, weight * share)
        d_local, d_other, weight = (x.unflatten(2, (tracks, length)).sum(2) for x in parts)
        span_grads.append(torch.einsum("bhn,bhnd->hd", d_local, k) * dim**-0.5)
        global_grads.append(torch.einsum("bhn,bhnd->hd", d_other, k) * dim**-0.5)
        if wants_cache:
            d_scores = torch.stack([d_local, d_other], -1)
            d_key = weight[..., None] * grad_key[:, :, None] + d_scores @ queries
            d_value = weight[..., None] * grad_value[:, :, None]
            cache_grads.append((d_key.to(key.dtype), d_value.to(key.dtype)))
    return torch.stack(span_grads), torch.stack(global_grads), cache_grads


@without_autocast
@torch.no_grad()
def span_weights(
    caches: Sequence[Pair],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None,
) -> Tensor:
    """What each span weighs in the summary: ``b_p`` of the cross-span softmax, ``(L, B, H, T·P)``; for inspection."""
    key = caches[0][0]
    _, heads, length, dim = key.shape
    dtype = accumulation_dtype(key.dtype)
    offsets, mask = with_tracks(span_offsets, attention_mask)
    tracks, ranges = offsets.shape[1], offsets.shape[2] - 1
    span = span_of_token(offsets, mask, length)
    spans = tracks * ranges
    outside = (span == ranges).all(1)[:, None, :, None]
    span = torch.where(span < ranges, span + torch.arange(tracks, device=key.device)[:, None] * ranges, spans)
    index = span.flatten(1)[:, None].expand(-1, heads, -1)
    shape = (len(key), heads, spans + 1)
    found = []
    for layer, (keys, _) in enumerate(caches):
        queries = torch.stack([span_query[layer], global_query[layer]], 1).to(dtype) * dim**-0.5
        scores = keys.to(dtype).masked_fill(outside, 0.0) @ queries.mT
        local, other = (x.tile(tracks) for x in scores.unbind(-1))
        peak = local.new_full(shape, -torch.inf).scatter_reduce_(2, index, local, "amax")
        weight = (local - peak.gather(2, index)).exp().masked_fill(index == spans, 0.0)
        total = torch.zeros_like(peak).scatter_add_(2, index, weight)
        score = torch.zeros_like(peak).scatter_add_(2, index, weight * other) / total
        found.append(score.masked_fill(total == 0, -torch.inf)[..., :spans].softmax(2))
    return torch.stack(found)
