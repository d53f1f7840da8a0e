"""Machine code, instruction by instruction: what each computes, where it goes on, and what it may not touch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fused import check_fuse
from numpy.typing import NDArray

from emulator.driver import Emulator
from emulator.lanes import to_bfloat
from emulator.machine import run
from emulator.memory import EmulationError, Findings, GlobalMemory
from emulator.ptx import Kernel
from emulator.sass import code
from emulator.sass.assembler import Assembler
from helpers import Geometry, make_cache, make_weights

Words = NDArray[Any]
#: Two words a thread: all pairs of these.
VALUES = np.array([0, 1, 5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF], np.uint32)
A, B = np.repeat(VALUES, 8), np.tile(VALUES, 8)
#: Numbers: all pairs of these.
NUMBERS = np.array([0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 1e-40], np.float32)
X, Y = np.repeat(NUMBERS, 8), np.tile(NUMBERS, 8)

BEGIN = """S2R R0, SR_TID.X
LDC.64 R2, c[0x0][0x210]
IMAD.WIDE.U32 R4, R0, 0x4, R2
LDG.E R8, desc[UR4][R4.64]
LDG.E R9, desc[UR4][R4.64+0x100]"""
END = """STG.E desc[UR4][R4.64+0x200], R10
STG.E desc[UR4][R4.64+0x300], R11
EXIT"""


def probe(body: str, a: Words, b: Words, *, shared: int = 1024) -> tuple[Words, Words, set[str]]:
    """R10, R11 of 64 threads after ``body``; it finds the thread's number in R0, ``a`` and ``b`` in R8 and R9."""
    lines = [line.strip() for line in f"{BEGIN}\n{body.strip()}\n{END}".splitlines()]
    text = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    words = torch.from_numpy(np.concatenate([a, b, np.zeros(128, np.uint32)]).view(np.int32))
    findings = Findings()
    kernel = code.parse(text, Kernel(name="probe", threads=64))
    steps = Assembler(kernel, code.constants([(8, words.data_ptr())])).steps
    with np.errstate(all="ignore"):
        run(kernel, steps, (1, 1, 1), shared, GlobalMemory(findings), findings, code.RESERVED)
    found = words.numpy().view(np.uint32)
    return found[128:192], found[192:], {kind for _, _, kind in findings.counts}


def at(line: int) -> str:
    """The address of a line of ``body``."""
    return hex(16 * (len(BEGIN.splitlines()) + line))


def whole(a: Words, b: Words) -> list[tuple[int, int]]:
    return [(int(one), int(other)) for one, other in zip(a, b)]


def narrow(value: int) -> int:
    """As a signed number of 32 bits."""
    return value - (1 << 32) if value >> 31 else value


