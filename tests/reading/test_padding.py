"""Where what belongs to a row lies once the row is padded."""

from __future__ import annotations

from lcf_fast.reading.padding import padded, shifted_index, shifted_spans


def test_padding_on_either_side() -> None:
    for left, ids in ((True, [[9, 9, 5], [6, 7, 8]]), (False, [[5, 9, 9], [6, 7, 8]])):
        found, mask = padded([[5], [6, 7, 8]], left=left, fill=9)
        assert found.tolist() == ids
        assert mask.tolist() == [[int(token != 9) for token in row] for row in ids]


def test_rows_and_spans_move_with_the_padding_and_none_stays_none() -> None:
    assert shifted_index([[0, -1, 2], [1]], [2, 0], 4).tolist() == [[-1, 2, -1, 4], [-1, -1, -1, 1]]
    assert shifted_spans([[(0, 2), (2, 3)], [(1, 4)]], [5, 0]).bounds() == [[(5, 7), (7, 8)], [(1, 4)]]
