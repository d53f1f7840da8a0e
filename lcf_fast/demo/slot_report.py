"""What a study of slots shows: a table, and accuracy against bytes as a picture. Every figure is of the study given."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..files import whole_file, write_whole
from .channels import NONE, TEXT
from .report import new_figure
from .study_methods import method_of
from .tasks import CHANCE

__all__ = ["study_markdown", "write_study"]


def write_study(study: dict[str, Any], out: Path, *, plot: bool = True) -> list[Path]:
    """``study.json``, ``study.md`` and ``study.png`` in a folder."""
    written = [out / "study.json", out / "study.md"]
    write_whole(written[0], (json.dumps(study, indent=1) + "\n").encode())
    write_whole(written[1], study_markdown(study).encode())
    if plot:
        _draw(study, out / "study.png")
        written.append(out / "study.png")
    return written


def study_markdown(study: dict[str, Any]) -> str:
    """A row a method: right answers with the matching message, and with another item's, by number of facts."""
    facts, seeds = study["plan"]["facts"], study["seeds"]
    header = ["method", "parameters", "bytes", *(f"{n} fact{'s' if n > 1 else ''}" for n in facts), "first token, ms"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    rows.append([NONE, "", "0", *(_of_text(study, "none", n) for n in facts), _time(study, NONE)])
    for cells in _methods(study):
        first = cells[0]
        scores = [_score(cells, "matched", n) + f" / {_mean(cells, 'mismatched', n):.1f}" for n in facts]
        name, sent = method_of(first["method"]).name, ", ".join(f"{n:,}" for n in dict.fromkeys(_sizes(first, facts)))
        rows.append([name, f"{first['parameters']:,}", sent, *scores, _time(study, first["method"])])
        for k, by_facts in sorted(first["kept"].items(), key=lambda pair: int(pair[0])):
            cut = [_score([{**c, "kept": c["kept"][k]} for c in cells], "kept", n) for n in by_facts]
            rows.append([f"… the first {k} of them", "", "", *cut, ""])
    told = [f"{2 * n}" for n in facts]
    rows.append([TEXT, "", ", ".join(told), *(_of_text(study, "told", n) for n in facts), _time(study, TEXT)])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    many = len(seeds) > 1
    note = (
        "Right answers, %, with the matching message / with another item's"
        f"{f': means of {len(seeds)} seeds (least to greatest)' if many else f' (seed {seeds[0]})'}; "
        f"chance is {100 * CHANCE:.1f}. Each of {study['plan']['items']:,} items; {study['plan']['steps']:,} steps of "
        "training a method, on one to so many facts at a time. Zero messages: at most "
        f"{100 * _greatest(study, 'zero'):.1f}%; another item's: at most {100 * _greatest(study, 'mismatched'):.1f}%."
    )
    return f"{lines}\n\n{note}\n"


def _methods(study: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The cells of each method, in order; numbers of facts as text, as JSON has them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in json.loads(json.dumps(study["cells"])):
        found.setdefault(cell["method"], []).append(cell)
    return list(found.values())


def _sizes(cell: dict[str, Any], facts: Sequence[int]) -> list[int]:
    return [cell["sent"][str(n)] for n in facts]


def _time(study: dict[str, Any], name: str) -> str:
    return f"{1000 * study['first_token'][name]:.1f}"


def _shares(cells: Sequence[dict[str, Any]], what: str, facts: int | str) -> list[float]:
    return [cell[what][str(facts)] / cell["items"] for cell in cells]


def _mean(cells: Sequence[dict[str, Any]], what: str, facts: int | str) -> float:
    return 100 * mean(_shares(cells, what, facts))


def _score(cells: Sequence[dict[str, Any]], what: str, facts: int | str) -> str:
    return _spread(_shares(cells, what, facts))


def _spread(shares: Sequence[float]) -> str:
    text = f"{100 * mean(shares):.1f}"
    return text if len(shares) == 1 else f"{text} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def _of_text(study: dict[str, Any], what: str, facts: int) -> str:
    return _spread([row[what][str(facts)] / row["items"] for row in json.loads(json.dumps(study["text"]))])


def _greatest(study: dict[str, Any], what: str) -> float:
    return max(right / cell["items"] for cell in study["cells"] for right in cell[what].values())


def _draw(study: dict[str, Any], path: str | os.PathLike[str]) -> None:
    figure = new_figure((8.0, 5.0))
    panel = figure.subplots()
    shown: dict[str, list[list[dict[str, Any]]]] = {"o-": [], "s": [], "^": [], "D": []}
    for cells in _methods(study):
        method = method_of(cells[0]["method"])
        if method.variant in ("", "per_span"):
            style = {"lcf_x": "s", "lcf": "^"}.get(method.key, "D" if method.variant else "o-")
            shown[style].append(cells)
    for number, facts in enumerate(study["plan"]["facts"]):
        label: str | None = f"{facts} fact{'s' if facts > 1 else ''}"
        for style, methods in shown.items():
            if not methods:
                continue
            shares = [[100 * share for share in _shares(cells, "matched", facts)] for cells in methods]
            middle = [mean(each) for each in shares]
            low = [m - min(each) for m, each in zip(middle, shares)]
            high = [max(each) - m for m, each in zip(middle, shares)]
            sizes = [cells[0]["sent"][str(facts)] for cells in methods]
            panel.errorbar(sizes, middle, yerr=[low, high], fmt=style, color=f"C{number}", capsize=2, lw=1, label=label)
            label = None
    panel.axhline(100 * CHANCE, color="grey", linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set(xlabel="bytes of a message, header and all", ylabel="right answers, %", ylim=(0, 105))
    title = "circles: 1, 2, 4 ... slots; diamonds: slots a fact; squares: LCF-X; triangles: LCF; bars: all seeds"
    panel.set_title(title, fontsize=9)
    panel.legend(fontsize=8, frameon=False)
    with whole_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=130)
