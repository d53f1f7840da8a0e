"""Clocks. On a CPU the wall clock around a call; on a GPU CUDA events around several calls, and more besides.

Variants take turns, so that whatever disturbs the machine disturbs them alike. On a GPU a call takes as long as its
kernels or as its launches, whichever is longer: that is what a user waits for, and a CUDA graph takes the launches out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import torch

from lcf_fast.capture import recording

Call = Callable[[], object]
#: A sample lasts at least this long, so that the clock's own cost does not count.
SAMPLE_MS = {"cpu": 1.0, "cuda": 3.0}
LEAST_ROUNDS, MOST_ROUNDS = 5, 30
MOST_SETS = 256


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over the samples."""

    median_ms: float
    low_ms: float
    high_ms: float
    samples: int

    def to_dict(self) -> dict[str, float | int]:
        return {
            "median_ms": self.median_ms, "low_ms": self.low_ms, "high_ms": self.high_ms, "samples": self.samples
        }  # fmt: skip

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], len(samples))
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, low, high, len(samples))


def _sample(calls: Iterator[Call], count: int, device: torch.device) -> float:
    """Milliseconds a call over ``count`` calls."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            next(calls)()
        return (time.perf_counter() - started) * 1e3 / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        next(calls)()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def measure(
    variants: Mapping[str, Sequence[Call]], device: torch.device, seconds: float, *, least: int = LEAST_ROUNDS
) -> dict[str, Timing]:
    """Time the variants in turns, for about ``seconds`` in all.

    Args:
        variants: by name, the same call on one or several sets of inputs, which are taken in rotation.
        least: samples of each, however long they take.
    """
    rotations = {name: cycle(calls) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    counts = {}
    for name, calls in variants.items():
        _sample(rotations[name], len(calls), device)  # warm-up: every set once
        once = _sample(rotations[name], 1, device)
        counts[name] = max(1, min(200, round(SAMPLE_MS[device.type] / max(once, 1e-4))))
        if counts[name] == 1:
            samples[name].append(once)
    order = list(variants)
    deadline = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if time.perf_counter() > deadline and min(len(some) for some in samples.values()) >= least:
            break
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            samples[name].append(_sample(rotations[name], counts[name], device))
    return {name: Timing.of(values) for name, values in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of copying a large tensor, read and written bytes counted: what moving memory costs here, at best."""
    size = (1 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": [lambda: target.copy_(source)]}, device, 1.0)["copy"]
    return 2 * size / timing.low_ms / 1e6


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of random matrices: what arithmetic costs here, at best."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = measure({"product": [lambda: one @ other]}, device, 0.5)["product"]
    return 2 * size**3 / timing.low_ms / 1e9


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def rotation_sets(nbytes: int, l2: int) -> int:
    """How many sets of inputs of ``nbytes`` it takes to pass three times through a cache of ``l2`` bytes.

    At most `MOST_SETS`: what is so small is bound by its launch, whether it lies in the cache or not.
    """
    return max(1, min(MOST_SETS, -(-3 * l2 // max(nbytes, 1))))


@contextmanager
def _quiet_device() -> Iterator[None]:
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


def host_us(call: Call) -> float:
    """Microseconds until the call returns, with the device idle before: checks and launches."""
    values = []
    for _ in range(15):
        with _quiet_device():
            started = time.perf_counter()
            call()
            values.append((time.perf_counter() - started) * 1e6)
    return statistics.median(values)


def peak_mb(call: Call) -> float:
    """MB that the call allocates at its highest, results included."""
    with _quiet_device():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    del result
    return peak


def kernels_launched(call: Call) -> int | None:
    """Kernels that one call runs; copies and fills by the driver are not counted. None: the profiler saw nothing."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with _quiet_device(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    return len(kernels) or None


def graphed(calls: Sequence[Call]) -> list[Call]:
    """The calls as CUDA graphs, captured into one pool of memory: one runs at a time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    graphs, kept = [], []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with recording(graph, pool):
            kept.append(call())
        graphs.append(graph)
    del kept  # after the last capture only, so that every graph writes to memory of its own: cold outputs too
    return [graph.replay for graph in graphs]
