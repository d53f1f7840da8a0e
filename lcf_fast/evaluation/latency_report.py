"""The latency protocol's cells as Markdown. What was not measured is a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .latency import PARTS, Protocol, said
from .report import _DASH, _table

__all__ = ["latency_markdown"]

_HEADS = {
    "sharer": "sharer",
    "communication": "communication",
    "receiver": "receiver's prefill",
    "first_token": "first token",
    "end": "end",
}


def latency_markdown(cells: Sequence[Mapping[str, Any]]) -> str:
    """A table a cell, and what was measured, where."""
    parts = [_cell(cell) for cell in cells]
    return "\n\n".join([*parts, _notes(cells)]) + "\n"


def _cell(cell: Mapping[str, Any]) -> str:
    channels, settings = cell["channels"], cell["settings"]
    texts = list(dict.fromkeys(text for one in channels.values() for text in one["speedups"]))
    header = ["channel", *(f"{_HEADS[part]}, ms" for part in PARTS), "communication, % of first token"]
    header += ["bytes", "launches", *(f"first token, times faster than {text}" for text in texts)]
    rows = []
    for name, one in channels.items():
        row = [f"`{name}`"]
        for part in PARTS:
            value = one["ms"][part]["median"]
            row.append(_ms(value) if value else _DASH)
        row.append(f"{100 * one['communication_share']:.1f}" if one["ms"]["communication"]["median"] else _DASH)
        row.append(f"{one['bytes']:,.0f}")
        row.append(_DASH if one["launches"] is None else f"{one['launches']:,}")
        row += [f"{one['speedups'][text]:.2f}×" for text in texts]
        rows.append(row)
    title = f"### {cell['group'].capitalize()}, batch {cell['batch']}"
    protocol = Protocol(**{name: settings[name] for name in Protocol.__dataclass_fields__})
    who = f"Sharer: {settings['sharer']}. Receiver: {settings['receiver']}. Precision {settings['precision']}."
    return f"{title}\n\n{who} {said(protocol).capitalize()}.\n\n{_table(header, rows)}"


def _machine(about: Mapping[str, Any]) -> str:
    threads = f", {about['threads']} threads" if about["device_type"] == "cpu" else ""
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "transformers") if about[name])
    commit = ""
    if about["commit"]:
        commit = f", commit {about['commit'][:12]}{' with changes' if about['uncommitted_changes'] else ''}"
    return f"{about['device']}{threads}, {versions}{commit}"


def _notes(cells: Sequence[Mapping[str, Any]]) -> str:
    text = (
        "Times: medians over the rounds, of a whole batch, from the call on; `latency.json` has quartiles. Sharer and"
        " receiver read one after the other. The first token comes after all parts and a step of the receiver."
        " Bytes: of one request. Launches: kernels that the communication of a batch runs on a GPU."
    )
    if any("c2c_as_released" in cell["channels"] for cell in cells):
        text += " `c2c_as_released`: operation by operation as C2C's released code, `c2c`: the same fuser in ours."
    machines = list(dict.fromkeys(_machine(cell["about"]) for cell in cells))
    return f"{text} Measured on {'; '.join(machines)}."


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
