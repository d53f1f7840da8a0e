"""What a tuning tries: a launch, the rows near the policy's own, whether one is right, and how long it takes.

A row is tried as a whole: the launch with it must keep the error budget before it is timed, and it is timed beside the
policy's own row, in turns, on inputs that are not in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lcf_fast import CacheGeometry, ops, reference
from lcf_fast.kernels import fusion_plan, tuned

from . import timing
from .cases import CASES, Shape
from .errors import judge
from .inputs import Operands, geometry_of, make_config, make_operands, make_weights, random_caches
from .job import is_fatal
from .plan import BY_NAME
from .variants import OURS, REFERENCE, flatten

#: Of a candidate's time over the policy's row's: what is not below this is not worth another row.
WORTH = 0.98
#: Candidates that take turns with the policy's row.
HEAT = 5
#: Samples of each in the last heat, of the fastest.
FINAL_ROUNDS, FINALISTS = 15, 4
#: In the name of a case: with a `sharer_index`.
INDEXED = ", indexed"
Row = Any
_CASES = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Size:
    """Of a call: batch B, receiver positions N, sharer positions that are pooled."""

    batch: int = 1
    tokens: int = 200
    context: int = 200


@dataclass(frozen=True)
class Task:
    """A row of the policy that is to be bettered.

    Attributes:
        name: as the command line calls it.
        kind: of `tuned.Place`.
        case: what is timed, of `bench.cases`.
        sizes: at which; where there are several, their ratios' geometric mean counts.
        grid: values that each field may take.
        first: fields of rows that are tried before all others, for a reason that stands beside them.
        also: cases that are launched with the same row, which must be right with it, too.
    """

    name: str
    kind: str
    case: str
    sizes: tuple[Size, ...]
    grid: Mapping[str, tuple[int, ...]]
    also: tuple[str, ...] = ()
    first: tuple[Mapping[str, int], ...] = ()

    def said(self) -> str:
        def said(size: Size) -> str:
            length = size.tokens if BY_NAME[_CASES[self.case].group].prompt else size.context
            return f"{size.batch} × {length:,}" if size.batch > 1 else f"{length:,}"

        return f"{self.name}: {self.case}, {' and '.join(map(said, self.sizes))} tokens"


_TILE = {
    "block_tokens": (32, 64, 128, 256),
    "block_channels": (32, 64, 128),
    "block_hidden": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
_SPLIT = {
    "block_tokens": (16, 32, 64),
    "block_channels": (32, 64, 128),
    "block_hidden": (32, 64, 128),
    "num_warps": (4, 8),
    "down_stages": (2, 3, 4, 5),
    "finish_stages": (2, 3, 4),
}
#: A tile of 128 tokens: more programs, and half the rows that wait in the L2 cache, against twice the weights. Then two
#: programs a multiprocessor, so that one reads while the other multiplies: 64 tokens on four warps take 203 to 254
#: registers a thread and 48 to 96 KB on sm_90 at d = 128 (Triton 3.7.1), none of which spills.
_FIRST = (
    {"block_tokens": 128, "block_hidden": 64},
    {"block_tokens": 64, "num_warps": 4, "block_hidden": 64},
    {"block_tokens": 64, "num_warps": 4, "block_hidden": 64, "num_stages": 2},
    {"block_tokens": 64, "num_warps": 4, "block_hidden": 32, "num_stages": 2},
    {"block_tokens": 64, "num_warps": 4, "block_hidden": 32, "block_channels": 32},
)
_ALSO = ("adapter.inject", "joint_projection", "gated_injection", "fuse_layers" + INDEXED)
#: In the order of what they are worth.
TASKS = (
    Task("tile", "tile", "fuse_layers", (Size(tokens=2048),), _TILE, _ALSO, _FIRST),
    Task("one", "split", "fuse_layers", (Size(tokens=1),), _SPLIT, ("adapter.inject", "fuse_layers" + INDEXED)),
    Task("few", "split", "fuse_layers", (Size(tokens=128),), _SPLIT, ("adapter.inject", "fuse_layers" + INDEXED)),
    Task(
        "pooling",
        "pooling",
        "summarize_layers",
        (Size(context=2000), Size(context=32_768)),
        {
            "block_tokens": (16, 32, 64, 128),
            "group_spans": (8, 16, 32),
            "num_warps": (2, 4, 8),
            "max_registers": (96, 128, 168, 255),
            "max_turns": (1, 4, 8, 16),
            "merge_chunks": (16, 32, 64),
            "merge_warps": (4, 8),
        },
        ("summarize_layers (windows)", "adapter.extend"),
    ),
    Task(
        "slots",
        "slot_pool",
        "slots.summarize (k = 8)",
        (Size(context=2000),),
        {"block_tokens": (16, 32, 64), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5), "merge_parts": (8, 16, 32)},
    ),
    Task(
        "places",
        "slot_expand",
        "slots.place (k = 8)",
        (Size(context=200),),
        {"block_channels": (32, 64, 128), "block_hidden": (32, 64, 128), "num_warps": (4, 8),
         "num_stages": (2, 3, 4, 5), "splits": (1, 2, 4, 8)},
    ),
    Task("middle", "tile", "fuse_layers", (Size(tokens=512),), _TILE, _ALSO),
    Task(
        "backward",
        "backward",
        "fuse_layers (train)",
        (Size(batch=8, tokens=1024),),
        {"block_tokens": (32, 64, 128), "block_channels": (32, 64), "block_hidden": (16, 32, 64), "num_warps": (4, 8),
         "num_stages": (1, 2, 3)},
    ),
    Task(
        "ffn-weights",
        "ffn_weights",
        "fuse_layers (train)",
        (Size(batch=8, tokens=1024),),
        {"block_tokens": (64, 128), "block_hidden": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    ),
    Task(
        "columns",
        "columns",
        "fuse_layers (train)",
        (Size(batch=8, tokens=1024),),
        {"block_tokens": (32, 64, 128), "block_channels": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    ),
)  # fmt: skip


@contextmanager
def forced(rows: Mapping[str, Row]) -> Iterator[None]:
    """Launches within take these rows, by kind."""
    with tuned.trying(rows):
        fusion_plan.plan_of.cache_clear()
        try:
            yield
        finally:
            fusion_plan.plan_of.cache_clear()


def near(row: Row, grid: Mapping[str, tuple[int, ...]]) -> list[Row]:
    """All rows of a grid but this one, from those that differ in one field to those that differ in all."""
    names = [field.name for field in fields(row) if field.name in grid]
    found = [replace(row, **dict(zip(names, values))) for values in product(*(grid[name] for name in names))]

    def distance(other: Row) -> int:
        return sum(getattr(other, name) != getattr(row, name) for name in names)

    return sorted((other for other in found if other != row), key=distance)


@dataclass(frozen=True)
class Bench:
    """Where tasks are run: geometries, width, dtype and device."""

    sharer: CacheGeometry
    receiver: CacheGeometry
    width: int
    dtype: torch.dtype
    device: torch.device

    def operands(self, case: str, size: Size, *, light: bool = False) -> Operands:
        """Inputs of a case at a size."""
        group = BY_NAME[_CASES[case.removesuffix(INDEXED)].group]
        caches = random_caches(
            self.sharer,
            self.receiver,
            batch=size.batch,
            tokens=size.tokens,
            context=size.context,
            spans=[size.context * i // 4 for i in range(5)],
            device=self.device,
            dtype=self.dtype,
            light=light,
        )
        config = make_config(group, geometry_of(caches.sharer), geometry_of(caches.receiver), self.width)
        return make_operands(group, caches, config, make_weights(config, device=self.device, dtype=self.dtype))


def _indexed(module: Any, o: Operands) -> Any:
    """LCF with the sharer's rows in another order, and none for some positions."""
    length = o.receiver[0][0].shape[2]
    index = torch.arange(length - 1, -1, -1, device=o.spans.device, dtype=torch.int32)
    index[::5] = -1
    return module.fuse_layers(o.sharer, o.receiver, o.weights, sharer_index=index.expand(len(o.spans), -1))


