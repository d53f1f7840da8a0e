"""Time and kernel launches of a channel's parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .request import Timings

__all__ = ["Clock", "LaunchCount"]


class Clock:
    """Seconds of the parts of a call. On GPUs a part ends when all of the call's devices have done it.

    ``devices``: the receiver's and the sharers': what a sharer's GPU has yet to do is not the communication's.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self._parts = {"sharer": 0.0, "communication": 0.0, "receiver": 0.0}
        self._began = self._now()
        self.first_token: float | None = None

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)

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

    def __init__(self, *devices: torch.device) -> None:
        super().__init__(*devices)
        self.launches = 0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        if part != "communication" or not self._gpus:
            yield
            return
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            yield
            self._wait()
        names = [event.name for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
        self.launches += sum(not name.startswith(("Memcpy", "Memset")) for name in names)
