"""The main job as on a machine with a GPU: every tensor is where the others of its sum are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_jobs import BY_NAME
from elsewhere import a_gpu_elsewhere, on_the_host

import lcf_fast
from bench import cases, inputs, rope, timing, warm, wire
from bench.job import Job
from bench.plan import Point
from bench.settings import Settings
from helpers import Geometry, make_cache
from lcf_fast import architectures

pytest.importorskip("transformers")
SHARER, RECEIVER = Geometry(2, 2, 32), Geometry(3, 2, 64)
#: Whose memory the stand-in has no addresses of.
ADDRESSES = "train"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    def random_model(auto: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
        with on_the_host():
            model = architectures.random_model(auto, config, torch.device("cpu"), dtype)
        return model.to(device)

    def called(call: Callable[[], Any]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(rope, "random_model", random_model)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "graphed", list)
    monkeypatch.setattr(timing, "_sample", lambda calls, count, device: called(next(calls)))
    for name in ("host_us", "kernels_launched", "peak_mb"):
        monkeypatch.setattr(timing, name, called)
    with a_gpu_elsewhere(monkeypatch) as device, torch.no_grad(), lcf_fast.use_backend("eager"):
        yield device


def caches(device: torch.device) -> inputs.Caches:
    heard, own = (make_cache(geometry, 2, 20, device=device) for geometry in (SHARER, RECEIVER))
    return inputs.Caches(heard, own, make_cache(RECEIVER, 2, 30, device=device), [0, 10, 10, 30])


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted({*BY_NAME} - {ADDRESSES}))
def test_every_group_is_measured(group: str, gpu: torch.device) -> None:
    settings = Settings(gpu, torch.float32, (20,), context=30, widths=(64,), hurry_after=-1.0)
    point = Point(BY_NAME[group], 20, 30, 64, torch.float32, batch=2)
    rows = Job(settings, point, caches(gpu), bandwidth=10.0, started=0.0).rows()
    for row in rows:
        assert row["time"] or row["reason"].startswith(("not captured: it", "not run: --no-compile", "not run: its")), (
            row
        )
        assert row["within"] is True or row["kind"] == "other" or not row["time"]
    assert all(row["time"] for row in rows if row["kind"] == "ours" and row["variant"] != "adapter.extend, CUDA graph")


def test_messages_and_what_is_compiled_before(gpu: torch.device) -> None:
    settings = Settings(gpu, torch.float32, (20,), context=30, widths=(64,), seconds=0.0)
    rows = wire.rows(settings, caches(gpu), 64, bandwidth=10.0)
    assert rows and all(row["within"] and row["time"] for row in rows)
    chosen = [Point(group, 20, 30, 64, torch.float32, batch=2) for group in cases.GROUPS]
    sides = {"sharer": cases.CacheGeometry(*SHARER), "receiver": cases.CacheGeometry(*RECEIVER)}
    assert warm.touch(gpu, chosen, **sides) == []
