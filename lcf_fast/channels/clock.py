"""Time and kernel launches of a channel's parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .request import Timings

__all__ = ["Clock", "LaunchCount"]


class Clock:
    """Seconds of the parts of a call. On a GPU a part ends when the device has done it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts = {"sharer": 0.0, "communication": 0.0, "receiver": 0.0}
        self._began = self._now()
        self.first_token: float | None = None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the block as a part: ``sharer``, ``communication`` or ``receiver``."""
        began = self._now()
        yield
        self._parts[part] += self._now() - began

    def token(self) -> None:
        """The receiver has a new token."""
        if self.first_token is None:
            self.first_token = self._now() - self._began

    def timings(self) -> Timings:
        """All of it; the call has ended."""
        end = self._now() - self._began
        return Timings(**self._parts, first_token=end if self.first_token is None else self.first_token, end=end)


class LaunchCount(Clock):
    """Counts the kernels that the communication launches, and keeps no time worth reading."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.launches = 0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        if part != "communication" or self._device.type != "cuda":
            yield
            return
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            yield
            torch.cuda.synchronize(self._device)
        names = [event.name for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
        self.launches += sum(not name.startswith(("Memcpy", "Memset")) for name in names)
