"""A driver for Triton that compiles for an NVIDIA chip and runs what comes out on the CPU, over CPU tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from launching.arguments import bits, given
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.host import forget_launches
from lcf_fast import backends
from lcf_fast.kernels import common

from .machine import run
from .memory import EmulationError, Findings, GlobalMemory
from .ptx import parse
from .sass import code
from .sass.assembler import Assembler
from .translator import Translator

#: Bytes of shared memory that a program may have.
SHARED = {80: 166_912, 90: 232_448}


class _Utilities:
    def __init__(self, chip: int) -> None:
        self._chip = chip

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self._chip], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills, the most threads: nothing of it is used."""
        return name, name, 0, 0, 1024


class _Launcher:
    """What Triton calls to launch one compiled kernel."""

    #: Where the kernel's PTX lies; known once Triton loads it.
    path = Path()

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds, self._shared = list(source.signature.values()), metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, *rest: Any) -> None:
        # Triton keeps a kernel that it loaded before: it goes to whoever stands in now.
        driver.active.emulator.launch(self.path, self._kinds, self._shared, (x, y, z), rest[3:])


class _Driver:
    """What Triton asks of a device."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator, self.utils = emulator, _Utilities(emulator.chip)
        self._newest: _Launcher | None = None

    def launcher_cls(self, source: Any, metadata: Any) -> _Launcher:
        self._newest = _Launcher(source, metadata)
        return self._newest

    def loading(self, module: Any, function: Any, name: str, files: dict[str, Any], key: str) -> None:
        """Triton's hook, called right after it made a kernel's launcher."""
        assert self._newest is not None
        self._newest.path = next(Path(path) for file, path in files.items() if file.endswith(".ptx"))

    def get_current_device(self) -> int:
        return self.emulator.chip  # what Triton compiled for one chip is not for another

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.emulator.chip, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.emulator.chip, 32)


class Emulator:
    """Stands in for a GPU of compute capability ``chip`` (80 or 90) and one launch after another runs at once.

    Attributes:
        findings: races and the like, of all launches.
        launches: how often each kernel ran.
    """

    def __init__(self, chip: int, *, assembled: bool = False) -> None:
        self.chip, self._assembled = chip, assembled
        self.findings = Findings()
        self.launches: dict[str, int] = {}
        self._parsed: dict[Path, Any] = {}

    def launch(self, path: Path, kinds: list[Any], shared: int, grid: tuple[int, int, int], arguments: Any) -> None:
        if path not in self._parsed:
            self._parsed[path] = parse(path.read_text(encoding="utf-8"))
            if self._assembled:
                text = code.disassemble(path.with_suffix(".cubin"))
                self._parsed[path] = code.parse(text, self._parsed[path])
        kernel = self._parsed[path]
        assert kernel.target == f"sm_{self.chip}", f"{kernel.name} was compiled for {kernel.target}"
        pairs = [pair for kind, value in zip(kinds, arguments, strict=True) for pair in given(kind, value)]
        values = [bits(*pair) for pair in pairs]
        values += [(8, 0)] * (len(kernel.parameters) - len(values))  # scratch memory, of which there is none
        self.findings.kernel = kernel.name
        self.launches[kernel.name] = self.launches.get(kernel.name, 0) + 1
        memory = GlobalMemory(self.findings)
        with np.errstate(all="ignore"):
            if self._assembled:
                steps = Assembler(kernel, code.constants(values)).steps
                run(kernel, steps, grid, shared, memory, self.findings, code.RESERVED)
                return
            named = {name: value for name, (_, value) in zip(kernel.parameters, values, strict=True)}
            run(kernel, Translator(kernel, named).steps, grid, shared, memory, self.findings)

    def check(self) -> None:
        """Raise if anything was found.

        Raises:
            EmulationError: what was found, a line each.
        """
        counts, self.findings.counts = self.findings.counts, Counter()
        if counts:
            lines = [f"{name}, {source}: {kind} ({n} times)" for (name, source, kind), n in counts.items()]
            raise EmulationError("\n".join(lines))

    @contextmanager
    def active(self) -> Iterator[Emulator]:
        """Triton launches its kernels here, and lcf_fast takes this chip's policy for CPU tensors."""
        hook, before = knobs.runtime.kernel_load_start_hook, driver._active
        serves, target = backends.interpreting, common._target
        standing_in: Any = _Driver(self)
        driver.set_active(standing_in)
        knobs.runtime.kernel_load_start_hook = standing_in.loading
        backends.interpreting, common._target = (lambda: True), (lambda device: f"sm_{self.chip}")  # type: ignore
        forget_launches()
        try:
            yield self
        finally:
            forget_launches()
            knobs.runtime.kernel_load_start_hook = hook
            driver._active = before
            backends.interpreting, common._target = serves, target
