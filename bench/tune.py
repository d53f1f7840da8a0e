"""``python -m bench.tune``: faster launch configurations than the package's own, on the GPU that is here.

For each task (a hot path at a size that a row of the kernels' policy is for) rows near the policy's are compiled in
processes side by side, held to the error budget, and timed beside the policy's own. What is faster goes to
DIR/tuned.json, which the environment variable LCF_FAST_TUNED makes the kernels take; DIR/trials.json has all times.
Without that variable nothing changes: the package tunes nothing by itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

import lcf_fast
from lcf_fast.files import write_whole
from lcf_fast.kernels import tuned

from . import ROOT, machine, report
from .cases import QWEN3, QWEN25
from .job import is_fatal
from .settings import DTYPES, dtype_name
from .trials import (
    FINAL_ROUNDS,
    FINALISTS,
    HEAT,
    TASKS,
    WORTH,
    Bench,
    Row,
    Task,
    Trial,
    asked,
    candidates,
    forced,
    ours,
)  # fmt: skip

#: Of the time, what goes to compiling.
COMPILING = 0.55
#: The most rows of a task that are tried.
MOST = 120
EXAMPLES = """examples:
  python -m bench.tune --out out/tune                              five minutes, every task at d = 128 in bfloat16
  python -m bench.tune --only tile few --bottleneck 256            two tasks, another width
  LCF_FAST_TUNED=out/tune/tuned.json python -m bench --quick       the benchmark with what was found
