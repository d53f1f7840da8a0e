"""A summary as Markdown. What was not run or not measured is said so, as a dash."""

from __future__ import annotations

from collections.abc import Sequence

from .choice import FrontierPoint
from .predictions import CONTROLS, MATCHED
from .statistics import Interval
from .summary import ChannelResult, SetResult, Summary
from .verdicts import NO_CONTENT

__all__ = ["markdown"]

_DASH = "—"


def markdown(summary: Summary) -> str:
    """A table a set, led by matched minus mismatched, with a sentence a channel; then what sums up all sets."""
    parts = [_set(found) for found in summary.sets]
    if len(summary.weighted) and len([s for s in summary.sets if s.measure == "accuracy"]) > 1:
        parts.append(_weighted(summary))
    parts.append(_notes(summary))
    return "\n\n".join(parts) + "\n"


def _set(found: SetResult) -> str:
    controls = [control for control in CONTROLS if any(c.cell(control) for c in found.channels)]
    texts = list(dict.fromkeys(text for channel in found.channels for text in channel.speedups))
    extractive = found.measure == "F1"
    header = ["channel", "matched − mismatched", "content", *(f"{found.measure}, {control}" for control in controls)]
    header += [*(["EM, matched"] if extractive else []), "bytes", "first token, ms", "end, ms"]
    header += [f"first token, times faster than {text}" for text in texts]
    rows = []
    for channel in found.channels:
        row = [f"`{channel.channel}`", _content(channel), _said(channel)]
        for control in controls:
            cell = channel.cell(control)
            row.append(_interval(cell.score) if cell else _DASH)
        matched = channel.cell(MATCHED)
        if extractive:
            row.append(_DASH if matched is None or matched.exact is None else f"{100 * matched.exact:.1f}")
        row.append(_DASH if matched is None or matched.sent is None else f"{matched.sent:,.0f}")
        for part in ("first_token", "end"):
            seconds = matched.timings.get(part) if matched else None
            row.append(_DASH if seconds is None else f"{1000 * seconds:.1f}")
        row += [f"{channel.speedups[text]:.2f}×" if text in channel.speedups else _DASH for text in texts]
        rows.append(row)
    text = f"### {found.set} ({found.questions:,} questions)\n\n{_table(header, rows)}"
    sentences = [f"- `{c.channel}`: {c.verdict.sentence}.{_alike(c)}" for c in found.channels if c.verdict]
    if sentences:
        text += "\n\n" + "\n".join(sentences)
    if found.comparisons:
        text += "\n\nAgainst each other, with the matching message:\n\n"
        text += "\n".join(f"- {comparison.sentence}." for comparison in found.comparisons)
    if len(found.routing) > 1:
        points = ", ".join(f"{100 * p.accuracy:.1f}% at {p.cost:,.0f} bytes" for p in _few(found.routing))
        right = "exact matches" if extractive else "right answers"
        text += f"\n\nOptimal routing ({right} against mean bytes a question): {points}."
    return text


def _content(channel: ChannelResult) -> str:
    return _DASH if channel.verdict is None else _interval(channel.verdict.content, signed=True)


def _said(channel: ChannelResult) -> str:
    if channel.verdict is None:
        return _DASH
    return "yes" if channel.verdict.crossed else NO_CONTENT


def _alike(channel: ChannelResult) -> str:
    found = channel.equivalence
    if found is None or not found.equivalent:
        return ""
    points = f"{100 * found.margin:.1f} points"
    return f" Matched and mismatched are equivalent within {points} (TOST, p = {found.p_value:.2g})."


def _weighted(summary: Summary) -> str:
    rows = [
        [f"`{name}`", f"{100 * a.share:.2f}", f"{100 * a.low:.2f} to {100 * a.high:.2f}", f"{a.items:,}"]
        for name, a in summary.weighted.items()
    ]
    header = ["channel", "weighted accuracy, matched", "95% interval", "questions"]
    return f"### All multiple-choice sets\n\n{_table(header, rows)}"


def _notes(summary: Summary) -> str:
    text = (
        "Scores in percent, with 95% intervals (accuracy: Wilson; F1 and differences: bootstrap, paired; where all are"
        " alike: exact). "
        "Bytes and times: medians with the matching message; times are of the call that the question was in."
    )
    if summary.judged:
        what = f"{summary.judged} verdict" + ("s, corrected together (Holm)" if summary.judged > 1 else "")
        text += f" {what}, at {summary.alpha:g}; content: matched against another item's message."
    else:
        text += " No channel was run with another item's message: whether content crossed was not measured."
    return "\n\n".join([text, *(f"{note}." for note in summary.notes)])


def _few(points: Sequence[FrontierPoint], most: int = 6) -> list[FrontierPoint]:
    """At most so many, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _interval(interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
