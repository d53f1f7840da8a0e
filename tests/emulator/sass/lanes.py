"""Hopper's arithmetic on lanes, as its machine code has it: registers of 32 bits, pairs of them, predicates.

NVIDIA describes these instructions by a word each. What they do here is what makes PTX's own meaning come out of what
ptxas writes for it, in all kernels alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]

U32, U64 = np.uint32, np.uint64


def signed(value: Lanes) -> Lanes:
    return value.view(f"i{value.dtype.itemsize}")


def wide(value: Lanes, *, is_signed: bool) -> Lanes:
    """64 bits of 32."""
    return signed(value).astype(np.int64).view(U64) if is_signed else value.astype(U64)


def low(value: Lanes) -> Lanes:
    return (value & U64(0xFFFFFFFF)).astype(U32)


def high(value: Lanes) -> Lanes:
    return (value >> U64(32)).astype(U32)


def paired(lower: Lanes, upper: Lanes) -> Lanes:
    return lower.astype(U64) | (upper.astype(U64) << U64(32))


def add(terms: list[tuple[Lanes, bool]], carries: list[Lanes]) -> tuple[Lanes, Lanes]:
    """The sum's 32 bits, and how often 2^32 was passed. A term that is taken off is its complement and one more."""
    total: Any = np.zeros((1, 1), U64)
    for value, is_negated in terms:
        total = total + ((~value).astype(U64) + U64(1) if is_negated else value.astype(U64))
    for carry in carries:
        total = total + carry.astype(U64)
    return low(total), high(total)


def shift_pair(value: Lanes, count: Lanes, *, left: bool, is_signed: bool) -> Lanes:
    count = count.astype(U64)
    beyond, some = count > U64(63), np.minimum(count, U64(63))
    if left:
        return np.where(beyond, U64(0), value << some)
    if is_signed:
        return (value.view(np.int64) >> some.astype(np.int64)).view(U64)
    return np.where(beyond, U64(0), value >> some)


def look_up(table: int, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """A function of three bits, by its table: of predicates, or of each bit of three words."""
    dtype = np.result_type(a.dtype, b.dtype, c.dtype)
    ones = np.array(True) if dtype == np.bool_ else np.array(~dtype.type(0))
    result: Any = np.zeros((1, 1), dtype)
    for place in range(8):
        if table >> place & 1:
            one = ones
            for bit, value in ((4, a), (2, b), (1, c)):
                one = one & (value if place & bit else ~value)
            result = result | one
    return np.asarray(result)


JOIN: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "AND": lambda a, b: a & b,
    "OR": lambda a, b: a | b,
    "XOR": lambda a, b: a ^ b,
}


def compare_upper(name: str, a: Lanes, b: Lanes, lower: Lanes) -> Lanes:
    """Of 64-bit numbers, by their upper words and what the lower ones gave."""
    if name in ("EQ", "NE"):
        return (a == b) & lower if name == "EQ" else (a != b) | lower
    strict = a > b if name[0] == "G" else a < b
    return strict | ((a == b) & lower)


def flush(value: Lanes) -> Lanes:
    """Subnormal numbers as zeros of their sign."""
    tiny = np.abs(value) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), value), value)


def rounded_up(value: Lanes) -> Lanes:
    """The least float32 that is not below an integer."""
    exact = value.astype(np.float64)
    near = exact.astype(np.float32)
    return np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)


def truncated(value: Lanes, kind: str) -> Lanes:
    limits = np.iinfo(kind)
    whole = np.trunc(np.nan_to_num(value.astype(np.float64)))
    top = float(limits.max)
    return np.where(whole >= top, limits.max, np.maximum(whole, float(limits.min)).astype(kind)).astype(kind)
