"""Time spent in the parts of a step, on a CPU or a GPU, without making the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up seconds by name. On a GPU it records events, read when :meth:`seconds` is called."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        """Now: to be given to :meth:`add`."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # which need not be the current device's
        return event

    def add(self, name: str, start: Any, stop: Any = None) -> None:
        """Count from ``start`` to ``stop`` (None: now) under ``name``."""
        self._spans[name].append((start, self.mark() if stop is None else stop))

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what the block takes under ``name``."""
        start = self.mark()
        yield
        self.add(name, start)

    def seconds(self) -> dict[str, float]:
        """Seconds by name since the last call. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        found = {name: sum(map(self._length, spans)) for name, spans in self._spans.items()}
        self._spans.clear()
        return found

    def _length(self, span: tuple[Any, Any]) -> float:
        start, stop = span
        return start.elapsed_time(stop) / 1000 if self._cuda else stop - start
