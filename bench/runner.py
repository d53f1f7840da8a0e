"""The job from start to end: models, caches, errors, times. Returns the results as plain JSON."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import lcf_fast

from . import interpreted, machine, models, timing, warm, wire
from .cases import GROUPS, HOST_GROUPS, QWEN3, cases_of
from .inputs import Caches
from .job import Job, is_fatal
from .plan import Point, points, sweep_points, urgent
from .settings import LONGEST, Settings, dtype_name

#: Of the results' layout; counts up when a name changes its meaning.
SCHEMA = 1
#: The targets of the CPU path are set for this many tokens, all layers of the published pair, d = 128, float32.
TARGET_TOKENS = 512
#: Why a size was left out, where somebody stopped the run.
INTERRUPTED = "interrupted"
#: The same where nobody told it.
ENDED = "the run was ended before"
#: For `_count`, after the time in which points are begun.
COUNTING_S = 15.0


class Progress(Protocol):
    """Where the job says what it is doing."""

    def step(self, text: str) -> AbstractContextManager[None]:
        """A step, until the context ends."""
        ...


class Silent:
    """A `Progress` that says nothing."""

    def step(self, text: str) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Found:
    """What the points came to.

    Attributes:
        rows: by point, in the order of the results.
        left_out: points without rows, and why.
        failures: points that raised.
        lost: why nothing more can be run; empty: it can.
        counts: see `Job`.
    """

    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lost: str = ""
    counts: list[tuple[dict[str, Any], Callable[[], Any]]] = field(default_factory=list)


Keep = Callable[[dict[str, Any]], None]


@torch.no_grad()
def run(settings: Settings, progress: Progress | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """Everything. ``failures`` in the results names what of ours is out of bounds, ``left_out`` what was not reached.

    Args:
        keep: is given the results so far after each point on a GPU, which may hang, or be taken away.

    Raises:
        RuntimeError: transformers is missing. OSError, ValueError: a model that cannot be loaded.
    """
    progress = Silent() if progress is None else progress
    started = time.perf_counter()
    sweep = settings.sweep
    too_large: list[dict[str, Any]] = []
    if sweep is None:
        chosen = points(settings)
    else:
        chosen, too_large = sweep_points(sweep, settings.only)
        if settings.on_gpu and settings.sharer is settings.receiver is None:
            with progress.step("compiling the kernels, in processes side by side"):
                warm.compile_beside(sweep)
    # By name, so that nothing falls back in silence.
    with lcf_fast.use_backend("triton" if settings.on_gpu else "eager"):
        caches, check, about_input = _caches(settings, chosen, progress)
        checks = []
        if check is not None:
            with progress.step("Triton kernels in the interpreter: errors (not timed)"):
                checks = check.results()
        scheduled = machine.scheduled_ns()
        with progress.step("copy bandwidth and rate of matrix products"):
            bandwidth = timing.copy_bandwidth(settings.device)
            rate = timing.matmul_rate(settings.device, settings.dtype)
        found = Found()
        about = machine.about(settings.device)

        def so_far(rest: Sequence[Point] = ()) -> dict[str, Any]:
            ended = [point.left_out(ENDED) for point in rest]
            return {
                "schema": SCHEMA,
                "about": about,
                "settings": _described(settings),
                "input": about_input,
                "copy_gb_s": bandwidth,
                "matmul_tflop_s": rate,
                "waited_share": machine.waited_share(scheduled),
                **_found(settings, found, checks, [*too_large, *ended]),
                "seconds": time.perf_counter() - started,
            }

        for rest in _run(settings, chosen, caches, progress, found, bandwidth=bandwidth, started=started):
            if keep is not None and settings.on_gpu:
                keep(so_far(rest))
        _count(settings, found, progress, started)
        if sweep is None:
            _run_host(settings, found, caches, progress, bandwidth)
        return so_far()


def _described(settings: Settings) -> dict[str, Any]:
    return {
        "quick": settings.quick,
        "sweep": settings.sweep is not None,
        "dtype": dtype_name(settings.dtype),
        "tokens": list(settings.tokens),
        "context": settings.context,
        "batch": list(settings.batches),
        "bottleneck": list(settings.widths),
        "only": list(settings.only),
    }


def _found(
    settings: Settings, found: Found, checks: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What points and checks came to, as the results have it."""
    rows = [row for index in sorted(found.rows) for row in found.rows[index]]
    failures = [
        f"{row['variant']}, {row['tokens']} tokens" for row in rows if row["kind"] == "ours" and row["within"] is False
    ]
    failures += found.failures
    failures += [f"{one['op']}, interpreted, {one['dtype']}" for one in checks if one["within"] is False]
    return {
        "rows": rows,
        "interpreted": list(checks),
        "targets": _targets(rows, settings),
        "left_out": [*left_out, *found.left_out],
        "failures": failures,
    }


