"""Compiles a sweep's kernels before it begins, in processes side by side: one after the other they take minutes.

Triton keeps on disk what it compiles, and the sweep finds it there. ``python -m bench.warm bfloat16 128`` is one of the
processes. What does not compile is passed over: it shows in the sweep.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

import lcf_fast
from lcf_fast import CacheGeometry

from . import ROOT
from .cases import QWEN3, QWEN25, WHOLE, cases_of
from .inputs import Caches, Pair, make_config, make_operands, make_weights
from .plan import BY_NAME
from .settings import DTYPES, LONGEST, Sweep, dtype_name
from .variants import OURS

LIMIT_S = 120.0
#: Batches and receiver positions, between them every tile of `lcf_fast.kernels.policy`; batches of one have their own.
SIZES = ((1, 8), (1, 512), (1, 2048), (8, 512))
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


@torch.no_grad()
def touch(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    *,
    sharer: CacheGeometry = QWEN25,
    receiver: CacheGeometry = QWEN3,
    sizes: Sequence[tuple[int, int]] = SIZES,
    contexts: Sequence[tuple[int, int]] = CONTEXTS,
) -> list[str]:
    """Call the first case of each swept group once at each size; returns what raised."""
    failed = []
    calls = [(name, batch, tokens, 200) for name in WHOLE for batch, tokens in sizes]
    calls += [("summarize", batch, 1, context) for batch, context in contexts]
    for name, batch, tokens, context in calls:
        group = BY_NAME[name]

        def cache(geometry: CacheGeometry, length: int, rows: int = batch) -> list[Pair]:
            shape = rows, geometry.kv_heads, length, geometry.head_dim
            pair = torch.randn(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype)
            return [pair] * geometry.layers  # one layer's memory serves them all

        caches = Caches(cache(sharer, tokens), cache(receiver, tokens), cache(receiver, context), [0, context])
        config = make_config(group, sharer, receiver, width)
        weights = make_weights(config, device=device, dtype=dtype)
        case = cases_of(group)[0]
        try:
            OURS[case.name](make_operands(group, caches, config, weights))
        except Exception as error:  # it has its place in the sweep's results
            failed.append(f"{case.name}, {batch} × {tokens}: {type(error).__name__}: {error}")
    return failed


def main() -> int:
    with lcf_fast.use_backend("triton"):
        failed = touch(torch.device("cuda"), DTYPES[sys.argv[1]], int(sys.argv[2]))
    print("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
