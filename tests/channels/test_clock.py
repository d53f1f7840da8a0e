"""What a channel's times and launches are of."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lcf_fast.channels.clock import Clock, LaunchCount
from lcf_fast.channels.request import Timings


def test_parts_add_up_and_the_first_token_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    for part, seconds in (("sharer", 1.0), ("communication", 2.0), ("sharer", 4.0), ("receiver", 8.0)):
        with clock.of(part):
            now[0] += seconds
    for seconds in (16.0, 32.0):
        now[0] += seconds
        clock.token()
    assert clock.timings() == Timings(sharer=5, communication=2, receiver=8, first_token=31, end=63)


def test_a_part_ends_when_all_devices_have_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once: a sharer may be on a GPU of its own, or on the receiver's; a CPU has done what it returns from."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    devices = [torch.device(name) for name in ("cuda:0", "cuda:1", "cpu", "cuda:0")]
    clock = Clock(*devices)
    for end in (clock.of("sharer").__enter__, clock.token, clock.timings):
        waited.clear()
        end()
        assert waited == devices[:2]


def test_kernels_of_the_communication_are_counted_and_copies_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's profiler would tell them."""
    from torch.autograd import DeviceType

    names = ["fuse", "Memcpy DtoD", "Memset (Device)", "norm"]
    events = [SimpleNamespace(name=name, device_type=DeviceType.CUDA) for name in names]
    events.append(SimpleNamespace(name="aten::add", device_type=DeviceType.CPU))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr("torch.profiler.profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    clock = LaunchCount(torch.device("cuda"))
    for part in ("sharer", "communication", "receiver", "communication"):
        with clock.of(part):
            pass
    assert clock.launches == 4
