"""Slots of a context in spans: each span is pooled by itself, by all of an adapter's slots.

A row of P spans then has P·k slots. Rows of a batch may have different numbers of spans: `summarize_spans` pools those
of a kind together, fills up the others' rows, and says which slots a row has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .caches import check_pairs
from .checks import reads_values
from .errors import ShapeError, SpanError
from .inputs import host_spans, span_offsets
from .message import Message
from .span_text import Bounds
from .spans import Spans

if TYPE_CHECKING:
    from .slots_sharer import SummarizesSlots

__all__ = ["slots_there", "span_groups", "summarize_spans"]


def span_groups(spans: Any, key: Tensor, mask: Tensor | None) -> Tensor:
    """``(B, P, N)`` bool: the tokens of each span that are to be pooled, on the device of ``key (B, H, N, D)``.

    ``mask (B, N)`` bool: real tokens. Spans and masks on a device are taken there, without a look at them.

    Raises:
        SpanError: rows of different numbers of spans, or a span without a token to pool, where that can be seen. As
            `lcf_fast.inputs.host_spans`.
    """
    is_traced = torch.compiler.is_compiling() and not isinstance(spans, Spans)
    if is_traced or (isinstance(spans, Tensor) and not reads_values(spans)):
        if not isinstance(spans, Tensor):
            _check_even([len(row) - 1 for row in spans])
        starts = span_offsets(spans, key, mask)[0]
        starts, stops = starts[:, :-1], starts[:, 1:]
    else:
        seen = mask if mask is not None and reads_values(mask) else None
        bounds = _bounds_of(spans, key, seen)
        counts = _counts_of(spans)
        _check_even(counts)
        for i, (row, count) in enumerate(zip(bounds, counts)):
            if len(row) < count:  # a row keeps its number of slots, and the receiver their order
                expected = "a token to pool in every span (lcf_fast.slot_spans.summarize_spans drops others)"
                raise SpanError("spans", expected=expected, got=f"{count - len(row)} without in row {i}")
        sides = torch.tensor(bounds, dtype=torch.int64, device="cpu").reshape(len(bounds), max(counts, default=1), 2)
        sides = sides.to(key.device, non_blocking=True)
        starts, stops = sides.unbind(-1)
    at = torch.arange(key.shape[2], device=key.device)
    inside = (at >= starts[..., None]) & (at < stops[..., None])
    return inside if mask is None else inside & mask[:, None]


def summarize_spans(
    side: SummarizesSlots,
    sharer_cache: Any,
    spans: Any,
    *,
    attention_mask: Tensor | None = None,
    slots: int | None = None,
) -> tuple[Message, Tensor]:
    """`SummarizesSlots.summarize` of rows that may have different numbers of spans.

    Args:
        side: what summarizes.
        sharer_cache, spans, attention_mask, slots: as `SummarizesSlots.summarize` takes them; a span without a real
            token is none.

    Returns:
        The message, ``latent (L, B, S, d)``, S slots of the row that has most, zeros where one has fewer; and which
        slots a row has, ``(B, S)`` int64, as `lcf_fast.placement` takes it.

    Raises:
        SpanError: a row without a span. As `SummarizesSlots.summarize`.
    """
    sharer, real = side._read(sharer_cache, attention_mask)
    check_pairs(sharer, "sharer_cache", side.sharer_geometry)  # all layers, whose rows are taken here
    key = sharer[0][0]
    bounds = _bounds_of(spans, key, real)
    alike: dict[int, list[int]] = {}
    for row, found in enumerate(bounds):
        alike.setdefault(len(found), []).append(row)
    parts = []
    for rows in alike.values() or [[]]:
        is_all = len(rows) == len(bounds)
        part = sharer if is_all else [(k[rows], v[rows]) for k, v in sharer]
        mask = real if is_all or real is None else real[rows]
        parts.append(side.summarize(part, Spans.given([bounds[r] for r in rows]), attention_mask=mask, slots=slots))
    most = max(part.slots for part in parts)
    latents = []
    for made in parts:
        assert made.latent is not None
        latents.append(pad(made.latent, (0, 0, 0, most - made.slots)))
    order = torch.tensor([row for rows in alike.values() for row in rows], device=key.device).argsort()
    message = replace(parts[0], latent=torch.cat(latents, 1)[:, order], spans=max(alike, default=1))
    return message, _there([len(found) for found in bounds], most).to(key.device)


def slots_there(spans: Spans, attention_mask: Tensor, most: int) -> Tensor:
    """Which slots a row has, of ``most`` that a message of `summarize_spans` has: ``(B, most)`` int64.

    ``attention_mask (B, N)``: what that was given.
    """
    counts = [len(found) for found in _bounds(spans, attention_mask.shape[1], attention_mask)]
    return _there(counts, most).to(attention_mask.device)


def _there(counts: list[int], most: int) -> Tensor:
    each = most // max(counts, default=1)
    own = each * torch.tensor(counts, dtype=torch.int64, device="cpu")
    return (torch.arange(most, device="cpu") < own[:, None]).long()


def _check_even(counts: list[int]) -> None:
    if len({*counts}) > 1:
        expected = "as many spans in every row (lcf_fast.slot_spans.summarize_spans takes rows that differ)"
        raise SpanError("spans", expected=expected, got=f"{counts} of them"[:200])


def _counts_of(spans: Any) -> list[int]:
    """How many spans each row was given: empty ones too, but of `Spans`, where a range without a token is none."""
    if isinstance(spans, Spans):
        return spans.counts
    listed = spans.tolist() if hasattr(spans, "tolist") else spans
    are_offsets = any(len(row) and not isinstance(row[0], Sequence) for row in listed)
    return [len(row) - are_offsets for row in listed]


def _bounds_of(spans: Any, key: Tensor, mask: Tensor | None) -> list[Bounds]:
    """`_bounds` of spans in any of their forms, for ``key (B, H, N, D)``."""
    given = host_spans(spans, key)
    if given.batch != key.shape[0]:
        raise ShapeError("spans", expected=f"spans of {key.shape[0]} items", got=f"of {given.batch}")
    return _bounds(given, key.shape[2], mask)


def _bounds(spans: Spans, tokens: int, mask: Tensor | None) -> list[Bounds]:
    """Each row's spans that hold a token to pool, in order.

    Raises:
        SpanError: a span beyond the tokens, or a row without one.
    """
    found: list[Bounds] = spans.bounds()
    for row in found:
        beyond = [pair for pair in row if pair[0] < 0 or pair[1] > tokens]
        if beyond:
            raise SpanError("spans", expected=f"spans within [0, {tokens}]", got=str(beyond[0]))
    if mask is not None:
        found = _real(found, mask)
    empty = [i for i, row in enumerate(found) if not row]
    if empty:
        raise SpanError("spans", expected="a span with a token in every row", got=f"none in rows {empty}"[:200])
    return found


def _real(found: list[Bounds], mask: Tensor) -> list[Bounds]:
    real = [torch.cat([row.new_zeros(1), row.cumsum(0)]).tolist() for row in (mask != 0).long().cpu()]
    return [[(a, b) for a, b in row if upto[b] > upto[a]] for row, upto in zip(found, real)]
