"""The eager back end's partial pools: states of token ranges, their merging, and what they come to.

The same states as `lcf_fast.kernels.merging` has, which says what LEFT, RIGHT, INNER and the through flag mean. Here an
absent part is all zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import without_autocast
from .eager_pooling import span_of_token, with_tracks
from .eager_tiles import Workspace
from .reference import Pair, accumulation_dtype

LEFT, RIGHT, INNER = range(3)
#: Floats a state in the statistics: (max, sum) a part, the through flag, one unused.
STATS = 8
THROUGH = 6


class Part(NamedTuple):
    """A softmax state: ``sums (.., 2, D)`` and ``total (..)`` are relative to ``exp(peak)``; total 0 is absent."""

    peak: Tensor
    total: Tensor
    sums: Tensor


def _part(states: Tensor, stats: Tensor, part: int) -> Part:
    total = stats[..., 2 * part + 1]
    peak = stats[..., 2 * part].masked_fill(total == 0, -torch.inf)
    return Part(peak, total, states[..., part, :, :].masked_fill((total == 0)[..., None, None], 0.0))


def _add(a: Part, b: Part) -> Part:
    peak = torch.maximum(a.peak, b.peak)
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    left, right = (a.peak - shift).exp(), (b.peak - shift).exp()
    sums = left[..., None, None] * a.sums + right[..., None, None] * b.sums
    return Part(peak, left * a.total + right * b.total, sums)


def _complete(span: Part, query: Tensor) -> Part:
    """A finished span as a member of the cross-span softmax; ``query (.., D)`` is ``q_global / sqrt(D)``."""
    present = span.total != 0
    mean = span.sums / torch.where(present, span.total, 1.0)[..., None, None]
    logit = (mean[..., 0, :] * query).sum(-1)
    return Part(logit.masked_fill(~present, -torch.inf), present.to(logit.dtype), mean)


def _choose(condition: Tensor, a: Part, b: Part) -> Part:
    return Part(
        torch.where(condition, a.peak, b.peak),
        torch.where(condition, a.total, b.total),
        torch.where(condition[..., None, None], a.sums, b.sums),
    )


def _absent(like: Part) -> Part:
    return Part(torch.full_like(like.peak, -torch.inf), torch.zeros_like(like.total), torch.zeros_like(like.sums))


def _packed(left: Part, right: Part, inner: Part, through: Tensor) -> Pair:
    parts = (left, right, inner)
    columns = [column for part in parts for column in (part.peak, part.total)]
    stats = torch.stack([*columns, through.to(left.peak.dtype), torch.zeros_like(left.peak)], -1)
    return torch.stack([part.sums for part in parts], -3), stats


@without_autocast
@torch.no_grad()
def pool_range(
    caches: Sequence[Pair],
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    attention_mask: Tensor | None = None,
) -> Pair:
    """The state of a piece of a sequence.

    Args:
        caches: one ``(key, value)``, ``(B, H, N, D)`` each, a layer.
        span_query, global_query: ``(L, H, D)``.
        span_offsets: ``(B, P+1)`` or ``(B, T, P+1)``, from the piece's first token on; one below 0 or beyond N belongs
            to a span that goes on there.
        attention_mask: ``(B, N)`` or ``(B, T, N)``.

    Returns:
        ``states (L, B, H, T, 3, 2, D)`` and ``stats (L, B, H, T, 8)``, float32 (float64 for float64 caches).
    """
    key = caches[0][0]
    batch, heads, length, dim = key.shape
    dtype = accumulation_dtype(key.dtype)
    offsets, mask = with_tracks(span_offsets, attention_mask)
    tracks, ranges = offsets.shape[1], offsets.shape[2] - 1
    span = span_of_token(offsets, mask, length)
    outside = (span == ranges).all(1)[:, None, :, None]
    # Looked at on a CPU, where a copy of both halves is most of the work; elsewhere looking would wait for the device.
    fills = key.device.type != "cpu" or bool(outside.any())
    begins_before, ends_after = offsets[..., :-1] < 0, offsets[..., 1:] > length
    through = (begins_before & ends_after).any(2)
    # Those that lie wholly outside have no token.
    is_left, is_right = begins_before, ends_after & ~begins_before
    is_inner = ~(is_left | is_right)
    # A part's tokens lie together: LEFT, INNER, RIGHT, in this order.
    left_end = torch.where(is_left, offsets[..., 1:], 0).amax(2).clamp(0, length)
    right_begin = torch.where(is_right, offsets[..., :-1], length).amin(2).clamp(0, length)
    cuts = torch.stack([left_end, right_begin], -1).tolist()

    states = torch.zeros(len(caches), batch, heads, tracks, 3, 2, dim, dtype=dtype, device=key.device)
    stats = torch.zeros(len(caches), batch, heads, tracks, STATS, dtype=dtype, device=key.device)
    stats[..., THROUGH] = through[:, None]
    wide = dtype if key.device.type == "mps" else torch.float64  # sums by span run token by token
    space = Workspace(key.device)
    for layer, pair in enumerate(caches):
        rows = [tensor.to(dtype).masked_fill(outside, 0.0) if fills else tensor.to(dtype) for tensor in pair]
        queries = torch.stack([span_query[layer], global_query[layer]], 1).to(dtype) * dim**-0.5  # (H, 2, D)
        scores = rows[0] @ queries.mT  # (B, H, N, 2)
        for track in range(tracks):
            index = span[:, None, track].expand(-1, heads, -1)
            local, other = scores.unbind(-1)
            shape = (batch, heads, ranges + 1)
            peak = local.new_full(shape, -torch.inf).scatter_reduce_(2, index, local, "amax")
            weight = (local - peak.gather(2, index)).exp().masked_fill(index == ranges, 0.0)
            total = torch.zeros(shape, dtype=wide, device=key.device).scatter_add_(2, index, weight.to(wide))
            score = torch.zeros_like(total).scatter_add_(2, index, (weight * other).to(wide)) / total
            peak, total, score = peak[..., :ranges], total[..., :ranges], score[..., :ranges]
            absent = total == 0
            inner = is_inner[:, None, track] & ~absent
            score = score.masked_fill(~inner, -torch.inf)
            top = score.amax(2, keepdim=True) if ranges else score.new_full((batch, heads, 1), -torch.inf)
            share = (score - top.masked_fill(top == -torch.inf, 0.0)).exp()
            factor = torch.where(inner, share / total, 1.0).masked_fill(absent, 0.0).to(dtype)
            weight *= torch.cat([factor, factor.new_zeros(batch, heads, 1)], 2).gather(2, index)
            one = stats[layer, :, :, track]
            for part, member in ((LEFT, is_left), (RIGHT, is_right)):
                chosen = member[:, None, track] & ~absent
                one[..., 2 * part] = torch.where(chosen, peak, -torch.inf).amax(2)
                one[..., 2 * part + 1] = torch.where(chosen, total, 0.0).sum(2)
            one[..., 2 * INNER], one[..., 2 * INNER + 1] = top[..., 0], share.sum(2)
            for half, x in enumerate(rows):
                product = torch.mul(x, weight[..., None], out=space("product", x.shape, dtype))
                for b, (first, last) in enumerate(row[track] for row in cuts):
                    target = states[layer, b, :, track, :, half]
                    target[:, LEFT] = product[b, :, :first].sum(1)
                    target[:, INNER] = product[b, :, first:last].sum(1)
                    target[:, RIGHT] = product[b, :, last:].sum(1)
    return states, stats


@torch.no_grad()
def merge_ranges(states: Tensor, stats: Tensor, global_query: Tensor) -> Pair:
    """The state of neighbouring ranges together.

    Args:
        states, stats: ``(L, B, H, T, R, 3, 2, D)`` and ``(L, B, H, T, R, 8)``, in the order of the tokens.
        global_query: ``(L, H, D)``.
    """
    query = _scaled(global_query, states)
    merged, flags = states[:, :, :, :, 0], stats[:, :, :, :, 0]
    for i in range(1, states.shape[4]):
        before = [_part(merged, flags, part) for part in range(3)]
        after = [_part(states[:, :, :, :, i], stats[:, :, :, :, i], part) for part in range(3)]
        through = flags[..., THROUGH] != 0, stats[:, :, :, :, i, THROUGH] != 0
        # The span across the border: all there is of it is in these two parts.
        joint = _add(_choose(through[0], before[LEFT], before[RIGHT]), after[LEFT])
        none = _absent(joint)
        inner = _add(before[INNER], after[INNER])
        inside = ~through[0] & ~through[1]
        merged, flags = _packed(
            _choose(through[0], joint, before[LEFT]),
            _choose(through[1], _choose(through[0], none, joint), after[RIGHT]),
            _add(inner, _choose(inside, _complete(joint, query), none)),
            through[0] & through[1],
        )
    return merged, flags


@torch.no_grad()
def finish_ranges(states: Tensor, stats: Tensor, global_query: Tensor) -> Tensor:
    """``K*, V*`` as ``(L, 2, B, H, D)`` of whole sequences; what is open ends here; NaN where there is no token."""
    query = _scaled(global_query, states)
    left, right, inner = (_part(states, stats, part) for part in range(3))
    whole = _add(inner, _add(_complete(left, query), _complete(right, query)))
    peak = whole.peak.amax(3, keepdim=True)
    factor = (whole.peak - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
    total = (factor * whole.total).sum(3)
    pooled = (factor[..., None, None] * whole.sums).sum(3) / total[..., None, None]  # (L, B, H, 2, D)
    return pooled.movedim(3, 1).contiguous()


def _scaled(global_query: Tensor, states: Tensor) -> Tensor:
    """``q_global / sqrt(D)`` as ``(L, 1, H, 1, D)``."""
    return global_query.to(states.dtype)[:, None, :, None] * states.shape[-1] ** -0.5
