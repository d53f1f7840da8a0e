"""What every kernel shares: matrix products, launch tables, activation.

Invariant: a kernel sees per-layer tensors only as addresses in a launch table, a tuple of 64-bit integers in the
kernel's parameters. Nothing is copied to the device, so a launch is safe under CUDA graph capture and never syncs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .policy import INTERPRETER

#: Launch tables are padded to a multiple of this, so that the number of layers adds few compiled variants.
TABLE_STEP = 8
#: Widest vector load, in bytes.
VECTOR_BYTES = 16
#: Of a tensor without elements, which torch puts at address 0; that, Triton would take for a number of 32 bits.
NOWHERE = 1 << 40
#: Weights are at most 1: scaled by this power of two, float16 holds those down to 1/4096 as well as float32 does.
WEIGHT_SCALE = tl.constexpr(4096.0)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def inlined(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for the small helpers. The interpreter takes milliseconds to enter a jitted function, so there
    they stay plain Python, which it runs alike as long as they hold no loop."""
    return function if INTERPRETED else triton.jit(function)


@inlined
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32. The interpreter multiplies the bits of bfloat16 as integers: upcast there."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@inlined
def long_dot(a, b, acc, PRECISION: tl.constexpr):
    """`dot` for an ``acc`` that many steps add to.

    Float32 products are multiply-adds one after the other. Here a step's start from zero and are added as a whole, or
    rounding would grow with all that was ever added: over 2,048 hidden units to several times that of blocked sums.
    By `tl.fma`, since Triton makes of a plain sum the one long chain again.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee" and not INTERPRETED:
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    else:
        acc = dot(a, b, acc, PRECISION)
    return acc


@inlined
def thirds(x, DTYPE: tl.constexpr):
    """Three 16-bit numbers that add up to a float32: 24 bits are 3 x 8 for bfloat16, and 2 x 11 and some for float16,
    but there not below 2**-25: scale small ones up."""
    first = x.to(DTYPE)
    x -= first.to(tl.float32)
    second = x.to(DTYPE)
    third = (x - second.to(tl.float32)).to(DTYPE)
    return first, second, third


@inlined
def exact_dot(rows, tile, acc, DTYPE: tl.constexpr):
    """``acc + rows @ tile`` for float32 ``rows`` and a 16-bit ``tile``, as exact as in float32: by `thirds`."""
    first, second, third = thirds(rows, DTYPE)
    acc = dot(third, tile, acc, "ieee")
    acc = dot(second, tile, acc, "ieee")
    acc = dot(first, tile, acc, "ieee")
    return acc


@inlined
def third_of(x, i_third, DTYPE: tl.constexpr):
    """The first, second or third of `thirds`; beyond those 0.

    With ``i_third`` along an axis of a product that tensor instructions pad anyway, one product does the work of three.
    """
    first, second, third = thirds(x, DTYPE)
    zero = tl.zeros_like(third)
    return tl.where(i_third == 0, first, tl.where(i_third == 1, second, tl.where(i_third == 2, third, zero)))


@inlined
def row_scale(rows):
    """A power of two a row that brings its largest element to between 2**8 and 2**9, and the inverse.

    float16 has so few exponents that three of them hold a float32's digits only near there.
    """
    exponent = tl.max(tl.abs(rows), 1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 16), 238)
    scale = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@inlined
def cast(x, DTYPE: tl.constexpr):
    """Round float32 to the cache's dtype, to nearest even. The interpreter cuts bfloat16 off instead: round there."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = rounded.to(tl.uint32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN's payload must not be rounded into an infinity
    return x.to(DTYPE)


