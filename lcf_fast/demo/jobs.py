"""Jobs side by side, each in a process with one thread: models this small gain nothing from a second one.

Results and models go between processes as plain data; `pack` and `unpack` turn a module's weights into bytes.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from ..training.models import hide_loading
from . import worker

__all__ = ["Display", "Job", "Watch", "Workers", "pack", "unpack"]

#: Told how a job goes, in words.
Watch = Callable[[str], None]

_mail: Any = None  # in a worker: where it tells how its jobs go


@dataclass(frozen=True)
class Job:
    """``function(*arguments, watch)``, to be run in some process: all of them can be pickled."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Workers:
    """Up to ``count`` processes, or with one the calling process itself; use it in a ``with`` block."""

    def __init__(self, count: int, display: Display) -> None:
        self._display, self._pool, self._threads = display, None, torch.get_num_threads()
        if count > 1:
            # Not by fork: threads of torch would not survive it.
            context = get_context("spawn")
            self._mail: Any = context.Queue()
            self._pool = ProcessPoolExecutor(count, context, initializer=worker.begin, initargs=(self._mail,))

    def __enter__(self) -> Workers:
        torch.set_num_threads(1)
        return self

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self._threads)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._display.close()

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Their results, in the order of the jobs, which begin in that order. An error of a job is raised here."""
        if self._pool is None:
            return [self._run_here(job) for job in jobs]
        futures: dict[Future[Any], Job] = {self._pool.submit(_work, job): job for job in jobs}
        left = set(futures)
        while left:
            done, left = wait(left, timeout=0.2, return_when="FIRST_COMPLETED")
            self._read_mail()
            for future in done:
                future.result()
                self._display.done(futures[future].name)
        return [future.result() for future in futures]

    def _read_mail(self) -> None:
        while True:
            try:
                name, said = self._mail.get_nowait()
            except queue.Empty:
                return
            self._display.say(name, said)

    def _run_here(self, job: Job) -> Any:
        result = job.function(*job.arguments, lambda said: self._display.say(job.name, said))
        self._display.done(job.name)
        return result


def begin(mail: Any) -> None:
    """In a worker, before its first job."""
    global _mail
    _mail = mail
    torch.set_num_threads(1)
    hide_loading()


def _work(job: Job) -> Any:
    return job.function(*job.arguments, lambda said: _mail.put((job.name, said)))


class Display:
    """On a terminal a line for each job that is going on; elsewhere one when it begins and one when it is done."""

    def __init__(self) -> None:
        self._began, self._tasks = time.perf_counter(), dict[str, Any]()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            said = TextColumn("{task.fields[said]}", markup=False)
            columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), said, TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()

    def say(self, name: str, said: str) -> None:
        """How a job goes."""
        if self._bar is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=1, said="")
            self._bar.update(self._tasks[name], said=said)
        elif name not in self._tasks:
            self._tasks[name] = None
            self._print(name, said)

    def done(self, name: str) -> None:
        """A job is over."""
        if self._bar is not None and name in self._tasks:
            self._bar.update(self._tasks[name], completed=1, said="done")
        elif self._bar is None:
            self._print(name, "done")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, name: str, said: str) -> None:
        print(f"{time.perf_counter() - self._began:4.0f} s  {name}: {said}", file=sys.stderr, flush=True)


def pack(module: nn.Module) -> bytes:
    """Its weights."""
    from safetensors.torch import save

    # Tied weights are one tensor under two names, which the format does not take.
    return save({name: value.detach().clone() for name, value in module.state_dict().items()})


def unpack(module: nn.Module, data: bytes) -> None:
    """Put in weights that `pack` took out of a module of the same kind."""
    from safetensors.torch import load

    module.load_state_dict(load(data))
