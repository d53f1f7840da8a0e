"""What is run, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: The longest text that is prefilled: what both published models have positions for. A batch is cut from it.
LONGEST = 32_768


@dataclass(frozen=True)
class Sweep:
    """Axes of a sweep, each from what matters most to what matters least.

    Attributes:
        contexts: sharer positions, of pooling.
        most: bytes an element times positions of a whole batch, above which a size is left out.
        compared: sizes at which everything else takes part as well, ``torch.compile`` too: group, batch, N, width.
    """

    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    contexts: tuple[int, ...]
    most: int
    compared: tuple[tuple[str, int, int, int], ...] = ()


#: By device.
SWEEPS = {
    # 65,536 positions in half precision: caches, results and the graphs' own are then some 40 GB.
    "cuda": Sweep(
        tokens=(2048, 128, 1, 8, 32, 512, 8192, 32_768),
        batches=(1, 8, 32),
        widths=(128, 64, 256, 512),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        contexts=(2000, LONGEST),
        most=131_072,
        compared=(("lcf", 8, 128, 128), ("inject", 8, 128, 128), ("lcf", 1, 2048, 256), ("lcf", 1, 2048, 512)),
    ),
    "cpu": Sweep(
        tokens=(128, 1), batches=(1, 2), widths=(128, 64), dtypes=(torch.float32,), contexts=(300,), most=4096
    ),
}


@dataclass(frozen=True)
class Settings:
    """See ``python -m bench --help``.

    Attributes:
        tokens: receiver positions N; the first is the headline, for which everything is compiled.
        context: sharer positions that LCF-X pools.
        widths: bottlenecks d.
        batches: rows of both caches.
        targets: the sizes that the targets of a GPU read are run too, and first (`bench.plan`).
        sweep: these axes instead of all sizes above (`bench.plan`).
        only: names of cases or groups; empty: all.
        sharer, receiver: folder or hub id; None: random weights.
        seconds: of timing for each group at each size and regime.
        hurry_after: seconds into the run after which a time is taken from two samples, so that a slow or busy machine
            ends soon too; errors are judged all the same.
        compile_until: seconds into the run after which nothing more goes to torch.compile; 0: nothing does.
        stop_after: seconds into the run after which no other size is begun; what is left is named.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: tuple[int, ...]
    context: int
    widths: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (1,)
    targets: bool = False
    sweep: Sweep | None = None
    quick: bool = False
    only: tuple[str, ...] = ()
    sharer: str | None = None
    receiver: str | None = None
    seconds: float = 2.0
    hurry_after: float = 75.0
    compile_until: float = 0.0
    stop_after: float = math.inf

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def default_settings(device: torch.device, *, quick: bool) -> Settings:
    """What a device does within its time: quick 2 minutes (GPU 3), else 8 minutes (GPU 5)."""
    if device.type == "cuda":
        gpu = Settings(device, torch.bfloat16, (2048, 128), context=2000, targets=True)
        if quick:
            return replace(gpu, quick=True, seconds=0.5, hurry_after=120.0, compile_until=80.0, stop_after=170.0)
        gpu = replace(gpu, tokens=(2048, 128, 512, 4096), seconds=1.0)
        return replace(gpu, hurry_after=200.0, compile_until=140.0, stop_after=300.0)
    if quick:
        return Settings(device, torch.float32, (512,), context=512, quick=True, seconds=2.0, hurry_after=75.0)
    cpu = Settings(device, torch.float32, (512, 128, 2048), context=2048)
    return replace(cpu, seconds=7.0, hurry_after=330.0, compile_until=240.0)


def sweep_settings(device: torch.device, sweep: Sweep) -> Settings:
    """Of a sweep, which names what it does not reach in 4 minutes and some (on a CPU in 3)."""
    return Settings(
        device,
        sweep.dtypes[0],
        sweep.tokens,
        context=sweep.contexts[0],
        widths=sweep.widths,
        batches=sweep.batches,
        sweep=sweep,
        seconds=0.1,
        hurry_after=math.inf,
        compile_until=180.0 if device.type == "cuda" else 0.0,
        stop_after=260.0 if device.type == "cuda" else 180.0,
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
