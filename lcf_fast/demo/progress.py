"""What the demo is at: a line a stage on standard error, and on a terminal how it goes."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Stages"]


class Stages:
    """A spinner on a terminal; elsewhere a line where a stage begins. The trainer's own bar follows where it trains.

    Adapters show `lcf_fast.training.progress`, and two live displays do not go together: the spinner is up only
    while agents learn.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, markup=False, highlight=False)
        self._status: Any = None
        self._stage, self._began = "", time.perf_counter()

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def show(self, stage: str, detail: str) -> None:
        """A stage goes on, or another begins."""
        if stage != self._stage:
            self._stop()
            self._stage = stage
            self._console.print(f"{time.perf_counter() - self._began:4.0f} s  {stage}")
        if sys.stderr.isatty() and not stage.startswith("training the adapter"):
            if self._status is None:
                self._status = self._console.status(detail)
                self._status.start()
            self._status.update(detail)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
