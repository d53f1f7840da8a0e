"""What the tests of the main job share: small jobs on random caches, a GPU's path without one, the rows' schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import cases, inputs
from bench.job import Job
from bench.plan import Point
from bench.settings import Settings
from helpers import Geometry, make_cache
from lcf_fast import LCFConfig

CPU = torch.device("cpu")
LCF = LCFConfig(cases.QWEN25, cases.QWEN3, bottleneck=128)
LCFX = LCFConfig(cases.QWEN3, cases.QWEN3, bottleneck=128, cross_context=True)
BY_NAME = {group.name: group for group in cases.GROUPS}

ROW = {
    "group", "title", "op", "variant", "kind", "batch", "tokens", "context", "spans", "layers", "bottleneck", "dtype",
    "sharer", "receiver", "bytes", "flops", "within", "error", "note", "time", "time_hot", "reason", "gb_s",
    "copy_share", "tflop_s", "kernels", "peak_mb", "saved_mb", "activation_mb", "host_us", "speedup", "against",
    "speedup_reference",
}  # fmt: skip


class AsOnGpu(Settings):
    """Takes a GPU's path through the job; what asks a device must be stood in for."""

    on_gpu = True  # type: ignore[assignment]


def small_job(
    group: str, kind: type[Settings] = Settings, *, batch: int = 1, brief: bool = False, **settings: Any
) -> Job:
    """A job on random caches of small models."""
    sharer, receiver = Geometry(2, 2, 32), Geometry(3, 2, 64)
    caches = inputs.Caches(
        make_cache(sharer, batch, 20), make_cache(receiver, batch, 20), make_cache(receiver, batch, 30), [0, 10, 10, 30]
    )
    given = kind(CPU, torch.float32, (20,), context=30, widths=(64,), **{"seconds": 0.05, **settings})
    point = Point(BY_NAME[group], 20, 30, 64, torch.float32, batch, brief)
    return Job(given, point, caches, bandwidth=10.0, started=0.0)


def two_models(folder: Path) -> tuple[str, str]:
    """Folders of two tiny models, the sharer's and the receiver's, without tokenizers."""
    import transformers

    size = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    size["num_key_value_heads"] = 2
    torch.manual_seed(0)
    sharer = transformers.Qwen2Config(num_hidden_layers=2, **size)
    receiver = transformers.Qwen3Config(num_hidden_layers=3, head_dim=32, **size)
    for name, config in (("sharer", sharer), ("receiver", receiver)):
        transformers.AutoModel.from_config(config).save_pretrained(folder / name)
    return str(folder / "sharer"), str(folder / "receiver")
