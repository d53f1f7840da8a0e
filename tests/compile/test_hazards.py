"""The search for registers touched too early, on assembly with and without."""

from __future__ import annotations

import pytest
from hazards import register_hazards

PRODUCTS = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8], R24 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR12], R24, gsb0 ;
"""
WAIT = "        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"


def line(text: str) -> str:
    return f"        /*0040*/                   {text} ;\n"


@pytest.mark.parametrize(
    "text",
    [
        "FADD R57, R4, R5",  # the left operand
        "LDG.E.128 R60, desc[UR8][R2.64]",
        "LDSM.16.M88.4 R54, [R2+UR4]",  # its third and fourth
        "FADD R4, R30, R5",  # the sums, read
        "STS.128 [R2], R40",
        "MOV R55, R4",  # the last of the sums
        "LDG.E.64 R23, desc[UR8][R2.64]",  # the first of them is its second
        "IMAD.WIDE R23, R4, R5, R6",
        "LDG.E.128 R21, desc[UR8][R2.64]",  # its fourth
        "@!P1 FADD R4, -R30, R5",
    ],
)
def test_found(text: str) -> None:
    assert len(register_hazards(PRODUCTS + line(text))) >= 1
    assert register_hazards(PRODUCTS + WAIT + line(text)) == []


@pytest.mark.parametrize("text", ["FADD R4, R57, R5", "LDG.E R64, desc[UR8][R2.64]", "LDSM.16.M88.2 R64, [R2+UR4]"])
def test_reading_the_operand_and_other_registers_are_allowed(text: str) -> None:
    assert register_hazards(PRODUCTS + line(text)) == []


def test_a_wait_may_leave_the_last_group() -> None:
    later = "        /*0024*/                   HGMMA.64x64x16.F32.BF16 R88, R100, gdesc[UR8], R88, gsb0 ;\n"
    some = WAIT.replace("0x0", "0x1")
    assert register_hazards(PRODUCTS + later + some + line("FADD R57, R4, R5")) == []
    assert len(register_hazards(PRODUCTS + later + some + line("FADD R101, R4, R5"))) == 1
    assert len(register_hazards(PRODUCTS + some + line("FADD R57, R4, R5"))) >= 1, "the only group is the last"


def test_a_long_kernel_is_read_to_its_end() -> None:
    text = (PRODUCTS + line("FADD R57, R4, R5")).replace("/*00", "/*1200")
    assert len(register_hazards(text)) >= 1
