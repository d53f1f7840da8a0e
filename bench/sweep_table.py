"""A sweep as tables of milliseconds and speed-ups over eager, and what in it is slower than eager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .report import heading, number, plural, size_of

Row = dict[str, Any]


def is_eager(row: Row) -> bool:
    """Whether it is a plain eager way to the same result."""
    return row["variant"] in ("reference (eager)", "reference, folded")


def speedups(rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
    """Each of our rows that has a time and no graph, with how much faster it is than the fastest eager one."""
    for those in by_size(rows).values():
        eager = [row["time"]["median_ms"] for row in those if is_eager(row) and row["time"]]
        if not eager:
            continue
        for row in those:
            if row["kind"] == "ours" and row["time"] and not row["variant"].endswith(", CUDA graph"):
                yield row, min(eager) / row["time"]["median_ms"]


def losses(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Where ours is slower than eager, the worst first."""
    return sorted((found for found in speedups(rows) if found[1] < 1), key=lambda found: found[1])


def by_size(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of one group at one size, each of its own width and dtype."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = row["group"], row.get("batch", 1), row["tokens"], row["context"], row["bottleneck"], row["dtype"]
        found.setdefault(key, []).append(row)
    return found


def markdown(results: dict[str, Any]) -> str:
    """A table a group: a line a dtype, width and batch, a column a length; then losses, and what was left out."""
    rows = results["rows"]
    best: dict[tuple[Any, ...], str] = {}
    for row, speedup in speedups(rows):
        key = row["group"], row["dtype"], row["bottleneck"], row.get("batch", 1), row["tokens"]
        best.setdefault(key, f"{number(row['time']['median_ms'])} ({number(speedup)}×)")
    parts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        title = next(row["title"] for row in rows if row["group"] == group)
        lengths = sorted({key[4] for key in best if key[0] == group})
        lines = list(dict.fromkeys(key[1:4] for key in best if key[0] == group))
        table = [["dtype", "d", "batch", *(f"N = {length:,}" for length in lengths)]]
        table.append(["---"] * len(table[0]))
        for line in lines:
            table.append([*map(str, line), *(best.get((group, *line, length), "–") for length in lengths)])
        parts += [f"**{title}**", "\n".join(f"| {' | '.join(cells)} |" for cells in table)]
    return "\n\n".join([*parts, " ".join(notes(results))])


def print_results(results: dict[str, Any]) -> None:
    """The whole of it, to stdout."""
    print("\n".join(heading(results)))
    print(f"\n{markdown(results)}\n")
    verdict = f"every error is within bounds ({results['seconds']:.0f} s in all)"
    print(f"OUT OF BOUNDS: {'; '.join(results['failures'])}" if results["failures"] else verdict)


def notes(results: dict[str, Any]) -> list[str]:
    """What is under the tables, a sentence an entry."""
    rows = results["rows"]
    found = ["ms (times faster than the fastest eager way); –: left out or no time."]
    lost = losses(rows)
    if lost:
        named = "; ".join(f"`{row['variant']}` at {_said(row)}: {speedup:.2f}×" for row, speedup in lost[:12])
        more = f"; and {len(lost) - 12} more" if len(lost) > 12 else ""
        found.append(f"Slower than eager in {len(lost)} of {len(list(speedups(rows)))}: {named}{more}.")
    elif rows:
        found.append(f"Slower than eager: none of {len(list(speedups(rows)))}.")
    reasons: dict[str, int] = {}
    for one in results["left_out"]:
        reasons[one["why"]] = reasons.get(one["why"], 0) + 1
    found += [f"Left out, {why}: {plural(count, 'size')}." for why, count in reasons.items()]
    return found


def _said(row: Row) -> str:
    return f"N = {size_of(row)}, d = {row['bottleneck']}, {row['dtype']}"
