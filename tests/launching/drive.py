"""Every kernel through Triton's own compiler, binder and launcher, to a CUDA driver that runs nothing.

``python tests/launching/drive.py LIBRARY CHIP``: LIBRARY is stub_cuda.c, built as ``libcuda.so.1``; CHIP is ``sm_90``
or the like. Prints a line of JSON a launch. What it proves, for the Triton and torch that it runs in: each kernel
compiles as it is really launched, within the chip's shared memory, and each parameter that reaches the driver is what
the launch was given, addresses in launch tables among them. What it cannot: that a GPU computes with them.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))

from launching.arguments import bits, given  # noqa: E402


def parameter_sizes(cubin: bytes) -> list[tuple[int, int]]:
    """``(offset, bytes)`` of a kernel's parameters, as its binary describes them (EIATTR_KPARAM_INFO)."""
    found = {}
    for match in re.finditer(rb"\x04\x17\x0c\x00", cubin):
        _, ordinal, offset, flags = struct.unpack_from("<IHHI", cubin, match.end())
        size = flags >> 18 & 0x3FFF
        if size in (1, 2, 4, 8) and offset < 1 << 15:  # else the same four bytes, of something else
            found[ordinal] = offset, size
    return [found[i] for i in sorted(found)]


def watch(stub: ctypes.CDLL, capability: tuple[int, int]) -> list[dict[str, Any]]:
    """Put the stub in the place of a GPU; the launches, one by one, come into what is returned."""
    import torch
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
    from triton.runtime import driver

    counts = (ctypes.c_int * 4096).in_dll(stub, "stub_counts")
    values = (ctypes.c_ulonglong * 1024).in_dll(stub, "stub_values")
    last = ctypes.c_int.in_dll(stub, "stub_kernel")
    grid = (ctypes.c_int * 3).in_dll(stub, "stub_grid")
    shared = ctypes.c_int.in_dll(stub, "stub_shared")
    parameters: dict[int, list[tuple[int, int]]] = {}
    launches: list[dict[str, Any]] = []

    class Launcher(CudaLauncher):  # type: ignore[misc]
        """Triton's own, and a look at what arrived."""

        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.name, self.kinds = source.fn.__name__, list(source.signature.values())

        def __call__(self, *arguments: Any) -> None:
            last.value = 0
            super().__call__(*arguments)
            name, sizes = self.name, parameters[last.value]
            assert min(grid) > 0, (name, list(grid))
            # Before the kernel's own: grid, stream, function, and what Triton tells its hooks.
            own = arguments[9:]
            wanted = [pair for kind, value in zip(self.kinds, own, strict=True) for pair in given(kind, value)]
            # Triton adds addresses of scratch memory.
            assert len(wanted) <= len(sizes) <= len(wanted) + 2, (name, len(sizes), len(wanted))
            for i, (kind, value) in enumerate(wanted):
                size, number = bits(kind, value)
                assert sizes[i][1] == size, (name, i, kind, sizes[i])
                assert values[i] & (1 << 8 * size) - 1 == number, (name, i, kind, hex(values[i]), value)
            taken = max(offset + size for offset, size in sizes)
            launches.append({"kernel": name, "parameters": len(wanted), "bytes": taken, "shared": shared.value})

    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    active: Any = CudaDriver()
    active.launcher_cls = Launcher
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda _: 0
    active.get_device_capability = lambda *_: capability
    driver.set_active(active)
    load_binary = active.utils.load_binary

    def load(name: str, kernel: bytes, *rest: Any) -> Any:
        loaded = load_binary(name, kernel, *rest)
        parameters[loaded[1]] = parameter_sizes(kernel)
        counts[loaded[1]] = len(parameters[loaded[1]])
        return loaded

    active.utils.load_binary = load
    return launches


def main() -> None:
    library, chip = sys.argv[1:]
    number = int(chip.removeprefix("sm_"))
    os.environ["TRITON_LIBCUDA_PATH"] = str(Path(library).parent)
    stub = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    launches = watch(stub, divmod(number, 10))

    import torch

    import lcf_fast
    from lcf_fast import backends
    from lcf_fast.kernels import common

    backends._obstacle = lambda *_: None
    common._target = lambda _: chip  # type: ignore[assignment]
    sys.path.append(str(TESTS / "gpu"))
    sanitize = importlib.import_module("sanitize")

    with torch.no_grad(), lcf_fast.use_backend("triton"):
        sanitize.main("cpu")
        sanitize.main("cpu")  # launches that were planned before take another way
    for launch in launches:
        print(json.dumps(launch))


if __name__ == "__main__":
    main()
