"""The results as a picture: a panel a group, a bar a variant, over the sizes; of a sweep, lines over the length.

Needs matplotlib, and no display.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import number, pooled, size_of
from .sweep_table import is_eager

#: Ours in one hue, what gives the same result in greys and browns, other methods in violet.
_COLOURS = {"reference": "#8c8c8c", "baseline": "#c9a66b", "other": "#a88bc4"}
_OURS = ("#0b6e4f", "#3fa37c", "#7cc9a8", "#b5e2cf")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG or, by the name's ending, an SVG.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # An SVG is committed: the same results are the same bytes, and text is text.
    matplotlib.rcParams.update({"svg.hashsalt": "lcf-fast", "svg.fonttype": "none"})
    if results["settings"].get("sweep"):
        _draw_sweep(plt, results, path)
        return
    width = results["settings"]["bottleneck"][0]
    rows = [row for row in results["rows"] if row["bottleneck"] == width]
    panels = list(dict.fromkeys(row["group"] for row in rows))
    if not panels:
        return
    sizes = {panel: sorted({_size(row) for row in rows if row["group"] == panel}) for panel in panels}
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    bars = max(sum(row["group"] == panel for row in rows) + len(sizes[panel]) for panel in panels)
    figure, axes = plt.subplots(
        down, across, figsize=(7.5 * across, down * (0.9 + 0.24 * bars)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels):
        _panel(axis, [row for row in rows if row["group"] == panel], sizes[panel])
    about = results["about"]
    figure.suptitle(
        f"{about['device']}, {results['settings']['dtype']}, d = {width}: median ms, lower is better "
        f"(copy {results['copy_gb_s']:,.0f} GB/s)",
        fontsize=12,
    )
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row.get("batch", 1), row["tokens"]


def _draw_sweep(plt: Any, results: dict[str, Any], path: Path) -> None:
    """A panel a group: time over length, ours and eager, a line a batch; at the first width and dtype."""
    width, dtype = results["settings"]["bottleneck"][0], results["settings"]["dtype"]
    rows = [row for row in results["rows"] if row["time"] and (row["bottleneck"], row["dtype"]) == (width, dtype)]
    panels = list(dict.fromkeys(row["group"] for row in rows))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    styles = ("-", "--", ":")
    for axis, panel in zip(axes.flat, panels):
        some = [row for row in rows if row["group"] == panel]
        for number_of, batch in enumerate(sorted({row.get("batch", 1) for row in some})):
            for label, colour, mine in (("ours", _OURS[0], False), ("eager", _COLOURS["reference"], True)):
                found: dict[int, float] = {}
                for row in (row for row in some if row.get("batch", 1) == batch):
                    ours = row["kind"] == "ours" and not row["variant"].endswith(", CUDA graph")
                    if is_eager(row) if mine else ours:
                        ms = row["time"]["median_ms"]
                        found[row["tokens"]] = min(ms, found.get(row["tokens"], ms))
                points = sorted(found.items())
                style = styles[number_of % len(styles)]
                axis.plot(
                    [n for n, _ in points],
                    [ms for _, ms in points],
                    style,
                    marker="o",
                    markersize=3,
                    color=colour,
                    label=f"{label}, batch {batch}",
                )
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel="ms")
        axis.set_title(some[0]["title"], fontsize=9, loc="left")
        axis.grid(color="#e0e0e0", linewidth=0.6)
        axis.legend(fontsize=7)
    figure.suptitle(f"{results['about']['device']}, {dtype}, d = {width}: median ms, lower is better", fontsize=12)
    _save(plt, figure, path)


def _panel(axis: Any, rows: list[dict[str, Any]], sizes: list[tuple[int, int]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    labels, places, place = [], [], 0.0
    timed = [row["time"]["median_ms"] for row in rows if row["time"]]
    floor = min(timed, default=1.0) / 4
    for size in sizes:
        ours = 0
        for row in (row for row in rows if _size(row) == size):
            if row["kind"] == "ours":
                colour, ours = _OURS[min(ours, len(_OURS) - 1)], ours + 1
            else:
                colour = _COLOURS[row["kind"]]
            labels.append(f"{row['variant']}  N={size_of(row)}" if len(sizes) > 1 else row["variant"])
            places.append(place)
            _bar(axis, row, place, colour, floor)
            place += 1.0
        place += 0.6
    axis.set_yticks(places, labels, fontsize=8)
    axis.set_ylim(places[-1] + 0.7, places[0] - 0.7)  # the first row on top
    axis.set_xscale("log")
    longest = max((row["time"]["high_ms"] for row in rows if row["time"]), default=1.0)
    axis.set_xlim(floor, longest * (longest / floor) ** 0.6)  # room for the figures beside the bars
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", which="major", color="#e0e0e0", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    first = rows[0]
    layers = "" if first["layers"] == 1 else f" ({first['layers']})"
    tokens = "" if len(sizes) > 1 else f"; N = {size_of(first)}"
    axis.set_title(f"{first['title']}{layers}{tokens}{pooled(first)}", fontsize=9, loc="left")


def _bar(axis: Any, row: dict[str, Any], place: float, colour: str, floor: float) -> None:
    if row["time"] is None:
        wrong = row["within"] is False
        text = "error out of bounds: no time" if wrong else "not run"
        axis.text(floor * 1.1, place, text, va="center", fontsize=7, color="#b00020" if wrong else "#777777")
        return
    timing = row["time"]
    hatch = "///" if row["kind"] == "other" and row["layers"] == 1 else None  # not all layers: no bar to compare with
    axis.barh(place, timing["median_ms"] - floor, left=floor, height=0.78, color=colour, hatch=hatch, edgecolor="white")
    axis.plot([timing["low_ms"], timing["high_ms"]], [place, place], color="black", linewidth=1.0)
    text = f"{number(timing['median_ms'])} ms"
    if row["speedup"] is not None:
        text += f"   {row['speedup']:.2f}× the fastest other"
    axis.text(max(timing["median_ms"], timing["high_ms"]) * 1.08, place, text, va="center", fontsize=7)
