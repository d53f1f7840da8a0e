"""What the emulator finds, in small kernels with one mistake each; and that it computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from emulator import matrices
from emulator.driver import Emulator
from emulator.lanes import operation, to_bfloat
from emulator.machine import run
from emulator.memory import EmulationError, Findings, GlobalMemory, SharedMemory
from emulator.ptx import parse
from emulator.translator import Translator

PTX = """.version 8.7
.target sm_90a
.visible .entry probe(
	.param .u64 probe_param_0
)
.reqntid 64
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<20>;
	ld.param.b64 	%rd1, [probe_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	shl.b32 	%r3, %r1, 2;
	cvt.u64.u32 	%rd2, %r3;
	add.s64 	%rd3, %rd1, %rd2;
	xor.b32 	%r4, %r3, 128;
{body}
	ret;
}}
"""


def probe(body: str, *, elements: int = 64, programs: int = 1, shared: int = 1024) -> tuple[Tensor, set[str]]:
    """Run ``body`` over 64 threads: %r1 thread, %r3 four times that, %r4 the same in the other warp, %rd3 its word."""
    words = torch.arange(elements, dtype=torch.int32)
    findings = Findings()
    kernel = parse(PTX.format(body=body))
    steps = Translator(kernel, {"probe_param_0": words.data_ptr()}).steps
    run(kernel, steps, (programs, 1, 1), shared, GlobalMemory(findings), findings)
    return words, {kind for _, _, kind in findings.counts}


TO_SHARED = "mov.b32 %r5, 7;\nst.shared.b32 [%r3], %r5;\n"
COPY = "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, %r9;\ncp.async.commit_group;\n"
LATER = COPY.replace("%r3 + 0", "%r3 + 256")
FOUR = "mov.b32 %r9, 4;\n"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (TO_SHARED + "ld.shared.b32 %r6, [%r4];", "shared read of what another warp wrote before any barrier"),
        (TO_SHARED + "bar.sync 0;\nld.shared.b32 %r6, [%r4];\nst.shared.b32 [%r3], %r6;",
         "shared write of what another warp read before any barrier"),
        (TO_SHARED + "st.shared.b32 [%r4], %r5;", "shared write of what another warp wrote before any barrier"),
        ("ld.shared.b32 %r6, [%r3+512];", "shared read of what nobody wrote"),
        (FOUR + COPY + "bar.sync 0;\nld.shared.b32 %r6, [%r3];", "shared read of what a copy is still to bring"),
        (FOUR + COPY + "cp.async.wait_group 0;\nld.shared.b32 %r6, [%r4];",
         "shared read of what another warp wrote before any barrier"),
        (FOUR + COPY + COPY + "cp.async.wait_group 0;", "shared write of what a copy is still to bring"),
        (FOUR + COPY + LATER + "cp.async.wait_group 1;\nld.shared.b32 %r6, [%r3+256];",
         "shared read of what a copy is still to bring"),
        ("cvt.u64.u32 %rd4, %r4;\nadd.s64 %rd5, %rd1, %rd4;\nst.global.b32 [%rd3], %r1;\nld.global.b32 %r6, [%rd5];",
         "global read of what another warp wrote before any barrier"),
        ("cvt.u64.u32 %rd4, %r4;\nadd.s64 %rd5, %rd1, %rd4;\nld.global.b32 %r6, [%rd5];\nst.global.b32 [%rd3], %r1;",
         "global write of what another warp read before any barrier"),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_race_is_found(body: str, kind: str) -> None:
    assert kind in probe(body)[1]


@pytest.mark.parametrize(
    "body",
    [
        TO_SHARED + "bar.sync 0;\nld.shared.b32 %r6, [%r4];\nbar.sync 0;\nst.shared.b32 [%r3], %r6;",
        TO_SHARED + "ld.shared.b32 %r6, [%r3];",
        FOUR + COPY + "cp.async.wait_group 0;\nbar.sync 0;\nld.shared.b32 %r6, [%r4];",
        FOUR + COPY + LATER + "cp.async.wait_group 1;\nld.shared.b32 %r6, [%r3];",
        "ld.global.b32 %r6, [%rd3];\nst.global.b32 [%rd3], %r6;",
    ],
)
def test_what_is_in_order_is_not(body: str) -> None:
    assert probe(body)[1] == set()


OTHER = "cvt.u64.u32 %rd4, %r4;\nadd.s64 %rd5, %rd1, %rd4;\n"


def test_every_reader_is_remembered() -> None:
    """The writer read last itself: what another warp, or another program, read before it is not forgotten."""
    body = OTHER + "ld.global.b32 %r6, [%rd5];\nld.global.b32 %r6, [%rd3];\nst.global.b32 [%rd3], %r6;"
    assert probe(body)[1] == {"global write of what another warp read before any barrier"}
    body = "ld.global.b32 %r6, [%rd3];\nsetp.eq.b32 %p1, %r2, 1;\n@%p1 st.global.b32 [%rd3], %r2;"
    assert probe(body, programs=2)[1] == {"global write of what another program reads"}
    body = OTHER + "ld.global.b32 %r6, [%rd5];\nbar.sync 0;\nld.global.b32 %r6, [%rd3];\nst.global.b32 [%rd3], %r6;"
    assert probe(body)[1] == set()


def test_matrix_products_read_when_they_may() -> None:
    """Shared memory as wgmma sees it: written, behind a barrier and a fence, and its own until it is waited for."""
    findings = Findings()
    shared = SharedMemory(1, 256, 4, findings)
    words, warps = np.arange(32), np.arange(32) // 8

    def found() -> set[str]:
        kinds = {kind for _, _, kind in findings.counts}
        findings.counts.clear()
        return kinds

    shared.watch_matrix(words, 1, "")
    assert found() == {"wgmma reads what nobody wrote"}
    shared.release_matrix(words, 0b1111, 1)
    shared.watch_write(words[:, None], warps, 2, "")
    shared.watch_matrix(words, 2, "")
    assert found() == {"wgmma reads what was written before any barrier", "wgmma reads what no proxy fence followed"}
    shared.fences += 1
    shared.watch_matrix(words, 3, "")
    assert found() == set()
    shared.watch_write(words[:, None], warps, 4, "")
    assert found() == {"shared write of what wgmma may still read"}
    shared.release_matrix(words, 0b1111, 5)
    shared.watch_write(words[:, None], warps, 5, "")
    assert found() == {"shared write of what another warp read before any barrier"}
    shared.watch_write(words[:, None], warps, 6, "", arrives=False)
    shared.fences += 1
    assert found() == set()
    shared.watch_matrix(words, 7, "")
    assert found() == {"wgmma reads what a copy is still to bring"}


def test_a_wait_may_leave_the_last_product() -> None:
    shared = SharedMemory(1, 256, 4, Findings())
    groups = [[np.arange(0, 8)], [np.arange(8, 16)], []]
    frame: Any = SimpleNamespace(matrices=groups, threads=128, shared=shared, epoch=1)
    for group in groups[:2]:
        shared.watch_matrix(group[0], 1, "")
    matrices.finish(frame, 1)
    assert shared.taken[0, :16].tolist() == [0] * 8 + [1] * 8
    matrices.finish(frame, 0)
    assert not shared.taken.any() and len(frame.matrices) == 1


def test_programs_have_no_order() -> None:
    """Each writes all words; the first reads what the second writes; the second reads what the first wrote."""
    assert "global write of what another program writes" in probe("st.global.b32 [%rd3], %r2;", programs=2)[1]
    body = "setp.eq.b32 %p1, %r2, 0;\n@%p1 ld.global.b32 %r6, [%rd3];\n@!%p1 st.global.b32 [%rd3], %r2;"
    assert "global write of what another program reads" in probe(body, programs=2)[1]
    body = "setp.eq.b32 %p1, %r2, 0;\n@%p1 st.global.b32 [%rd3], %r2;\n@!%p1 ld.global.b32 %r6, [%rd3];"
    assert "global read of what another program writes" in probe(body, programs=2)[1]
    own = "shl.b32 %r7, %r2, 8;\ncvt.u64.u32 %rd4, %r7;\nadd.s64 %rd5, %rd3, %rd4;\nst.global.b32 [%rd5], %r2;"
    words, found = probe(own, elements=128, programs=2)
    assert found == set()
    assert words.tolist() == [0] * 64 + [1] * 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r6, [%rd3+256];", "out of every tensor's bounds"),
        ("$L__A:\nld.global.b32 %r6, [%rd3];\nadd.s64 %rd3, %rd3, 4;\nbra.uni $L__A;", "out of every tensor's bounds"),
        ("ld.global.b32 %r6, [%rd3+2];", "not aligned"),
        (FOUR + COPY.replace("%rd3 + 0", "%rd3 + 256"), "out of every tensor's bounds"),
        ("ld.shared.b32 %r6, [%r3+2];", "a shared address not aligned"),
        ("st.shared.b32 [%r3+1024], %r1;", "out of 1024 bytes"),
        ("setp.lt.u32 %p1, %r1, 8;\n@%p1 bra $L__B;\nbar.sync 0;\n$L__B:", "a barrier that some threads miss"),
    ],
)
def test_an_access_that_must_not_be(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        probe(body)


def test_threads_part_and_meet() -> None:
    body = """
	setp.lt.u32 %p1, %r1, 8;
	@%p1 bra $L__A;
	mov.b32 %r7, 1;
	bra.uni $L__B;
