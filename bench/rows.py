"""A row of the results, as plain JSON: one variant of one group at one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cases import Group, Shape, Work
from .errors import Judgement
from .timing import Timing


def new_row(
    group: Group,
    shape: Shape,
    work: Work,
    *,
    op: str,
    variant: str,
    kind: str,
    spans: int | None,
    dtype: str,
    within: bool | None,
    judgement: Judgement | None,
    note: str = "",
    reason: str = "",
) -> dict[str, Any]:
    """A row without a time.

    Args:
        shape: its ``layers`` are those that this variant covers.
        spans: that are pooled; None: nothing is.
        reason: why it has no time; empty: `add_time` is to come.
    """
    config = shape.config
    return {
        "group": group.name,
        "title": group.title,
        "op": op,
        "variant": variant,
        "kind": kind,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "context": shape.context if config.cross_context else None,
        "spans": spans,
        "layers": shape.layers,
        "bottleneck": config.bottleneck,
        "dtype": dtype,
        "sharer": [config.sharer.layers, config.sharer.kv_heads, config.sharer.head_dim],
        "receiver": [config.receiver.layers, config.receiver.kv_heads, config.receiver.head_dim],
        "bytes": work.bytes,
        "flops": work.flops,
        "within": within,
        "error": judgement.to_dict() if judgement else None,
        "note": note or None,
        "time": None,
        "time_hot": None,
        "reason": reason or None,
        **dict.fromkeys(("gb_s", "copy_share", "tflop_s", "kernels", "peak_mb", "saved_mb", "activation_mb")),
        **dict.fromkeys(("host_us", "speedup", "against", "speedup_reference")),
    }


def add_time(row: dict[str, Any], timing: Timing, regime: str, bandwidth: float) -> None:
    """Set the time, and the rates that follow from it.

    Args:
        regime: ``cold`` or ``hot``.
        bandwidth: of copying memory on the same device, GB/s.
    """
    row["time"] = {**timing.to_dict(), "regime": regime}
    row["gb_s"] = row["bytes"] / timing.median_ms / 1e6
    row["copy_share"] = row["gb_s"] / bandwidth
    row["tflop_s"] = row["flops"] / timing.median_ms / 1e9


def median_ms(row: Mapping[str, Any]) -> float:
    return float(row["time"]["median_ms"])


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Ours against the fastest that gives the same result, and against the naive reference. Losses are below 1."""
    rivals = [row for row in rows if row["kind"] in ("reference", "baseline") and row["time"]]
    if not rivals:
        return
    fastest = min(rivals, key=median_ms)
    naive = next((row for row in rivals if row["kind"] == "reference"), None)
    for row in rows:
        if row["kind"] == "ours" and row["time"]:
            row["speedup"], row["against"] = median_ms(fastest) / median_ms(row), fastest["variant"]
            row["speedup_reference"] = median_ms(naive) / median_ms(row) if naive else None
