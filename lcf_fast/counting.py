"""How far a long pass over many items is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["counted"]

Item = TypeVar("Item")

_QUIET = 1.0  # seconds that pass before anything is shown
_EVERY = 10.0  # seconds from one line to the next, into a file or a pipe


def counted(
    items: Iterable[Item],
    what: str,
    *,
    total: int | None = None,
    shown: bool = True,
    more: Callable[[], str] = lambda: "",
) -> Iterator[Item]:
    """The items, as they come; on standard error a bar with their number, ``what`` they are and ``more`` to say.

    Nothing is shown of a pass that is over within a second. Into a file or a pipe a line comes every ten seconds.
    """
    if not shown:
        yield from items
        return
    if sys.stderr.isatty():
        yield from _with_bar(items, what, total, more)
        return
    then = time.monotonic() + _EVERY
    for number, item in enumerate(items):
        if time.monotonic() >= then:
            of = "" if total is None else f" of {total:,}"
            print(f"{what}: {number:,}{of}  {more()}".rstrip(), file=sys.stderr, flush=True)
            then += _EVERY
        yield item


def _with_bar(items: Iterable[Item], what: str, total: int | None, more: Callable[[], str]) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[more]}"))
    bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total, more="")
    begin, started = time.monotonic() + _QUIET, False
    try:
        for item in items:
            yield item
            if not started and time.monotonic() >= begin:
                bar.start()
                started = True
            bar.update(task, advance=1, more=more())
    finally:
        if started:
            bar.stop()
