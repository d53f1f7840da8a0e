"""The terminal's table, with rich where it is installed, and the progress line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .cases import ALL_GROUPS

try:
    from rich.console import Console
except ImportError:  # the job itself does not need it
    Console = None  # type: ignore[assignment,misc]

COLUMNS = (
    "variant", "error", "ms", "quartiles", "hot ms", "GB/s", "% copy", "TFLOP/s", "kernels", "peak MB", "host µs",
    "speed-up",
)  # fmt: skip
#: Share of the time spent waiting for a core, above which the times say little.
MOST_WAITED = 0.05
GPU_ONLY = ("hot ms", "kernels", "peak MB", "host µs")


class Steps:
    """Progress: what is being done and for how long, on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True) if Console is not None and sys.stderr.isatty() else None

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show ``text`` while the context lasts, and its seconds after."""
        started = time.perf_counter()
        if self.console is not None:
            with self.console.status(f"{text} ..."):
                yield
        else:
            yield
        print(f"  {time.perf_counter() - started:6.1f} s  {text}", file=sys.stderr, flush=True)


def to_json(results: Mapping[str, Any]) -> bytes:
    """Results as they lie in files."""
    return (json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent where that is short; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:.{digits}f}" if "e" in text else text


def plural(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")


def size_of(row: dict[str, Any]) -> str:
    """N, and before it the batch where that is more than one row."""
    batch = row.get("batch", 1)  # older results have none: one row
    return f"{batch} × {row['tokens']}" if batch > 1 else str(row["tokens"])


def pooled(row: dict[str, Any]) -> str:
    """What is pooled, where the row's N does not say it; and in how many spans, where there are any."""
    if row["context"] is None:
        return ""
    spans = "" if row["spans"] is None else f" in {plural(row['spans'], 'span')}"
    alone = row["group"] in (group.name for group in ALL_GROUPS if not group.prompt)
    return spans if alone else f", context {row['context']}{spans}"


def cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    """A row under these columns. One without a time ends at its error: `closing` says why."""
    error = "–" if row["error"] is None else number(row["error"]["rel_rms"])
    if row["within"] is False:
        error += " ✗"
    if row["time"] is None:
        return [row["variant"], error, "–"]
    timing, hot = row["time"], row["time_hot"]
    values = {
        "variant": row["variant"],
        "error": error,
        "ms": number(timing["median_ms"]),
        "quartiles": f"{number(timing['low_ms'])}–{number(timing['high_ms'])}",
        "hot ms": number(hot["median_ms"] if hot else None),
        "GB/s": number(row["gb_s"]),
        "% copy": f"{100 * row['copy_share']:.0f}",
        "TFLOP/s": number(row["tflop_s"]),
        "kernels": "–" if row["kernels"] is None else str(row["kernels"]),
        "peak MB": number(row["peak_mb"]),
        "host µs": number(row["host_us"]),
        "speed-up": "" if row["speedup"] is None else f"{row['speedup']:.2f}×",
    }
    return [values[name] for name in names]


def sections(results: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows under one heading: a group at one size."""
    seen: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        key = row["group"], row.get("batch", 1), row["tokens"], row["context"], row["bottleneck"], row["dtype"]
        seen.setdefault(key, []).append(row)
    for rows in seen.values():
        row = rows[0]
        size = f"N = {size_of(row)}{pooled(row)}, d = {row['bottleneck']}"
        layers = "" if row["layers"] == 1 else f" ({row['layers']})"
        yield f"{row['title']}{layers}: {size}, {row['dtype']}", rows


def heading(results: dict[str, Any]) -> list[str]:
    """What the figures hold for, a line an entry."""
    about, given = results["about"], results["input"]
    names = ("driver", "torch", "triton", "transformers", "python")
    versions = ", ".join(f"{name} {about[name]}" for name in names if about[name])
    threads = "" if about["device_type"] == "cuda" else f", {about['threads']} threads"
    commit = (about["commit"] or "unknown")[:12] + (" with uncommitted changes" if about["uncommitted_changes"] else "")
    regime = "inputs repeated (hot)"
    if about["device_type"] == "cuda":
        regime = "inputs rotated past three times the L2 (cold)"
    lines = [
        f"{about['device']}{threads}; {versions}; commit {commit}",
        f"sharer: {given['sharer']}",
        f"receiver: {given['receiver']}",
        f"caches: prefill of {given['text']}, {given['prompt_tokens']} tokens;"
        f" LCF-X reads {given['context_tokens']} others in {plural(given['spans'], 'paragraph')}",
        f"adapter: {given['adapter']}; downloaded: {given['downloaded']}",
        "error: relative RMS against float64; ✗ is out of bounds, and gets no time.",
        f"ms: median, {regime}. Copying memory here: {number(results['copy_gb_s'])} GB/s;"
        f" matrix products: {number(results['matmul_tflop_s'])} TFLOP/s.",
        "GB/s, TFLOP/s: what the computation must move and do at the least, over that time.",
        "speed-up: over the fastest of all others that give the same result (C2C is another method).",
    ]
    if disturbed(results):
        lines.append(disturbed(results))
    return lines


def disturbed(results: dict[str, Any]) -> str:
    """That other work took the CPU from this run, if it did."""
    share = results["waited_share"]
    if share is None or share <= MOST_WAITED:
        return ""
    return f"OTHER WORK WAS RUNNING: {100 * share:.0f}% of the time was waiting for a core; the times are too long."


def _style(row: dict[str, Any]) -> str:
    if row["within"] is False:
        return "bold red"
    if row["kind"] == "ours":
        return "bold"
    return "dim" if row["time"] is None else ""


def print_results(results: dict[str, Any]) -> None:
    """The whole report, to stdout; in colours on a terminal that has them, where rich is installed."""
    lines = [("", ""), *((line, "dim") for line in heading(results)), *table(results), ("", ""), *closing(results)]
    if Console is None or not sys.stdout.isatty():
        print("\n".join(text for text, _ in lines))
        return
    console = Console(highlight=False)
    for text, style in lines:
        console.print(text, style=style or None, markup=False)


def table(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows under their headings, each line with its style; columns have one width all through."""
    on_gpu = results["about"]["device_type"] == "cuda"
    names = [name for name in COLUMNS if on_gpu or name not in GPU_ONLY]
    parts = [(title, rows, [cells(row, names) for row in rows]) for title, rows in sections(results)]
    filled = [line for _, _, lines in parts for line in lines]
    widths = [max([len(name), *(len(line[i]) for line in filled if i < len(line))]) for i, name in enumerate(names)]

    def padded(line: Sequence[str]) -> str:
        return "  " + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])

    found = []
    for title, rows, lines in parts:
        found += [("", ""), (title, "bold cyan"), (padded(names), "dim")]
        found += [(padded(line), _style(row)) for row, line in zip(rows, lines)]
    return found


