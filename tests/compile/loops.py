"""What the loops of a compiled kernel are made of: ``python tests/compile/loops.py fuse-128-bf16-128 --chip sm_90``.

Prints, for each loop, its instructions by kind. Times the steps they run, and the warps, over what a multiprocessor can
issue (four a clock), that is the least a program takes, whatever memory does.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter

import backward_cases
import pooling_cases
import slot_cases
import split_cases
import tile_cases
import triton
from case import Case
from resources import TARGETS, disassemble, nvidia_loops
from triton.compiler import ASTSource

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)


def loops_of(case: Case, chip: str) -> tuple[int, list[Counter[str]]]:
    """Registers a thread, and each loop's instructions by kind, in the order in which loops end."""
    source = ASTSource(case.kernel, dict(case.signature), dict(case.constexprs), dict(case.attrs))
    options = case.options(chip)
    registers, sass = disassemble(triton.compile(source, target=TARGETS[chip], options=options).asm["cubin"])
    ends = {begin: sass.index("\n", end) for begin, end in nvidia_loops(sass)}
    return registers, [Counter(_INSTRUCTION.findall(sass[begin:end])) for begin, end in ends.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="a case of the compile gate (pytest --collect-only tests/compile lists them)")
    parser.add_argument("--chip", choices=[chip for chip in TARGETS if chip.startswith("sm_")], default="sm_90")
    arguments = parser.parse_args()
    modules = (tile_cases, split_cases, backward_cases, pooling_cases, slot_cases)
    cases = {case.name: case for module in modules for case in module.cases(arguments.chip)}
    if arguments.case not in cases:
        parser.error(f"no case {arguments.case!r} on {arguments.chip}; there are: {', '.join(cases)}")
    registers, loops = loops_of(cases[arguments.case], arguments.chip)
    print(f"{arguments.case}, {arguments.chip}, Triton {triton.__version__}: {registers} registers")
    for loop in loops:
        print(f"{loop.total():6d}  " + ", ".join(f"{name} {count}" for name, count in loop.most_common()))


if __name__ == "__main__":
    main()
