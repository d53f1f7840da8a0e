"""The gate on what the compiler makes of every kernel, for four chips, none of which need be here.

Run without the interpreter: ``TRITON_INTERPRET=0 pytest tests/compile``.
"""

from __future__ import annotations

import re

import pooling_cases
import pytest
import tile_cases
from case import Case
from resources import SHARED_LIMIT, TARGETS, compile_case

#: Spills inside loops that are known and left; everything else has none. The 128-token tile of width 128 fills the
#: register file: 4 to 31 spills by compiler (Triton 3.6.0: 4, 3.7.1: 16; sm_100: 8, 31), of some 4,000 instructions in
#: the loops, against half the weight reads of a 64-token tile.
FULL_TILE, FULL_TILE_SPILLS = re.compile(r"fuse-128-(bf16|fp16)-128\b"), 32

MATRIX = [
    pytest.param(chip, case, id=f"{chip}-{case.name}")
    for chip in TARGETS
    for case in (*tile_cases.cases(chip), *pooling_cases.CASES)
]


@pytest.mark.parametrize(("chip", "case"), MATRIX)
def test_resources(chip: str, case: Case) -> None:
    """Fits in shared memory, does not spill in a loop, uses tensor instructions, loads 16 bytes at a time."""
    used = compile_case(case, chip)
    assert used.shared <= SHARED_LIMIT[chip], used
    assert used.loop_spills <= (FULL_TILE_SPILLS if FULL_TILE.match(case.name) else 0), used
    assert used.spills <= 64, used
    if case.expect_mma:
        assert used.mma, "no tensor instruction"
        if chip == "sm_90" and "-128-bf16-128" in case.name:
            assert "HGMMA" in used.mma, f"the slow path: {used.mma}"
    if not any(word in case.name for word in ("odd", "unaligned", "merge", "fold")):
        assert used.wide_loads, "no 16-byte load of a cache"