MASK, WIDE = (1 << 32) - 1, (1 << 64) - 1
#: Instructions that leave 32 bits in R10, and those of them.
ONE: list[tuple[str, Callable[[int, int], int]]] = [
    ("IADD3 R10, R8, -R9, 0x7", lambda a, b: a - b + 7),
    ("VIADD R10, R8, -0x3", lambda a, b: a - 3),
    ("IMAD R10, R8, R9, -R8", lambda a, b: a * b - a),
    ("IMAD.HI.U32 R10, R8, R9, R8", lambda a, b: (a * b + (a | b << 32)) >> 32),
    ("IMAD.HI R10, R8, -0x2, RZ", lambda a, b: (narrow(a) * -2) >> 32),
    ("LEA R10, R8, R9, 0x5", lambda a, b: (a << 5) + b),
    ("LEA.HI R10, R8, R9, RZ, 0x1b", lambda a, b: (a << 27 >> 32) + b),
    ("LEA.HI R10, R8, 0x1, R9, 0x3", lambda a, b: (((b << 32 | a) << 3 & WIDE) >> 32) + 1),
    ("LEA.HI.SX32 R10, R8, R9, 0x1e", lambda a, b: (narrow(a) << 30 >> 32) + b),
    ("LOP3.LUT R10, R8, R9, RZ, 0x3c, !PT", lambda a, b: a ^ b),
    ("LOP3.LUT R10, R8, R9, 0xff, 0xe8, !PT", lambda a, b: a & b | a & 255 | b & 255),
    ("SHF.L.U32 R10, R8, 0x4, RZ", lambda a, b: a << 4),
    ("SHF.R.U32.HI R10, RZ, 0x4, R8", lambda a, b: a >> 4),
    ("SHF.R.S32.HI R10, RZ, 0x1f, R8", lambda a, b: narrow(a) >> 31),
    ("SHF.L.U64.HI R10, R8, 0x3, R9", lambda a, b: ((b << 32 | a) << 3 & WIDE) >> 32),
    ("SHF.R.U64 R10, R8, 0x9, R9", lambda a, b: (b << 32 | a) >> 9),
    ("SHF.R.S64 R10, R8, 0x28, R9", lambda a, b: (narrow(b) << 32 | a) >> 40),
    ("SGXT R10, R8, 0x5", lambda a, b: narrow(a << 27 & MASK) >> 27),
    ("SGXT.U32 R10, R8, 0x5", lambda a, b: a & 31),
    ("PRMT R10, R8, 0x7610, R9", lambda a, b: b & 0xFFFF0000 | a & 0xFFFF),
    ("PRMT R10, R8, 0x4321, R9", lambda a, b: a >> 8 | (b & 255) << 24),
    ("IABS R10, R8", lambda a, b: abs(narrow(a))),
    ("VIMNMX R10, R8, R9, PT", lambda a, b: min(narrow(a), narrow(b))),
    ("VIMNMX.U32 R10, R8, R9, !PT", max),
    ("VIADDMNMX R10, R8, 0x1, R9, PT", lambda a, b: min(narrow(a + 1 & MASK), narrow(b))),
    ("VIMNMX3.U32 R10, R8, R9, 0x5, PT", lambda a, b: min(a, b, 5)),
    ("ISETP.GT.AND P0, P1, R8, R9, PT\nSEL R10, R8, R9, P0", lambda a, b: max(a, b, key=narrow)),
    ("ISETP.LT.U32.AND P0, P1, R8, R9, PT\nSEL R10, R8, R9, P1", max),
    ("LOP3.LUT P2, RZ, R8, R9, RZ, 0xc0, !PT\nSEL R10, RZ, 0x1, !P2", lambda a, b: a & b != 0),
    ("ISETP.EQ.AND P0, PT, R8, R9, PT\nISETP.NE.OR P2, PT, R8, RZ, P0\n"
     "PLOP3.LUT P1, P3, P0, P2, PT, 0x80, 0x2a\nP2R R10, PR, R8, 0xa",
     lambda a, b: a & ~10 | (2 if a == b else 8)),
    ("R2P PR, R8, 0x5\nMOV R10, RZ\n@P0 VIADD R10, R10, 0x1\n@!P2 VIADD R10, R10, 0x2",
     lambda a, b: a & 1 | (~a >> 1 & 2)),
    ("R2UR UR4, R8\nUIADD3 UR5, UR4, 0x1, URZ\nUP2UR UR6, UPR, UR5, 0x1\nIMAD.U32 R10, RZ, RZ, UR6",
     lambda a, b: a + 1 & ~1),
    ("STL.64 [R1+-0x8], R8\nLDL.LU R10, [R1+-0x4]", lambda a, b: b),
    ("IADD3 R6, R0, 0x100, RZ\nLDC R10, c[0x0][0x210]\nISETP.NE.AND P0, PT, R10, R2, PT\nSEL R10, R6, R8, P0",
     lambda a, b: a),
]  # fmt: skip
#: And 64 in R10 and R11.
TWO: list[tuple[str, Callable[[int, int], int]]] = [
    ("IMAD.WIDE R10, R8, -0x7, R8", lambda a, b: narrow(a) * -7 + (a | b << 32)),
    ("IMAD.WIDE.U32 R10, R8, R9, RZ", lambda a, b: a * b),
    ("IADD3 R10, P0, R8, -R9, RZ\nIADD3.X R11, R9, ~R8, RZ, P0, !PT", lambda a, b: (b << 32 | a) - (a << 32 | b)),
    ("IADD3 R10, P0, P1, R8, R9, R8\nIADD3.X R11, RZ, RZ, RZ, P0, P1", lambda a, b: a + a + b),
    ("UMOV UR8, 0x5\nUMOV UR9, 0x1\nR2UR UR10, R8\nR2UR UR11, R9\nUIADD3.64 UR12, UR10, -UR8, URZ\n"
     "IMAD.U32 R10, RZ, RZ, UR12\nMOV R11, UR13", lambda a, b: (b << 32 | a) - 0x100000005),
    ("LEA R10, P0, R8, R9, 0x3\nLEA.HI.X R11, R8, RZ, R9, 0x3, P0", lambda a, b: ((b << 32 | a) << 3) + b),
    ("LEA R10, P0, R8, R9, 0x1\nLEA.HI.X.SX32 R11, R8, R9, 0x1, P0", lambda a, b: narrow(a) * 2 + (b << 32 | b)),
    ("IADD3 R10, P0, R8, R9, RZ\nIMAD.X R11, RZ, RZ, R8, P0", lambda a, b: (a << 32 | a) + b),
    ("CS2R R10, SRZ\nISETP.GE.U32.AND P0, PT, R8, R9, PT\n"
     "ISETP.GE.AND.EX P0, PT, R9, R8, PT, P0\nSEL R10, RZ, 0x1, !P0",
     lambda a, b: (narrow(b), a) >= (narrow(a), b)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "meaning"), ONE, ids=[body.split(",")[0] + f" {i}" for i, (body, _) in enumerate(ONE)]
)
def test_words(body: str, meaning: Callable[[int, int], int]) -> None:
    found, _, _ = probe(body, A, B)
    assert found.tolist() == [meaning(a, b) & MASK for a, b in whole(A, B)]


