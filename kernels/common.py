"""What every kernel shares: matrix products, launch tables, activation.

Invariant: a kernel sees per-layer tensors only as addresses in a launch table, a tuple of 64-bit integers in the
kernel's parameters. Nothing is copied to the device, so a launch is safe under CUDA graph capture and never syncs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Launch tables are padded to a multiple of this, so that the number of layers adds few compiled variants.
TABLE_STEP = 8
#: Widest vector load, in bytes.
VECTOR_BYTES = 16

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32. The interpreter multiplies the bits of bfloat16 as integers: upcast there."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def gelu(x):
    """Exact (erf) GELU."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def table_entry(table, i_layer, LAYERS: tl.constexpr, IS_ODD: tl.constexpr):
    """Entry ``i_layer`` of a launch table; entries that must not be specialised on are stored as ``2 * value + 1``."""
    entry = table[0]
    for i in tl.static_range(1, LAYERS):
        entry = tl.where(i_layer == i, table[i], entry)
    if IS_ODD:
        entry = entry >> 1
    return entry


@triton.jit
def pointer_of(table, i_layer, LAYERS: tl.constexpr, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The pointer that `address_table` stored for layer ``i_layer``."""
    address = table_entry(table, i_layer, LAYERS, not IS_ALIGNED)
    if IS_ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(DTYPE))


def padded(entries: Sequence[int]) -> tuple[int, ...]:
    """``entries`` with the last one repeated up to a multiple of `TABLE_STEP`."""
    return (*entries, *(entries[-1],) * (-len(entries) % TABLE_STEP))


def odd(entries: Sequence[int]) -> tuple[int, ...]:
    """Entries that Triton can not specialise on: 64-bit, odd, never 1. Decoded by `table_entry`."""
    return tuple(2 * entry + 1 for entry in entries)


def address_table(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], bool]:
    """The launch table of ``tensors``, and whether 16-byte vector loads may be used on all of them.

    Strides are taken from the first: the caller groups tensors by stride.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    size = tensors[0].element_size()
    aligned = all(step * size % VECTOR_BYTES == 0 for step in tensors[0].stride()[:-1])
    for address in addresses:
        aligned = aligned and address % VECTOR_BYTES == 0
    table = padded(addresses)
    return (table if aligned else odd(table)), aligned


TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_precision(dtype: torch.dtype) -> str:
    """IEEE products for float32, unless torch's own matmul setting allows TF32. Other dtypes ignore it."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def head_chunk(head_dim: int, widest: int) -> int:
    """Channels a step: the widest power of two up to ``widest`` that wastes under a quarter of a head."""
    chunk = widest
    while chunk > 16 and -(-head_dim // chunk) * chunk * 4 >= head_dim * 5:
        chunk //= 2
    return chunk
