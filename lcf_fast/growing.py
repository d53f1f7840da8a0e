"""Messages that grow: partial pools of pieces, and a context that comes piece by piece (spec, section 4).

Softmax pooling is associative, so a piece leaves a state of fixed size: the spans that lie inside it, already weighed
against each other, and the spans that it begins or continues and does not end. States of neighbours merge exactly. Of
slots, which know no spans, a piece leaves what `lcf_fast.slot_states` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from . import ops_pooling as ops
from .checks import check_state_numbers, check_tensor, describe, reads_values
from .eager_ranges import STATS
from .errors import DeviceError, DTypeError, MessageError, ShapeError, SpanError
from .fingerprint import Origin
from .identity import Pending, TakesOrigin
from .inputs import host_spans, without_gaps
from .message import Message
from .slot_states import SlotStates
from .spans import Spans

if TYPE_CHECKING:
    from .sharer import Summarizes
    from .slots_sharer import SummarizesSlots

__all__ = ["GrowingMessage", "GrowingSlots", "PartialPool", "merged"]


@dataclass(frozen=True, eq=False)
class PartialPool(TakesOrigin):
    """What a piece of a context comes to, of a size that does not depend on its length.

    Attributes:
        states: ``(L, B, Hs, T, 3, 2, Ds)``, float32 (float64 for float64 caches): sums of keys and values of the span
            that began before the piece, of the one that goes on after it, and of the spans inside, on each track T.
        stats: ``(L, B, Hs, T, 8)``: their maxima and weights; `lcf_fast.kernels.merging` says how they are to be read.
        spans: spans that begin in the piece, of each item.
        tokens: positions in the piece, padding included.
        made_by: whose it is, as a message's ``made_by``; None: not known. Other sharers' halves do not take it.

    Raises:
        ShapeError, DTypeError, DeviceError: naming the field.
    """

    states: Tensor
    stats: Tensor
    spans: tuple[int, ...]
    tokens: int
    made_by: Pending | Origin | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        states, stats = check_tensor("states", self.states), check_tensor("stats", self.stats)
        if states.dim() != 7 or tuple(states.shape[4:6]) != (3, 2):
            raise ShapeError("states", expected="(L, B, Hs, T, 3, 2, Ds)", got=describe(states))
        if tuple(stats.shape) != (*states.shape[:4], STATS):
            raise ShapeError("stats", expected=f"{(*states.shape[:4], STATS)}", got=describe(stats))
        check_state_numbers(states, stats)
        if not isinstance(self.spans, tuple) or any(type(count) is not int for count in self.spans):
            raise DTypeError("spans", expected="a tuple of ints", got=repr(self.spans)[:80])
        if len(self.spans) != states.shape[1]:
            raise ShapeError("spans", expected=f"one for each of {states.shape[1]} items", got=str(len(self.spans)))
        if type(self.tokens) is not int:
            raise DTypeError("tokens", expected="an int", got=describe(self.tokens))

    @property
    def nbytes(self) -> int:
        """Bytes of the state: what a device sends to another to merge."""
        return int(self.states.nbytes + self.stats.nbytes)

    def to(self, device: torch.device | str) -> PartialPool:
        """The same on another device."""
        return replace(self, states=self.states.to(device), stats=self.stats.to(device))

    def on_tracks(self, tracks: int) -> PartialPool:
        """The same with more tracks, on which there is nothing."""
        missing = tracks - self.stats.shape[3]
        if not missing:
            return self
        states = torch.nn.functional.pad(self.states, (0, 0, 0, 0, 0, 0, 0, missing))
        return replace(self, states=states, stats=torch.nn.functional.pad(self.stats, (0, 0, 0, missing)))

    def check_rows(self) -> None:
        """Every row had a token; looked at on the CPU only, like all values."""
        if not reads_values(self.stats) or not self.stats.numel():
            return
        weight = self.stats[0, :, 0, :, 1:6:2].flatten(1)  # (B, T * 3), the same for all layers and heads: zero or not
        empty = (weight == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise SpanError("spans", expected="a token to pool in every row", got=f"none in rows {empty}"[:200])


def merged(
    parts: Sequence[PartialPool], global_query: Tensor, check_made_by: Callable[[str, Any], None]
) -> PartialPool:
    """See `lcf_fast.sharer.Summarizes.merge`; ``check_made_by`` refuses what others have pooled."""
    if not isinstance(parts, Sequence) or not all(isinstance(part, PartialPool) for part in parts):
        raise DTypeError("parts", expected="a sequence of PartialPool", got=type(parts).__name__)
    if not parts:
        raise SpanError("parts", expected="at least one PartialPool", got="none")
    first = parts[0].states
    for i, part in enumerate(parts):
        shape = part.states.shape
        if shape[:3] != first.shape[:3] or shape[4:] != first.shape[4:]:
            expected = f"{tuple(first.shape)} as the first but for the tracks"
            raise ShapeError(f"parts[{i}].states", expected=expected, got=str(tuple(shape)))
        if part.states.dtype != first.dtype:
            raise DTypeError(f"parts[{i}].states", expected=f"{first.dtype}", got=str(part.states.dtype))
        if part.states.device != first.device:
            raise DeviceError(f"parts[{i}].states", expected=f"{first.device}", got=str(part.states.device))
        check_made_by(f"parts[{i}]", part.made_by)
    if len(parts) == 1:
        return parts[0]
    tracks = max(part.stats.shape[3] for part in parts)
    wide = [part.on_tracks(tracks) for part in parts]
    states, stats = ops.merge_ranges(
        torch.stack([part.states for part in wide], 4), torch.stack([part.stats for part in wide], 4), global_query
    )
    spans = tuple(sum(row) for row in zip(*(part.spans for part in parts)))
    return PartialPool(states, stats, spans=spans, tokens=sum(part.tokens for part in parts))


Half = TypeVar("Half", "Summarizes", "SummarizesSlots")
Pool = TypeVar("Pool", PartialPool, SlotStates)


class _Growing(Generic[Half, Pool]):
    """What pieces have come to so far, by weights that must not change meanwhile."""

    def __init__(self, half: Half) -> None:
        self._half: Half = half
        self._state = half._state()
        self._pool: Pool | None = None
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Positions pooled so far, padding included."""
        return self._tokens

    @property
    def partial(self) -> Pool:
        """The state so far, to merge with those of other devices.

        Raises:
            SpanError: nothing was pooled yet.
        """
        if self._pool is None:
            raise SpanError("message", expected="at least one piece", got="none: call extend")
        return self._pool

    def _check_weights(self) -> None:
        if self._half._state() is not self._state:
            raise MessageError("message", expected="the weights that it was begun with", got="weights changed since")

    def _check_batch(self, key: Tensor) -> None:
        if self._pool is not None and key.shape[0] != self._pool.stats.shape[1]:
            expected = f"batch size {self._pool.stats.shape[1]} as before"
            raise ShapeError("cache_piece", expected=expected, got=str(key.shape[0]))


