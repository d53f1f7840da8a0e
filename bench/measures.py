"""What a target reads from the results of a run: a time, a ratio of times, a share. ``None`` is "not measured".

Only what a CUDA GPU gave is read. Floors are counted by `bench.cases`, for the rates measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lcf_fast import LCFConfig

from .cases import QWEN3, QWEN25, SLOTS, Shape, Work
from .plan import BY_NAME
from .sweep_table import speedups

Row = dict[str, Any]
#: What is read unless a target says otherwise.
WIDTH, DTYPE, ITEMSIZE = 128, "bfloat16", 2
GRAPH = ", CUDA graph"


@dataclass
class Evidence:
    """What runs on one GPU left, as plain JSON.

    Attributes:
        machine: the GPU's name; empty: nothing was run on one.
        rows: of the benchmark; ``swept``: of its sweep.
        copy_gb_s, matmul_tflop_s: rates measured beside the rows; None: no run.
        left_out: sizes that the benchmark did not reach, and why; ``sweep_left_out``: the sweep.
        failures: of the benchmark, ``sweep_failures``: of its sweep; None: no run.
        cells: of the latency protocol.
        steps: of ``make gpu``, the status by name.
    """

    machine: str = ""
    rows: list[Row] = field(default_factory=list)
    swept: list[Row] = field(default_factory=list)
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    left_out: list[Row] = field(default_factory=list)
    sweep_left_out: list[Row] = field(default_factory=list)
    failures: list[str] | None = None
    sweep_failures: list[str] | None = None
    cells: list[Row] = field(default_factory=list)
    steps: dict[str, str] = field(default_factory=dict)

    def add(self, data: dict[str, Any]) -> None:
        """Take one file's results, in place of earlier ones of its kind."""
        if "steps" in data:
            self.steps |= {step["step"]: step["status"] for step in data["steps"]}
        elif "cells" in data:
            new = {(cell["group"], cell["batch"]) for cell in data["cells"]}
            self.cells = [cell for cell in self.cells if (cell["group"], cell["batch"]) not in new] + data["cells"]
        elif data["settings"].get("sweep"):
            self.swept, self.sweep_left_out, self.sweep_failures = data["rows"], data["left_out"], data["failures"]
        else:
            self.rows, self.left_out, self.failures = data["rows"], data["left_out"], data["failures"]
            self.copy_gb_s, self.matmul_tflop_s = data["copy_gb_s"], data["matmul_tflop_s"]


def evidence_of(files: Sequence[dict[str, Any]]) -> list[Evidence]:
    """Results sorted by GPU; those of a CPU are passed over.

    Raises:
        ValueError: a file that is none of a benchmark's, of its sweep's, of the latency protocol's and of ``make gpu``.
    """
    found: dict[str, Evidence] = {}
    for data in files:
        if "cells" in data:
            parts = [{"cells": [cell]} for cell in data["cells"] if cell["about"]["device_type"] == "cuda"]
            named = [(part["cells"][0]["about"]["device"], part) for part in parts]
        elif "steps" in data:
            named = [(data["about"]["gpu"], data)]
        elif "rows" in data and "settings" in data:
            named = [(data["about"]["device"], data)] if data["about"]["device_type"] == "cuda" else []
        else:
            raise ValueError("no result of the benchmark, of `lcf-fast latency` or of `make gpu`")
        for machine, part in named:
            found.setdefault(machine, Evidence(machine)).add(part)
    return list(found.values())


class Measure(Protocol):
    """One figure."""

    def value(self, evidence: Evidence) -> float | None: ...

    def why(self, evidence: Evidence) -> str:
        """Why there is none, where that is known."""
        ...


@dataclass(frozen=True)
class Pick:
    """One row of the benchmark: a variant of a group at one size, d = 128 in bfloat16.

    Attributes:
        tokens: as the row has it: receiver positions, or those pooled where no receiver takes part.
        context: that LCF-X pools; None: nothing is.
    """

    group: str
    variant: str
    tokens: int
    context: int | None = None
    batch: int = 1

    def row(self, evidence: Evidence) -> Row | None:
        for row in evidence.rows:
            size = row["group"], row["variant"], row["tokens"], row["context"], row.get("batch", 1)
            wanted = self.group, self.variant, self.tokens, self.context, self.batch
            if size == wanted and (row["bottleneck"], row["dtype"]) == (WIDTH, DTYPE):
                return row
        return None

    def graphed(self) -> Pick:
        return Pick(self.group, self.variant + GRAPH, self.tokens, self.context, self.batch)

    def other(self, variant: str) -> Pick:
        return Pick(self.group, variant, self.tokens, self.context, self.batch)

    def shape(self) -> Shape:
        group = BY_NAME[self.group]
        config = LCFConfig(
            QWEN3 if group.crossing else QWEN25,
            QWEN3,
            bottleneck=WIDTH,
            cross_context=group.crossing,
            slots=SLOTS if group.slots else 0,
        )
        layers = 9 if group.pruned else QWEN3.layers
        return Shape(config, self.tokens, self.context or 0, layers, ITEMSIZE, self.batch)

    def why(self, evidence: Evidence) -> str:
        row = self.row(evidence)
        if row is not None:
            return str(row["reason"] or "")
        for one in evidence.left_out:
            if (one["group"], one["tokens"], one["batch"]) == (self.group, self.tokens, self.batch):
                return str(one["why"])
        return ""


@dataclass(frozen=True)
class Ms:
    """Median milliseconds."""

    pick: Pick

    def value(self, evidence: Evidence) -> float | None:
        row = self.pick.row(evidence)
        return None if row is None or row["time"] is None else float(row["time"]["median_ms"])

    def why(self, evidence: Evidence) -> str:
        return self.pick.why(evidence)


