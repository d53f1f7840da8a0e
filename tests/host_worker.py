"""What test_host.py runs in a process of its own: kernels that are launched, up to the driver, and not interpreted.

Prints ``name: calls, calls a kept layer``, after checking that launches past Triton's binder get what it would give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from bench.host import Launches, make_calls, on_a_gpu
from lcf_fast.kernels import launching


@triton.jit
def bound_kernel(x, number, last):
    pass


@triton.jit
def launched_kernel(x, number, last):
    pass


def visible_calls(run: Callable[[], object]) -> int:
    """Calls of functions, Python's and built-in ones, that the interpreter sees: no clock, so the same every time."""
    count = 0

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def described(value: Any) -> Any:
    """A kernel's argument, to be compared: a tensor by its looks, since outputs and workspaces are new every time."""
    return (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


def check_variants(call: Any, launches: Launches) -> None:
    """Parameters of another dtype take kernels of their own, and the first are found again."""
    adapter, dtype = call.func.__self__, call.func.__self__.down_weight.dtype
    call()
    before = launches.variants
    call()
    assert launches.variants == before
    adapter.float()
    call()
    wide = launches.variants
    assert wide > before
    adapter.to(dtype)
    call()
    assert launches.variants == wide


def check_alike(launches: Launches) -> None:
    """`launching` takes for alike what Triton's binder does: integers, tensors, options."""
    words = torch.zeros(17, dtype=torch.float16)
    given = [(words, number, 4) for number in (0, 1, 2, 16, 17, 2**31 - 16, 2**31, 2**31 + 1, 2**40, 3)]
    given += [(words[1:], 3, 4), (words, 3, 4), (words.float(), 3, 4), (words, 3, 8), (words[1:], 3, 8), (words, 3, 4)]
    for x, number, warps in given:
        before = launches.variants
        bound_kernel[(1,)](x, number, 8, num_warps=warps)
        bound = launches.variants
        launching.launch(launched_kernel, 1, (), (x,), (number, 8), {}, {"num_warps": warps})
        assert launches.variants - bound == bound - before, (x.dtype, x.data_ptr() % 16, number, warps)


def check_odd_addresses(call: Any, launches: Launches) -> None:
    """A sharer that lies as the one before, but at odd addresses, is not read by 16 bytes."""
    before = launches.variants
    heard, own = call.args
    odd = [tuple(torch.zeros(side.numel() + 1).to(side)[1:].view(side.shape) for side in pair) for pair in heard]
    call.func(odd, own)
    assert launches.variants > before


def main() -> None:
    with on_a_gpu() as launches:
        check_alike(launches)
    counts: dict[str, dict[int, int]] = {}
    for layers in (4, 28):
        with on_a_gpu() as launches:
            for name, call in make_calls(3, layers=range(28 - layers, 28)).items():
                found = []
                for _ in range(3):  # the first goes through Triton's binder
                    launches.arguments = []
                    call()
                    assert launches.arguments, name
                    found.append([[described(value) for value in some] for some in launches.arguments])
                launches.arguments = None
                assert found[0] == found[1] == found[2], name
                if name.endswith("pairs"):  # the other kind takes the same kernels
                    check_variants(call, launches)
                if name == "fuse, pairs":
                    check_odd_addresses(call, launches)
                counts.setdefault(name, {})[layers] = visible_calls(call)
    for name, by_layers in counts.items():
        print(f"{name}: {by_layers[28]}, {(by_layers[28] - by_layers[4]) / 24:.2f}")


if __name__ == "__main__":
    main()