class GrowingMessage(_Growing["Summarizes", PartialPool]):
    """A message whose context comes in pieces; made by ``adapter.begin()``.

    Pooling piece by piece gives what pooling at once gives, to rounding, and holds a state of fixed size. Spans of one
    track (those that do not overlap) may be left open at a piece's end and go on in the next; overlapping spans that
    cross pieces are given for the whole context and cut with `Spans.piece`, which marks them.

    Example::

        growing = adapter.begin()
        growing.extend(first_piece, [[0, 120, 200]], open=True)  # the second span goes on
        growing.extend(second_piece, [[0, 64]])                  # to token 264, where it ends
        message = growing.finish()                               # of what there is so far; extend may go on
    """

    def __init__(self, half: Summarizes) -> None:
        super().__init__(half)
        self._open: list[bool] = []

    @torch.no_grad()
    def extend(
        self,
        cache_piece: Any,
        spans: Spans | Tensor | Sequence[Sequence[int]] | None = None,
        *,
        open: bool | Sequence[bool] = False,
        attention_mask: Tensor | None = None,
    ) -> GrowingMessage:
        """Pool the next piece of the context. Returns self.

        Args:
            cache_piece: a cache of the sharer that holds the piece's tokens alone, of the same batch each time.
            spans: as in ``summarize``, counted from the piece's first token; None: one span over the piece. A row's
                first span continues the span that was left open, if one was. A row without a span leaves an open one
                as it is. What `Spans.piece` cut says itself what goes on, and ``open`` must then be False.
            open: whether a row's last span goes on in the next piece; of all rows, or one bool a row.
            attention_mask: ``(B, M)``, of the piece; padding is not pooled.

        Raises:
            SpanError: spans that leave the piece, overlap and go on, or are cut ones with ``open``.
            MessageError: the adapter's weights have changed since the message was begun.
            GeometryError, ShapeError, DTypeError, DeviceError: naming the argument. The message is then as it was.
        """
        half = self._half
        self._check_weights()
        sharer, mask = half._read(cache_piece, attention_mask, "cache_piece")
        key = sharer[0][0]
        self._check_batch(key)
        given = host_spans(spans, key)
        has_span = [bool(count) for count in given.counts]
        leaves = _flags(open, key.shape[0])
        continues = self._open or [False] * key.shape[0]
        mask = without_gaps(given, key, mask)
        if any(leaves) or any(continues):
            given, mask = _with_open_ends(given, key, mask, continues, leaves)
        piece = half._pool(sharer, given, mask)
        self._pool = piece if self._pool is None else half.merge([self._pool, piece])
        self._tokens += key.shape[2]
        self._open = [leave if span else on for leave, span, on in zip(leaves, has_span, continues)]
        return self

    def finish(self) -> Message:
        """The message of all pieces so far; open spans count as far as they go. More pieces may follow."""
        return self._half.finish(self.partial)


