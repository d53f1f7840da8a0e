"""Spans: which tokens of the sharer's context are pooled together (spec, section 4).

`Spans` holds them as offsets on parallel *tracks*, so that spans may overlap: what overlaps lies on different tracks.
They come outright (`Spans.given`), as fixed windows (`windows`), one a row (`whole`), from a tokenizer's offset mapping
(`paragraphs`, `sentences`, `from_characters`) or from chat turns (`turns`; `turn_bounds` for those of a rendered
template). Everything is on the CPU; token positions count padding too, as positions in a cache do.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import INTEGERS, check_tensor, describe
from .errors import DeviceError, DTypeError, IndexRangeError, ShapeError, SpanError
from .span_inputs import (
    LARGEST,
    bounds_of,
    ints,
    items,
    mapping_rows,
    offsets_of,
    real_positions,
    real_tokens,
    rows,
    text_list,
)
from .span_text import Bounds, paragraph_bounds, sentence_bounds, turn_bounds

__all__ = [
    "Spans",
    "from_characters",
    "paragraph_bounds",
    "paragraphs",
    "sentence_bounds",
    "sentences",
    "turn_bounds",
    "turns",
    "whole",
    "windows",
]
_NOT_WHITE = re.compile(r"\S+")


@dataclass(frozen=True, eq=False)
class Spans:
    """Spans of a batch of token sequences.

    Attributes:
        offsets: ``(B, T, P+1)`` int32 on the CPU, non-decreasing along the last axis: range ``p`` of a track is
            tokens ``[offsets[p], offsets[p+1])``. Spans of one track do not overlap. Offsets may be negative (a span
            that began before this piece of the sequence) or beyond the piece (one that goes on after it); see
            :meth:`piece`. Rows and tracks with fewer ranges end in empty ones, which are no spans and weigh nothing.
        is_span: ``(B, T, P)`` bool on the CPU, False where a range is a gap between two spans, which is not pooled
            (or padding). None: no gaps, every range that holds a token is a span.

    A span's track depends on the spans before it in the order of ``(start, stop)`` alone (the first track that is
    free), never on later ones: more spans can follow without moving those that are known.

    Raises:
        ShapeError, DTypeError, DeviceError: tensors of another form.
        SpanError: offsets that decrease.
    """

    offsets: Tensor
    is_span: Tensor | None = None

    def __post_init__(self) -> None:
        offsets = check_tensor("offsets", self.offsets)
        if offsets.dtype != torch.int32:
            raise DTypeError("offsets", expected="int32", got=describe(offsets))
        if offsets.dim() != 3 or offsets.shape[1] < 1 or offsets.shape[2] < 2:
            raise ShapeError("offsets", expected="(B, T, P+1) with T >= 1 and P >= 1", got=describe(offsets))
        if offsets.device.type != "cpu":
            raise DeviceError("offsets", expected="cpu", got=str(offsets.device))
        falls = (offsets[..., 1:] < offsets[..., :-1]).any(-1).nonzero()
        if len(falls):
            item, track = falls[0].tolist()
            got = f"{offsets[item, track].tolist()}"[:200]
            raise SpanError(f"offsets[{item}, {track}]", expected="offsets that do not decrease", got=got)
        if self.is_span is None:
            return
        flags = check_tensor("is_span", self.is_span)
        if flags.dtype != torch.bool:
            raise DTypeError("is_span", expected="bool", got=describe(flags))
        shape = (*offsets.shape[:2], offsets.shape[2] - 1)
        if tuple(flags.shape) != shape:
            raise ShapeError("is_span", expected=f"(B, T, P) = {shape}", got=describe(flags))
        if flags.device.type != "cpu":
            raise DeviceError("is_span", expected="cpu", got=str(flags.device))

    @classmethod
    def given(cls, bounds: Any) -> Spans:
        """Spans given outright, a list of one entry an item of the batch.

        Args:
            bounds: for each item a list of ``(start, stop)`` token positions, half-open, in any order; they may
                overlap, one that is given twice counts twice, empty ones are dropped; also ``(B, P, 2)`` int. Or for
                each item a list of offsets ``[o_0, o_1, ..., o_P]``, span ``p`` being ``[o_p, o_{p+1})``; also
                ``(B, P+1)`` int. Offsets give one track, whose range ``p`` is the offsets' range ``p``.

        Raises:
            SpanError: a span that ends before it starts, a position that is negative or over int32, offsets that
                decrease or fewer than two of them.
            DTypeError, ShapeError: something else than integers so nested.
        """
        if isinstance(bounds, Tensor):
            if bounds.dtype not in INTEGERS:
                raise DTypeError("bounds", expected="an integer dtype", got=describe(bounds))
            if bounds.dim() not in (2, 3):
                raise ShapeError("bounds", expected="(B, P+1) offsets or (B, P, 2) pairs", got=describe(bounds))
            listed, as_offsets = list(bounds), bounds.dim() == 2
        else:
            listed = items("bounds", bounds, "one list of pairs or of offsets an item")
            for i, row in enumerate(listed):
                # (0, 3), (3, 5) could mean two spans of one item as well as one span each of two.
                if not isinstance(row, Sequence) or isinstance(row, (str, bytes, tuple)):
                    expected = "a list: of (start, stop) pairs, or of offsets"
                    raise DTypeError(f"bounds[{i}]", expected=expected, got=describe(row))
            first = next((row[0] for row in listed if len(row)), None)
            as_offsets = first is not None and not isinstance(first, Sequence)
        columns = None if as_offsets else 2
        read = [ints(f"bounds[{i}]", row, columns) for i, row in enumerate(listed)]
        if as_offsets:
            return _one_track([offsets_of(f"bounds[{i}]", row) for i, row in enumerate(read)])
        return _on_tracks([bounds_of(f"bounds[{i}]", row) for i, row in enumerate(read)])

    @classmethod
    def stack(cls, spans: Sequence[Spans]) -> Spans:
        """One batch of the items of all ``spans``, in their order.

        Raises:
            SpanError: nothing to stack. DTypeError: something else than `Spans`.
        """
        if not isinstance(spans, Sequence) or not all(isinstance(each, Spans) for each in spans):
            raise DTypeError("spans", expected="a list of Spans", got=describe(spans))
        if not spans:
            raise SpanError("spans", expected="at least one", got="none")
        tracks, ranges = (max(each.offsets.shape[i] for each in spans) for i in (1, 2))
        offsets, flags = [], []
        for each in spans:
            missing = ranges - each.offsets.shape[2]
            wide = torch.cat([each.offsets, each.offsets[..., -1:].expand(-1, -1, missing)], -1)
            offsets.append(torch.cat([wide, wide.new_zeros(each.batch, tracks - each.tracks, ranges)], 1))
            pads = (0, missing, 0, tracks - each.tracks)
            flags.append(torch.nn.functional.pad(each._span_flags(), pads, value=False))
        return _canonical(torch.cat(offsets), torch.cat(flags))

    @property
    def batch(self) -> int:
        """Number of items."""
        return self.offsets.shape[0]

    @property
    def tracks(self) -> int:
        """Number of tracks T: no token is in more spans than this."""
        return self.offsets.shape[1]

    @property
    def counts(self) -> list[int]:
        """Spans of each item, empty ranges and gaps not counted."""
        counts: list[int] = self._span_flags().sum((1, 2)).tolist()
        return counts

    def bounds(self) -> list[Bounds]:
        """``(start, stop)`` of each item's spans, sorted; one that was given twice comes twice."""
        return [[(start, stop) for start, stop, _, _ in item] for item in self._listed()]

    def places(self) -> list[list[tuple[int, int]]]:
        """``(track, range)`` of each item's spans, in the order of :meth:`bounds`."""
        return [[(track, p) for _, _, track, p in item] for item in self._listed()]

    def piece(
        self, start: int | Sequence[int] | Tensor, stop: int | Sequence[int] | Tensor, *, trim: bool = False
    ) -> Spans:
        """The same spans seen from tokens ``[start, stop)`` of the sequence.

        Offsets are counted from ``start`` and not clipped: a span with a negative offset began before the piece,
        one that ends beyond ``stop - start`` goes on after it. Tracks stay as they are.

        Args:
            start, stop: for all items, or one an item.
            trim: leave out ranges that neither hold a token of the piece nor go on through it, so that a piece costs
                what lies in it; range numbers then differ from piece to piece. Tracks still do not.

        Raises:
            IndexRangeError: a piece that starts before the sequence or ends before it starts.
            DTypeError, ShapeError: something else than an int or one an item.
        """
        starts, stops = self._per_item("start", start), self._per_item("stop", stop)
        for first, last in zip(starts, stops):
            if not 0 <= first <= last <= LARGEST:
                raise IndexRangeError("start", expected="0 <= start <= stop", got=f"[{first}, {last})")
        begins = torch.tensor(starts, dtype=torch.int64, device="cpu")[:, None, None]
        offsets = self.offsets - begins
        if offsets.numel() and int(offsets.min()) < -LARGEST:
            raise IndexRangeError("start", expected="offsets that int32 holds", got=f"{int(offsets.min())}")
        offsets = offsets.int()
        if not trim:
            return Spans(offsets, self.is_span)
        length = torch.tensor(stops, dtype=torch.int64, device="cpu")[:, None, None] - begins
        flags = self._span_flags()
        touches = flags & (offsets[..., :-1] < length) & (offsets[..., 1:] > 0)
        ranges = touches.shape[-1]
        # argmax gives the first of the largest, so 0 where nothing touches.
        first_range = touches.int().argmax(-1, keepdim=True)
        end_range = (ranges - touches.flip(-1).int().argmax(-1, keepdim=True)) * touches.any(-1, keepdim=True)
        width = max(1, int((end_range - first_range).max())) if touches.numel() else 1
        index = first_range + torch.arange(width + 1, device="cpu")
        flags = flags.gather(-1, index[..., :-1].clamp(max=ranges - 1)) & (index[..., :-1] < end_range)
        return _canonical(offsets.gather(-1, torch.minimum(index, end_range)), flags)

    def to_mask(self, length: int) -> Tensor:
        """``(B, T, length)`` bool on the CPU: True where a token is in a span of that track.

        Raises:
            DTypeError, ShapeError: a length that is no int, or negative.
        """
        if not isinstance(length, int) or isinstance(length, bool):
            raise DTypeError("length", expected="an int", got=describe(length))
        if not 0 <= length <= LARGEST:
            raise ShapeError("length", expected=f"0 to {LARGEST}", got=str(length))
        tokens = torch.arange(length, dtype=torch.int32, device="cpu")
        tokens = tokens.expand(self.batch, self.tracks, length).contiguous()
        # The last range that starts at or before the token; empty ones before it start there too, and give way.
        ranges = torch.searchsorted(self.offsets.contiguous(), tokens, right=True) - 1
        count = self.offsets.shape[-1] - 1
        inside = (ranges >= 0) & (ranges < count)
        if self.is_span is not None:
            inside &= self.is_span.gather(-1, ranges.clamp(0, count - 1))
        return inside

    def _span_flags(self) -> Tensor:
        """``(B, T, P)`` bool: ranges that are spans and hold a token."""
        filled = self.offsets[..., 1:] > self.offsets[..., :-1]
        return filled if self.is_span is None else filled & self.is_span

    def _listed(self) -> list[list[tuple[int, int, int, int]]]:
        """``(start, stop, track, range)`` of each item's spans, sorted."""
        listed: list[list[tuple[int, int, int, int]]] = [[] for _ in range(self.batch)]
        where = self._span_flags().nonzero()
        item, track, p = where.unbind(1)
        starts, stops = self.offsets[item, track, p], self.offsets[item, track, p + 1]
        for (i, t, r), start, stop in zip(where.tolist(), starts.tolist(), stops.tolist()):
            listed[i].append((start, stop, t, r))
        return [sorted(spans) for spans in listed]

    def _per_item(self, name: str, value: Any) -> list[int]:
        if isinstance(value, int) and not isinstance(value, bool):
            return [value] * self.batch
        values: list[int] = ints(name, value, None).tolist()
        if len(values) != self.batch:
            raise ShapeError(name, expected=f"one for each of {self.batch} items", got=str(len(values)))
        return values


