"""The kernels' shared arithmetic by itself: within what its docstrings promise."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lcf_fast.kernels.common import TABLE_STEP, TRITON_DTYPE, address_tables, gelu, gelu_slope, row_scale, thirds
from lcf_fast.kernels.fusion_plan import Tables
from lcf_fast.layouts import Layers


@triton.jit
def gelu_kernel(x, out, slope, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_x = tl.load(x + o)
    tl.store(out + o, gelu(b_x, DTYPE))
    tl.store(slope + o, gelu_slope(b_x, DTYPE))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-6)], ids=str)
def test_gelu_is_near_the_exact_one_everywhere(dtype: torch.dtype, error: float, device: torch.device) -> None:
    """A twentieth of bfloat16's rounding at 1 does not show in a layer's error budget."""
    x = torch.linspace(-8, 8, 4096, dtype=torch.float64, device=device).requires_grad_()
    exact = torch.nn.functional.gelu(x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), x)
    out, slope = torch.empty(2, 4096, device=device)
    gelu_kernel[(1,)](x.detach().float(), out, slope, SIZE=4096, DTYPE=TRITON_DTYPE[dtype])
    assert float((out - exact.detach()).abs().max()) <= error
    assert float((slope - exact_slope).abs().max()) <= 5 * error


@triton.jit
def thirds_kernel(x, out, scaled, ROWS: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    o = tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    b_x = tl.load(x + o)
    scale, inverse = row_scale(b_x)
    b_x *= scale[:, None]
    first, second, third = thirds(b_x, DTYPE)
    tl.store(scaled + o, b_x)
    tl.store(out + o, ((third.to(tl.float32) + second.to(tl.float32)) + first.to(tl.float32)) * inverse[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_thirds_of_scaled_rows_are_the_rows(dtype: torch.dtype, device: torch.device) -> None:
    """Of rows of any size: a float32 is brought to between 2**8 and 2**9, and three 16-bit numbers hold all of it."""
    generator = torch.Generator().manual_seed(0)
    size = 10.0 ** torch.arange(-30, 34, 4).float()[:, None]
    x = (torch.rand(16, 64, generator=generator) * 0.9 + 0.1) * size
    x = x.to(device)
    out, scaled = torch.empty_like(x), torch.empty_like(x)
    thirds_kernel[(1,)](x, out, scaled, ROWS=16, SIZE=64, DTYPE=TRITON_DTYPE[dtype])
    largest = scaled.amax(1)
    assert (largest >= 256).all() and (largest < 512).all()
    torch.testing.assert_close(out, x, rtol=2**-23, atol=0)


@pytest.mark.parametrize("fault", ["", "address 0", "address 1", "address 2", "address 3", "stride 0", "stride 1"])
def test_wide_loads_are_taken_where_every_address_and_stride_allows(fault: str) -> None:
    """Two layers, ``[k0, v0, k1, v1]``; else entries are odd, and twice what they stand for."""
    kind, _, at = fault.partition(" ")
    tensors = [torch.zeros(1, 2, 5, 16, dtype=torch.float16) for _ in range(4)]
    if kind == "address":
        tensors[int(at)] = torch.zeros(161, dtype=torch.float16)[1:].view(1, 2, 5, 16)
    elif kind == "stride":
        tensors[int(at) :: 2] = [torch.zeros(1, 2, 5, 20, dtype=torch.float16)[..., :16] for _ in range(2)]
    layers = Layers.of(tensors)
    *planned, planned_aligned = Tables.of(layers.layout, (0, 1))(layers)
    made, made_aligned = address_tables(tensors[::2], tensors[1::2])
    assert planned_aligned == made_aligned == (not fault)
    wanted = [[tensor.data_ptr() for tensor in tensors[side::2]] for side in (0, 1)]
    for tables in (planned, made):
        for table, addresses in zip(tables, wanted):
            assert len(table) == TABLE_STEP and set(table[1:]) == {table[1]}
            assert list(table[:2]) == [2 * address + 1 if fault else address for address in addresses]
