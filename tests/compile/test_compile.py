"""The gate on what the compiler makes of every kernel, for five chips, none of which need be here.

Run without the interpreter: ``TRITON_INTERPRET=0 pytest tests/compile``.
"""

from __future__ import annotations

import backward_cases
import pooling_cases
import pytest
import slot_cases
import split_cases
import tile_cases
from case import Case
from resources import SHARED_LIMIT, TARGETS, compile_case

#: Spills inside a loop that are known and left. On sm_100 ptxas aims at 128 registers, of 255.
#: 64 slots with float32 queries, in training only, are one register short. d = 256 backward: one of a hundred.
KNOWN_LOOP_SPILLS = {
    ("sm_100", "inject-128-bf16-128-128"): 4,
    ("sm_100", "project-128-bf16-128-128"): 3,
    ("sm_100", "fuse-256-bf16-128"): 14,
    ("sm_100", "expand-128-bf16-64"): 1,
    ("sm_100", "inject-512-bf16-32-128"): 6,
    ("sm_90", "gradients-256-bf16"): 6,
    ("sm_90", "inject-back-256-bf16"): 3,
    ("sm_90", "ffn-weights-512-bf16"): 14,
    ("sm_90", "slots-128-bf16-64-exact"): 1,
}
#: The same of float32 weights beside 16-bit caches, at d = 512 and one stage, and on sm_100: what fits is slow there.
SINGLE_LOOP_SPILLS = 100
#: Spills outside of loops that are known to be more than the bound below.
KNOWN_SPILLS = {("sm_90", "finish-128-fp32-16"): 74, ("sm_90", "gradients-256-bf16"): 560}

#: Kernels that read no cache, and some whose tile is too small for 16 bytes a thread.
EXEMPT = ("merge", "fold", "spans", "across", "down-weights-256", "down-weights-512", "slots-128-fp32-ffn-weights",
          "fuse-256-bf16-16-out-single")  # fmt: skip

MATRIX = [
    pytest.param(chip, case, id=f"{chip}-{case.name}")
    for chip in TARGETS
    for module in (tile_cases, split_cases, backward_cases, pooling_cases, slot_cases)
    for case in module.cases(chip)
]


@pytest.mark.parametrize(("chip", "case"), MATRIX)
def test_resources(chip: str, case: Case) -> None:
    """Fits in shared memory, does not spill in a loop, uses tensor instructions, loads 16 bytes at a time."""
    used = compile_case(case, chip)
    assert used.shared <= SHARED_LIMIT[chip], used
    assert not used.hazards, used.hazards
    is_aligned = not any(word in case.name for word in ("odd", "unaligned"))
    # Element by element, addresses crowd the registers: a slow path for odd addresses, which need only be right.
    if is_aligned:
        few = SINGLE_LOOP_SPILLS if "single" in case.name and ("-512-" in case.name or chip == "sm_100") else 0
        assert used.loop_spills <= KNOWN_LOOP_SPILLS.get((chip, case.name), few), used
    # Random numbers take registers, once or twice a program, whose loops have some twenty thousand instructions; what
    # loads element by element is not held to any number of them.
    usual = 512 if "noise" in case.name else 160 if "single" in case.name else 64
    usual = 256 if "inject-512" in case.name else usual  # all of a tile's latents at once, once
    bound = KNOWN_SPILLS.get((chip, case.name), usual)
    assert used.spills <= bound or not is_aligned, used
    if case.expect_mma:
        assert used.mma, "no tensor instruction"
        if chip == "sm_90" and any(tile in case.name for tile in ("-128-bf16-128", "-128-bf16-256")):
            assert "HGMMA" in used.mma, f"the slow path: {used.mma}"
    if is_aligned and not any(word in case.name for word in EXEMPT):
        assert used.wide_loads, "no 16-byte load of a cache"
        # A launch table whose alignment hint is lost narrows every access to one element: hundreds. Biases are a few.
        assert "fp32" in case.name or used.narrow <= 8, used
