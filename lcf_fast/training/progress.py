"""A progress bar with the figures of the last step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["Progress"]


class Progress:
    """rich's bar on standard error; into a file or a pipe, a line every tenth of the steps. Nothing if not shown."""

    def __init__(self, steps: int, done: int, *, shown: bool) -> None:
        self._steps, self._lines = steps, shown and not sys.stderr.isatty()
        self._bar: Any = None
        if not shown or self._lines:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=steps, completed=done, figures="")
        self._bar.start()

    def show(self, entry: Mapping[str, Any]) -> None:
        text = (
            f"loss {entry['loss']:.4f}  {entry['tokens_per_second']:,.0f} tokens/s"
            f"  prefill {entry['prefill_share']:.0%}  adapter {entry['adapter_share']:.0%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=entry["step"], figures=text)
        elif self._lines and (entry["step"] == self._steps or entry["step"] % max(1, self._steps // 10) == 0):
            print(f"step {entry['step']} of {self._steps}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