class GrowingSlots(_Growing["SummarizesSlots", SlotStates]):
    """A message of slots whose context comes in pieces; made by ``adapter.begin()``.

    Pooling piece by piece gives what pooling at once gives, to rounding, and holds a state of fixed size. There are no
    spans, so nothing is left open, and pieces may come in any order.

    Example::

        growing = adapter.begin()
        growing.extend(first_piece).extend(second_piece)
        message = growing.finish()  # of what there is so far; extend may go on
    """

    @torch.no_grad()
    def extend(self, cache_piece: Any, *, attention_mask: Tensor | None = None) -> GrowingSlots:
        """Pool another piece of the context. Returns self.

        Args:
            cache_piece: a cache of the sharer that holds the piece's tokens alone, of the same batch each time. It may
                be empty.
            attention_mask: ``(B, M)``, of the piece; padding is not pooled, and a row may have no token.

        Raises:
            MessageError: the adapter's weights have changed since the message was begun.
            GeometryError, ShapeError, DTypeError, DeviceError: naming the argument. The message is then as it was.
        """
        self._check_weights()
        sharer, mask = self._half._read(cache_piece, attention_mask, "cache_piece")
        self._check_batch(sharer[0][0])
        piece = self._half._pool(sharer, mask)
        self._pool = piece if self._pool is None else self._half.merge([self._pool, piece])
        self._tokens += sharer[0][0].shape[2]
        return self

    def finish(self) -> Message:
        """The message of all pieces so far. More may follow.

        Raises:
            SpanError: no piece yet, or a row without a token in any of them.
        """
        return self._half.finish(self.partial)


def _flags(open: Any, batch: int) -> list[bool]:
    if isinstance(open, bool):
        return [open] * batch
    if isinstance(open, Tensor):
        open = open.tolist()
    if not isinstance(open, Sequence) or not all(isinstance(flag, bool) for flag in open):
        raise DTypeError("open", expected="a bool, or one a row", got=repr(open)[:80])
    if len(open) != batch:
        raise ShapeError("open", expected=f"a bool for each of {batch} rows", got=str(len(open)))
    return list(open)


def _with_open_ends(
    spans: Spans, key: Tensor, mask: Tensor | None, continues: list[bool], leaves: list[bool]
) -> tuple[Spans, Tensor | None]:
    """Spans whose first one reaches back, and whose last one reaches on, where these flags say so.

    An end that is moved would take in tokens that are not the span's (padding, or what lies before the first span), so
    the mask holds on to the spans as they were given.
    """
    length = key.shape[2]
    if spans.tracks > 1:
        expected = "spans that do not overlap, to leave one open (for others: Spans.piece of the whole context's)"
        raise SpanError("spans", expected=expected, got=f"{spans.tracks} tracks")
    offsets = spans.offsets[:, 0].clone()
    if offsets.numel() and (int(offsets.min()) < 0 or int(offsets.max()) > length):
        expected = "open=False with spans that say themselves what goes on (Spans.piece)"
        raise SpanError("open", expected=expected, got="both")
    inside = spans.to_mask(length)[:, 0].to(key.device)
    flags = spans._span_flags()[:, 0]
    is_span = flags.clone()
    for row, (back, on) in enumerate(zip(continues, leaves)):
        there = flags[row].nonzero().flatten().tolist()
        if not there:
            if back:  # nothing of this piece is pooled, and the open span lasts through it
                offsets[row], offsets[row, 0], is_span[row] = length + 1, -1, False
                is_span[row, 0] = True
            continue
        if back:
            offsets[row, : there[0] + 1] = -1
        if on:
            offsets[row, there[-1] + 1 :] = length + 1
    visible = inside if mask is None else inside & (mask if mask.dim() == 2 else mask[:, 0])
    return Spans(offsets[:, None], is_span[:, None]), visible