def closing(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands under the table: reasons, notes, interpreted kernels, targets, the verdict; each with its style."""
    lines: list[tuple[str, str]] = []
    reasons: dict[str, list[str]] = {}
    for row in results["rows"]:
        if row["time"] is None and row["reason"]:
            reasons.setdefault(row["reason"], []).append(f"{row['variant']} ({row['group']}, N = {size_of(row)})")
        if row["saved_mb"] is not None:
            text = f"{row['variant']}, N = {size_of(row)}: {number(row['saved_mb'])} MB kept between the passes"
            if row["activation_mb"] is not None:
                text += f", {number(row['activation_mb'])} MB of activations at the highest"
            lines.append((text, "dim"))
        if row["note"] and row["time"]:
            text = f"{row['variant']}, N = {size_of(row)}: {row['note']}"
            extrapolated = _extrapolated(row, results["rows"])
            lines.append((text + extrapolated, "dim"))
    for reason, who in reasons.items():
        style = "bold red" if reason.startswith("no time") else "dim"
        shown = ", ".join(who) if len(who) <= 3 or style != "dim" else f"{', '.join(who[:3])} and {len(who) - 3} more"
        lines.append((f"{shown}: {reason}", style))
    lines += [(text, "yellow") for text in left_out(results["left_out"])]
    lines += _interpreted_lines(results["interpreted"])
    for target in results["targets"]:
        reached = "not measured" if target["reached"] is None else f"{target['reached']:.2f}×"
        lines.append(
            (
                f"target: {target['op']}, {target['tokens']} tokens, {target['layers']} layers,"
                f" {target['target']}× over the naive reference: {reached}, {'met' if target['met'] else 'MISSED'}",
                "green" if target["met"] else "yellow",
            )
        )
    if results["failures"]:
        lines.append((f"OUT OF BOUNDS: {'; '.join(results['failures'])}", "bold red"))
    else:
        lines.append((f"every error is within bounds ({results['seconds']:.0f} s in all)", "green"))
    return lines


def left_out(points: Sequence[dict[str, Any]]) -> list[str]:
    """What was not run, a reason a line."""
    reasons: dict[str, list[str]] = {}
    for point in points:
        reasons.setdefault(point["why"], []).append(f"{point['group']} {size_of(point)}, d = {point['bottleneck']}")
    return [f"left out, {why}: {'; '.join(some)}" for why, some in reasons.items()]


def _extrapolated(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """C2C ran one layer: what all of them would take, said to be no measurement."""
    ours = [r for r in rows if r["group"] == row["group"] and size_of(r) == size_of(row) and r["kind"] == "ours"]
    if row["kind"] != "other" or not ours or ours[0]["layers"] == row["layers"]:
        return ""
    times = ours[0]["layers"] / row["layers"]
    return f"; {ours[0]['layers']} layers, extrapolated, not measured: {number(times * row['time']['median_ms'])} ms"


def _interpreted_lines(checks: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    if not checks:
        return []
    good = [check for check in checks if check["within"]]
    dtypes = sorted({str(check["dtype"]) for check in checks})
    layers = max(check["layers"] for check in checks)
    lines = [
        (
            f"Triton kernels in the interpreter (no GPU here; not timed), {checks[0]['tokens']} tokens, up to"
            f" {layers} layers, {', '.join(dtypes)}: {len(good)} of {len(checks)} within bounds",
            "green" if len(good) == len(checks) else "bold red",
        )
    ]
    for op in dict.fromkeys(check["op"] for check in checks):
        parts = [_interpreted_part(check) for check in checks if check["op"] == op]
        bad = any(check["within"] is not True for check in checks if check["op"] == op)
        lines.append((f"  {op}: {'; '.join(parts)}", "bold red" if bad else "dim"))
    return lines


def _interpreted_part(check: dict[str, Any]) -> str:
    if check["error"] is None:
        return f"{check['dtype']} {check['reason']}"
    verdict = "" if check["within"] else " OUT OF BOUNDS"
    error = check["error"]
    used = "beyond" if error["used"] is None else f"{100 * error['used']:.0f}%"
    return f"{check['dtype']} error {number(error['rel_rms'])}, {used} of its bound{verdict}"