def _run(
    settings: Settings,
    chosen: Sequence[Point],
    caches: Caches,
    progress: Progress,
    found: Found,
    *,
    bandwidth: float,
    started: float,
) -> Iterator[list[Point]]:
    """Every point, what targets read first, until there is no time left or the device is lost. After each, the rest."""
    order = range(len(chosen)) if settings.sweep else urgent(chosen, settings)
    for number, index in enumerate(order, 1):
        point = chosen[index]
        late = time.perf_counter() - started > settings.stop_after
        if found.lost or late:
            why = found.lost or f"not reached within {settings.stop_after:.0f} s"
            found.left_out.append(point.left_out(why))
            continue
        with progress.step(f"{number} of {len(chosen)}: {point.said()}"), _told(found, [point], point.said()):
            cut = caches.cut(point.tokens, point.context, point.batch).to(point.dtype)
            job = Job(settings, point, cut, bandwidth=bandwidth, started=started)
            found.rows[index] = job.rows()
            found.counts += job.counts
        yield [chosen[index] for index in order[number:]]


def _count(settings: Settings, found: Found, progress: Progress, started: float) -> None:
    """Count kernels, as far as there is time; a row without a count has none."""
    if found.lost or not found.counts:
        return
    with progress.step("counting kernels"), _told(found, [], "counting kernels"):
        for row, call in found.counts:
            if time.perf_counter() - started > settings.stop_after + COUNTING_S:
                return
            row["kernels"] = timing.kernels_launched(call)


def _run_host(settings: Settings, found: Found, caches: Caches, progress: Progress, bandwidth: float) -> None:
    """What is done on the CPU wherever the rest runs, behind the points of `_run`."""
    groups = [group for group in HOST_GROUPS if cases_of(group, settings.only)]
    for width in settings.widths if groups else ():
        # The prompt takes no part.
        places = [Point(group, 1, settings.context, width, settings.dtype) for group in groups]
        said = f"messages to bytes and back, on the CPU: d = {width}"
        if found.lost:
            found.left_out += [place.left_out(found.lost) for place in places]
            continue
        with progress.step(said), _told(found, places, said):
            found.rows[max(found.rows, default=-1) + 1] = _host_rows(settings, caches, width, bandwidth)


@contextmanager
def _told(found: Found, places: Sequence[Point], said: str) -> Iterator[None]:
    """What goes wrong in the block, told of these places; what was measured before is worth its results."""

    def leave_out(why: str) -> None:
        found.left_out += [place.left_out(why) for place in places]

    try:
        yield
    except KeyboardInterrupt:
        found.lost = INTERRUPTED
        leave_out(found.lost)
    except torch.cuda.OutOfMemoryError:
        leave_out("more memory than there is")
        torch.cuda.empty_cache()
    except Exception as error:  # one size that fails must not take the others with it
        traceback.print_exc()
        why = f"it raised {type(error).__name__}"
        leave_out(why)
        found.failures.append(f"{said}: {why}: {error}"[:300])
        if is_fatal(error):
            found.lost = f"the device was lost in {said}"


