"""Seconds by name: on a CPU by the clock, on a GPU by events in that GPU's stream, whichever is the current one."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lcf_fast.training.timing import Stopwatch


def test_seconds_add_up_by_name_and_begin_anew() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.of("sleep"):
            time.sleep(0.01)
    start = watch.mark()
    watch.add("nothing", start, start)
    found = watch.seconds()
    assert found["sleep"] >= 0.02
    assert found["nothing"] == 0.0
    assert watch.seconds() == {}


def test_events_are_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    streams: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            streams.append(stream)

        def elapsed_time(self, later: Any) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda", 1)
    watch = Stopwatch(device)
    with watch.of("prefill"):
        pass
    assert watch.seconds() == {"prefill": 0.25}
    assert streams == ["stream of cuda:1"] * 2
    assert waited == [device]
