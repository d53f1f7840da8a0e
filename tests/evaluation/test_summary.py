"""Figures, tables and pictures of small runs whose numbers are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcf_fast.errors import BackendError
from lcf_fast.evaluation import plots
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.plots import check_plot, write_png
from lcf_fast.evaluation.predictions import MATCHED, MISMATCHED, SELF, ZERO, Prediction
from lcf_fast.evaluation.report import markdown
from lcf_fast.evaluation.statistics import accuracy, holm, mcnemar
from lcf_fast.evaluation.summary import Summary, summarize, summary_json
from lcf_fast.evaluation.verdicts import NO_CONTENT, verdict

ITEMS = 100


def cell(
    set: str, channel: str, control: str, right: int, *, sent: int = 0, time: float = 0.01, items: int = ITEMS
) -> list[Prediction]:
    """The first ``right`` of the questions answered right."""
    timings = {"first_token": time, "end": 2 * time}
    return [
        Prediction(f"q{i}", set, channel, control, "A", correct=i < right, timings=timings, sent=sent)
        for i in range(items)
    ]


def run() -> list[Prediction]:
    return [
        *cell("arc-c", "none", MATCHED, 30),
        *cell("arc-c", "text_50", MATCHED, 40, sent=180, time=0.25),
        *cell("arc-c", "text_200", MATCHED, 45, sent=700, time=0.41),
        *cell("arc-c", "lcf", MATCHED, 60, sent=7168, time=0.05),
        *cell("arc-c", "lcf", MISMATCHED, 32, sent=7168, time=0.05),
        *cell("arc-c", "lcf", ZERO, 31, sent=7168, time=0.05),
        *cell("arc-c", "c2c", MATCHED, 65, sent=300_000, time=0.1),
        *cell("arc-c", "c2c", MISMATCHED, 64, sent=300_000, time=0.1),
    ]


@pytest.fixture(scope="module")
def found() -> Summary:
    return summarize(run())


def test_figures(found: Summary) -> None:
    (arc,) = found.sets
    assert (arc.set, arc.measure, arc.questions) == ("arc-c", "accuracy", ITEMS)
    channels = {channel.channel: channel for channel in arc.channels}
    assert list(channels) == ["none", "text_50", "text_200", "lcf", "c2c"]
    lcf = channels["lcf"]
    assert [c.control for c in lcf.cells] == [MATCHED, MISMATCHED, ZERO]
    matched = lcf.cell(MATCHED)
    assert matched is not None
    wilson = accuracy([True] * 60 + [False] * 40)
    assert (matched.score.value, matched.score.low, matched.score.high) == (0.6, wilson.low, wilson.high)
    assert (matched.sent, matched.timings) == (7168, {"end": 0.1, "first_token": 0.05})
    assert lcf.speedups == pytest.approx({"text_50": 5.0, "text_200": 8.2})
    assert channels["text_50"].speedups == pytest.approx({"text_200": 1.64})
    assert channels["none"].verdict is None and channels["text_50"].verdict is None


def test_verdicts_are_those_of_the_paired_answers(found: Summary) -> None:
    channels = {channel.channel: channel for channel in found.sets[0].channels}
    one = [i < 60 for i in range(ITEMS)], [i < 32 for i in range(ITEMS)], [i < 30 for i in range(ITEMS)]
    alone = verdict(*one)
    ours, theirs = channels["lcf"].verdict, channels["c2c"].verdict
    assert ours is not None and theirs is not None
    assert (ours.content, ours.gain, ours.surviving, ours.p_value) == (
        alone.content,
        alone.gain,
        alone.surviving,
        mcnemar(one[0], one[1]).p_value,
    )
    assert [ours.p_adjusted, theirs.p_adjusted] == holm([ours.p_value, theirs.p_value])
    assert ours.crossed and not theirs.crossed
    assert found.judged == 2
    assert channels["c2c"].equivalence is not None
    assert channels["c2c"].equivalence.difference.value == pytest.approx(0.01)


def test_questions_are_joined_by_their_ids(found: Summary) -> None:
    rows = run()
    assert summarize([*rows[:300], *rows[400:][::-1], *rows[300:400]]).sets[0].channels[-1].channel == "lcf"
    shuffled = summarize([*rows[:400], *rows[400:500][::-1], *rows[500:]])
    assert shuffled == found
    with pytest.raises(EvaluationError, match=r"arc-c: none/matched and c2c/mismatched.*1 questions"):
        summarize(rows[:-1])
    with pytest.raises(EvaluationError, match="arc-c/c2c/mismatched/q99 twice"):
        summarize([*rows, rows[-1]])
    with pytest.raises(EvaluationError):
        summarize([])
    mixed = [Prediction(f"q{i}", "arc-c", "x", MATCHED, "A", em=0, f1=0) for i in range(ITEMS)]
    with pytest.raises(EvaluationError, match="answers of one kind"):
        summarize([*rows, *mixed])


def test_routing_and_weighted_accuracy(found: Summary) -> None:
    # 30 right for nothing, 10 more at 180 bytes, 5 at 700, 15 at 7,168, 5 at 300,000.
    points = [(round(p.cost), round(100 * p.accuracy)) for p in found.sets[0].routing]
    assert points == [(0, 30), (18, 40), (53, 45), (1128, 60), (16128, 65)]
    more = [*cell("openbookqa", "none", MATCHED, 100, items=300), *cell("openbookqa", "c2c", MATCHED, 200, items=300)]
    both = summarize([*run(), *more])
    assert {name: (a.right, a.items) for name, a in both.weighted.items()} == {"none": (130, 400), "c2c": (265, 400)}
    unmeasured = [Prediction("q0", "s", "lcf", MATCHED, "A", correct=True)]
    (alone,) = summarize(unmeasured).sets
    assert alone.routing == ()
    only = alone.channels[0].cell(MATCHED)
    assert only is not None and (only.sent, only.timings) == (None, {})


def test_a_cell_of_unlike_rows_has_their_medians() -> None:
    seconds, sizes = (0.1, 0.9, 0.2, 0.3, 0.4), (5, 1, 100, 7, 9)
    rows = [
        Prediction(f"q{i}", "s", "lcf", MATCHED, "A", correct=i < 3, timings={"first_token": time}, sent=sent)
        for i, (time, sent) in enumerate(zip(seconds, sizes))
    ]
    matched = summarize(rows).sets[0].channels[0].cell(MATCHED)
    assert matched is not None and (matched.sent, matched.timings) == (7, {"first_token": 0.3})


def test_the_receiver_as_its_own_sharer_is_part_of_the_verdict() -> None:
    own = cell("arc-c", "lcf", SELF, 50)
    (arc,) = summarize([*run(), *own]).sets
    lcf = next(channel.verdict for channel in arc.channels if channel.channel == "lcf")
    assert lcf is not None and lcf.over_own is not None and lcf.over_own.value == pytest.approx(0.1)


def test_what_is_routed_is_joined_by_id_and_asked_of_all() -> None:
    cheap, dear = cell("s", "none", MATCHED, 3, items=5), cell("s", "lcf", MATCHED, 3, sent=10, items=5)
    (found,) = summarize([*cheap, *reversed(dear)]).sets
    assert [(p.cost, p.accuracy) for p in found.routing] == [(0, 0.6)], "both know the same three"
    others = [replace(row, id=f"other{row.id}") for row in dear]
    with pytest.raises(EvaluationError, match="the same questions"):
        summarize([*cheap, *others])


def extractive(channel: str, control: str, f1: float) -> list[Prediction]:
    shares = [min(1.0, f1 * i / 20) for i in range(40)]
    return [
        Prediction(f"h{i}", "hotpotqa", channel, control, "x", em=float(share == 1), f1=share, sent=100)
        for i, share in enumerate(shares)
    ]


def test_extractive_sets_have_f1_and_exact_matches() -> None:
    rows = [
        *extractive("none", MATCHED, 0.3),
        *extractive("lcf_x", MATCHED, 0.8),
        *extractive("lcf_x", MISMATCHED, 0.3),
    ]
    summary = summarize(rows)
    (hotpot,) = summary.sets
    assert hotpot.measure == "F1"
    channel = hotpot.channels[1]
    matched = channel.cell(MATCHED)
    assert matched is not None
    shares = [min(1.0, 0.8 * i / 20) for i in range(40)]
    assert matched.score.value == pytest.approx(sum(shares) / 40)
    assert matched.exact == sum(share == 1 for share in shares) / 40
    assert hotpot.routing[-1].accuracy == matched.exact < matched.score.value, "a word in common is not right"
    assert channel.verdict is not None and channel.verdict.test == "Wilcoxon" and channel.verdict.crossed
    assert summary.weighted == {}
    text = markdown(summary)
    assert "F1, matched" in text
    assert "EM, matched" in text


# --- on paper
# ---------------------------------------------------------------------------------------------------------


def table(text: str) -> dict[str, dict[str, str]]:
    """The first table of a Markdown text, by its first column."""
    lines = [line for line in text.split("\n\n")[1].splitlines() if "---" not in line]
    header, *rows = ([c.strip() for c in line.strip("|").split(" | ")] for line in lines)
    assert all(len(row) == len(header) for row in rows)
    return {row[0].strip("` "): dict(zip(header, row)) for row in rows}


def test_markdown_leads_with_matched_minus_mismatched(found: Summary) -> None:
    text = markdown(found)
    rows = table(text)
    assert list(rows["lcf"])[1:4] == ["matched − mismatched", "content", "accuracy, matched"]
    assert rows["lcf"]["matched − mismatched"].startswith("+28.0 (+")
    assert rows["lcf"]["content"] == "yes"
    assert rows["lcf"]["accuracy, matched"].startswith("60.0 (")
    assert rows["lcf"]["accuracy, zero"].startswith("31.0 (")
    assert (rows["lcf"]["bytes"], rows["lcf"]["first token, ms"], rows["lcf"]["end, ms"]) == ("7,168", "50.0", "100.0")
    assert rows["lcf"]["first token, times faster than text_50"] == "5.00×"
    assert rows["c2c"]["content"] == NO_CONTENT
    assert rows["text_50"]["content"] == rows["text_50"]["accuracy, mismatched"] == "—"
    sentence = next(line for line in text.splitlines() if line.startswith("- `c2c`"))
    assert "no content shown; the gain of +35.0 points over no message survives another item's message" in sentence
    assert "2 verdicts, corrected together (Holm), at 0.001" in text
    assert "30.0% at 0 bytes" in text and "65.0% at 16,128 bytes" in text
    assert "All multiple-choice sets" not in text


def test_markdown_says_what_was_not_measured() -> None:
    text = markdown(summarize([Prediction("q|0", "s", "a|b", MATCHED, "A", correct=True)]))
    assert "whether content crossed was not measured" in text
    assert "`a\\|b`" in text
    assert text.count("—") >= 5
    alike = [*cell("s", "x", MATCHED, 100, items=200), *cell("s", "x", MISMATCHED, 100, items=200)]
    assert "equivalent within 2.8 points (TOST" in markdown(summarize(alike))
    assert "### All multiple-choice sets" in markdown(summarize([*run(), *cell("openbookqa", "none", MATCHED, 9)]))


def test_json_holds_every_figure(found: Summary) -> None:
    read: Any = json.loads(summary_json(found))
    lcf = read["sets"][0]["channels"][3]
    assert lcf["channel"] == "lcf"
    assert lcf["verdict"]["content"]["value"] == pytest.approx(0.28)
    assert lcf["cells"][0]["score"]["value"] == 0.6
    assert read["sets"][0]["routing"][0] == {"cost": 0.0, "accuracy": 0.3}
    assert read["judged"] == 2


def drawn(path: Path) -> Any:
    from matplotlib.image import imread

    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return imread(path)


def test_pictures_hold_a_mark_a_channel(found: Summary, tmp_path: Path) -> None:
    for against in ("bytes", "first_token"):
        write_png(found, tmp_path / f"{against}.png", against)  # type: ignore[arg-type]
        pixels = drawn(tmp_path / f"{against}.png")
        colours = {tuple((pixel[:3] * 255).round().astype(int)) for row in pixels[::2] for pixel in row[::2]}
        # Matplotlib's first five colours, one a channel.
        assert {(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)} <= colours
    two = summarize([*run(), *extractive("none", MATCHED, 0.3)])
    write_png(two, tmp_path / "two.png", "bytes")
    assert drawn(tmp_path / "two.png").shape[1] > drawn(tmp_path / "bytes.png").shape[1]
    write_png(two, tmp_path / "one.png", "first_token")  # HotpotQA's times were not measured
    assert drawn(tmp_path / "one.png").shape == drawn(tmp_path / "first_token.png").shape


@pytest.mark.parametrize("against", ["bytes", "first_token"])
def test_marks_stand_where_the_figures_are(
    against: Any, found: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    made = plots._figure

    def figure(panels: int) -> Any:
        figures.append(made(panels))
        return figures[-1]

    monkeypatch.setattr(plots, "_figure", figure)
    write_png(found, tmp_path / "map.png", against)
    (panel,) = figures[0].axes
    marks = {}
    for container in panel.containers:
        line, _, (bars,) = container.lines
        ((low, high),) = ([y for _, y in bar] for bar in bars.get_segments())
        name = {f"C{i}": c.channel for i, c in enumerate(found.sets[0].channels)}[line.get_color()]
        marks[name, line.get_fillstyle()] = (*line.get_xdata(), low, *line.get_ydata(), high)
    assert len(marks) == 7  # five channels, two of them with another item's message too
    for (name, fill), got in marks.items():
        channel = next(c for c in found.sets[0].channels if c.channel == name)
        one = channel.cell(MATCHED if fill == "full" else MISMATCHED)
        assert one is not None
        at = one.sent if against == "bytes" else 1000 * one.timings["first_token"]
        assert got == pytest.approx((at, 100 * one.score.low, 100 * one.score.value, 100 * one.score.high))
    steps = [line for line in panel.lines if line.get_label() == "optimal routing"]
    assert len(steps) == (against == "bytes")
    for step in steps:
        assert step.get_drawstyle() == "steps-post"  # what more bytes buy is had from there on
        routing = found.sets[0].routing
        assert list(step.get_xdata()) == [point.cost for point in routing]
        assert list(step.get_ydata()) == pytest.approx([100 * point.accuracy for point in routing])


def test_nothing_to_draw(found: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = summarize([Prediction("q0", "s", "lcf", MATCHED, "A", correct=True)])
    with pytest.raises(EvaluationError, match="first token measured"):
        write_png(bare, tmp_path / "none.png", "first_token")
    with pytest.raises(EvaluationError):
        write_png(found, tmp_path / "none.png", "energy")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"lcf-fast\[eval\]"):
        check_plot()
    with pytest.raises(BackendError):
        write_png(found, tmp_path / "none.png", "bytes")
    assert list(tmp_path.iterdir()) == []


def test_channels_are_compared_on_each_set_that_both_were_run_on(found: Summary) -> None:
    (arc,) = found.sets
    assert [(one.first, one.second) for one in arc.comparisons] == [
        ("lcf", "text_50"), ("lcf", "text_200"), ("lcf", "c2c")]  # fmt: skip
    assert [one.difference.value for one in arc.comparisons] == pytest.approx([0.2, 0.15, -0.05])
    for one in arc.comparisons:
        assert one.sets == ("arc-c",)
        assert f"- {one.sentence}." in markdown(found)
    asked = summarize(run(), pairs=[("c2c", "text_50")]).sets[0].comparisons
    assert [(one.first, one.second) for one in asked] == [("c2c", "text_50")]
    assert asked[0].p_adjusted == asked[0].test.p_value, "corrected for what was not asked"
    for pair in (("lcf", "kvcomm"), ("nobody", "lcf")):
        with pytest.raises(EvaluationError, match="pairs"):
            summarize(run(), pairs=[pair])
