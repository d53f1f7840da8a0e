"""Aligning two renderings by characters: by hand, and against the definition over all shapes."""

from __future__ import annotations

import hypothesis.strategies as st
from against_reference import EXAMPLES
from hypothesis import given

from lcf_fast.reading.alignment import Piece, align, shared_pieces

Offsets = list[tuple[int, int]]


def test_by_hand() -> None:
    #       0123456789
    mine = "<u>a cat.<"  # content in [3, 9)
    theirs = "[a cat. ]"  # in [1, 7)
    pieces = shared_pieces(["a cat."], mine, [(3, 9)], theirs, [(1, 7)])
    assert pieces == [(3, 1, 6)]
    receiver = [(0, 0), (0, 3), (3, 4), (4, 8), (8, 10)]  # [BOS] <u> a ␣cat .<
    sharer = [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8), (8, 9)]  # [ a␣ ca t .␣ ]
    # "␣cat" by its "t"; ".<" by its "." alone, since "<" is the template's.
    assert align(receiver, sharer, pieces).tolist() == [-1, -1, 1, 3, 4]


def test_bytes_of_one_character_align_with_the_last_that_covers_it() -> None:
    assert align([(0, 1), (0, 1), (1, 2)], [(0, 1), (0, 1), (0, 1), (1, 2)], [(0, 0, 2)]).tolist() == [2, 2, 3]


def test_what_nothing_covers_aligns_with_nothing() -> None:
    # White space that trimmed offsets leave out, on either side.
    assert align([(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)], [(0, 0, 3)]).tolist() == [0, -1, 1]
    assert align([(0, 1), (1, 1), (2, 3)], [(0, 3)], [(0, 0, 3)]).tolist() == [0, -1, 0]
    assert align([(0, 1)], [(0, 1)], []).tolist() == [-1]
    assert align([], [], []).tolist() == []
    assert align([(0, 2)], [], [(0, 0, 2)]).tolist() == [-1]


def test_outer_white_space_where_both_kept_it() -> None:
    def pieces(mine: str, theirs: str) -> list[Piece]:
        return shared_pieces([" a \n"], mine, [(0, len(mine))], theirs, [(0, len(theirs))])

    assert pieces(" a \n", " a \n") == [(0, 0, 4)]
    assert pieces(" a \n", "a") == [(1, 0, 1)]
    assert pieces("a \n", " a \n") == [(0, 1, 3)]


def test_contents_that_are_not_to_be_found() -> None:
    bounds = [(0, 1), (1, 1), (1, 2), (2, 3)]
    other = [(0, 1), (1, 2), (2, 2), (2, 3)]
    assert shared_pieces(["a", "b", "c", " "], "ac ", bounds, "ab ", other) == [(0, 0, 1)]


@st.composite
def rendered(draw: st.DrawFn) -> tuple[str, Offsets, list[int]]:
    """A text of template (``#``) and content, its tokens, and where each of its contents' three letters begins."""
    template = st.text("#", max_size=3)
    text, starts = draw(template), []
    for _ in range(2):
        starts.append(len(text))
        text += "abc" + draw(template)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    tokens = [(a, b) for a, b in zip(cuts, cuts[1:]) for _ in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(0, 2))):
        tokens.insert(draw(st.integers(0, len(tokens))), (0, 0))
    dropped = draw(st.integers(0, len(tokens)))
    return text, [token for i, token in enumerate(tokens) if i != dropped], starts


@EXAMPLES
@given(rendered(), rendered())
def test_the_definition(mine: tuple[str, Offsets, list[int]], theirs: tuple[str, Offsets, list[int]]) -> None:
    pieces = [(a, b, 3) for a, b in zip(mine[2], theirs[2])]
    index = align(mine[1], theirs[1], pieces).tolist()
    like = {a + i: b + i for a, b, length in pieces for i in range(length)}
    for (start, stop), found in zip(mine[1], index, strict=True):
        content = [at for at in range(start, stop) if at in like]
        covering = [n for n, (a, b) in enumerate(theirs[1]) if content and a <= like[content[-1]] < b]
        assert found == (covering[-1] if covering else -1)
