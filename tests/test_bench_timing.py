"""The benchmark's clocks: how calls are timed, and what their inputs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_jobs import CPU, small_job

from bench import timing
from bench.settings import default_settings


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_variants_take_turns() -> None:
    seen: list[str] = []
    found = timing.measure({name: [partial(seen.append, name)] for name in "ab"}, CPU, 0.0)
    assert set(found) == {"a", "b"} and found["a"].samples == timing.LEAST_ROUNDS
    switches = sum(one != other for one, other in zip(seen, seen[1:]))
    assert switches >= timing.LEAST_ROUNDS


def test_each_round_begins_with_another_variant_and_every_set_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []

    def sample(calls: Iterator[Any], count: int, device: torch.device) -> float:
        names = [next(calls)() for _ in range(count)]
        taken.append((names[0], count))
        return float(len(taken))

    monkeypatch.setattr(timing, "_sample", sample)
    found = timing.measure({name: [lambda name=name: name] * 7 for name in "ab"}, CPU, 0.0, least=3)  # type: ignore[misc]
    assert taken[:4] == [("a", 7), ("a", 1), ("b", 7), ("b", 1)], "each set once, then how long one call takes"
    assert "".join(name for name, _ in taken[4:]) == "abbaabba"[: len(taken) - 4]
    assert found["a"].samples == found["b"].samples == 3


def test_a_sample_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.002

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for device in (CPU, torch.device("cuda")):
        assert timing._sample(cycle([call]), 5, device) == pytest.approx(2.0)
    assert timing.host_us(call) == pytest.approx(2000.0)


def test_a_timing_is_the_median_between_quartiles() -> None:
    found = timing.Timing.of([5.0, 1.0, 2.0, 9.0])
    assert (found.median_ms, found.low_ms, found.high_ms, found.samples) == (3.5, 1.75, 6.0, 4)
    assert timing.Timing.of([3.0]) == timing.Timing(3.0, 3.0, 3.0, 1)


def test_what_a_device_can_do_counts_reads_and_writes_and_both_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    known = timing.Timing(4.0, 2.0, 8.0, 5)
    monkeypatch.setattr(timing, "measure", lambda calls, *_: dict.fromkeys(calls, known))
    assert timing.copy_bandwidth(CPU) == pytest.approx(2 * (128 << 20) / 2e-3 / 1e9)
    assert timing.matmul_rate(CPU, torch.float32) == pytest.approx(2 * 1024**3 / 2e-3 / 1e12)


def test_memory_and_kernels_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would tell them: what was there before does not count, nor do copies and fills by the driver."""
    from torch.autograd import DeviceType

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_500_000)
    assert timing.peak_mb(list) == 2.5
    kernels = ["fuse", "fuse", "Memcpy DtoD", "Memset (Device)"]
    events = [SimpleNamespace(name=name, device_type=DeviceType.CUDA) for name in kernels]
    host = SimpleNamespace(name="aten::add", device_type=DeviceType.CPU)
    seen = SimpleNamespace(events=lambda: [host, *events])
    monkeypatch.setattr("torch.profiler.profile", lambda **_: nullcontext(seen))
    assert timing.kernels_launched(list) == 2
    events.clear()
    assert timing.kernels_launched(list) is None


def test_operands_keep_shared_tensors_shared() -> None:
    operands = small_job("lcf").operands
    doubled = operands.double()
    assert doubled.weights["down_weight"].dtype == torch.float64
    assert doubled.spans.dtype == torch.int32
    assert doubled.sharer[0][0] is doubled.sharer_layers[0][0]


def test_rotated_inputs_share_no_memory() -> None:
    assert timing.rotation_sets(10, 100) == 30 and timing.rotation_sets(301, 100) == 1
    assert timing.rotation_sets(1, 10**9) == timing.MOST_SETS
    for group, one_layer in (("lcf", False), ("injection", True)):
        operands = small_job(group).operands
        sets = operands.rotated(7, one_layer=one_layer)
        assert len(sets) == 7 and sets[0].row == operands.row
        read = [one.receiver[one.row][0].data_ptr() for one in sets] if one_layer else []
        read += [] if one_layer else [key.data_ptr() for one in sets for key, _ in one.receiver]
        weights = [one.layer_weights[one.row]["up_weight"].data_ptr() for one in sets]
        assert len(set(read)) == len(read) >= 7 and len(set(weights)) == 7
        assert all(one.layer_weights[one.row]["up_weight"].shape == (2, 128, 32) for one in sets)


def test_defaults_are_within_what_a_device_does() -> None:
    for quick in (True, False):
        cpu, gpu = default_settings(CPU, quick=quick), default_settings(torch.device("cuda"), quick=quick)
        assert 512 in cpu.tokens and cpu.dtype == torch.float32 and gpu.dtype == torch.bfloat16
    assert default_settings(CPU, quick=True).compile_until == 0