$L__A:
	mov.b32 %r7, 2;
$L__B:
	add.s32 %r7, %r7, %r1;
	st.global.b32 [%rd3], %r7;"""
    words, found = probe(body)
    assert found == set()
    assert words.tolist() == [i + (2 if i < 8 else 1) for i in range(64)]


def test_a_loop_of_programs_with_different_counts() -> None:
    """Program p adds p times; the group parts, and each part ends."""
    body = """
	mov.b32 %r7, 0;
	mov.b32 %r8, 0;
$L__A:
	setp.ge.u32 %p1, %r8, %r2;
	@%p1 bra $L__B;
	add.s32 %r7, %r7, 5;
	add.s32 %r8, %r8, 1;
	bra.uni $L__A;
$L__B:
	shl.b32 %r9, %r2, 8;
	cvt.u64.u32 %rd4, %r9;
	add.s64 %rd5, %rd3, %rd4;
	st.global.b32 [%rd5], %r7;"""
    words, found = probe(body, elements=192, programs=3)
    assert found == set()
    assert words.view(3, 64).tolist() == [[0] * 64, [5] * 64, [10] * 64]


def test_programs_that_part_keep_their_shared_memory() -> None:
    """What each stored, and what was on its way to it, before they parted."""
    body = """
	mov.b32 %r9, 4;
	st.shared.b32 [%r3], %r2;
	shl.b32 %r7, %r2, 8;
	cvt.u64.u32 %rd4, %r7;
	add.s64 %rd5, %rd3, %rd4;
	cp.async.ca.shared.global [ %r3 + 256 ], [ %rd5 + 0 ], 0x4, %r9;
	cp.async.commit_group;
	setp.eq.u32 %p1, %r2, 1;
	@%p1 bra $L__A;
	mov.b32 %r9, 0;
