"""What a long pass says of itself, and that a short one says nothing."""

from __future__ import annotations

import io
import sys

import pytest

from lcf_fast import counting
from lcf_fast.counting import counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes four seconds."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 4
        return now[0]

    monkeypatch.setattr(counting.time, "monotonic", monotonic)


def test_a_short_pass_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(counted(range(50), "reading")) == list(range(50))
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(counted(range(50), "reading", total=50)) == list(range(50))
    assert terminal.getvalue() == ""


@pytest.mark.usefixtures("clock")
def test_lines_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(range(8), "reading", total=2000, more=lambda: "1 left out")) == list(range(8))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 2 of 2,000  1 left out"
    assert 2 <= len(lines) <= 4  # every ten seconds of 32
    assert list(counted(range(8), "reading", shown=False)) == list(range(8))
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("clock")
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for item in counted(range(1000), "reading", total=1000, more=lambda: "some left out"):
        if item == 500:
            break  # which takes the bar away
    shown = terminal.getvalue()
    assert "reading" in shown
    assert "/1000" in shown
    assert "some left out" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back