@pytest.mark.parametrize(
    ("body", "meaning"), TWO, ids=[body.split(",")[0] + f" {i}" for i, (body, _) in enumerate(TWO)]
)
def test_pairs(body: str, meaning: Callable[[int, int], int]) -> None:
    low, high, _ = probe(body, A, B)
    got = [int(one) | int(other) << 32 for one, other in zip(low, high)]
    assert got == [meaning(a, b) & WIDE for a, b in whole(A, B)]


with np.errstate(all="ignore"):
    NORMAL = np.where(np.abs(X) < 2.0**-126, np.copysign(np.float32(0), X), X)
    FLOATS: list[tuple[str, Words]] = [
        ("FADD R10, R8, -R9", X - Y),
        ("FADD.FTZ R10, |R8|, -RZ", np.abs(NORMAL)),
        ("FMUL R10, R8, 0.5", X * np.float32(0.5)),
        ("FFMA R10, R8, R9, -1", (X.astype(float) * Y - 1).astype(np.float32)),
        ("FFMA.SAT R10, R8, 2, RZ", np.where(np.isnan(X), np.float32(0), np.clip(2 * X, np.float32(0), np.float32(1)))),
        ("FMNMX R10, R8, R9, PT", np.fmin(X, Y)),
        ("FMNMX R10, R8, R9, !PT", np.fmax(X, Y)),
        ("FSETP.GEU.AND P0, PT, R8, R9, PT\nFSEL R10, R8, 7, P0", np.where(~(X < Y), X, np.float32(7))),
        ("FSETP.GT.AND P0, P1, R8, -INF , PT\nFSEL R10, R8, -7.5, P1", np.where(-np.inf < X, np.float32(-7.5), X)),
        ("FSET.BF.GT.AND R10, R8, R9, PT", (X > Y).astype(np.float32)),
        ("MUFU.EX2 R10, R8", np.exp2(X)),
        ("HFMA2.MMA R10, -RZ, RZ, 1.875, 0", np.full(64, 1, np.float32)),
        ("F2F.BF16.F32 R6, R8\nIMAD.U32 R10, R6, 0x10000, RZ", (to_bfloat(X).astype(np.uint32) << 16).view(np.float32)),
        ("F2FP.F16.F32.PACK_AB R6, R8, R9\nHADD2.F32 R10, -RZ, R6.H1_H1", X.astype(np.float16).astype(np.float32)),
        ("F2FP.F16.F32.PACK_AB R6, R8, R9\nHADD2.F32 R10, -RZ, -R6.H0_H0", -(Y.astype(np.float16).astype(np.float32))),
        ("F2FP.BF16.F32.PACK_AB R6, R8, R9\nHSETP2.BF16_V2.LEU.OR P0, PT, R6.H1_H1, R6.H0_H0, !PT\nFSEL R10, 1, 2, P0",
         np.where(~(X > Y) | (np.abs(X) < 1e-30) & (np.abs(Y) < 1e-30) & ~(X > Y), np.float32(1), np.float32(2))),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "wanted"), FLOATS, ids=[body.split(",")[0] + f" {i}" for i, (body, _) in enumerate(FLOATS)]
)
def test_numbers(body: str, wanted: Words) -> None:
    found, _, _ = probe(body, X.view(np.uint32), Y.view(np.uint32))
    np.testing.assert_array_equal(found.view(np.float32), wanted)


