"""``python -m bench.host``: what a call costs on the host, with no GPU at hand.

Runs the whole of `adapter.fuse`, `fuse_`, `inject` and `summarize`, and `summarize` of slots, on CPU tensors, through
Triton's own launcher up to the compiled kernel, which is a stub: what is timed is our Python and Triton's binder,
specialisation and cache look-up. Not counted: the driver's launch itself, the device guard, and what a GPU's allocator
takes above the CPU's. Counted, though a GPU has nothing of it: a look at the spans' values. Times are the thread's own
CPU time, which other work on the machine does not count into.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import os
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from .cases import SLOTS
from .timing import Timing

EXAMPLES = """examples:
  python -m bench.host                              microseconds a call, one token
  python -m bench.host --tokens 1 16 64 128         several lengths
  python -m bench.host --profile fuse               one call by parts
"""
CALLS = ("fuse", "fuse_", "inject", "inject_", "summarize", "slots")
KINDS = ("pairs", "DynamicCache")
#: Calls a sample: long enough for the clock, short enough to fall between disturbances.
SAMPLE = 20

Call = Callable[[], object]


class _Driver:
    """What Triton asks of a driver before it launches. `on_a_gpu` puts it in the place of one."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


class Launches:
    """Stands for every compiled kernel, as `triton.compiler.CompiledKernel` is called, and counts launches.

    Attributes:
        variants: kernels that would have been compiled.
        grids: programs of each launch.
        arguments: those of each launch, where this is a list.
    """

    function = packed_metadata = None

    def __init__(self) -> None:
        self.variants = 0
        self.grids: list[int] = []
        self.arguments: list[tuple[Any, ...]] | None = None

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        from triton.compiler import CompiledKernel

        launch: Callable[..., None] = CompiledKernel.__getitem__(self, grid)
        return launch

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, grid: int, *rest: Any) -> None:
        self.grids.append(grid)
        if self.arguments is not None:
            self.arguments.append(rest[8:])


def forget_launches() -> None:
    """Our launchers keep Triton's compiled kernels; what one driver launches is not for another."""
    from lcf_fast.kernels import fusion_plan, launching

    fusion_plan.plan_of.cache_clear()
    launching.variants_of.cache_clear()