@inlined
def normal_cdf(x, DTYPE: tl.constexpr):
    """The normal distribution's ``P(X < x)``, to be multiplied by values that are rounded to DTYPE next.

    For bfloat16 it is ``1/2 + x q(x²)``, cut off at 0 and 1, with ``x²`` no larger than 4.25²: GELU comes out within
    1e-4 of the exact one everywhere, a twentieth of bfloat16's rounding at 1, in 11 instructions instead of 33 (the cut
    is FFMA's own). Counted over a token, exact GELU costs more issue slots than the products take on the tensor cores.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        u = tl.minimum(x * x, 18.0625)
        q = -8.459771772e-10 * u + 7.570358207e-08
        q = q * u - 2.938658326e-06
        q = q * u + 6.552480772e-05
        q = q * u - 9.404274169e-04
        q = q * u + 9.257725440e-03
        q = q * u - 6.545326859e-02
        q = q * u + 3.984198272e-01
        cdf = tl.minimum(tl.maximum(x * q + 0.5, 0.0), 1.0)
    else:
        cdf = 0.5 * tl.erf(x * 0.7071067811865476) + 0.5
    return cdf


@inlined
def gelu(x, DTYPE: tl.constexpr):
    """Erf GELU of float32 values that are rounded to DTYPE next."""
    return x * normal_cdf(x, DTYPE)


@inlined
def gelu_slope(x, DTYPE: tl.constexpr):
    """The derivative of `gelu`."""
    return normal_cdf(x, DTYPE) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@inlined
def row_offsets(rows, stride, IS_WIDE: tl.constexpr):
    """``rows * stride``, in 64 bits only where `needs_wide_offsets` says so: offsets live in registers."""
    if IS_WIDE:
        rows = rows.to(tl.int64)
    return rows * stride


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
    """The pointer that `address_table` stored for layer ``i_layer``.

    Triton reads the alignment hint off the integer-to-pointer conversion only, and in the function that made it: on
    the integer, or outside this function, it is lost, and every access narrows to one element.
    """
    pointer = table_entry(table, i_layer, LAYERS, not IS_ALIGNED).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


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
    addresses = [*map(Tensor.data_ptr, tensors)]
    if 0 in addresses:
        addresses = [address or NOWHERE for address in addresses]
    size = tensors[0].element_size()
    aligned = not reduce(or_, addresses) % VECTOR_BYTES
    aligned = aligned and all(step * size % VECTOR_BYTES == 0 for step in tensors[0].stride()[:-1])
    table = padded(addresses)
    return (table if aligned else odd(table)), aligned


TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def address_tables(*columns: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """One launch table a column (a column: the same tensor of every layer), all aligned or all not."""
    tables = [address_table(column) for column in columns]
    if all(aligned for _, aligned in tables):
        return tuple(table for table, _ in tables), True
    return tuple(odd(table) if aligned else table for table, aligned in tables), False


def alike_runs(keys: Sequence[Tensor], values: Sequence[Tensor], most: int) -> Iterator[slice]:
    """Neighbouring layers that can share a launch: equal strides, and no more than ``most`` of them."""
    strides = [*zip(map(Tensor.stride, keys), map(Tensor.stride, values))]
    start, count = 0, len(keys)
    for i in range(1, count + 1):
        if i == count or i - start == most or strides[i] != strides[start]:
            yield slice(start, i)
            start = i


def needs_wide_offsets(rows: int, *tensors: Tensor) -> bool:
    """Whether an offset of up to ``rows`` tokens overflows 32 bits in any of the ``(B, H, N, D)`` tensors."""
    return any(rows * tensor.stride(2) + tensor.shape[3] >= 2**31 for tensor in tensors)


def heads_block(heads: int) -> int:
    """Heads padded to a power of two that is no narrower than a tensor instruction."""
    return max(16, triton.next_power_of_2(heads))


def device_guard(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's GPU the current one for a launch; nothing to do where it is, and for the interpreter's CPU
    tensors."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache
def _target(device: torch.device) -> str:
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def target_of(tensor: Tensor) -> str:
    """The name of the tensor's chip in `policy`: ``sm_90``, ``gfx942``."""
    return _target(tensor.device)


def dot_precision(dtype: torch.dtype) -> str:
    """IEEE products for float32, unless torch's own matmul setting allows TF32. Other dtypes ignore it."""
    # Not `allow_tf32`, which torch refuses to read once somebody has set the newer name.
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def hidden_chunk(hidden: int, widest: int) -> int:
    """FFN hidden units a step: the widest power of two up to ``widest`` that divides them."""
    return math.gcd(hidden, widest)


def head_chunk(head_dim: int, widest: int) -> int:
    """Channels a step: the widest power of two up to ``widest`` that wastes under a quarter of a head."""
    chunk = widest
    while chunk > 16 and -(-head_dim // chunk) * chunk * 4 >= head_dim * 5:
        chunk //= 2
    return chunk