def test_numbers_of_words() -> None:
    """Rounded up, as a division wants its first guess; and back, without going beyond what a word holds."""
    up, _, _ = probe("I2F.U32.RP R10, R8", A, B)
    exact = A.astype(float)
    assert (up.view(np.float32) >= exact).all() and (np.nextafter(up.view(np.float32), np.float32(0)) <= exact).all()
    near, _, _ = probe("I2FP.F32.S32 R10, R8", A, B)
    np.testing.assert_array_equal(near.view(np.float32), A.view(np.int32).astype(np.float32))
    back, _, _ = probe("F2I.FTZ.U32.TRUNC.NTZ R10, R8", X.view(np.uint32), B)
    wanted = {0.0: 0, 1.5: 1, -2.25: 0, np.inf: MASK, -np.inf: 0}
    assert all(int(got) == wanted.get(float(x), 0) for got, x in zip(back, X))
    low, high, _ = probe("MOV R6, R8\nMOV R7, RZ\nI2F.U64.RP R6, R6\nF2I.U64.TRUNC R10, R6", A, B)
    assert np.all(np.abs(low.astype(float) + high * 2.0**32 - exact) <= exact * 2.0**-23)


def test_where_code_goes_on() -> None:
    """A loop as long as each thread asks for, a subroutine for some of them, an end for others."""
    loop = f"""MOV R10, RZ
        LOP3.LUT R6, R0, 0x7, RZ, 0xc0, !PT
        ISETP.GE.AND P0, PT, R10, R6, PT
        @P0 BRA {at(6)}
        VIADD R10, R10, 0x1
        BRA {at(2)}
        BSYNC B0"""
    assert probe(loop, A, B)[0].tolist() == [i % 8 for i in range(64)]
    call = f"""ISETP.GE.AND P0, PT, R0, 0x9, PT
        MOV R10, 0x1
        @P0 BRA {at(6)}
        CALL.REL.NOINC {at(8)}
        VIADD R10, R10, 0x10
        NOP
        VIADD R10, R10, 0x100
        BRA {at(10)}
        VIADD R10, R10, 0x1000
        RET.REL.NODEC R6 0x0
        NOP"""
    assert probe(call, A, B)[0].tolist() == [0x1111 if i < 9 else 0x101 for i in range(64)]
    ends = "MOV R10, 0x7\nISETP.LT.AND P0, PT, R0, 0x21, PT\n@P0 EXIT"
    assert probe(ends, A, B)[0].tolist() == [0] * 33 + [7] * 31
    both = f"""ISETP.GT.AND P1, PT, R0, 0x3, PT
        ISETP.LT.AND P0, PT, R0, 0x9, PT
        MOV R10, RZ
        @P0 BRA P1, {at(5)}
        MOV R10, 0x1"""
    assert probe(both, A, B)[0].tolist() == [int(not 3 < i < 9) for i in range(64)]


def test_a_warp_speaks_to_itself() -> None:
    own = np.arange(64, dtype=np.uint32)
    assert probe("SHFL.BFLY PT, R10, R0, 0x4, 0x1f", A, B)[0].tolist() == (own ^ 4).tolist()
    assert probe("SHFL.IDX PT, R10, R0, 0x3, 0x1f", A, B)[0].tolist() == [3] * 32 + [35] * 32
    assert probe("REDUX.SUM.S32 UR4, R0\nMOV R10, UR4", A, B)[0].tolist() == [496] * 32 + [1520] * 32
    vote = "ISETP.EQ.AND P0, PT, R0, 0x5, PT\nVOTEU.ANY UP1, P0\nUSEL UR4, URZ, 0x1, !UP1\nMOV R10, UR4"
    assert probe(vote, A, B)[0].tolist() == [1] * 32 + [0] * 32


BASE = "UMOV UR6, 0x400\nIMAD.SHL.U32 R6, R0, 0x4, RZ\nLOP3.LUT R7, R6, 0x80, RZ, 0x3c, !PT\n"
COPY = "LDGSTS.E [R6+UR6], desc[UR4][R4.64]{}\nLDGDEPBAR\n"