def windows(lengths: Any, size: int, overlap: int = 0) -> Spans:
    """Windows of ``size`` tokens, each beginning ``size - overlap`` tokens after the one before.

    The last may be shorter; none lies wholly within the one before it.

    Args:
        lengths: tokens of the sequence; or of each item, ``(B,)`` ints; or an attention mask ``(B, N)``, zero at
            padding, wherever that lies: only real tokens are counted then, and a window reaches from its first to
            its last real token's position.
        size: tokens a window, 1 or more.
        overlap: tokens that a window shares with the one before, less than ``size``.

    Raises:
        SpanError: a size, overlap or length out of range. DTypeError, ShapeError: arguments of another form.
    """
    for name, value in (("size", size), ("overlap", overlap)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise DTypeError(name, expected="an int", got=describe(value))
    if size < 1:
        raise SpanError("size", expected="1 or more", got=str(size))
    if not 0 <= overlap < size:
        raise SpanError("overlap", expected=f"0 or more, and less than the size {size}", got=str(overlap))
    spans = []
    for tokens in real_positions("lengths", lengths):
        n = len(tokens)
        # A window is needed where the one before has not reached the end.
        starts = range(0, max(n - overlap, 1) if n else 0, size - overlap)
        spans.append([(tokens[a], tokens[min(a + size, n) - 1] + 1) for a in starts])
    return _on_tracks(spans)


def whole(lengths: Any) -> Spans:
    """One span a row, from its first to its last real token; none in a row without any.

    Args, raises: ``lengths`` as in `windows`.
    """
    return _on_tracks([[(row[0], row[-1] + 1)] if len(row) else [] for row in real_positions("lengths", lengths)])


def turns(input_ids: Any, start_ids: int | Sequence[int] | Tensor, attention_mask: Any = None) -> Spans:
    """Chat turns by token ids: a turn begins where ``start_ids`` occur, and goes on to where the next begins.

    Tokens before the first occurrence make a span of their own.

    Args:
        input_ids: ``(B, N)`` int, or a list of ids an item; one item alone may be ``(N,)``.
        start_ids: the id, or the ids one after the other, that every turn begins with, as that of ``<|im_start|>``.
        attention_mask: ``(B, N)``, zero at padding, which is passed over.

    Raises:
        SpanError: no ``start_ids``. DTypeError, ShapeError: arguments of another form.
    """
    marks = ints("start_ids", [start_ids] if isinstance(start_ids, int) else start_ids, None)
    if not len(marks):
        raise SpanError("start_ids", expected="at least one id", got="none")
    ids = [ints(f"input_ids[{i}]", row, None) for i, row in enumerate(rows("input_ids", input_ids, None))]
    spans = []
    for row, real in zip(ids, real_tokens(attention_mask, [len(row) for row in ids])):
        positions = real.nonzero().flatten().tolist()
        row = row[real]
        matches: list[int] = []
        if len(row) >= len(marks):
            for match in (row.unfold(0, len(marks), 1) == marks).all(1).nonzero().flatten().tolist():
                if not matches or match >= matches[-1] + len(marks):  # what is part of one mark begins no other
                    matches.append(match)
        cuts = [*sorted({0, *matches}), len(row)] if len(row) else []
        spans.append([(positions[a], positions[b - 1] + 1) for a, b in zip(cuts, cuts[1:])])
    return _on_tracks(spans)


def paragraphs(texts: Any, offset_mapping: Any, attention_mask: Any = None) -> Spans:
    """One span a paragraph of each text (`paragraph_bounds`).

    Every token of the text is in exactly one span: in that of its first character that is not white space; white
    space between paragraphs counts to the one before. Special tokens are in a span only between two tokens of it.

    Args:
        texts: a str, or one an item.
        offset_mapping: what a fast tokenizer returns with ``return_offsets_mapping=True``: ``(B, N, 2)``, or a list
            of ``(start, stop)`` characters an item, ``(0, 0)`` for special tokens and padding; for one text also
            ``(N, 2)``. Offsets may be trimmed, that is leave white space out; a first token of white space that comes
            out as ``(0, 0)`` cannot be told from a special one.
        attention_mask: ``(B, N)``, zero at padding. Needed only where padding has characters of its own.

    Raises:
        SpanError: a mapping that leaves its text, runs backwards (two texts in one row), or ends before it starts.
        DTypeError, ShapeError: arguments of another form.
    """
    return _units(paragraph_bounds, texts, offset_mapping, attention_mask)


def sentences(texts: Any, offset_mapping: Any, attention_mask: Any = None) -> Spans:
    """One span a sentence of each text (`sentence_bounds`); all else as in `paragraphs`."""
    return _units(sentence_bounds, texts, offset_mapping, attention_mask)


def from_characters(bounds: Any, offset_mapping: Any, attention_mask: Any = None, *, texts: Any = None) -> Spans:
    """Token spans of character ranges, which need not cover the text and may overlap.

    A token counts by one character of it: the first that is in any of the ranges, with ``texts`` the first such that
    is not white space if there is one. It is in the spans whose ranges hold that character. So ranges that do not
    overlap never share a token, and one that also has characters outside all ranges (a word with the space before
    it) is not lost.

    Args:
        bounds: for each item a list of ``(start, stop)`` characters, half-open, in any order. A range without a
            token gives no span.
        offset_mapping, attention_mask, texts: as in `paragraphs`.

    Raises:
        As `paragraphs`; SpanError also for a range that ends before it starts or leaves its text.
    """
    expected = "one list of (start, stop) pairs an item"
    listed = [ints(f"bounds[{i}]", row, 2) for i, row in enumerate(items("bounds", bounds, expected))]
    ranges = [bounds_of(f"bounds[{i}]", row) for i, row in enumerate(listed)]
    mapping = mapping_rows(offset_mapping, len(ranges))
    given: list[str | None] = [None] * len(ranges) if texts is None else [*text_list(texts)]
    if len(given) != len(ranges):
        raise ShapeError("texts", expected=f"{len(ranges)}, as bounds", got=str(len(given)))
    real = real_tokens(attention_mask, [len(row) for row in mapping])
    spans = []
    for i, (chars, row, text, seen) in enumerate(zip(ranges, mapping, given, real)):
        if text is not None and chars and max(stop for _, stop in chars) > len(text):
            raise SpanError(f"bounds[{i}]", expected=f"ranges within {len(text)} characters", got="one beyond")
        spans.append(_token_bounds(f"offset_mapping[{i}]", chars, row, text, seen))
    return _on_tracks(spans)


def _units(split: Callable[[str], Bounds], texts: Any, offset_mapping: Any, attention_mask: Any) -> Spans:
    listed = text_list(texts)
    return from_characters([split(text) for text in listed], offset_mapping, attention_mask, texts=listed)


def _token_bounds(name: str, chars: Bounds, mapping: Tensor, text: str | None, real: Tensor) -> Bounds:
    """Of one item: the token range of each range of characters that has any."""
    begins, ends = mapping.unbind(1)
    filled = begins < ends
    if text is not None:
        last = int(ends[real].max()) if bool(real.any()) else 0
        if last > len(text):
            raise SpanError(name, expected=f"characters within the text's {len(text)}", got=f"one at {last}")
        # Where offsets are trimmed, a token of white space alone has none; it lies before where they stand.
        for token in ((begins == ends) & (begins > 0) & real).nonzero().flatten().tolist():
            filled[token] = text[int(begins[token]) - 1].isspace()
        begins = torch.where(filled & (begins == ends), begins - 1, begins)
    tokens = (filled & real).nonzero().flatten()
    starts, stops = begins[tokens], ends[tokens]
    if bool((starts[1:] < starts[:-1]).any()):
        raise SpanError(name, expected="one text, from its start to its end", got="characters that run backwards")
    covered = _merged(chars)
    anchors = _first_within(covered, starts, stops)
    if text is not None:
        visible = _first_within(_visible(covered, text), starts, stops)
        anchors = torch.where(visible >= 0, visible, anchors)
    tokens, anchors = tokens[anchors >= 0], anchors[anchors >= 0]
    # A token within the white space of the one before would stand behind it in the text: keep the tokens' order.
    anchors = anchors.cummax(0).values if len(anchors) else anchors
    edges = torch.tensor(chars, dtype=torch.int64, device="cpu").reshape(-1, 2)
    found = [(a, b) for a, b in torch.searchsorted(anchors, edges).tolist() if a < b]
    positions = tokens.tolist()
    return [(positions[a], positions[b - 1] + 1) for a, b in found]


def _first_within(ranges: Bounds, starts: Tensor, stops: Tensor) -> Tensor:
    """The first character of each ``[start, stop)`` in any of the ``ranges`` (sorted, disjoint), or -1."""
    last = torch.iinfo(torch.int64).max
    begins, ends = torch.tensor([*ranges, (last, last)], dtype=torch.int64, device="cpu").unbind(1)
    nearest = torch.searchsorted(ends.contiguous(), starts.contiguous(), right=True)
    first = torch.maximum(starts, begins[nearest])
    return first.masked_fill(first >= stops, -1)


def _merged(ranges: Bounds) -> Bounds:
    """The same characters as sorted ranges that neither overlap nor touch."""
    merged: Bounds = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _visible(ranges: Bounds, text: str) -> Bounds:
    """The runs of characters within ``ranges`` that are not white space."""
    return [run.span() for start, stop in ranges for run in _NOT_WHITE.finditer(text, start, stop)]


def _on_tracks(batch: list[Bounds]) -> Spans:
    """Spans that hold tokens, laid on tracks: in order, each on the first track whose spans have ended."""
    laid = []
    for bounds in batch:
        tracks: list[Bounds] = []
        busy: list[tuple[int, int]] = []  # (stop, track), the earliest stop first
        free: list[int] = []
        for start, stop in sorted(bounds):
            while busy and busy[0][0] <= start:
                heapq.heappush(free, heapq.heappop(busy)[1])
            track = heapq.heappop(free) if free else len(tracks)
            if track == len(tracks):
                tracks.append([])
            tracks[track].append((start, stop))
            heapq.heappush(busy, (stop, track))
        laid.append([_with_gaps(track) for track in tracks])
    most = max([1, *(len(item) for item in laid)])
    ranges = max([1, *(len(flags) for item in laid for _, flags in item)])
    offsets = torch.zeros(len(laid), most, ranges + 1, dtype=torch.int32, device="cpu")
    is_span = torch.zeros(len(laid), most, ranges, dtype=torch.bool, device="cpu")
    for i, item in enumerate(laid):
        for t, (edges, flags) in enumerate(item):
            offsets[i, t] = edges[-1]
            offsets[i, t, : len(edges)] = torch.tensor(edges, dtype=torch.int32, device="cpu")
            is_span[i, t, : len(flags)] = torch.tensor(flags, device="cpu")
    return _canonical(offsets, is_span)


def _with_gaps(track: Bounds) -> tuple[list[int], list[bool]]:
    """One track's offsets, and which of its ranges are spans."""
    offsets, flags = [track[0][0]], []
    for start, stop in track:
        if start > offsets[-1]:
            offsets.append(start)
            flags.append(False)
        offsets.append(stop)
        flags.append(True)
    return offsets, flags


def _one_track(batch: list[list[int]]) -> Spans:
    """Offsets as they are, rows of fewer ending in empty ranges."""
    widest = max([2, *(len(row) for row in batch)])
    padded = [[*row, *[row[-1]] * (widest - len(row))] for row in batch]
    return Spans(torch.tensor(padded, dtype=torch.int32, device="cpu").reshape(len(batch), 1, widest))


def _canonical(offsets: Tensor, flags: Tensor) -> Spans:
    """``is_span`` left out where it would say nothing."""
    gaps = (offsets[..., 1:] > offsets[..., :-1]) & ~flags
    return Spans(offsets, flags if bool(gaps.any()) else None)