@dataclass(frozen=True)
class Field:
    """A column of a row other than its time."""

    pick: Pick
    name: str

    def value(self, evidence: Evidence) -> float | None:
        row = self.pick.row(evidence)
        return None if row is None or row[self.name] is None else float(row[self.name])

    def why(self, evidence: Evidence) -> str:
        return self.pick.why(evidence)


@dataclass(frozen=True)
class Best:
    """The extreme of several, none of which may be missing but where ``some`` are enough."""

    choose: Callable[[Sequence[float]], float]
    measures: tuple[Measure, ...]
    some: bool = False

    def value(self, evidence: Evidence) -> float | None:
        found = [measure.value(evidence) for measure in self.measures]
        known = [value for value in found if value is not None]
        return self.choose(known) if known and (self.some or len(known) == len(found)) else None

    def why(self, evidence: Evidence) -> str:
        return next((text for one in self.measures if one.value(evidence) is None and (text := one.why(evidence))), "")


@dataclass(frozen=True)
class Ratio:
    """How often ``under`` goes into ``over``."""

    over: Measure
    under: Measure

    def value(self, evidence: Evidence) -> float | None:
        over, under = self.over.value(evidence), self.under.value(evidence)
        return None if over is None or not under else over / under

    def why(self, evidence: Evidence) -> str:
        return next((text for one in (self.over, self.under) if (text := one.why(evidence))), "")


@dataclass(frozen=True)
class Floor:
    """Milliseconds that the bytes or the products of a computation take at the rates that the run measured."""

    work: Callable[[Shape], Work]
    pick: Pick

    def counted(self) -> Work:
        return self.work(self.pick.shape())

    def value(self, evidence: Evidence) -> float | None:
        if evidence.copy_gb_s is None or evidence.matmul_tflop_s is None:
            return None
        return max(floors(self.counted(), evidence.copy_gb_s, evidence.matmul_tflop_s))

    def why(self, evidence: Evidence) -> str:
        return ""


def floors(work: Work, copy_gb_s: float, matmul_tflop_s: float) -> tuple[float, float]:
    """Milliseconds by bytes and by products."""
    return work.bytes / copy_gb_s / 1e6, work.flops / matmul_tflop_s / 1e9


@dataclass(frozen=True)
class Bandwidth:
    """Share of the copy bandwidth that the needed bytes went at."""

    floor: Floor

    def value(self, evidence: Evidence) -> float | None:
        ms = Ms(self.floor.pick).value(evidence)
        if ms is None or evidence.copy_gb_s is None:
            return None
        return self.floor.counted().bytes / ms / 1e6 / evidence.copy_gb_s

    def why(self, evidence: Evidence) -> str:
        return self.floor.pick.why(evidence)


@dataclass(frozen=True)
class Latency:
    """A figure of a channel at batch 1: its communication's share of the first token, or how much faster than text."""

    group: str
    channel: str
    over: str = ""

    def value(self, evidence: Evidence) -> float | None:
        for cell in evidence.cells:
            if (cell["group"], cell["batch"]) == (self.group, 1) and self.channel in cell["channels"]:
                one = cell["channels"][self.channel]
                value = one["speedups"].get(self.over) if self.over else one["communication_share"]
                return None if value is None else float(value)
        return None

    def why(self, evidence: Evidence) -> str:
        return ""


@dataclass(frozen=True)
class Failed:
    """How many steps of ``make gpu`` did not pass; one that was absent or not run leaves it open."""

    steps: tuple[str, ...]

    def value(self, evidence: Evidence) -> float | None:
        found = [evidence.steps.get(step, "absent") for step in self.steps]
        bad = sum(status in ("failed", "timeout") for status in found)
        return None if not bad and "absent" in found else float(bad)

    def why(self, evidence: Evidence) -> str:
        missing = [step for step in self.steps if evidence.steps.get(step, "absent") == "absent"]
        return f"{', '.join(missing)}: absent or not run" if evidence.steps and missing else ""


@dataclass(frozen=True)
class OutOfBounds:
    """How many rows of ours are out of bounds, or raised."""

    def value(self, evidence: Evidence) -> float | None:
        known = [some for some in (evidence.failures, evidence.sweep_failures) if some is not None]
        return float(sum(map(len, known))) if known else None

    def why(self, evidence: Evidence) -> str:
        return ""


@dataclass(frozen=True)
class Unmeasured:
    """How many of the widths and dtypes have no time for the whole of LCF in the sweep."""

    wanted: tuple[tuple[int, str], ...]

    def value(self, evidence: Evidence) -> float | None:
        timed = {
            (row["bottleneck"], row["dtype"])
            for row in evidence.swept
            if row["kind"] == "ours" and row["group"] == "lcf" and row["time"]
        }
        return float(len(set(self.wanted) - timed)) if evidence.swept else None

    def why(self, evidence: Evidence) -> str:
        return ""


@dataclass(frozen=True)
class Slowest:
    """The least that ours is faster than eager in the sweep; sizes not reached leave it open, but for `Point.extra`."""

    def value(self, evidence: Evidence) -> float | None:
        found = [speedup for _, speedup in speedups(evidence.swept)]
        if not found or (min(found) >= 1 and self.why(evidence)):
            return None
        return min(found)

    def why(self, evidence: Evidence) -> str:
        left_out = [one for one in evidence.sweep_left_out if not one.get("extra")]
        missed = [one for one in left_out if not one["why"].startswith("more than")]
        if not missed:
            return ""
        least = min((speedup for _, speedup in speedups(evidence.swept)), default=None)
        so_far = "" if least is None else f"; the least of the others: {least:.2f}×"
        return f"{len(missed)} sizes were not reached{so_far}"