$L__A:
	cp.async.wait_group 0;
	ld.shared.b32 %r5, [%r3];
	ld.shared.b32 %r6, [%r3+256];
	shl.b32 %r5, %r5, 10;
	add.s32 %r6, %r6, %r5;
	st.global.b32 [%rd5], %r6;"""
    words, found = probe(body, elements=128, programs=2)
    assert found == set()
    assert words.tolist() == [*range(64), *range(1024 + 64, 1024 + 128)]


def test_one_finding_is_enough() -> None:
    emulator = Emulator(90)
    emulator.findings.add("a race", "kernel.py:1")
    with pytest.raises(EmulationError, match="a race"):
        emulator.check()
    emulator.check()


def test_arithmetic() -> None:
    def evaluate(opcode: str, *operands: float) -> Any:
        function, kinds = operation(opcode)
        types: dict[str, Any] = {"s32": "i4", "u32": "u4", "b32": "u4", "f32": "f4", "u64": "u8"}
        arrays = [np.array([[x]], types[kind]) for x, kind in zip(operands, kinds, strict=True)]
        with np.errstate(all="ignore"):
            return function(*arrays).item()

    nan = float("nan")
    assert evaluate("div.s32", -7, 2) == -3
    assert evaluate("rem.s32", -7, 2) == -1
    assert evaluate("shl.b32", 1, 40) == 0
    assert evaluate("shr.s32", -8, 40) == -1
    assert evaluate("mul.hi.u32", 2**31, 6) == 3
    assert evaluate("mul.wide.s32", -(2**31), 4) == -(2**33)
    assert evaluate("mad.wide.u32", 2**31, 4, 5) == 2**33 + 5
    assert evaluate("bfe.u32", 0b110100, 2, 3) == 0b101
    assert evaluate("bfe.s32", 0b110100, 2, 3) == -3
    assert evaluate("prmt.b32", 0x33221100, 0x77665544, 0x7610) == 0x77661100
    assert evaluate("setp.lt.f32", nan, 1.0) is False
    assert evaluate("setp.ltu.f32", nan, 1.0) is True
    assert evaluate("max.f32", nan, 1.0) == 1.0
    assert evaluate("cvt.rn.bf16x2.f32", 1.0, 2.0) == 0x3F804000
    # One rounding: the product alone would lose its last digits.
    assert evaluate("fma.rn.f32", 1 + 2**-12, 1 + 2**-12, -1.0) == np.float32(2**-11 + 2**-24)
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159, float("inf"), 1e-40])
    assert (to_bfloat(values.numpy()) == values.bfloat16().view(torch.int16).numpy().view(np.uint16)).all()


@triton.jit
def product_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, TURNED: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    acc = tl.zeros([M, N], dtype=tl.float32)
    for k in range(0, K, STEP):
        left = tl.load(a + o_m[:, None] * K + (k + o_k)[None, :])
        if TURNED:
            right = tl.load(b + (k + o_k)[:, None] * N + o_n[None, :])
        else:
            right = tl.load(b + o_n[None, :] * K + (k + o_k)[:, None])
        acc = tl.dot(left, right, acc)
    tl.store(c + o_m[:, None] * N + o_n[None, :], acc)


def multiplied(chip: int, m: int, n: int, step: int, dtype: torch.dtype, *, turned: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * n)
    a = torch.randn(m, 128, generator=generator).to(dtype)
    b = torch.randn(n, 128, generator=generator).to(dtype)
    c = torch.full((m, n), torch.nan)
    emulator = Emulator(chip)
    with emulator.active():
        right = b.t().contiguous() if turned else b
        product_kernel[(1,)](a, right, c, 128, m, n, step, turned, num_warps=4, num_stages=3)
    emulator.check()
    assert emulator.launches == {"product_kernel": 1}
    return c, a.double() @ b.double().t()


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(
    ("m", "n", "step", "dtype", "turned"),
    [
        (64, 64, 64, torch.bfloat16, False),  # sm_90: wgmma, rows of 128 bytes
        (64, 64, 64, torch.bfloat16, True),  # its right operand the other way round
        (64, 32, 32, torch.float16, True),  # rows of 64 bytes
        (128, 16, 16, torch.bfloat16, False),  # of 32
        (16, 32, 32, torch.bfloat16, False),  # mma.sync
    ],
)
def test_products(chip: int, m: int, n: int, step: int, dtype: torch.dtype, turned: bool) -> None:
    got, exact = multiplied(chip, m, n, step, dtype, turned=turned)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("instruction", ["bar.sync", "cp.async.wait_group"])
def test_a_product_without_its_barriers(instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's own compiler put in, taken out."""
    monkeypatch.setattr("emulator.driver.parse", lambda text: parse(text.replace(instruction, f"// {instruction}")))
    with pytest.raises(EmulationError, match=r"before any barrier|still to bring"):
        multiplied(90, 64, 64, 32, torch.bfloat16, turned=False)
