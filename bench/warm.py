"""Compiles kernels before they are timed: those of a sweep in processes side by side, since one after the other they
take minutes.

Triton keeps on disk what it compiles, and the benchmark finds it there. ``python -m bench.warm bfloat16 128`` is one of
a sweep's processes; without arguments, all of ``python -m bench --quick``. What does not compile is passed over: it
shows in the benchmark.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

import lcf_fast
from lcf_fast import CacheGeometry

from . import ROOT
from .cases import QWEN3, QWEN25, WHOLE, cases_of
from .inputs import make_config, make_operands, make_weights, random_caches
from .plan import ASIDE, BY_NAME, Point, points, urgent
from .settings import DTYPES, LONGEST, Sweep, default_settings, dtype_name
from .variants import OURS

LIMIT_S = 120.0
#: Batches and receiver positions, between them every tile of `lcf_fast.kernels.policy`; batches of one have their own.
SIZES = ((1, 8), (1, 128), (1, 512), (1, 1024), (1, 2048), (8, 512))
CONTEXTS = ((1, 2000), (1, LONGEST), (8, 2000))


def commands(sweep: Sweep) -> list[list[str]]:
    """A process a dtype and width."""
    return [
        [sys.executable, "-m", "bench.warm", dtype_name(dtype), str(width)]
        for dtype in sweep.dtypes
        for width in sweep.widths
    ]


def compile_beside(sweep: Sweep) -> int:
    """Run them all, as many at a time as there are cores; returns how many came to their end in time."""
    end = time.monotonic() + LIMIT_S

    def run(command: list[str]) -> bool:
        try:
            left = max(end - time.monotonic(), 0.1)
            return not subprocess.run(command, cwd=ROOT, capture_output=True, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return False

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return sum(pool.map(run, commands(sweep)))


def swept(dtype: torch.dtype, width: int) -> list[Point]:
    """Points that between them have every kernel of a sweep at one dtype and width."""
    found = [(name, batch, tokens, ASIDE) for name in WHOLE for batch, tokens in SIZES]
    found += [("summarize", batch, 1, context) for batch, context in CONTEXTS]
    return [
        Point(BY_NAME[name], tokens, context, width, dtype, batch, brief=True) for name, batch, tokens, context in found
    ]


@torch.no_grad()
def touch(
    device: torch.device,
    chosen: Sequence[Point],
    *,
    sharer: CacheGeometry = QWEN25,
    receiver: CacheGeometry = QWEN3,
) -> list[str]:
    """Call our cases of each point once, as the benchmark does; returns what raised."""
    failed = []
    draw = lru_cache(maxsize=2)(make_weights)
    for point in chosen:
        group = point.group
        for case in cases_of(group)[: 1 if point.brief else None]:
            try:
                config = make_config(group, sharer, receiver, point.width)
                weights = draw(config, device=device, dtype=point.dtype)
                caches = random_caches(
                    sharer,
                    receiver,
                    batch=point.batch,
                    tokens=point.tokens,
                    context=point.context,
                    spans=[0, max(point.context // 3, 1), point.context],
                    device=device,
                    dtype=point.dtype,
                    light=True,
                )
                OURS[case.name](make_operands(group, caches, config, weights))
            except Exception as error:  # it has its place in the results
                failed.append(f"{case.name}, {point.said()}: {type(error).__name__}: {error}")
    return failed


def main() -> int:
    device = torch.device("cuda")
    if len(sys.argv) > 1:
        chosen = swept(DTYPES[sys.argv[1]], int(sys.argv[2]))
    else:
        settings = default_settings(device, quick=True)
        chosen = points(settings)
        chosen = [chosen[index] for index in urgent(chosen, settings)]
    with lcf_fast.use_backend("triton"):
        failed = touch(device, chosen)
    print("\n".join(failed) or f"kernels of {len(chosen)} sizes are compiled")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
