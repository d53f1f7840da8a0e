"""What the demo claims: "no content shown" unless the matching message does better than chance explains."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import pytest

from lcf_fast.demo.statistics import ALPHA, accuracy, check_scipy, verdict
from lcf_fast.errors import BackendError, ShapeError

pytest.importorskip("scipy")


def answers(*counts: tuple[bool, bool, int]) -> tuple[list[bool], list[bool]]:
    """(matched right, mismatched right, items)."""
    both = [(a, b) for a, b, count in counts for _ in range(count)]
    return [a for a, _ in both], [b for _, b in both]


def test_content_that_crosses_is_said_to() -> None:
    found = verdict(*answers((True, False, 950), (False, True, 10), (True, True, 20), (False, False, 20)))
    assert found.crossed and (found.gained, found.lost) == (950, 10)
    assert found.sentence.startswith("content crossed: yes (97.0% with the matching message, 3.0% with another item's")


@pytest.mark.parametrize(
    "counts",
    [
        ((True, True, 1000),),  # right either way: the message does not matter
        ((False, False, 1000),),
        ((True, False, 60), (False, True, 60), (False, False, 880)),  # both at chance
        ((True, False, 10), (False, True, 900), (False, False, 90)),  # another item's is the better one
        ((True, False, 9), (False, False, 991)),  # better, but too few to tell: p = 1/512
    ],
)
def test_content_that_is_not_shown_is_not_claimed(counts: tuple[tuple[bool, bool, int], ...]) -> None:
    found = verdict(*answers(*counts))
    assert not found.crossed
    assert "no content shown" in found.sentence and "yes" not in found.sentence


def test_the_test_is_the_exact_one() -> None:
    found = verdict(*answers((True, False, 14), (False, True, 3), (True, True, 5)))
    assert found.p_value == pytest.approx(sum(comb(17, k) for k in range(14, 18)) / 2**17)
    assert found.crossed == (found.p_value < ALPHA)


def test_an_interval_holds_the_share_and_narrows() -> None:
    few, many = (accuracy([True] * n + [False] * n) for n in (10, 1000))
    assert few.share == many.share == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    assert many.low == pytest.approx(0.4781, abs=1e-4)  # Wilson, by hand
    sure = accuracy([True] * 100)
    assert sure.share == sure.high == 1.0 and 0.95 < sure.low < 1.0


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one answer"):
        accuracy([])
    with pytest.raises(ShapeError):
        verdict([], [])
    with pytest.raises(ShapeError, match="expected 2 answers"):
        verdict([True, False], [True])


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    with pytest.raises(BackendError, match="SciPy"):
        check_scipy()


def test_a_verdict_is_plain_data() -> None:
    found = verdict([True], [False])
    assert replace(found) == found
