"""One group of cases at one size: every error first, then the times of what is within bounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import timing
from .cases import WHOLE, Case, Shape, Work, c2c_fuser, cases_of
from .errors import Judgement, judge
from .inputs import Caches, Operands, geometry_of, make_config, make_operands, make_weights
from .plan import Point
from .rows import add_speedups, add_time, new_row
from .settings import Settings, dtype_name
from .training import Training, saved_mb
from .variants import OURS, REFERENCE, Variant, baselines, compiled, flatten

COMPILED = "torch.compile"
#: Samples a variant once `Settings.hurry_after` has passed.
HURRIED_ROUNDS = 2
#: Positions of a batch that are held against float64, the last of each row, where each is computed by itself.
MOST_JUDGED = 16_384
BY_POSITION = ("lcf", "lcf_pruned", "inject")
#: Positions of a batch above which a brief point captures no graphs: launches are a small part of what is timed.
MOST_GRAPHED = 4096
Calls = dict[str, list[Callable[[], Any]]]
#: Drawing them takes seconds at the largest width, and one set serves many points.
_weights = lru_cache(maxsize=4)(make_weights)


@dataclass(frozen=True)
class Candidate:
    """A variant on its way to a row.

    Attributes:
        case: of ours, which one; None for the others.
        judgement: of its error, where there is something to hold it against.
        within: False: it is not to be timed; None: there is nothing to hold it against.
        skip: why it has no time; empty: it has.
    """

    variant: Variant
    case: Case | None
    judgement: Judgement | None = None
    within: bool | None = None
    skip: str = ""
    is_graph: bool = False


class Job:
    """See `rows`.

    Args:
        caches: cut to the point's size, of its dtype.
        bandwidth: the copy bandwidth of this run, GB/s.
        started: `time.perf_counter()` at the start of the run.

    Attributes:
        counts: rows whose kernels are still to be counted, and their calls: a profiler slows down what the process
            launches from then on, so that it comes behind all that is timed.
    """

    def __init__(self, settings: Settings, point: Point, caches: Caches, *, bandwidth: float, started: float) -> None:
        self.settings, self.point, self.group = settings, point, point.group
        self.counts: list[tuple[dict[str, Any], Callable[[], Any]]] = []
        self.bandwidth, self.started = bandwidth, started
        config = make_config(point.group, geometry_of(caches.sharer), geometry_of(caches.receiver), point.width)
        weights = _weights(config, device=settings.device, dtype=point.dtype)
        self.operands = make_operands(point.group, caches, config, weights)
        self.shape = Shape(
            config,
            tokens=point.length,
            context=point.context,
            layers=len(self.operands.kept),
            itemsize=point.dtype.itemsize,
            batch=point.batch,
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row a variant, plain JSON. What is out of bounds has no time."""
        candidates = self._judged()
        sets = [self.operands]
        if self.settings.on_gpu:
            # About half of the traffic is input: what is written is new memory anyway.
            case = cases_of(self.group)[0]
            count = timing.rotation_sets(case.work(self.shape).bytes // 2, timing.l2_bytes(self.settings.device))
            sets = self.operands.rotated(
                count, one_layer=case.scope == "one layer", reads_caches=self.group.reads_caches
            )
        calls: Calls = {
            one.variant.name: [partial(one.variant.run, operands) for operands in sets]
            for one in candidates
            if not one.skip
        }
        if self.settings.on_gpu:
            candidates = self._with_graphs(candidates, calls)
        clock = partial(timing.measure, device=self.settings.device, seconds=self.settings.seconds)
        if time.perf_counter() - self.started > self.settings.hurry_after:
            clock = partial(clock, seconds=0.0, least=HURRIED_ROUNDS)
        one_regime = self.point.brief and len(sets) > 1
        first = {} if one_regime else clock({name: some[:1] for name, some in calls.items()})
        if len(sets) > 1:
            cold, hot = clock(calls), first
        elif self.settings.on_gpu:
            cold, hot = first, {}  # one set alone is more than three times the L2
        else:
            cold, hot = {}, first
        rows = [self._row(one, cold, hot, calls) for one in candidates]
        add_speedups(rows)
        return rows

    # --- who takes part

    def _candidates(self) -> list[Candidate]:
        cases = cases_of(self.group, self.settings.only)[: 1 if self.point.brief else None]
        found = [Candidate(_ours(case), case) for case in cases]
        others = baselines(self.group.name, self.operands, eager_only=self.point.brief)
        found += [Candidate(variant, None) for variant in others]
        return found if self.point.brief else found + self._compiled()

    def _compiled(self) -> list[Candidate]:
        """``torch.compile`` of the reference, or why it is not run: each takes from seconds to a minute to compile."""
        point, settings = self.point, self.settings
        sizes = settings.tokens[0], settings.widths[0], settings.batches[0]
        headline = not self.group.prompt or (point.tokens, point.width, point.batch) == sizes
        whole = self.group.name in WHOLE
        skip = ""
        if self.group.compiled_in:
            skip = f"not run: its reference is that of {self.group.compiled_in}: see there"
        elif not self.settings.compile_until:
            skip = "not run: --no-compile, or --quick on a CPU"
        elif self.settings.quick and not (whole and headline):
            skip = "not run: --quick compiles the whole of LCF and of inject only, at the first of --tokens"
        elif not (whole or headline):
            skip = "not run: compiled for the first of --tokens only"
        elif time.perf_counter() - self.started > self.settings.compile_until:
            skip = f"not run: {self.settings.compile_until:.0f} s had gone, and compiling takes long"
        modes: dict[str, str | None] = {COMPILED: None}
        if self.settings.on_gpu and whole and headline and not self.settings.quick:
            modes[f"{COMPILED} max-autotune"] = "max-autotune-no-cudagraphs"
        if skip:
            return [Candidate(Variant(name, "baseline", _not_run), None, skip=skip) for name in modes]
        torch.compiler.reset()  # else the functions of earlier sizes count towards a limit, beyond which it gives up
        return [
            Candidate(Variant(name, "baseline", compiled(self.group.name, mode)), None) for name, mode in modes.items()
        ]

    def _with_graphs(self, candidates: Sequence[Candidate], calls: Calls) -> list[Candidate]:
        """Each that is timed once more as a CUDA graph; it inherits the error of what it replays."""
        found = []
        small = not self.point.brief or self.point.batch * self.point.length <= MOST_GRAPHED
        for one in candidates:
            found.append(one)
            if one.skip or not small:
                continue
            variant = replace(one.variant, name=f"{one.variant.name}, CUDA graph")
            graph = replace(one, variant=variant, is_graph=True)
            if one.variant.no_graph:
                found.append(replace(graph, skip=f"not captured: {one.variant.no_graph}"))
                continue
            try:
                calls[variant.name] = list(timing.graphed(calls[one.variant.name]))
            except Exception as error:  # what cannot be captured is a loss to be shown, not the end of the job
                graph = replace(graph, skip=f"not captured: {_first_line(error)}")
            found.append(graph)
        return found

    # --- errors

    def _judged(self) -> list[Candidate]:
        candidates = self._candidates()
        # Not the paper's formula for LCF-X, which in a narrow dtype rounds K* and V* that others never form.
        reference = REFERENCE[self.group.name]
        kept = self.operands.kept
        last = self._last()
        part = self.operands if last is None else self.operands.last(last)
        truth = flatten(reference(part.double()), kept)
        plain = flatten(reference(part), kept)
        # Another method has nothing to be held against.
        return [
            one if one.skip or one.variant.kind == "other" else self._judge(one, truth, plain) for one in candidates
        ]

    def _last(self) -> int | None:
        """How many positions of a row are judged, where that is not all of them."""
        count = max(1, MOST_JUDGED // self.point.batch)
        return count if self.group.name in BY_POSITION and self.point.tokens > count else None

    def _judge(self, one: Candidate, truth: Sequence[Tensor], plain: Sequence[Tensor]) -> Candidate:
        is_ours = one.variant.kind == "ours"
        last = self._last()
        try:
            got = flatten(one.variant.run(self.operands), self.operands.kept)
        except Exception as error:
            if one.variant.kind == "reference" or is_fatal(error):
                raise
            said = f"{type(error).__name__}: {_first_line(error)}"
            if is_ours:
                return replace(one, within=False, skip=f"no time: it raised {said}")
            # A baseline that this machine cannot run (no C++ compiler, an old driver) must not end the job.
            return replace(one, skip=f"not run: {said}")
        if last is not None:
            got = [tensor[:, :, -last:] for tensor in got]
        judgement = judge(got, truth, plain, baseline_dtype=None if is_ours else self.point.dtype)
        if last is not None:
            judgement = replace(judgement, rule=f"{judgement.rule}; the last {last:,} positions")
        skip = "" if judgement.within else f"no time: the error is {judgement.used:.3g} times its bound"
        return replace(one, judgement=judgement, within=judgement.within, skip=skip)

    # --- rows

    def _work(self, one: Candidate) -> tuple[Work, int]:
        """Bytes and FLOPs, and the layers that they are for."""
        case = one.case or cases_of(self.group)[0]
        if one.variant.kind == "other":
            layers = one.variant.layers or self.shape.layers
            return c2c_fuser(replace(self.shape, layers=layers)), layers
        work = case.work if one.case or self.group.others is None else self.group.others
        return work(self.shape), 1 if case.scope == "one layer" else self.shape.layers

    def _row(
        self,
        one: Candidate,
        cold: Mapping[str, timing.Timing],
        hot: Mapping[str, timing.Timing],
        calls: Calls,
    ) -> dict[str, Any]:
        name, config = one.variant.name, self.operands.config
        work, layers = self._work(one)
        row = new_row(
            self.group,
            replace(self.shape, layers=layers),
            work,
            op=one.case.name if one.case else self.group.name,
            variant=name,
            kind=one.variant.kind,
            spans=self.operands.context_spans.counts[0] if config.mode == "lcf_x" else None,
            dtype=dtype_name(self.point.dtype),
            within=one.within,
            judgement=one.judgement,
            note=one.variant.note,
            reason=one.skip,
        )
        best = cold.get(name) or hot.get(name)
        if best is None:
            return row
        add_time(row, best, "cold" if name in cold else "hot", self.bandwidth)
        if self.group.name == "train" and not one.is_graph:
            row["saved_mb"] = saved_mb(one.variant.run, self.operands)
        if name in cold and name in hot:
            row["time_hot"] = hot[name].to_dict()
        if self.settings.on_gpu:
            call = calls[name][0]
            if one.case or not self.point.brief:  # eager's is long, and of a brief point nobody asks for it
                row["host_us"] = timing.host_us(call)
            if not (one.is_graph or self.point.brief):  # a graph's memory is its own pool; it launches as one
                if not name.startswith(COMPILED):  # by then its code is gone, and made anew within the count
                    self.counts.append((row, call))
                row["peak_mb"] = timing.peak_mb(call)
                if isinstance(one.variant.run, Training):
                    row["activation_mb"] = one.variant.run.activation_mb(self.operands)
        return row


def _ours(case: Case) -> Variant:
    return Variant(case.name, "ours", OURS[case.name], note=case.note, no_graph=case.no_graph)


def is_fatal(error: Exception) -> bool:
    """Whether nothing more can be run: not in this size (no memory), or not at all (a kernel broke the context)."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error" in str(error)


def _not_run(operands: Operands) -> None:
    raise AssertionError("what has a reason not to run was run")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
