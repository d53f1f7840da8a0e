"""What the tests on a GPU share: CUDA graphs, the guard against syncs, the count of compiled variants."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of ``run``, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled_variants() -> dict[str, int]:
    """How many variants each kernel has been compiled to in this process."""
    kernels = importlib.import_module("lcf_fast.kernels")
    counts = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"lcf_fast.kernels.{info.name}")
        for name, function in vars(module).items():
            if hasattr(function, "device_caches") and function.__module__ == module.__name__:
                counts[name] = sum(len(cache[0]) for cache in function.device_caches.values())
    return counts
