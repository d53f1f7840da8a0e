"""Masks, alignments and spans as users have them, made ready for `lcf_fast.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import as_int32, check_has_memory, check_index, check_mask, check_offsets
from .errors import DeviceError, DTypeError, LCFError, ShapeError, SpanError
from .spans import Spans

__all__ = [
    "check_device",
    "given_spans",
    "hide_padding",
    "host_spans",
    "known_length",
    "real_tokens",
    "span_offsets",
    "without_gaps",
]


def check_device(name: str, tensor: Tensor, other: Any, whose: str = "the receiver's cache") -> None:
    """``tensor`` lies where ``other``, ``whose`` it is, lies."""
    if tensor.device != other.device:
        raise DeviceError(name, expected=f"{other.device} as {whose}", got=str(tensor.device))


def known_length(*given: Any) -> int | None:
    """The length that a ``(B, N)`` mask or index gives away without reading a device, if any."""
    for tensor in given:
        if isinstance(tensor, Tensor) and tensor.dim() == 2:
            return int(tensor.shape[1])
    return None


def real_tokens(name: str, mask: Any, key: Tensor) -> Tensor | None:
    """A transformers-style mask as bool ``(B, N)``, True where ``key (B, H, N, D)`` holds a real token."""
    if mask is None:
        return None
    check_mask(name, mask, key.shape[0], key.shape[2])
    check_device(name, mask, key, "the cache")
    real: Tensor = mask if mask.dtype == torch.bool else mask != 0
    return real


def hide_padding(sharer_index: Any, visible: Tensor, key: Tensor) -> Tensor:
    """``sharer_index (B, N)`` with -1 where it names a row that is not ``visible (B, M)``."""
    check_index(sharer_index, key.shape[0], key.shape[2], visible.shape[1])
    index: Tensor = sharer_index
    if visible.shape[1] == 0:
        return index
    rows = index.to(key.device, torch.int64, non_blocking=True)
    shown = visible.gather(1, rows.clamp(0, visible.shape[1] - 1))
    return rows.masked_fill(~shown, -1)


def span_offsets(spans: Any, key: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the ops take: int32 offsets and the mask of tokens to pool, on the device of ``key (B, H, N, D)``.

    ``spans`` as `LatentCacheFlow.summarize` takes them: `Spans`, a tensor, a list of lists, or None. What lies on the
    host is checked there.
    """
    batch, length = key.shape[0], key.shape[2]
    mask = attention_mask
    if spans is None:
        # Made on the device: a copy from the host would not do in a CUDA graph.
        spans = (torch.arange(2, device=key.device, dtype=torch.int32) * length).repeat(batch, 1)
    elif isinstance(spans, Spans):
        mask = without_gaps(spans, key, attention_mask)
        spans = spans.offsets if spans.tracks > 1 else spans.offsets[:, 0]
    elif not isinstance(spans, Tensor):
        spans = _padded(spans)
    try:
        check_offsets(spans, batch, length, mask)
    except LCFError as error:
        raise type(error)("spans", expected=error.expected, got=error.got) from None
    return as_int32(spans, key.device), mask


def without_gaps(spans: Spans, key: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """``attention_mask`` less the tokens between spans: ``(B, T, N)`` where there are gaps, else as it is."""
    if spans.batch != key.shape[0]:
        raise ShapeError("spans", expected=f"spans of {key.shape[0]} items", got=f"of {spans.batch}")
    if spans.is_span is None:
        return attention_mask
    inside = spans.to_mask(key.shape[2]).to(key.device, non_blocking=True)
    return inside if attention_mask is None else inside & attention_mask[:, None]


def host_spans(spans: Any, key: Tensor) -> Spans:
    """``spans`` in any of their forms as `Spans`, for a piece ``key (B, H, N, D)`` of a context."""
    batch, length = key.shape[0], key.shape[2]
    if isinstance(spans, Spans):
        return spans
    if spans is None:
        return Spans(torch.tensor([0, length], dtype=torch.int32, device="cpu").repeat(batch, 1, 1))
    given = given_spans(spans)
    if given.batch != batch:
        raise ShapeError("spans", expected=f"spans of {batch} items", got=f"of {given.batch}")
    last = max(map(max, given.offsets.flatten(1).tolist()), default=0)
    if last > length:
        expected = f"offsets within [0, {length}] (Spans.piece marks those that go on)"
        raise SpanError("spans", expected=expected, got=f"values up to {last}")
    return given


def given_spans(spans: Any) -> Spans:
    """`Spans.given`, whose errors name ``spans`` as the caller calls them."""
    if isinstance(spans, Tensor):
        check_has_memory("spans", spans)
    try:
        return Spans.given(spans.cpu() if isinstance(spans, Tensor) else spans)
    except LCFError as error:
        name = error.argument.replace("bounds", "spans", 1)
        raise type(error)(name, expected=error.expected, got=error.got) from None


def _padded(spans: Any) -> Tensor:
    """Lists of offsets as one tensor; rows of fewer spans end in empty ones, which weigh nothing."""
    if not isinstance(spans, Sequence) or not all(isinstance(row, Sequence) for row in spans):
        raise DTypeError("spans", expected="a (B, P+1) tensor or a list of lists", got=type(spans).__name__)
    if not all(isinstance(offset, int) and not isinstance(offset, bool) for row in spans for offset in row):
        raise DTypeError("spans", expected="int offsets", got="other entries")
    if any(offset.bit_length() > 63 for row in spans for offset in row):
        raise SpanError("spans", expected="offsets within the sequence", got="offsets beyond 64 bits")
    if any(len(row) < 2 for row in spans):
        raise SpanError("spans", expected="two offsets or more a row", got=f"{[len(row) for row in spans]}")
    widest = max([2, *(len(row) for row in spans)])
    rows = [[*row, *[row[-1]] * (widest - len(row))] for row in spans]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), widest)
