"""What is run, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """See ``python -m bench --help``.

    Attributes:
        tokens: receiver positions N; the first is the headline, for which everything is compiled.
        context: sharer positions that LCF-X pools.
        widths: bottlenecks d.
        only: names of cases or groups; empty: all.
        sharer, receiver: folder or hub id; None: random weights.
        seconds: of timing for each group at each size and regime.
        hurry_after: seconds into the run after which a time is taken from two samples, so that a slow or busy machine
            ends soon too; errors are judged all the same.
        compile_until: seconds into the run after which nothing more goes to torch.compile; 0: nothing does.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: tuple[int, ...]
    context: int
    widths: tuple[int, ...] = (128,)
    quick: bool = False
    only: tuple[str, ...] = ()
    sharer: str | None = None
    receiver: str | None = None
    seconds: float = 2.0
    hurry_after: float = 75.0
    compile_until: float = 0.0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def default_settings(device: torch.device, *, quick: bool) -> Settings:
    """What a device does within its time: quick 2 minutes (GPU 90 s), else 8 minutes (GPU 4)."""
    if device.type == "cuda":
        if quick:
            gpu = Settings(device, torch.bfloat16, (2048, 128), context=2048, quick=True)
            return replace(gpu, seconds=0.5, hurry_after=60.0, compile_until=40.0)
        gpu = Settings(device, torch.bfloat16, (2048, 128, 512, 4096), context=2048)
        return replace(gpu, seconds=1.0, hurry_after=180.0, compile_until=120.0)
    if quick:
        return Settings(device, torch.float32, (512,), context=512, quick=True, seconds=2.0, hurry_after=75.0)
    cpu = Settings(device, torch.float32, (512, 128, 2048), context=2048)
    return replace(cpu, seconds=7.0, hurry_after=330.0, compile_until=240.0)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
