"""What the demo prints, draws and writes. Every figure and every claim is of the run that it is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError
from ..files import whole_file, write_whole
from .channels import CHANNELS, TEXT

if TYPE_CHECKING:
    from rich.console import Console

    from .run import Experiment, Results
    from .statistics import Accuracy

__all__ = ["check_plot", "new_figure", "print_results", "write_json", "write_png"]


def print_results(console: Console, results: Results) -> None:
    """Tables of agents and channels, then one line a claim."""
    console.print()
    recalls = (f"recall of {n}" for n in results.agents[0].recall)
    _table(
        console,
        ("agent", "layers", "width", "parameters", *recalls, "secret table"),
        [
            (
                agent.role,
                str(agent.size.layers),
                str(agent.size.width),
                f"{agent.parameters:,}",
                *(f"{share:.1%}" for share in agent.recall.values()),
                f"{agent.table:.1%}",
            )
            for agent in results.agents
        ],
    )
    for experiment in results.experiments:
        console.print()
        console.print(_heading(experiment), style="bold")
        _table(
            console,
            ("channel", "right", "95% interval", "bytes sent", "first token, ms"),
            [
                (c.name, f"{c.accuracy.share:.1%}", _interval(c.accuracy), f"{c.sent:,}", f"{1000 * c.first_token:.2f}")
                for c in experiment.channels
            ],
        )
        console.print(experiment.verdict.sentence)
    console.print()
    for line in summary(results):
        console.print(line)


def summary(results: Results) -> list[str]:
    """How to read the tables, and what they cost."""
    lines = [
        f"Chance is {results.chance:.1%}. Bytes: one item, with the header. Times to first token: without a network.",
        "Text is the sharer's facts word for word (LCF: the value that the sharer says), one byte a token.",
    ]
    for experiment in results.experiments:
        if (n := experiment.facts) > 1:
            share = 1 / n + (1 - 1 / n) * results.chance
            lines.append(f"With {n} facts, values without whose they are would be right in {share:.1%}.")
    dearer = [e.name for e in results.experiments if e.channel(TEXT).sent < max(c.sent for c in e.channels)]
    if dearer:
        lines.append(f"Facts as short as these take fewer bytes as text than as a message: {'; '.join(dearer)}.")
    if results.quick:
        lines.append("A quick run: nothing has been trained long enough to mean anything.")
    processes = "1 process" if results.workers == 1 else f"{results.workers} processes"
    lines.append(
        f"Took {results.wall:.0f} s, {results.cpu:.0f} s of CPU time in {processes} of one thread"
        f", on {results.machine}; seed {results.seed}."
    )
    return lines


def write_json(results: Results, path: Path) -> None:
    """All figures, times in seconds; whole or not at all."""
    write_whole(path, (json.dumps(asdict(results), indent=1, allow_nan=False) + "\n").encode())


def check_plot() -> None:
    """Refuse before any work where nothing could be drawn at its end."""
    new_figure()


def write_png(results: Results, path: Path) -> None:
    """Accuracy with its intervals, bytes, and time to first token of each channel, by experiment.

    Raises:
        BackendError: matplotlib is not installed. OSError: the file cannot be written.
    """
    figure = new_figure()
    accuracies, sizes, times = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    names = [experiment.name for experiment in results.experiments]
    for number, channel in enumerate(CHANNELS):
        found = [experiment.channel(channel) for experiment in results.experiments]
        at = [i + (number - (len(CHANNELS) - 1) / 2) * 0.16 for i in range(len(found))]
        shares = [c.accuracy.share for c in found]
        low = [max(0.0, c.accuracy.share - c.accuracy.low) for c in found]
        high = [max(0.0, c.accuracy.high - c.accuracy.share) for c in found]
        style = {"width": 0.15, "color": f"C{number}"}
        accuracies.bar(at, [100 * s for s in shares], label=channel, **style)
        errors = [[100 * e for e in low], [100 * e for e in high]]
        accuracies.errorbar(at, [100 * s for s in shares], yerr=errors, fmt="none", ecolor="black", capsize=2, lw=0.8)
        sizes.bar(at, [c.sent for c in found], **style)
        times.bar(at, [1000 * c.first_token for c in found], **style)
    accuracies.axhline(100 * results.chance, color="grey", linestyle=":", linewidth=1)
    accuracies.set(ylabel="right answers, %", ylim=(0, 105), title=f"What the receiver answers (seed {results.seed})")
    accuracies.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)
    sizes.set(ylabel="bytes sent")
    sizes.set_yscale("symlog", linthresh=1)
    sizes.set_ylim(0, 4 * max(c.sent for e in results.experiments for c in e.channels))
    times.set(ylabel="time to first\ntoken, ms")
    times.set_xticks(range(len(names)), names)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def new_figure(size: tuple[float, float] = (9, 8)) -> Any:
    """An empty figure of so many inches.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        expected = "matplotlib, which pip install 'lcf-fast[plot]' brings"
        raise BackendError("plot", expected=expected, got="an environment without it") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heading(experiment: Experiment) -> str:
    e = experiment
    if e.method == "LCF":
        what = "both read the question, the sharer alone knows the table; pairs that the adapter never saw"
    else:
        plural = "s" if e.facts > 1 else ""
        told = f"{e.slots} slot{'s' if e.slots > 1 else ''}" if e.slots else f"{e.spans} span{plural}"
        what = f"the sharer holds {e.facts} fact{plural} ({told}), the receiver two others"
    steps = f"{e.training_steps} steps, {e.training_cpu:.0f} s of CPU time"
    return f"{e.name}: {what}. Adapter: {e.parameters:,} parameters, {steps}"


def _interval(accuracy: Accuracy) -> str:
    return f"{accuracy.low:.1%} to {accuracy.high:.1%}"


def _table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
