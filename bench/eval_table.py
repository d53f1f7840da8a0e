"""The README's table of channels, from a committed summary of `lcf-fast eval` (`bench.published` puts it there)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONTROLS = ("matched", "mismatched", "self", "zero", "random")
_DASH = "—"


def table(file: Path) -> str:
    """Everything between the markers: a table a set, in percent with 95% intervals."""
    summary = json.loads(file.read_text(encoding="utf-8"))
    parts = [_set(found) for found in summary["sets"]]
    note = (
        f"{summary['judged']} verdicts, corrected together (Holm), at {summary['alpha']:g}. Times: of a whole batch, "
        "from its start to its first tokens."
    )
    return "\n\n".join([*parts, note])


def _set(found: dict[str, Any]) -> str:
    header = ["channel", *_CONTROLS, "matched − mismatched", "content crossed", "bytes", "first token, ms"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for channel in found["channels"]:
        cells = {cell["control"]: cell for cell in channel["cells"]}
        matched, verdict = cells["matched"], channel["verdict"]
        scores = [_interval(cells[name]["score"]) if name in cells else _DASH for name in _CONTROLS]
        content = _DASH if verdict is None else _interval(verdict["content"], sign="+")
        crossed = _DASH if verdict is None else "yes" if verdict["crossed"] else "no content shown"
        measured = [f"{matched['sent']:,.0f}", f"{1000 * matched['timings']['first_token']:.0f}"]
        rows.append([f"`{channel['channel']}`", *scores, content, crossed, *measured])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"**{found['set']}** ({found['questions']:,} questions; {found['measure']}, %)\n\n{lines}"


def _interval(interval: dict[str, float], sign: str = "") -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"