@contextmanager
def on_a_gpu(target: str = "sm_90") -> Iterator[Launches]:
    """CPU tensors take the path of a GPU's, up to the launch. Needs kernels that were imported without the interpreter.

    Args:
        target: the chip, ``sm_80`` and the like.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from lcf_fast import LatentCacheFlow, backends
    from lcf_fast.kernels import common

    launches = Launches()

    def compiled(function: Any, key: str, *_: Any) -> Launches:
        launches.variants += 1
        function.device_caches[0][0][key] = launches
        return launches

    def live(adapter: Any) -> Any:
        return adapter._live_of(adapter.gate_logit)

    driver = _Driver(int(target.removeprefix("sm_")))
    with ExitStack() as stack:
        for owner, name, value in (
            (triton.runtime.driver, "_active", driver),
            (JITFunction, "_do_compile", compiled),
            (backends, "interpreting", lambda: True),
            (common, "_target", lambda device: target),
            (LatentCacheFlow, "_live", live),
        ):
            stack.enter_context(patch.object(owner, name, value))
        forget_launches()
        stack.callback(forget_launches)  # they hold our stubs
        stack.enter_context(backends.use_backend("triton"))
        stack.enter_context(torch.no_grad())
        yield launches


def make_calls(
    tokens: int, dtype: torch.dtype = torch.bfloat16, layers: Sequence[int] | None = None
) -> dict[str, Call]:
    """The calls to time, by name and kind of cache: the published pair, one item.

    Args:
        tokens: positions of both caches.
        dtype: of weights and caches.
        layers: receiver layers that are kept; None: all.
    """
    from transformers import DynamicCache

    from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, Message
    from lcf_fast.architectures import published_config

    sharer, receiver = (CacheGeometry.of(published_config(role, vocabulary=8)) for role in ("sharer", "receiver"))
    lcf = LatentCacheFlow(LCFConfig(sharer, receiver, gate_init=1.0), keep_layers=layers)
    crossing = LatentCacheFlow(LCFConfig(receiver, receiver, cross_context=True), keep_layers=layers)
    kept = receiver if layers is None else replace(receiver, layers=len(layers))  # slots have all layers of a model
    slots = LatentSlots(LCFConfig(kept, kept, cross_context=True, slots=SLOTS))
    for adapter in (lcf, crossing, slots):
        adapter.to(dtype).requires_grad_(False).eval()

    def pairs(geometry: CacheGeometry) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shape = (1, geometry.kv_heads, tokens, geometry.head_dim)
        return [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(geometry.layers)]

    def dynamic(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
        cache = DynamicCache()
        for i, (key, value) in enumerate(layers):
            cache.update(key, value, i)
        return cache

    latent = torch.randn(len(crossing.receiver_layers), 1, 128)
    message = Message(latent=latent, receiver_layers=tuple(crossing.receiver_layers.tolist()), spans=1)
    offsets = torch.tensor([[0, tokens // 2, tokens]], dtype=torch.int32)
    calls: dict[str, Call] = {}
    for kind in KINDS:
        make = list if kind == "pairs" else dynamic
        heard, own = make(pairs(sharer)), make(pairs(receiver))
        calls |= {
            f"fuse, {kind}": partial(lcf.fuse, heard, own),
            f"fuse_, {kind}": partial(lcf.fuse_, heard, own),
            f"inject, {kind}": partial(crossing.inject, own, message),
            f"inject_, {kind}": partial(crossing.inject_, own, message),
            f"summarize, {kind}": partial(crossing.summarize, own, offsets),
            f"slots, {kind}": partial(slots.summarize, make(pairs(kept))),
        }
    return calls


def measure(calls: dict[str, Call], seconds: float) -> dict[str, Timing]:
    """Milliseconds of this thread's CPU time a call, in turns, for about ``seconds`` each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2 * SAMPLE):
            call()
    gc.collect()
    gc.disable()
    stop = time.perf_counter() + seconds * len(calls)
    is_first = True
    try:
        while is_first or time.perf_counter() < stop:
            is_first = False
            for name, call in calls.items():
                start = time.thread_time()
                for _ in range(SAMPLE):
                    call()
                samples[name].append((time.thread_time() - start) * 1e3 / SAMPLE)
    finally:
        gc.enable()
    return {name: Timing.of(found) for name, found in samples.items()}


def profile(call: Call, times: int = 2000) -> str:
    """Where a call's time goes, by function; the profiler's own cost is in it."""
    profiler = cProfile.Profile()
    call()
    profiler.enable()
    for _ in range(times):
        call()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(28)
    return text.getvalue()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench.host",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--tokens", type=int, nargs="+", default=[1], metavar="N", help="positions of the caches (default: 1)")
    add("--layers", type=int, default=None, metavar="L", help="kept layers, the last ones (default: all 28)")
    add("--seconds", type=float, default=2.0, help="how long each call is timed (default: %(default)s)")
    add("--profile", choices=CALLS, metavar="CALL", help=f"profile one of {', '.join(CALLS)} instead, on both caches")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    with on_a_gpu() as launches:
        for tokens in given.tokens:
            layers = None if given.layers is None else range(28 - given.layers, 28)
            calls = make_calls(tokens, layers=layers)
            if given.profile:
                for kind in KINDS:
                    print(f"{given.profile}, {kind}, {tokens} tokens")
                    print(profile(calls[f"{given.profile}, {kind}"]))
                continue
            launches.grids.clear()
            print(f"{tokens} tokens, microseconds a call: median, quartiles, launches, programs")
            for name, timing in measure(calls, given.seconds).items():
                launches.grids.clear()
                calls[name]()
                figures = f"{timing.median_ms * 1e3:6.1f}  ({timing.low_ms * 1e3:.1f} to {timing.high_ms * 1e3:.1f})"
                print(f"  {name:24}{figures:28}{launches.grids}", flush=True)
    return 0


if __name__ == "__main__":
    # The compiled kernels' launcher is what is timed, not the interpreter.
    os.environ["TRITON_INTERPRET"] = "0"
    sys.exit(main())
