"""Machine code of one kernel for Hopper, taken apart: what ptxas made of the PTX, as `cuobjdump` shows it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton

from ..ptx import Kernel, Statement, split_operands

#: ``/*01d0*/ @!P1 IADD3 R0, R0, -R5.reuse, RZ ;``
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<at>[0-9a-f]{4,6})\*/\s+(?:@(?P<not>!?)(?P<guard>U?P\w)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);",
    re.MULTILINE,
)
#: Where the first parameter lies among the constants, and shared memory's first byte that is a program's own.
PARAMETERS, RESERVED = 0x210, 0x400
#: Instructions that change no value here: who runs is kept otherwise, and other warps' turns are epochs.
_IDLE = ("NOP", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "MEMBAR", "ERRBAR", "CCTL", "YIELD")


def disassemble(cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout


def parse(text: str, source: Kernel) -> Kernel:
    """The kernel of a disassembly, made of ``source``; an instruction's line is its address, and jumps name these."""
    kernel = Kernel(name=source.name, target=source.target, threads=source.threads, parameters=source.parameters)
    for found in _INSTRUCTION.finditer(text):
        at = hex(int(found["at"], 16))
        kernel.labels[at] = len(kernel.statements)
        idle = found["opcode"].split(".")[0] in _IDLE or (found["guard"] in ("PT", "UPT") and found["not"])
        kernel.statements.append(
            Statement(
                opcode="NOP" if idle else found["opcode"],
                operands=() if idle else split_operands(found["operands"].replace(".reuse", "")),
                guard=None if idle else found["guard"],
                is_negated=bool(found["not"]),
                source=at,
                number=len(kernel.statements),
            )
        )
    return kernel


def constants(sizes_and_values: list[tuple[int, int]]) -> bytes:
    """The bank that a kernel reads its parameters from: each at a multiple of its size."""
    bank = bytearray(PARAMETERS)
    bank[0x28:0x2C] = (1 << 20).to_bytes(4, "little")  # the end of a thread's own memory
    for size, value in sizes_and_values:
        bank += bytes(-len(bank) % size) + value.to_bytes(size, "little")
    return bytes(bank)
