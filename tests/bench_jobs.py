"""What the tests of the main job share: small jobs on random caches, a GPU's path without one, the rows' schema."""

from __future__ import annotations

from typing import Any

import torch

from bench import cases, inputs
from bench.job import Job
from bench.settings import Settings
from helpers import Geometry, make_cache
from lcf_fast import LCFConfig

CPU = torch.device("cpu")
LCF = LCFConfig(cases.QWEN25, cases.QWEN3, bottleneck=128)
LCFX = LCFConfig(cases.QWEN3, cases.QWEN3, bottleneck=128, cross_context=True)
BY_NAME = {group.name: group for group in cases.GROUPS}

ROW = {
    "group", "title", "op", "variant", "kind", "tokens", "context", "spans", "layers", "bottleneck", "dtype", "sharer",
    "receiver", "bytes", "flops", "within", "error", "note", "time", "time_hot", "reason", "gb_s", "copy_share",
    "tflop_s", "kernels", "peak_mb", "saved_mb", "host_us", "speedup", "against", "speedup_reference",
}  # fmt: skip


class AsOnGpu(Settings):
    """Takes a GPU's path through the job; what asks a device must be stood in for."""

    on_gpu = True  # type: ignore[assignment]


def small_job(group: str, kind: type[Settings] = Settings, **settings: Any) -> Job:
    """A job on random caches of small models."""
    sharer, receiver = Geometry(2, 2, 32), Geometry(3, 2, 64)
    caches = inputs.Caches(
        make_cache(sharer, 1, 20), make_cache(receiver, 1, 20), make_cache(receiver, 1, 30), [0, 10, 10, 30]
    )
    given = kind(CPU, torch.float32, (20,), context=30, widths=(64,), seconds=0.05, **settings)
    return Job(given, BY_NAME[group], caches, 64, bandwidth=10.0, started=0.0)