def ours(case: str) -> Callable[[Operands], Any]:
    return partial(_indexed, ops) if case.endswith(INDEXED) else OURS[case]


def _reference(case: str) -> Callable[[Operands], Any]:
    return partial(_indexed, reference) if case.endswith(INDEXED) else REFERENCE[_CASES[case].group]


class Held:
    """A case at a size, with what its results are held against."""

    def __init__(self, bench: Bench, case: str, size: Size) -> None:
        self.case, self.operands = case, bench.operands(case, size)

    @cached_property
    def _bounds(self) -> tuple[list[Tensor], list[Tensor]]:
        compute = _reference(self.case)
        return tuple(flatten(compute(o), o.kept) for o in (self.operands.double(), self.operands))  # type: ignore[return-value]

    def wrong(self) -> str:
        """What is wrong with the result, as things are set; empty: it is within bounds."""
        truth, plain = self._bounds
        judgement = judge(flatten(ours(self.case)(self.operands), self.operands.kept), truth, plain)
        return "" if judgement.within else f"{self.case}: {judgement.used:.3g} times its error bound"


class Trial:
    """A task on its way: inputs and what the policy has for it.

    Attributes:
        asked: where the policy was asked, and the rows that it chose.
        row: the first of them.
    """

    def __init__(self, task: Task, bench: Bench) -> None:
        self.task, self.bench = task, bench
        self.held = [Held(bench, task.case, size) for size in task.sizes]
        self.asked: list[tuple[tuned.Place, Row]] = []
        for one in self.held:
            self.asked += [pair for pair in asked(task.kind, task.case, one.operands) if pair not in self.asked]
        if not self.asked:
            raise ValueError(f"the policy has no row of kind {task.kind!r} here")
        self.row = self.asked[0][1]

    @cached_property
    def _sets(self) -> list[list[Operands]]:
        """Inputs of each size, as many as it takes to pass through the L2 cache."""
        if self.bench.device.type != "cuda":
            return [[one.operands] for one in self.held]
        case, l2 = _CASES[self.task.case], timing.l2_bytes(self.bench.device)
        sets = []
        for size, one in zip(self.task.sizes, self.held):
            layers, itemsize = len(one.operands.kept), self.bench.dtype.itemsize
            shape = Shape(one.operands.config, size.tokens, size.context, layers, itemsize, size.batch)
            count = timing.rotation_sets(case.work(shape).bytes // 2, l2)
            reads = BY_NAME[case.group].reads_caches
            sets.append(one.operands.rotated(count, one_layer=False, reads_caches=reads))
        return sets

    def wrong(self, row: Row) -> str:
        """What is wrong with a row, in what is timed; empty: nothing."""
        return self._wrong(row, self.held)

    def wrong_beside(self, row: Row) -> str:
        """The same in what else is launched with it, at the first size."""
        for case in self.task.also:
            found = self._wrong(row, [Held(self.bench, case, self.task.sizes[0])])
            if found:
                return found
        return ""

    def _wrong(self, row: Row, held: Sequence[Held]) -> str:
        with forced({self.task.kind: row}):
            try:
                return next((found for one in held if (found := one.wrong())), "")
            except Exception as error:  # it does not compile, or takes more shared memory than there is
                if is_fatal(error):
                    raise
                return f"{held[0].case}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"

    def heat(self, rows: Sequence[Row], least: int = timing.LEAST_ROUNDS) -> tuple[list[float], list[float]]:
        """The policy's own row and these in turns, without the host's part where there are CUDA graphs.

        Returns:
            Milliseconds of the own row at each size, and of each other row its time over that, the geometric mean over
            the sizes.
        """
        own: list[float] = []
        ratios = [1.0] * len(rows)
        for sets in self._sets:
            calls = {str(i): self._calls(row, sets) for i, row in enumerate([self.row, *rows])}
            times = timing.measure(calls, self.bench.device, 0.0, least=least)
            base, *others = (times[name].median_ms for name in calls)
            own.append(base)
            ratios = [ratio * (other / base) ** (1 / len(self._sets)) for ratio, other in zip(ratios, others)]
        return own, ratios

    def _calls(self, row: Row, sets: Sequence[Operands]) -> list[timing.Call]:
        def run(operands: Operands) -> Any:
            with forced({self.task.kind: row}):
                return ours(self.task.case)(operands)

        calls: list[timing.Call] = [partial(run, operands) for operands in sets]
        return timing.graphed(calls) if self.bench.device.type == "cuda" else calls


def asked(kind: str, case: str, operands: Operands) -> list[tuple[tuned.Place, Row]]:
    """Where the policy is asked for rows of a kind in a call, and what it says."""
    fusion_plan.plan_of.cache_clear()
    with tuned.trying({}) as found:
        ours(case)(operands)
    return [pair for pair in dict.fromkeys(found) if pair[0].kind == kind]


def candidates(task: Task, row: Row) -> list[Row]:
    """Other rows for a task, those of ``first`` before the rest; None, not to split, where that can be."""
    first = [replace(row, **dict(changes)) for changes in task.first]
    found = dict.fromkeys([*first, *near(row, task.grid)])
    found.pop(row, None)
    return [*([None] if task.kind == "split" else []), *found]
