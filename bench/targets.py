"""The targets of a GPU, beside what a run measured: ``python -m bench.targets RESULTS.json [LATENCY.json]``.

Takes any of the results of the benchmark, of its sweep, of ``lcf-fast latency`` and the summary of ``make gpu``, all of
one GPU, and tells them apart. A target whose rows are missing is not measured. Floors are counted by `bench.cases`:
every byte read and written once, every product done once, at the rates that the same run measured. What is asked of
the GPU alone is read off CUDA graphs, since a plain call lasts as long as its host, with the plain call beside it; how
often ours is faster than something else, off calls of one kind. The exit status is 1 where a target is missed or not
measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import cases
from .measures import (
    Bandwidth,
    Best,
    Evidence,
    Failed,
    Field,
    Floor,
    Latency,
    Measure,
    Ms,
    OutOfBounds,
    Pick,
    Ratio,
    Slowest,
    Unmeasured,
    evidence_of,
    floors,
)
from .report import number
from .settings import LONGEST
from .table import replaced

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- targets:begin -->", "<!-- targets:end -->"
COMMAND = "python -m bench.targets --write bench/NOTES.md"
EXAMPLES = """examples:
  python -m bench.targets out/gpu/bench/results.json out/gpu/latency/latency.json out/gpu/summary.json
  python -m bench.targets --write bench/NOTES.md bench/results/*.json
  python -m bench.targets                             what is asked and what it must cost, with nothing measured
"""
#: What floors are counted for until a run has measured its own: an H200 through PyTorch, random data.
COPY_GB_S, MATMUL_TFLOP_S = 4300.0, 790.0


@dataclass(frozen=True)
class Target:
    """One figure that is asked for.

    Attributes:
        item: which part of the list it belongs to.
        name: what is asked, without the bound.
        measure: where it is read.
        bound: what is enough.
        at_most: whether the figure must not be above the bound; else not below.
        unit: ``ms``, ``µs``, ``×`` (times), ``%`` (of 1) or empty (a count).
        floor: what the computation must move and do, where that limits it.
        also: another figure to be shown beside it, with its name and unit.
    """

    item: str
    name: str
    measure: Measure
    bound: float
    at_most: bool
    unit: str = ""
    floor: Floor | None = None
    also: tuple[str, Measure, str] | None = None


@dataclass(frozen=True)
class Outcome:
    """A target and what became of it; ``met`` None: not measured, and ``why``, where that is known."""

    target: Target
    measured: float | None
    met: bool | None
    why: str
    also: float | None


EAGER = "reference (eager)"
GRAPHED = "time on the GPU, in a CUDA graph"
OVER_FLOOR = f"{GRAPHED}, over its tokens' floor"
LCF = Pick("lcf", "adapter.fuse", 2048)
BATCH = Pick("lcf", "adapter.fuse", 2048, batch=8)
FEW = tuple(Pick("lcf", "adapter.fuse", tokens) for tokens in (1, 8, 32, 128))
POOL = Pick("summarize", "summarize_layers", LONGEST, LONGEST)
WHOLE = Pick("lcfx", "adapter.summarize+inject", 1000, 2000)
TRAIN = Pick("train", "fuse_layers (train)", 1024, batch=8)
PRUNED = Pick("lcf_pruned", "adapter.fuse (pruned)", 2048)
SLOTS = Pick("slots", f"slots.summarize+place (k = {cases.SLOTS})", 2000, 2000)


def _over(pick: Pick, *variants: str) -> Ratio:
    """How much longer the fastest of these takes."""
    return Ratio(Best(min, tuple(Ms(pick.other(variant)) for variant in variants), some=True), Ms(pick))


def _over_graphed(pick: Pick, variant: str) -> Ratio:
    """The same of two CUDA graphs."""
    return Ratio(Ms(pick.other(variant).graphed()), Ms(pick.graphed()))


def _plain(pick: Pick) -> tuple[str, Measure, str]:
    """The time of a call from Python, beside that of its graph."""
    return "a plain call", Ms(pick), "ms"


def tokens_alone(shape: cases.Shape) -> cases.Work:
    """`cases.fuse_layers` without the weights, which long enough caches make as good as free."""
    whole, weights = cases.fuse_layers(shape), cases.fuse_layers(replace(shape, tokens=0))
    return cases.Work(whole.bytes - weights.bytes, whole.flops - weights.flops)


def _floor(pick: Pick, work: Any = cases.fuse_layers) -> Floor:
    return Floor(work, pick)


def _worst(column: str, *picks: Pick) -> Best:
    return Best(max, tuple(Field(pick, column) for pick in picks))


_FUSE, _FUSE_8 = "LCF, 2,048 tokens", "LCF, 8 × 2,048 tokens"
_FEW, _POOL, _X = "LCF, 1 to 128 tokens", "LCF-X, 32,768 tokens pooled", "LCF-X, 2,000 pooled, 1,000 edited"
_TRAIN, _END = "LCF, forward and backward, 8 × 1,024 tokens", "two models, contexts of 1,000 tokens"
TARGETS = (
    Target("correct", "checks that failed", Failed(("gpu", "numerics", "memcheck", "racecheck")), 0, True),
    Target("correct", "benchmark rows out of bounds", OutOfBounds(), 0, True),
    Target(
        _FUSE,
        OVER_FLOOR,
        Ratio(Ms(LCF.graphed()), _floor(LCF, tokens_alone)),
        1.5,
        True,
        "×",
        _floor(LCF, tokens_alone),
        _plain(LCF),
    ),
    Target(_FUSE, "faster than eager", _over(LCF, EAGER), 25, False, "×"),
    Target(
        _FUSE, "faster than torch.compile", _over(LCF, "torch.compile", "torch.compile max-autotune"), 4, False, "×"
    ),
    Target(_FUSE, "both in CUDA graphs, faster than eager", _over_graphed(LCF, EAGER), 8, False, "×"),
    Target(
        _FUSE,
        "faster than C2C's fuser",
        _over(LCF, "C2C fuser"),
        100,
        False,
        "×",
        also=("as released", _over(LCF, f"C2C fuser{cases.AS_RELEASED}"), "×"),
    ),
    Target(
        _FUSE_8,
        OVER_FLOOR,
        Ratio(Ms(BATCH.graphed()), _floor(BATCH, tokens_alone)),
        1.35,
        True,
        "×",
        _floor(BATCH, tokens_alone),
        _plain(BATCH),
    ),
    Target(
        _FEW,
        f"{GRAPHED}, the longest",
        Best(max, tuple(Ms(pick.graphed()) for pick in FEW)),
        0.030,
        True,
        "ms",
        _floor(FEW[-1]),
    ),
    Target(_FEW, "host time a call, the longest", _worst("host_us", *FEW), 60, True, "µs"),
    # Nothing of ours is left on the host then: what a replay takes is the driver's.
    Target(_FEW, "host time a replay, the longest", _worst("host_us", *(one.graphed() for one in FEW)), 10, True, "µs"),
    Target(
        _POOL,
        "of the copy bandwidth",
        Bandwidth(_floor(POOL, cases.summarize_layers)),
        0.90,
        False,
        "%",
        _floor(POOL, cases.summarize_layers),
    ),
    Target(_POOL, "faster than eager", _over(POOL, EAGER), 3, False, "×"),
    Target(
        _POOL,
        "faster than two calls of scaled_dot_product_attention",
        _over(POOL, "SDPA", "SDPA, CUDA graph"),
        1,
        False,
        "×",
    ),
    Target(
        _X,
        f"pool, fold, inject: {GRAPHED}",
        Ms(WHOLE.graphed()),
        0.2,
        True,
        "ms",
        _floor(WHOLE, cases.summarize_and_inject),
        _plain(WHOLE),
    ),
    Target(
        _X,
        "faster than eager",
        _over(WHOLE, EAGER),
        50,
        False,
        "×",
        also=("both in CUDA graphs", _over_graphed(WHOLE, EAGER), "×"),
    ),
    Target(_TRAIN, "faster than eager autograd", _over(TRAIN, EAGER), 4, False, "×", _floor(TRAIN, cases.train)),
    Target(
        _TRAIN,
        "activations at the highest, of eager's",
        Ratio(Field(TRAIN, "activation_mb"), Field(TRAIN.other(EAGER), "activation_mb")),
        0.1,
        True,
        "%",
    ),
    Target(
        "LCF pruned to nine layers",
        "time at 2,048 tokens, of 28 layers', both in CUDA graphs",
        Ratio(Ms(PRUNED.graphed()), Ms(LCF.graphed())),
        0.40,
        True,
        "%",
        _floor(PRUNED),
        ("of plain calls", Ratio(Ms(PRUNED), Ms(LCF)), "%"),
    ),
    Target(_END, "LCF's communication, of the time to first token", Latency("shared context", "lcf"), 0.02, True, "%"),
    Target(
        _END, "LCF-X's communication, of the time to first token", Latency("cross context", "lcf_x"), 0.02, True, "%"
    ),
    Target(
        _END, "LCF-X's first token before text's of 200", Latency("cross context", "lcf_x", "text_200"), 8.5, False, "×"
    ),
    Target(
        _END, "LCF-X's first token before text's of 50", Latency("cross context", "lcf_x", "text_50"), 5, False, "×"
    ),
    Target(
        "every size",
        "widths and dtypes without a time",
        Unmeasured(((64, "bfloat16"), (256, "bfloat16"), (512, "bfloat16"), (128, "float16"), (128, "float32"))),
        0,
        True,
    ),
    Target("every size", "faster than eager, at the least", Slowest(), 1, False, "×"),
    Target(
        "slots, k = 8",
        f"pool 2,000 tokens, deliver to 28 layers: {GRAPHED}",
        Ms(SLOTS.graphed()),
        0.1,
        True,
        "ms",
        _floor(SLOTS, cases.slots_summarize_and_deliver),
        _plain(SLOTS),
    ),
)


def judged(evidence: Evidence) -> list[Outcome]:
    """Every target with what was measured."""
    found = []
    for target in TARGETS:
        value = target.measure.value(evidence)
        met = None if value is None else value <= target.bound if target.at_most else value >= target.bound
        why = target.measure.why(evidence) if value is None else ""
        also = target.also[1].value(evidence) if target.also else None
        found.append(Outcome(target, value, met, why, also))
    return found


def figure(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.3g}%"
    return f"{value:.0f}" if not unit else f"{number(value)}{'' if unit == '×' else ' '}{unit}"


def _asked(target: Target) -> str:
    if not target.bound and target.at_most:
        return "none"
    return f"{'at most' if target.at_most else 'at least'} {figure(target.bound, target.unit)}"


def _measured(outcome: Outcome) -> str:
    if outcome.measured is None:
        return f"not measured{f' ({outcome.why})' if outcome.why else ''}"
    text = figure(outcome.measured, outcome.target.unit)
    if outcome.target.also is not None and outcome.also is not None:
        text += f" ({outcome.target.also[0]}: {figure(outcome.also, outcome.target.also[2])})"
    return text


def _counted(target: Target, copy_gb_s: float, matmul_tflop_s: float) -> tuple[str, str]:
    """What it must move and do; the floor and what sets it."""
    if target.floor is None:
        return "", ""
    work = target.floor.counted()
    moved, done = floors(work, copy_gb_s, matmul_tflop_s)
    limit = "bytes" if moved >= done else "products"
    return f"{number(work.bytes / 1e6)} MB, {number(work.flops / 1e9)} GFLOP", f"{number(max(moved, done))} ms, {limit}"


VERDICTS = {True: "met", False: "**missed**", None: ""}


def table(evidence: Evidence) -> str:
    """One GPU's targets, as Markdown; nobody's, what they come to."""
    measured = evidence.copy_gb_s is not None and evidence.matmul_tflop_s is not None
    rates = (evidence.copy_gb_s, evidence.matmul_tflop_s) if measured else (COPY_GB_S, MATMUL_TFLOP_S)
    copy, matmul = (float(rate or 0) for rate in rates)
    title = f"**{evidence.machine}**\n\n" if evidence.machine else ""
    lines = [["what", "target", "asked", "must move and do", "floor, set by", "measured", ""], ["---"] * 7]
    outcomes = judged(evidence)
    for outcome in outcomes:
        target = outcome.target
        counted = _counted(target, copy, matmul)
        found = _measured(outcome), VERDICTS[outcome.met]
        lines.append([target.item, target.name, _asked(target), *(text or "–" for text in counted), *found])
    whose = f"measured on {evidence.machine} in the same run" if measured else "of an H200, until a run has its own"
    note = (
        f"Floors: every byte once at {copy:,.0f} GB/s of copying, every product once at {matmul:,.0f} TFLOP/s in"
        f" bfloat16, rates {whose}. Qwen2.5-0.5B to Qwen3-0.6B (LCF), Qwen3-0.6B to itself (LCF-X, slots), d = 128,"
        " all 28 layers, bfloat16, unless said. Made by"
        f" `{COMMAND}` from the results in bench/results/."
    )
    counts = {met: sum(outcome.met is met for outcome in outcomes) for met in (True, False, None)}
    verdict = f"{counts[True]} met, {counts[False]} missed, {counts[None]} not measured."
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{verdict} {note}"


def lines(evidence: Evidence) -> list[str]:
    """The same for a terminal, what is missed and what is not measured last."""
    outcomes = judged(evidence)
    order = [o for met in (True, False, None) for o in outcomes if o.met is met]
    words = {True: "met", False: "MISSED", None: "open"}
    head = [evidence.machine] if evidence.machine else []
    return head + [
        f"{words[o.met]:<7} {o.target.item}: {o.target.name}: {_asked(o.target)}, {_measured(o)}" for o in order
    ]


def read(files: Sequence[Path]) -> list[Evidence]:
    """By GPU; where nothing was run on one, one that knows nothing.

    Raises:
        ValueError, OSError: as `evidence_of`; a file that cannot be read.
    """
    return evidence_of([json.loads(file.read_text(encoding="utf-8")) for file in files]) or [Evidence()]


def write(page: Path, found: Sequence[Evidence]) -> None:
    """Put the tables between the page's markers.

    Raises:
        ValueError: it has none.
    """
    text = replaced(page.read_text(encoding="utf-8"), "\n\n".join(map(table, found)), BEGIN, END)
    page.write_text(text, encoding="utf-8")


def committed(folder: Path = RESULTS) -> list[Path]:
    """Results in the repository, as ``--write`` takes them where none are named."""
    return sorted(file for file in folder.glob("**/*.json") if not _is_other(file))


def _is_other(file: Path) -> bool:
    """Evaluations are results of another kind, but for those of latency."""
    return file.parent.name == "evaluation" and not file.name.startswith("latency")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.targets",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="JSON", help="default: those in bench/results/")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put the table between {BEGIN} and {END} there")
    given = parser.parse_args(arguments)
    try:
        files = given.results or committed()
        found = read(files)
        if given.write is not None:
            write(given.write, found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"bench.targets: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(line for evidence in found for line in lines(evidence)))
    return int(any(outcome.met is not True for evidence in found for outcome in judged(evidence)))


if __name__ == "__main__":
    sys.exit(main())
