"""The eager back end's attention pooling.

No span summary is made. A span's global score is the weighted mean of its tokens' global scores, so one product gives
both scores of every token, and one weighted sum over the tokens, with the two stages' weights multiplied, gives ``K*``
or ``V*``. Nothing loops over spans or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .eager_tiles import TILE_ROWS, Workspace, cut_tiles
from .reference import Pair, accumulation_dtype

# Pooling: a layer up to this many elements is cheaper to copy next to its neighbours than to launch alone ...
_STACK_ELEMENTS = 1 << 16
# ... and this many are worked on at a time, so that the second read of a key comes from the last-level cache.
_POOL_ELEMENTS = 1 << 21


def _span_of_token(span_offsets: Tensor, attention_mask: Tensor | None, length: int) -> Tensor:
    """``(B, N)``: the span of each token; ``P``, one past the last, for padding and for what lies in no span."""
    offsets = span_offsets.long()
    token = torch.arange(length, device=offsets.device).expand(len(offsets), length).contiguous()
    span = torch.searchsorted(offsets[:, 1:].contiguous(), token, right=True)
    outside = token < offsets[:, :1]
    if attention_mask is not None:
        outside |= attention_mask == 0
    return span.masked_fill_(outside, offsets.shape[1] - 1)


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
    spans = span_offsets.shape[1] - 1
    span = _span_of_token(span_offsets, attention_mask, length)
    inside = span < spans
    queries = torch.stack([span_query, global_query][: min(spans, 2)], 2).to(dtype) * dim**-0.5
    pooled = torch.full((len(caches), 2, batch, heads, dim), torch.nan, dtype=dtype, device=device)
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
                    if weight is None:
                        query = queries[layers, None, part].expand(-1, items, -1, -1, -1).flatten(0, 2)
                        scores = torch.bmm(query, x.reshape(-1, tokens, dim).mT).view(*shape[:3], -1, tokens)
                        weight = _token_weights(scores, span[tile.items, tile.tokens], spans)[..., None]
                    # Not a product of matrices: with one row on the left, torch.bmm is slower and adds token by token.
                    torch.mul(x, weight, out=product)
                    if tile.keep is not None:  # a weight of zero does not stop a NaN in the padding
                        product.masked_fill_(~tile.keep[:, None, :, None], 0.0)
                    pooled[layers, half, tile.items, part] = product.sum(-2)
    return pooled.masked_fill_(~inside.any(1)[:, None, None], torch.nan)


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