def _host_rows(settings: Settings, caches: Caches, width: int, bandwidth: float) -> list[dict[str, Any]]:
    """Rows of messages to bytes and back, against the CPU's own copy bandwidth."""
    if settings.on_gpu:
        bandwidth = timing.copy_bandwidth(torch.device("cpu"))
    return wire.rows(settings, caches.cut(1, settings.context), width, bandwidth=bandwidth)


def _caches(
    settings: Settings, chosen: Sequence[Point], progress: Progress
) -> tuple[Caches, interpreted.Check | None, dict[str, Any]]:
    """Build the models, prefill the text, let the models go. Without a GPU the interpreted check starts meanwhile."""
    tokens = max((_prefilled(point.tokens, point.batch) for point in chosen), default=max(settings.tokens))
    context = max((_prefilled(point.context, point.batch) for point in chosen), default=settings.context)
    parts = models.paragraphs()
    prompt, other = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    with progress.step(f"sharer: building it, prefilling {tokens} tokens"):
        sharer = models.load(settings.sharer, "sharer", device=settings.device, dtype=settings.dtype)
        heard = models.prefill(sharer, models.tokenize(sharer, prompt, tokens)[0])
        labels = {"sharer": sharer.label}
        del sharer
    with progress.step("receiver: building it"):
        receiver = models.load(settings.receiver, "receiver", device=settings.device, dtype=settings.dtype)
        labels["receiver"] = receiver.label
    ids, _ = models.tokenize(receiver, prompt, tokens)
    context_ids, spans = models.tokenize(receiver, other, context)
    check = None
    if not settings.on_gpu and settings.sweep is None:
        few = min(interpreted.TOKENS, tokens, context)
        sample = Caches(
            [(key[:, :, :few].clone(), value[:, :, :few].clone()) for key, value in heard],
            models.prefill(receiver, ids[:few]),
            models.prefill(receiver, context_ids[:few]),
            [0, few // 3, few // 3, few // 2, few],  # an empty span among them
        )
        dtypes = ["float32"] if settings.quick else ["float32", "float16", "bfloat16"]
        check = interpreted.start(sample, settings.widths[0], dtypes, everything=not settings.quick)
    with progress.step(f"receiver: prefilling {tokens} tokens, and {context} of another text"):
        caches = Caches(heard, models.prefill(receiver, ids), models.prefill(receiver, context_ids), spans)
    named = [where for where in (settings.sharer, settings.receiver) if where is not None]
    about = {
        **labels,
        "text": "bench/text.txt",
        "prompt_tokens": max(settings.tokens),
        "context_tokens": settings.context,
        "spans": sum(offset < settings.context for offset in spans[1:]) + 1,
        "adapter": "random weights of order 1, all gates open",
        "downloaded": "only what --sharer and --receiver name" if named else "nothing",
    }
    return caches, check, about


def _prefilled(length: int, batch: int) -> int:
    """Tokens of the text that rows of this length are cut from; further rows begin anew."""
    return max(length, min(length * batch, LONGEST))


def _targets(rows: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """What the CPU path must reach over the naive reference, and what it reached."""
    targets = {group.name: group.target for group in GROUPS if group.target is not None}
    found = []
    for row in rows:
        same = row["tokens"] == TARGET_TOKENS and row["layers"] == QWEN3.layers and row["bottleneck"] == 128
        if row["kind"] != "ours" or row["group"] not in targets or not same or row["batch"] != 1:
            continue
        if settings.on_gpu or row["dtype"] != "float32":
            continue
        target, reached = targets[row["group"]], row["speedup_reference"]
        found.append(
            {
                "op": row["op"],
                "tokens": row["tokens"],
                "layers": row["layers"],
                "target": target,
                "reached": reached,
                "met": reached is not None and reached >= target,
            }
        )
    return found
