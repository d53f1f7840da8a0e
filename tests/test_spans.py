"""`lcf_fast.spans.Spans`: tracks, pieces, masks, and spans given outright, as windows and as turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from against_reference import EXAMPLES
from hypothesis import given
from torch import Tensor

from lcf_fast import DeviceError, DTypeError, IndexRangeError, LCFError, ShapeError, SpanError
from lcf_fast.spans import Spans, turns, whole, windows

LENGTH = 24
PAIR = st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(lambda pair: (min(pair), max(pair)))
ITEM = st.lists(PAIR, max_size=8)
BATCH = st.lists(ITEM, min_size=1, max_size=3)
MASKS = st.integers(1, 3).flatmap(
    lambda batch: st.integers(0, 16).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=batch, max_size=batch)
    )
)


def kept(bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted((start, stop) for start, stop in bounds if start < stop)


def flags_of_empty_ranges(spans: Spans) -> set[bool]:
    empty = spans.offsets[..., 1:] == spans.offsets[..., :-1]
    return set() if spans.is_span is None else {*spans.is_span[empty].tolist()}


def memberships(spans: Spans, token: int, shift: int = 0) -> list[list[tuple[int, int, int]]]:
    """Of one token of each item: the spans that hold it, as (track, start, stop) of the whole sequence."""
    held = []
    for bounds, places in zip(spans.bounds(), spans.places(), strict=True):
        pairs = zip(bounds, places, strict=True)
        held.append([(t, a + shift, b + shift) for (a, b), (t, _) in pairs if a <= token < b])
    return held


# --- what a Spans is
# ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(BATCH)
def test_given_is_a_round_trip_on_tracks_without_overlap(batch: list[list[tuple[int, int]]]) -> None:
    spans = Spans.given(batch)
    assert spans.bounds() == [kept(item) for item in batch]
    assert spans.counts == [len(kept(item)) for item in batch]
    assert spans.batch == len(batch)
    assert spans.offsets.dtype == torch.int32
    # As few tracks as the token in most spans needs.
    depth = [sum(start <= token < stop for start, stop in item) for item in batch for token in range(LENGTH)]
    assert spans.tracks == max(1, *depth)
    for item, (bounds, places) in enumerate(zip(spans.bounds(), spans.places(), strict=True)):
        for track in range(spans.tracks):
            own = [bound for bound, (t, _) in zip(bounds, places, strict=True) if t == track]
            assert all(before[1] <= after[0] for before, after in zip(own, own[1:])), "overlap within a track"
        for (start, stop), (track, p) in zip(bounds, places, strict=True):
            assert spans.offsets[item, track, p : p + 2].tolist() == [start, stop]


@EXAMPLES
@given(ITEM)
def test_later_spans_move_no_earlier_one(item: list[tuple[int, int]]) -> None:
    bounds = kept(item)
    places = Spans.given([bounds]).places()[0]
    for known in range(len(bounds)):
        assert Spans.given([bounds[:known]]).places()[0] == places[:known]


def test_tracks_and_gaps_by_hand() -> None:
    spans = Spans.given([[(5, 9), (0, 5), (2, 7), (8, 8), (20, 22)], [(1, 2)], []])
    assert spans.offsets.tolist() == [
        [[0, 5, 9, 20, 22], [2, 7, 7, 7, 7]],
        [[1, 2, 2, 2, 2], [0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    assert spans.is_span is not None
    assert spans.is_span.tolist()[0] == [[True, True, False, True], [True, False, False, False]]
    assert spans.counts == [4, 1, 0]
    assert spans.places()[0] == [(0, 0), (1, 0), (0, 1), (0, 3)]  # in the order of bounds
    assert Spans.given([[(3, 5), (0, 3)], [(0, 4)]]).is_span is None, "a gap where there is none"
    # One that is given twice counts twice, each on a track of its own.
    assert Spans.given([[(0, 3), (0, 3)]]).offsets.tolist() == [[[0, 3], [0, 3]]]
    last = 2**31 - 1  # what int32 holds
    assert Spans.given([[(1, last)]]).bounds() == Spans.given([[1, last]]).bounds() == [[(1, last)]]
    assert whole(last).bounds() == [[(0, last)]]
    nothing = Spans.given([])
    assert (nothing.batch, nothing.tracks, nothing.bounds(), nothing.counts) == (0, 1, [], [])


@pytest.mark.parametrize("form", ["lists", "tensor", "int32", "ragged"])
def test_offsets_make_one_track_range_for_range(form: str) -> None:
    """Empty ranges keep their place, so that range p is the p-th that was given; they are no spans."""
    rows = [[0, 4, 4, 9], [2, 3, 8, 8]]
    given_as: Any = {"lists": rows, "ragged": [rows[0], rows[1][:3]]}.get(form, torch.tensor(rows))
    spans = Spans.given(given_as.int() if form == "int32" else given_as)
    assert spans.offsets.tolist() == [[rows[0]], [rows[1]]]
    assert spans.is_span is None
    assert spans.bounds() == [[(0, 4), (4, 9)], [(2, 3), (3, 8)]]
    assert spans.places()[0] == [(0, 0), (0, 2)]


def test_pairs_as_a_tensor() -> None:
    pairs = torch.tensor([[[0, 4], [2, 6]], [[1, 1], [3, 5]]])
    assert Spans.given(pairs).bounds() == Spans.given(pairs.tolist()).bounds() == [[(0, 4), (2, 6)], [(3, 5)]]
    assert Spans.given(pairs.numpy()).bounds() == [[(0, 4), (2, 6)], [(3, 5)]]


@EXAMPLES
@given(st.lists(BATCH, min_size=1, max_size=3))
def test_stack(batches: list[list[list[tuple[int, int]]]]) -> None:
    parts = [Spans.given(batch) for batch in batches]
    stacked = Spans.stack(parts)
    assert stacked.bounds() == [item for part in parts for item in part.bounds()]
    assert stacked.places() == [item for part in parts for item in part.places()]
    at = 0
    for part in parts:
        mask = stacked.to_mask(LENGTH)[at : at + part.batch]
        assert torch.equal(mask[:, : part.tracks], part.to_mask(LENGTH))
        assert not mask[:, part.tracks :].any()
        at += part.batch
    alone = Spans.given([item for batch in batches for item in batch])
    assert (alone.is_span is None) == (stacked.is_span is None)
    assert flags_of_empty_ranges(stacked) <= {False}


# --- masks and pieces
# ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(BATCH, st.integers(0, LENGTH), st.integers(0, LENGTH + 4))
def test_to_mask(batch: list[list[tuple[int, int]]], start: int, length: int) -> None:
    """Against the definition, token by token; of a piece as well, whose spans reach out of it on both sides."""
    spans = Spans.given(batch).piece(start, LENGTH)
    mask = spans.to_mask(length)
    assert mask.shape == (len(batch), spans.tracks, length)
    assert mask.dtype == torch.bool
    expected = torch.zeros_like(mask)
    for i, (bounds, places) in enumerate(zip(spans.bounds(), spans.places(), strict=True)):
        for (a, b), (track, _) in zip(bounds, places, strict=True):
            expected[i, track, max(a, 0) : max(b, 0)] = True
    assert torch.equal(mask, expected)


def test_mask_by_hand() -> None:
    spans = Spans.given([[(1, 3), (4, 6), (2, 5)]])
    assert spans.to_mask(7).int().tolist() == [[[0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]]]
    offsets = Spans.given([[2, 2, 4, 4]])  # empty ranges on both sides
    assert offsets.to_mask(6).int().tolist() == [[[0, 0, 1, 1, 0, 0]]]


@EXAMPLES
@given(BATCH, st.lists(st.integers(0, LENGTH), max_size=4), st.booleans())
def test_pieces_keep_every_tokens_spans(batch: list[list[tuple[int, int]]], cuts: list[int], trim: bool) -> None:
    spans = Spans.given(batch)
    edges = [0, *sorted(cuts), LENGTH]
    mask = spans.to_mask(LENGTH)
    for start, stop in zip(edges, edges[1:]):
        piece = spans.piece(start, stop, trim=trim)
        assert piece.tracks == spans.tracks
        assert flags_of_empty_ranges(piece) <= {False}
        for token in range(start, stop):
            assert memberships(piece, token - start, start) == memberships(spans, token)
        assert torch.equal(piece.to_mask(stop - start), mask[:, :, start:stop])
        # What is open at the piece's end is known to be.
        for bounds, all_bounds in zip(piece.bounds(), spans.bounds(), strict=True):
            goes_on = [(a + start, b + start) for a, b in bounds if a < stop - start < b]
            assert goes_on == [(a, b) for a, b in all_bounds if a < stop < b]
        if trim:
            # Nothing but what touches the piece: a piece costs what lies in it.
            expected = [[(a, b) for a, b in item if b > start and a < stop] for item in spans.bounds()]
            assert [[(a + start, b + start) for a, b in item] for item in piece.bounds()] == expected
            assert piece.offsets.shape[-1] <= max(2, 2 * max(map(len, expected)))
        else:
            assert torch.equal(piece.offsets, spans.offsets - start)


def test_a_piece_of_a_piece_and_a_start_of_its_own_for_each_item() -> None:
    spans = Spans.given([[(0, 10), (10, 20)], [(3, 12)]])
    assert torch.equal(spans.piece(4, 20).piece(3, 9).offsets, spans.piece(7, 13).offsets)
    own = spans.piece([5, 2], torch.tensor([12, 14]))
    assert own.bounds() == [[(-5, 5), (5, 15)], [(1, 10)]]
    trimmed = spans.piece([10, 2], [12, 3], trim=True)
    assert trimmed.bounds() == [[(0, 10)], []]
    assert trimmed.offsets.shape == (2, 1, 2)
    # A piece that begins in a gap has no gap: nothing of it is to be pooled.
    assert Spans.given([[(0, 3), (6, 9)]]).piece(4, 9, trim=True).is_span is None
    assert Spans.given([]).piece(0, 4, trim=True).batch == 0


def test_an_empty_piece_still_knows_what_goes_on() -> None:
    spans = Spans.given([[(0, 4), (4, 9), (9, 12)]])
    assert spans.piece(6, 6, trim=True).bounds() == [[(-2, 3)]]
    assert spans.piece(4, 4, trim=True).bounds() == [[]]


# --- windows and whole rows
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (0, 3, 1, []),
        (2, 3, 0, [(0, 2)]),
        (3, 3, 0, [(0, 3)]),
        (7, 3, 0, [(0, 3), (3, 6), (6, 7)]),
        (7, 3, 1, [(0, 3), (2, 5), (4, 7)]),
        (8, 3, 1, [(0, 3), (2, 5), (4, 7), (6, 8)]),
        (5, 4, 3, [(0, 4), (1, 5)]),
        (4, 1, 0, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_windows_by_hand(length: int, size: int, overlap: int, expected: list[tuple[int, int]]) -> None:
    assert windows(length, size, overlap).bounds() == [expected]


def test_windows_without_overlap_or_padding_are_plain_offsets() -> None:
    spans = windows([10, 3, 0], 4)
    assert spans.offsets.tolist() == [[[0, 4, 8, 10]], [[0, 3, 3, 3]], [[0, 0, 0, 0]]]
    assert spans.is_span is None


def test_windows_of_padded_rows() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 1, 1], [0] * 7])
    for given_as in (mask, mask.bool(), mask.float(), -mask, mask.tolist(), mask.numpy()):
        assert windows(given_as, 2).bounds() == [[(2, 4), (4, 6), (6, 7)], [(0, 2), (2, 3)], [(0, 4), (5, 7)], []]
    assert windows(mask, 3, 2).bounds()[2] == [(0, 6), (3, 7)]
    assert whole(mask).bounds() == [[(2, 7)], [(0, 3)], [(0, 7)], []]


@EXAMPLES
@given(MASKS, st.integers(1, 7), st.integers(0, 6))
def test_windows_cover_every_real_token(mask: list[list[bool]], size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    step = size - overlap
    spans = windows(torch.tensor(mask), size, overlap)
    for row, bounds in zip(mask, spans.bounds(), strict=True):
        real = [position for position, is_real in enumerate(row) if is_real]
        inside = [[p for p in real if start <= p < stop] for start, stop in bounds]
        n = len(real)
        assert all(len(tokens) == size for tokens in inside[:-1])
        assert [tokens[0] for tokens in inside] == real[::step][: len(inside)]
        assert not n or len(inside) == max(1, -(-(n - overlap) // step))
        for before, after in zip(inside, inside[1:]):
            assert len({*before} & {*after}) == min(overlap, len(after))
            assert not {*after} <= {*before}, "a window within the one before"
        for start, stop in bounds:
            assert row[start] and row[stop - 1], "a window that begins or ends in padding"
        assert sorted({p for tokens in inside for p in tokens}) == real


def test_lengths_in_every_form() -> None:
    for lengths in ([4, 0, 2], (4, 0, 2), torch.tensor([4, 0, 2]), np.array([4, 0, 2])):
        assert whole(lengths).bounds() == [[(0, 4)], [], [(0, 2)]]
    assert whole(5).bounds() == [[(0, 5)]]
    assert whole([]).batch == 0
    assert whole(torch.ones(2, 0)).bounds() == [[], []]


# --- turns by token ids
# ---------------------------------------------------------------------------------------------------------


def test_turns_by_hand() -> None:
    assert turns([[9, 1, 2, 9, 3], [5, 9, 3, 3, 3]], 9).bounds() == [[(0, 3), (3, 5)], [(0, 1), (1, 5)]]
    assert turns([7, 8, 1, 7, 7, 8], [7, 8]).bounds() == [[(0, 4), (4, 6)]]
    assert turns([1, 2, 3], 9).bounds() == [[(0, 3)]]
    assert turns([[], [9]], 9).bounds() == [[], [(0, 1)]]
    assert turns([4], [4, 4]).bounds() == [[(0, 1)]]
    assert turns([4, 4, 4, 4, 4], [4, 4]).bounds() == [[(0, 2), (2, 5)]], "a mark within a mark"
    ids = torch.tensor([[9, 1, 9, 2]])
    assert turns(ids, 9).bounds() == turns(ids[0], torch.tensor([9])).bounds() == [[(0, 2), (2, 4)]]


def test_turns_of_padded_rows() -> None:
    """Padding is passed over even where it is the mark itself, as where one token serves for both."""
    ids = torch.tensor([[9, 9, 9, 1, 9, 2], [9, 1, 9, 2, 9, 9], [1, 9, 2, 9, 3, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]])
    expected = [[(2, 4), (4, 6)], [(0, 2), (2, 4)], [(0, 3), (3, 5)]]
    assert turns(ids, 9, mask).bounds() == expected
    assert turns(ids.tolist(), [9], mask.tolist()).bounds() == expected
    # A mark of two ids may have padding between them.
    assert turns([[5, 7, 0, 8, 1]], [7, 8], [[1, 1, 0, 1, 1]]).bounds() == [[(0, 1), (1, 5)]]


@EXAMPLES
@given(st.lists(st.integers(0, 2), max_size=14), st.lists(st.integers(0, 2), min_size=1, max_size=3), st.data())
def test_turns_partition_the_real_tokens(ids: list[int], mark: list[int], data: st.DataObject) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    bounds = turns([ids], mark, [mask]).bounds()[0]
    real = [position for position, is_real in enumerate(mask) if is_real]
    held = [[ids[p] for p in real if start <= p < stop] for start, stop in bounds]
    assert [token for turn in held for token in turn] == [ids[p] for p in real]
    for number, turn in enumerate(held):
        if number:
            assert turn[: len(mark)] == mark
        # Nowhere behind a turn's own beginning.
        begins = len(mark) if turn[: len(mark)] == mark else 1
        assert all(turn[at : at + len(mark)] != mark for at in range(begins, len(turn)))


# --- what is refused
# ---------------------------------------------------------------------------------------------------------

OFFSETS = torch.tensor([[[0, 2, 4]]], dtype=torch.int32)


def a_mask(*values: int) -> Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (DTypeError, "offsets", lambda: Spans([[[0, 2]]])),  # type: ignore[arg-type]
        (DTypeError, "offsets", lambda: Spans(OFFSETS.long())),
        (ShapeError, "offsets", lambda: Spans(OFFSETS[0])),
        (ShapeError, "offsets", lambda: Spans(OFFSETS[:, :, :1])),
        (ShapeError, "offsets", lambda: Spans(OFFSETS[:, :0])),
        (DeviceError, "offsets", lambda: Spans(OFFSETS.to("meta"))),
        (SpanError, "offsets[0, 0]", lambda: Spans(OFFSETS.flip(-1))),
        (DTypeError, "is_span", lambda: Spans(OFFSETS, torch.ones(1, 1, 2))),
        (ShapeError, "is_span", lambda: Spans(OFFSETS, torch.ones(1, 1, 3, dtype=torch.bool))),
        (DeviceError, "is_span", lambda: Spans(OFFSETS, torch.ones(1, 1, 2, dtype=torch.bool, device="meta"))),
        (DTypeError, "bounds", lambda: Spans.given(None)),
        (DTypeError, "bounds", lambda: Spans.given("ab")),
        (DTypeError, "bounds", lambda: Spans.given(torch.ones(1, 2))),
        (ShapeError, "bounds", lambda: Spans.given(torch.ones(2, dtype=torch.int64))),
        (DeviceError, "bounds[0]", lambda: Spans.given(OFFSETS[0].to("meta"))),
        (ShapeError, "bounds[0]", lambda: Spans.given(torch.ones(2, 1, 3, dtype=torch.int64))),
        (DTypeError, "bounds[0]", lambda: Spans.given([0, 4])),
        (DTypeError, "bounds[0]", lambda: Spans.given([(0, 3), (3, 5)])),
        (ShapeError, "bounds[0]", lambda: Spans.given([[(0, 3, 5)]])),
        (ShapeError, "bounds[0]", lambda: Spans.given([[(0, 3), (3,)]])),
        (ShapeError, "bounds[1]", lambda: Spans.given([[(0, 3)], [0, 3]])),
        (DTypeError, "bounds[0]", lambda: Spans.given([[(0, 2.5)]])),
        (DTypeError, "bounds[0]", lambda: Spans.given([[(False, True)]])),
        (DTypeError, "bounds[0]", lambda: Spans.given([[("a", "b")]])),
        (DTypeError, "bounds[0]", lambda: Spans.given([[(0, 2**70)]])),
        (SpanError, "bounds[0][1]", lambda: Spans.given([[(0, 2), (3, 1)]])),
        (SpanError, "bounds[1][0]", lambda: Spans.given([[(0, 2)], [(-1, 1)]])),
        (SpanError, "bounds[0][0]", lambda: Spans.given([[(0, 2**31)]])),
        (SpanError, "bounds[0]", lambda: Spans.given([[0, 4, 3]])),
        (SpanError, "bounds[0]", lambda: Spans.given([[-1, 3]])),
        (SpanError, "bounds[0]", lambda: Spans.given([[0, 2**31]])),
        (SpanError, "bounds[1]", lambda: Spans.given([[0, 3], [2]])),
        (SpanError, "bounds[1]", lambda: Spans.given([[0, 3], []])),
        (DTypeError, "bounds[0]", lambda: Spans.given([[0, 1.5]])),
        (SpanError, "spans", lambda: Spans.stack([])),
        (DTypeError, "spans", lambda: Spans.stack([OFFSETS])),  # type: ignore[list-item]
        (DTypeError, "spans", lambda: Spans.stack(windows(3, 1))),  # type: ignore[arg-type]
        (IndexRangeError, "start", lambda: windows(9, 3).piece(-1, 4)),
        (IndexRangeError, "start", lambda: windows(9, 3).piece(4, 3)),
        (IndexRangeError, "start", lambda: windows(9, 3).piece(2**31 - 1, 2**31 - 1).piece(9, 9)),
        (DTypeError, "start", lambda: windows(9, 3).piece(0.5, 3)),  # type: ignore[arg-type]
        (DTypeError, "start", lambda: windows(9, 3).piece(True, 3)),
        (ShapeError, "stop", lambda: windows(9, 3).piece(0, [3, 4])),
        (ShapeError, "start", lambda: windows([9, 9], 3).piece([0], 4)),
        (DTypeError, "length", lambda: windows(9, 3).to_mask(4.0)),  # type: ignore[arg-type]
        (ShapeError, "length", lambda: windows(9, 3).to_mask(-1)),
        (SpanError, "size", lambda: windows(9, 0)),
        (DTypeError, "size", lambda: windows(9, 2.0)),  # type: ignore[arg-type]
        (DTypeError, "size", lambda: windows(9, True)),
        (SpanError, "overlap", lambda: windows(9, 3, 3)),
        (SpanError, "overlap", lambda: windows(9, 3, -1)),
        (SpanError, "lengths[1]", lambda: windows([4, -1], 3)),
        (SpanError, "lengths[0]", lambda: whole(2**31)),
        (DTypeError, "lengths", lambda: whole(2.5)),
        (DTypeError, "lengths", lambda: whole(True)),
        (DTypeError, "lengths", lambda: whole(None)),
        (DTypeError, "lengths", lambda: whole([1.5])),
        (ShapeError, "lengths", lambda: whole(torch.ones(1, 1, 1))),
        (DTypeError, "lengths[0]", lambda: whole([["a"]])),
        (ShapeError, "lengths[0]", lambda: whole([[[0, 1], [1, 1]]])),
        (DeviceError, "lengths[0]", lambda: whole(torch.ones(1, 2, device="meta"))),
        (DTypeError, "lengths[0]", lambda: whole(torch.ones(1, 2, dtype=torch.complex64))),
        (SpanError, "start_ids", lambda: turns([[1, 2]], [])),
        (DTypeError, "start_ids", lambda: turns([[1, 2]], "a")),  # type: ignore[arg-type]
        (DTypeError, "input_ids[0]", lambda: turns(torch.ones(1, 2), 1)),
        (ShapeError, "input_ids", lambda: turns(torch.ones(1, 1, 2), 1)),
        (DTypeError, "input_ids", lambda: turns("ab", 1)),
        (DTypeError, "input_ids[1]", lambda: turns([[1], 2], 1)),
        (ShapeError, "attention_mask", lambda: turns([[1], [2]], 1, a_mask(1))),
        (ShapeError, "attention_mask[0]", lambda: turns([[1, 2]], 1, a_mask(1))),
        (ShapeError, "attention_mask[0]", lambda: turns([[1, 2]], 1, a_mask(1, 1, 0))),
    ],
)
def test_bad_input(error: type[LCFError], argument: str, call: Any) -> None:
    with pytest.raises(error) as raised:
        call()
    assert raised.value.argument == argument
    assert type(raised.value) is error