"""


class Found:
    """What the tasks came to, kept on disk as it grows: a run may be cut short."""

    def __init__(self, out: Path, bench: Bench) -> None:
        self.out = out
        self.about = machine.about(bench.device)
        self.entries: list[dict[str, Any]] = []
        self.trials: list[dict[str, Any]] = []
        self.write()

    def write(self) -> None:
        for name, key, values in (("tuned", "rows", self.entries), ("trials", "trials", self.trials)):
            data = {"schema": tuned.SCHEMA, "about": self.about, key: values}
            write_whole(self.out / f"{name}.json", report.to_json(data))


def compile_beside(tasks: Sequence[Task], bench: Bench, seconds: float) -> set[tuple[str, int]]:
    """Compile the tasks' candidates in as many processes as there are cores; Triton keeps them on disk.

    Returns:
        Task names and indices of `candidates` that were launched once in time, right or wrong.
    """
    processes = os.cpu_count() or 1
    command = [sys.executable, "-m", "bench.tune", "--dtype", dtype_name(bench.dtype), "--bottleneck", str(bench.width)]
    command += ["--only", *(task.name for task in tasks)]
    end = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+") as said:  # one file, to which lines are appended whole
        running = [
            subprocess.Popen([*command, "--compile", str(i), str(processes)], cwd=ROOT, stdout=said,
                             stderr=subprocess.DEVNULL)
            for i in range(processes)
        ]  # fmt: skip
        try:
            for process in running:
                try:
                    process.wait(max(end - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    process.kill()
        finally:
            for process in running:
                process.kill()
                process.wait()
        said.seek(0)
        lines = [line.split() for line in said.read().splitlines()]
    return {(line[0], int(line[1])) for line in lines if len(line) == 2 and line[1].isdigit()}


def compile_some(tasks: Sequence[Task], bench: Bench, part: int, parts: int) -> None:
    """Launch every ``parts``-th candidate once, the nearest of all tasks first; says which on stdout."""
    units: list[list[tuple[Task, Any, int, Row]]] = [[] for _ in tasks]
    # Each process begins elsewhere, so that they do not all compile the same policy's rows at once.
    for at in range(part, part + len(tasks)):
        task = tasks[at % len(tasks)]
        operands = bench.operands(task.case, task.sizes[0], light=True)
        found = asked(task.kind, task.case, operands)
        rows = candidates(task, found[0][1])[:MOST] if found else []
        units[at % len(tasks)] = [(task, operands, i, row) for i, row in enumerate(rows)]
    for task, operands, i, row in list(_in_turns(units))[part::parts]:
        try:
            with forced({task.kind: row}):
                ours(task.case)(operands)
        except Exception as error:
            if is_fatal(error):
                return
        print(task.name, i, flush=True)


def _in_turns(lists: Iterable[Sequence[Any]]) -> Iterable[Any]:
    return (one for some in zip_longest(*lists) for one in some if one is not None)


def tune(
    tasks: Sequence[Task], bench: Bench, found: Found, seconds: float, progress: report.Steps | None = None
) -> None:
    """Try the tasks one after the other; ``found`` grows."""
    started = time.monotonic()
    step = progress.step if progress is not None else lambda _: nullcontext()
    compiled = None
    if bench.device.type == "cuda":
        with step("compiling other rows, in processes side by side"):
            compiled = compile_beside(tasks, bench, COMPILING * seconds)
    for i, task in enumerate(tasks):
        left = seconds - (time.monotonic() - started)
        if left <= 0:
            print(f"{task.said()}: not reached within {seconds:.0f} s")
            continue
        with step(task.said()):
            try:
                line = tune_task(task, bench, found, compiled, left / (len(tasks) - i))
            except Exception as error:  # one task that fails must not take the others with it
                if is_fatal(error) and not isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                line = f"{task.said()}: it raised {type(error).__name__}: {str(error)[:300]}"
            finally:
                found.write()
        print(line, flush=True)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def tune_task(task: Task, bench: Bench, found: Found, compiled: set[tuple[str, int]] | None, seconds: float) -> str:
    """One task; what came of it, in a line."""
    end = time.monotonic() + seconds
    trial = Trial(task, bench)
    rows = candidates(task, trial.row)[:MOST]
    if compiled is not None:
        rows = [row for i, row in enumerate(rows) if (task.name, i) in compiled]
    own_wrong = trial.wrong(trial.row)
    if own_wrong:
        return f"{task.said()}: the policy's own row is out of bounds, and nothing is tuned: {own_wrong}"
    ratios: list[tuple[float, int]] = []
    own: list[float] = []
    tried = 0
    while tried < len(rows) and time.monotonic() < end:
        some: list[int] = []
        while tried < len(rows) and len(some) < HEAT:
            wrong = trial.wrong(rows[tried])
            if wrong:
                found.trials.append(_said(task, rows[tried], wrong=wrong))
            else:
                some.append(tried)
            tried += 1
        own, times = trial.heat([rows[i] for i in some])
        ratios += zip(times, some)
        found.trials += [_said(task, rows[i], ratio=ratio) for ratio, i in zip(times, some)]
    best = [rows[i] for _, i in sorted(ratios)[:FINALISTS]]
    if best:
        own, times = trial.heat(best, FINAL_ROUNDS)
        found.trials += [_said(task, row, ratio=ratio, final=True) for ratio, row in zip(times, best)]
        ranked = sorted(zip(times, range(len(best))))
    else:
        ranked = []
    times_ms = ", ".join(f"{ms:.4f} ms" for ms in own)
    said = f"{task.said()}: {trial.row}: {times_ms}; {len(ratios)} of {tried} other rows right"
    for ratio, i in ranked:
        if ratio > WORTH:
            break
        wrong = trial.wrong_beside(best[i])
        if wrong:
            found.trials.append(_said(task, best[i], wrong=wrong))
            continue
        found.entries += [tuned.entry(place, row, best[i]) for place, row in trial.asked]
        return f"{said}; {best[i] or 'not split'}: {ratio:.3f} of its time"
    nearest = f", the nearest {ranked[0][0]:.3f}: {best[ranked[0][1]] or 'not split'}" if ranked else ""
    return f"{said}; none at {WORTH:g} of its time or less{nearest}"


def _said(
    task: Task, row: Row, *, ratio: float | None = None, wrong: str = "", final: bool = False
) -> dict[str, Any]:
    fields = None if row is None else asdict(row)
    return {"task": task.name, "row": fields, "ratio": ratio, "final": final, "wrong": wrong}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [task.name for task in TASKS]
    add = result.add_argument
    add("--only", nargs="+", choices=names, default=names, metavar="TASK", help=f"of {', '.join(names)}")
    add("--bottleneck", type=int, choices=(64, 128, 256, 512), default=128, help="latent width d (%(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="%(default)s")
    add("--seconds", type=float, default=300.0, help="for everything (%(default).0f); over half for compiling")
    add("--out", type=Path, default=Path("out/tune"), metavar="DIR", help="where the files go (%(default)s)")
    add("--compile", type=int, nargs=2, help=argparse.SUPPRESS)
    return result


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"bench.tune: a CUDA GPU is needed, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    tasks = [task for task in TASKS if task.name in given.only]
    bench = Bench(QWEN25, QWEN3, given.bottleneck, DTYPES[given.dtype], torch.device("cuda"))
    with lcf_fast.use_backend("triton"):
        if given.compile is not None:
            compile_some(tasks, bench, *given.compile)
            return 0
        try:
            given.out.mkdir(parents=True, exist_ok=True)
            found = Found(given.out, bench)
        except OSError as error:
            print(f"bench.tune: --out {given.out}: {error.strerror or error}", file=sys.stderr)
            return 2
        tune(tasks, bench, found, given.seconds, report.Steps())
    print(f"{report.plural(len(found.entries), 'row')} in {given.out / 'tuned.json'}")
    if found.entries:
        print(f"to take them: {tuned.VARIABLE}={given.out / 'tuned.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
