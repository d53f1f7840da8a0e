"""Compile a case for a chip that need not be here, and read what it takes: registers, spills, shared memory, mma."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from case import Case
from hazards import register_hazards
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Shared memory that one program may take, bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024
}  # fmt: skip
#: What the tensor instruction is called in the chip's assembly.
MMA = {
    "sm_80": r"\bHMMA\b|\bIMMA\b",
    "sm_89": r"\bHMMA\b|\bIMMA\b",
    "sm_90": r"\bHGMMA\b|\bHMMA\b",
    "sm_100": r"\bUTC\w*MMA\b|\bHMMA\b",
    "gfx942": r"\bv_mfma_\w+",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: a thread.
        spills: instructions that store to or load from local (AMD: scratch) memory.
        loop_spills: those of them inside a loop, where they cost time at every step.
        shared: bytes of shared memory a program.
        mma: names of the tensor instructions used.
        wide_loads: global loads of 16 bytes.
        narrow: global loads and stores of 2 bytes, one element of half precision at a time.
        hazards: instructions that touch registers of a product that still runs.
    """

    registers: int
    spills: int
    loop_spills: int
    shared: int
    mma: tuple[str, ...]
    wide_loads: int
    narrow: int
    hazards: tuple[str, ...]


def compile_case(case: Case, chip: str) -> Resources:
    """Cross-compile; no GPU is touched."""
    source = ASTSource(case.kernel, dict(case.signature), dict(case.constexprs), dict(case.attrs))
    options = case.options(chip)
    compiled = triton.compile(source, target=TARGETS[chip], options=options)
    shared = compiled.metadata.shared
    if chip == "gfx942":
        return amd_resources(compiled.asm["amdgcn"], shared)
    return nvidia_resources(*disassemble(compiled.asm["cubin"]), shared, chip)


def nvidia_resources(registers: int, sass: str, shared: int, chip: str) -> Resources:
    """What SASS says, and what it does not."""
    spilled = [m.start() for m in re.finditer(r"\b(?:LDL|STL)\b", sass)]
    return Resources(
        registers=registers,
        spills=len(spilled),
        loop_spills=_inside(spilled, nvidia_loops(sass)),
        shared=shared,
        mma=tuple(sorted(set(re.findall(MMA[chip], sass)))),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E[\w.]*\.128", sass)),
        narrow=len(re.findall(r"\b(?:LDG|STG)\.E[\w.]*\.[US]16", sass)),
        hazards=tuple(register_hazards(sass)),
    )


def amd_resources(text: str, shared: int) -> Resources:
    """What AMD's assembly says."""
    spilled = [m.start() for m in re.finditer(r"\bscratch_(?:load|store)", text)]
    return Resources(
        registers=sum(int(n) for n in re.findall(r"\.(?:vgpr|agpr)_count:\s+(\d+)", text)),
        spills=len(spilled),
        loop_spills=_inside(spilled, _amd_loops(text)),
        shared=shared,
        mma=tuple(sorted(set(re.findall(MMA["gfx942"], text)))),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text)),
        narrow=len(re.findall(r"\b(?:global|buffer)_(?:load_(?:ushort|short_d16\w*)|store_short\w*)", text)),
        hazards=(),
    )


def _inside(places: list[int], loops: list[tuple[int, int]]) -> int:
    return sum(any(first <= at <= last for first, last in loops) for at in places)


def nvidia_loops(sass: str) -> list[tuple[int, int]]:
    """Backward branches: where in the text a loop's first and last instruction stand."""
    at = {int(m.group(1), 16): m.start() for m in re.finditer(r"^\s*/\*([0-9a-f]{4,6})\*/", sass, re.MULTILINE)}
    loops = []
    for branch in re.finditer(r"^\s*/\*([0-9a-f]{4,6})\*/[^\n]*\bBRA[^\n]*?(0x[0-9a-f]+)", sass, re.MULTILINE):
        own, target = int(branch.group(1), 16), int(branch.group(2), 16)
        if target < own and target in at:
            loops.append((at[target], branch.start()))
    return loops


def _amd_loops(text: str) -> list[tuple[int, int]]:
    """Branches to a label further up."""
    labels = {m.group(1): m.start() for m in re.finditer(r"^(\.LBB\w+):", text, re.MULTILINE)}
    branches = re.finditer(r"\bs_c?branch\w*\s+(\.LBB\w+)", text)
    return [(labels[m.group(1)], m.start()) for m in branches if labels.get(m.group(1), m.start()) < m.start()]


def disassemble(cubin: bytes) -> tuple[int, str]:
    """Registers and SASS, by the tool that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bREG:(\d+)", usage)
    assert found is not None, usage
    return int(found.group(1)), sass
