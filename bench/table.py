"""The README's table, made from committed results: ``python -m bench.table bench/results/*.json``.

With ``--write README.md`` it goes between the file's markers instead of to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import sweep_table
from .cases import AS_RELEASED
from .report import disturbed, number, plural, size_of

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMMAND = "python -m bench.table --write README.md bench/results/*.json"
COLUMNS = (
    "op", "layers", "N", "d", "error", "ms", "GB/s", "% of copy", "fastest other, ms", "speed-up", "over the reference",
)  # fmt: skip


def _versions(about: dict[str, Any]) -> str:
    names = ("driver", "torch", "triton", "transformers", "python")
    return ", ".join(f"{name} {about[name]}" for name in names if about[name])


def _fastest(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    if row["against"] is None:
        return "–"
    key = ("group", "tokens", "context", "bottleneck", "dtype")
    other = next(
        r
        for r in rows
        if r["variant"] == row["against"] and size_of(r) == size_of(row) and all(r[k] == row[k] for k in key)
    )
    return f"{row['against']}, {number(other['time']['median_ms'])}"


def _line(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    error = "–" if row["error"] is None else number(row["error"]["rel_rms"])
    start = [f"`{row['variant']}`", str(row["layers"]), size_of(row), str(row["bottleneck"]), error]
    if row["time"] is None:
        return [*start, row["reason"] or "–", *["–"] * (len(COLUMNS) - len(start) - 1)]
    return [
        *start,
        number(row["time"]["median_ms"]),
        number(row["gb_s"]),
        f"{100 * row['copy_share']:.0f}%",
        _fastest(row, rows),
        "–" if row["speedup"] is None else f"{row['speedup']:.2f}×",
        "–" if row["speedup_reference"] is None else f"{row['speedup_reference']:.2f}×",
    ]


def _c2c(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What C2C's fuser took, with what it covered."""
    found = []
    for row in sorted((r for r in rows if r["kind"] == "other" and r["time"]), key=lambda r: r["tokens"]):
        covers = "one layer alone" if row["layers"] == 1 else f"{row['layers']} layers"
        how = AS_RELEASED if AS_RELEASED in row["variant"] else ""
        found.append(f"{number(row['time']['median_ms'])} ms for {covers} at N = {size_of(row)}{how}")
    return [f"C2C's fuser at the same shapes, another method: {'; '.join(found)}."] if found else []


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of ours, an op an entry."""
    notes = {row["variant"]: row["note"] for row in rows if row["kind"] == "ours" and row["note"] and row["time"]}
    return [f"`{variant}`: {note}." for variant, note in notes.items()]


def section(results: dict[str, Any]) -> str:
    """One machine's table."""
    about, given = results["about"], results["input"]
    regime = next((row["time"]["regime"] for row in results["rows"] if row["time"]), "hot")
    inputs = "inputs rotated past three times the L2" if regime == "cold" else "inputs repeated"
    threads = "" if about["device_type"] == "cuda" else f", {plural(about['threads'], 'thread')}"
    commit = (about["commit"] or "unknown")[:12] + (" with uncommitted changes" if about["uncommitted_changes"] else "")
    ours = [row for row in results["rows"] if row["kind"] == "ours"]
    groups = list(dict.fromkeys(row["group"] for row in results["rows"]))
    ours.sort(key=lambda row: (groups.index(row["group"]), row["bottleneck"], row.get("batch", 1), row["tokens"]))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(_line(row, results["rows"]) for row in ours)]
    context = f"LCF-X pools {given['context_tokens']} tokens in {plural(given['spans'], 'span')}"
    copy = number(results["copy_gb_s"])
    head = (
        f"**{about['device']}**{threads}, {results['settings']['dtype']}; {_versions(about)}; commit {commit};"
        f" `{results['command']}`. Medians, {inputs}; copying memory in the same run: {copy} GB/s."
        f" {context}. Sharer: {given['sharer']}. Receiver: {given['receiver']}."
    )
    if disturbed(results):
        head += f" **{disturbed(results)}**"
    if results["settings"].get("sweep"):
        return f"{head}\n\n{sweep_table.markdown(results)}"
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    targets = [
        f"Target {t['target']}× over the reference, `{t['op']}`, {t['tokens']} tokens, {t['layers']} layers:"
        f" {'not measured' if t['reached'] is None else format(t['reached'], '.2f') + '×'}"
        f"{'' if t['met'] else ', **missed**'}."
        for t in results["targets"]
    ]
    parts = (targets, _c2c(results["rows"]), _notes(results["rows"]))
    return "\n\n".join([head, body, *(" ".join(part) for part in parts if part)])


def table(files: Sequence[Path]) -> str:
    """Everything between the markers, for these results, by file name.

    Raises:
        ValueError: a file that holds no results of the benchmark. OSError: one that cannot be read.
    """
    parts = []
    for file in sorted(files, key=lambda file: file.name):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if not isinstance(results, dict) or not {"about", "input", "rows", "settings"} <= results.keys():
            raise ValueError(f"{file}: expected results of `python -m bench`")
        parts.append(section(results))
        if file.with_suffix(".svg").exists():
            parts.append(f"![{results['about']['device']}: times](bench/results/{file.stem}.svg)")
    note = (
        "error: relative RMS against float64. % of copy: of the memory traffic that the computation needs at the least,"
        " over that of copying memory. speed-up: over the fastest other way to the same result; below 1 is a loss."
    )
    return "\n\n".join([*parts, note, f"Made by `{COMMAND}`."])


def replaced(readme: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with ``content`` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise ValueError(f"expected {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON", help="files of bench/results/")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put it between {BEGIN} and {END} there")
    given = parser.parse_args(arguments)
    try:
        content = table(given.results)
        page = "" if given.write is None else given.write.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"bench.table: {error}", file=sys.stderr)
        return 1
    if given.write is None:
        print(content)
        return 0
    try:
        text = replaced(page, content)
    except ValueError as error:
        print(f"{given.write}: {error}", file=sys.stderr)
        return 1
    given.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
