"""A summary as pictures: scores against bytes, and against the time to the first token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from ..errors import BackendError
from ..files import whole_file
from .failures import EvaluationError
from .predictions import MATCHED, MISMATCHED
from .summary import CellResult, SetResult, Summary

__all__ = ["check_plot", "write_png"]

Against = Literal["bytes", "first_token"]


def check_plot() -> None:
    """Refuse before any work where nothing could be drawn at its end."""
    _figure(1)


def write_png(summary: Summary, path: str | os.PathLike[str], against: Against) -> None:
    """One panel a set: the score with the matching message (full), and with another item's (hollow).

    Args:
        against: "bytes" or "first_token" (milliseconds): medians. Channels where that was not measured are left out.

    Raises:
        EvaluationError: nothing to draw. BackendError: matplotlib is not installed. OSError: as the system says.
    """
    if against not in ("bytes", "first_token"):
        raise EvaluationError("against", expected="'bytes' or 'first_token'", got=repr(against))
    drawn = [found for found in summary.sets if any(_at(c.cell(MATCHED), against) is not None for c in found.channels)]
    if not drawn:
        expected = f"a channel with {against.replace('_', ' ')} measured, matched"
        raise EvaluationError("summary", expected=expected, got="none")
    names = list(dict.fromkeys(channel.channel for found in drawn for channel in found.channels))
    figure = _figure(len(drawn))
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, found in zip(panels, drawn):
        _draw(panel, found, against, names)
    if any(channel.cell(MISMATCHED) for found in drawn for channel in found.channels):
        figure.suptitle("full: the matching message; hollow: another item's", fontsize=9)
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    with whole_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=130)


def _draw(panel: Any, found: SetResult, against: Against, names: list[str]) -> None:
    for channel in found.channels:
        for control, fill in ((MATCHED, "full"), (MISMATCHED, "none")):
            cell = channel.cell(control)
            at = _at(cell, against)
            if cell is None or at is None:
                continue
            score = cell.score
            number = names.index(channel.channel)
            error = [[100 * max(0.0, score.value - score.low)], [100 * max(0.0, score.high - score.value)]]
            panel.errorbar(
                [at],
                [100 * score.value],
                yerr=error,
                fmt="os^"[number // 10 % 3],
                fillstyle=fill,
                color=f"C{number % 10}",
                capsize=2,
                lw=0.8,
                label=channel.channel if control == MATCHED else None,
            )
    if against == "bytes":
        panel.set_xscale("symlog", linthresh=1)  # channels that send nothing stand at 0
        panel.set(xlim=(-0.5, None), xlabel="bytes sent (median)")
        if len(found.routing) > 1 and found.measure == "accuracy":  # of exact matches, it has no place among F1
            costs = [point.cost for point in found.routing]
            shares = [100 * point.accuracy for point in found.routing]
            panel.step(costs, shares, where="post", color="grey", linestyle=":", lw=1, label="optimal routing")
    else:
        panel.set(xlim=(0, None), xlabel="time to first token, ms (median)")
    panel.set(ylabel=f"{found.measure}, %", title=f"{found.set} ({found.questions:,} questions)")


def _at(cell: CellResult | None, against: Against) -> float | None:
    if cell is None:
        return None
    if against == "bytes":
        return cell.sent
    seconds = cell.timings.get("first_token")
    return None if seconds is None else 1000 * seconds


def _figure(panels: int) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        expected = "matplotlib, which pip install 'lcf-fast[eval]' brings"
        raise BackendError("plot", expected=expected, got="an environment without it") from None
    figure = Figure(figsize=(1 + 4 * panels, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