def test_shared_memory() -> None:
    """What one warp writes another reads behind a barrier; copies that read nothing bring zeros."""
    other = np.arange(64) ^ 32
    passed = BASE + "STS [R6+UR6], R8\nBAR.SYNC.DEFER_BLOCKING 0x0\nLDS R10, [R7+UR6]"
    found, _, wrong = probe(passed, A, B)
    assert found.tolist() == A[other].tolist() and not wrong
    narrow = BASE + "STS [R6+UR6], R8\nSTS.U8 [R6+UR6+0x1], R9\nLDS.U16 R10, [R6+UR6]"
    assert probe(narrow, A, B)[0].tolist() == (A & 255 | (B & 255) << 8).tolist()
    brought = BASE + COPY.format("") + "DEPBAR.LE SB0, 0x0\nBAR.SYNC.DEFER_BLOCKING 0x0\nLDS R10, [R7+UR6]"
    found, _, wrong = probe(brought, A, B)
    assert found.tolist() == A[other].tolist() and not wrong
    nothing = (
        BASE + "ISETP.LT.AND P3, PT, R0, 0x8, PT\n" + COPY.format(", P3") + "DEPBAR.LE SB0, 0x0\nLDS R10, [R6+UR6]"
    )
    assert probe(nothing, A, B)[0].tolist() == [int(a) if i < 8 else 0 for i, a in enumerate(A)]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("STS [R6+UR6], R8\nLDS R10, [R7+UR6]", "shared read of what another warp wrote before any barrier"),
        (COPY.format("") + "LDS R10, [R6+UR6]", "shared read of what a copy is still to bring"),
        ("LDS R10, [R6+UR6]", "shared read of what nobody wrote"),
        ("STG.E desc[UR4][R2.64+0x200], R0", "global write of what another warp wrote before any barrier"),
    ],
)
def test_a_race_is_found(body: str, kind: str) -> None:
    assert kind in probe(BASE + body, A, B)[2]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("STS [R6], R8", "out of 1024 bytes of shared memory"),  # what lies before a program's own
        ("LDS R10, [R6+UR6+0x3c0]", "out of 1024 bytes of shared memory"),
        ("LDS.64 R10, [R6+UR6]", "not aligned to 8"),
        ("LDG.E R10, desc[UR4][R4.64+0x7ffffff0]", "out of every tensor's bounds|not aligned"),
        ("LDC R10, c[0x0][R8+0x210]", "constant out of the parameters' bounds"),
        (
            "ISETP.LT.AND P0, PT, R0, 0x5, PT\n@P0 BRA 0x100\nBAR.SYNC.DEFER_BLOCKING 0x0\nNOP\nNOP\nNOP\nNOP\nNOP",
            "barrier",
        ),
    ],
)
def test_what_may_not_be_touched_is_refused(body: str, match: str) -> None:
    with pytest.raises(EmulationError, match=match):
        probe(BASE + body, A, B)


@pytest.mark.parametrize(
    "line", ["FSWZADD R10, R8, R9", "SHF.R.W.U32.HI R10, RZ, 0x4, R8", "FMUL.RZ R10, R8, R9", "LDS.S8 R10, [R8]"]
)
def test_what_is_not_known_stops(line: str) -> None:
    with pytest.raises(NotImplementedError, match=line.split()[0].split(".")[0]):
        probe(line, A, B)


@pytest.mark.parametrize(
    ("before", "after"),
    [(r"(HMMA\S+) R\d+,", r"\1 R200,"), (r" FADD ", " FMUL "), (r"(STS\.128 \[R\d+)", r"\1+0x10")],
    ids=["product", "sum", "place"],
)
def test_machine_code_that_went_wrong_is_noticed(
    before: str, after: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One instruction of a kernel is another one, as a fault of the assembler would have it."""
    changed: list[int] = []

    def spoiled(cubin: Path) -> str:
        text = disassemble(cubin)
        text, count = re.subn(before, after, text, count=1)
        changed.append(count)
        return text

    disassemble = code.disassemble
    monkeypatch.setattr(code, "disassemble", spoiled)
    geometry = Geometry(2, 2, 64)
    weights = make_weights(geometry, geometry, 128, dtype=torch.bfloat16, generator=generator)
    own, other = (make_cache(geometry, 1, 150, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    with Emulator(90, assembled=True).active(), pytest.raises((AssertionError, EmulationError)):
        check_fuse(other, own, weights)
    assert changed == [1]
