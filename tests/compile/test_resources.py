"""What the gate counts it can count: spills and narrow accesses are held from above, and none seen would be none."""

from __future__ import annotations

import triton
import triton.language as tl
from case import make
from resources import Resources, amd_resources, compile_case, nvidia_resources

SASS = """
        /*0010*/                   LDL R4, [R1] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/                   STL.64 [R1+0x8], R6 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/                   LDL.LU.128 R4, [R1] ;
        /*0080*/                   STG.E.U16 desc[UR4][R2.64], R8 ;
        /*0090*/                   LDG.E.S16 R9, desc[UR4][R2.64] ;
        /*00a0*/               @P1 BRA 0xc0 ;
        /*00b0*/                   STL [R1+0x8], R6 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""
AMD = """
.LBB0_1:
	scratch_load_dword v7, off, off offset:4
.LBB0_2:
	global_load_dwordx4 v[2:5], v[0:1], off
	scratch_store_dwordx2 off, v[6:7], off offset:8
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	s_cbranch_scc1 .LBB0_2
	global_load_ushort v3, v[0:1], off
	buffer_load_dwordx4 v[2:5], v0, s[0:3], 0 offen
	global_store_short v[0:1], v3, off
	s_branch .LBB0_3
	scratch_load_dword v7, off, off offset:4
.LBB0_3:
	s_endpgm
    .agpr_count:     16
    .vgpr_count:     96
"""


def test_what_assembly_says() -> None:
    assert nvidia_resources(168, SASS, 4096, "sm_90") == Resources(
        registers=168, spills=4, loop_spills=1, shared=4096, mma=("HMMA",), wide_loads=2, narrow=2, hazards=()
    )
    assert amd_resources(AMD, 512) == Resources(
        registers=112, spills=3, loop_spills=1, shared=512, mma=("v_mfma_f32_32x32x8_bf16_1k",), wide_loads=2, narrow=2,
        hazards=(),
    )  # fmt: skip


def test_what_the_search_for_hazards_finds_is_told() -> None:
    text = "/*0010*/ HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8], R24, gsb0 ;\n/*0020*/ FADD R57, R4, R5 ;\n"
    assert len(nvidia_resources(168, text, 0, "sm_90").hazards) == 1


@triton.jit
def crowded_kernel(x, y, steps, SIZE: tl.constexpr):
    """Numbers that are all needed in each step, and 16-bit ones at odd addresses."""
    o = tl.arange(0, SIZE)
    a = tl.load(x + o).to(tl.float32)
    b = a
    for i in range(steps):
        b = a * b + tl.sum(b, 0) + i
    tl.store(y + o, b.to(tl.bfloat16))


def test_what_a_compiled_kernel_takes() -> None:
    types = {"x": "*bf16", "y": "*bf16"}
    case = make("crowded", crowded_kernel, types, {"SIZE": 4096}, 4, unaligned=("x",), max_registers=40)
    used = compile_case(case, "sm_90")
    assert used.registers <= 40
    assert used.spills > used.loop_spills > 10
    assert used.narrow >= 32, "what each of 128 threads loads"
    assert used.shared > 0 and not used.wide_loads and not used.mma
    assert compile_case(make("crowded", crowded_kernel, types, {"SIZE": 512}, 4), "sm_90").spills == 0
