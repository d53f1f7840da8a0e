"""PTX's arithmetic on lanes: one numpy operation an instruction, for all threads of all programs of a group.

A register holds its bits: ``uint16``, ``uint32``, ``uint64`` or ``bool``, of any shape that broadcasts to
``(programs, threads)``. Floats are views of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]

#: numpy's name of a PTX type; bits as unsigned integers.
TYPES = {
    **{f"{letter}{bits}": f"u{bits // 8}" for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    "f16": "f2",
    "f32": "f4",
    "f64": "f8",
}
BITS = {"pred": "?", "b16": "u2", "b32": "u4", "b64": "u8"}


def is_float(kind: str) -> bool:
    return kind in ("f16", "bf16", "f32", "f64")


def from_bfloat(bits: Lanes) -> Lanes:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat(value: Lanes) -> Lanes:
    """Nearest, ties to even."""
    bits = value.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_half(value: Lanes) -> Lanes:
    return value.astype(np.float16).view(np.uint16)


def read(bits: Lanes, kind: str) -> Lanes:
    """A register's bits as values of a type, which may be narrower than the register."""
    if kind == "pred":
        return bits
    if kind == "bf16":
        return from_bfloat(bits.astype(np.uint16))
    wanted = np.dtype(TYPES[kind])
    if bits.dtype == np.bool_:
        return bits.astype(wanted)
    if bits.dtype.itemsize == wanted.itemsize:
        return bits.view(wanted)
    return bits.astype(f"u{wanted.itemsize}").view(wanted)


def write(value: Any, register: str) -> Lanes:
    """Values as the bits of a register, widened as their type is."""
    wanted = np.dtype(BITS[register])
    value = np.asarray(value)
    if value.dtype == wanted:
        return value
    if value.dtype.kind == "f":
        value = value.view(f"u{value.dtype.itemsize}")
    if value.dtype.itemsize == wanted.itemsize:
        return value.view(wanted) if wanted.kind != "b" else value.astype(wanted)
    return value.astype(wanted)


def immediate(text: str, kind: str) -> Lanes:
    """A number as it stands in PTX, in a type."""
    if text.startswith(("0f", "0F")):
        return np.array([[int(text[2:], 16)]], np.uint32).view(np.float32)
    if text.startswith(("0d", "0D")):
        return np.array([[int(text[2:], 16)]], np.uint64).view(np.float64)
    number = int(text.rstrip("U"), 0)
    if kind == "pred":
        return np.array([[number != 0]])
    wanted = np.dtype(TYPES[kind] if kind != "bf16" else "u2")
    bits = number & (1 << 8 * wanted.itemsize) - 1
    return np.array([[bits]], f"u{wanted.itemsize}").view(wanted)


def _wide(kind: str) -> str:
    return f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 4}"


def _shift(a: Lanes, count: Lanes, *, left: bool) -> Lanes:
    """Counts beyond the width give zeros, or the sign."""
    width = 8 * a.dtype.itemsize
    count = np.minimum(count.astype(np.uint32), width).astype(a.dtype)
    if left:
        return np.where(count >= width, a.dtype.type(0), a << np.minimum(count, a.dtype.type(width - 1)))
    if a.dtype.kind == "i":
        return a >> np.minimum(count, a.dtype.type(width - 1))
    return np.where(count >= width, a.dtype.type(0), a >> np.minimum(count, a.dtype.type(width - 1)))


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return _divide(a, b)[1]


def _divide(a: Lanes, b: Lanes) -> tuple[Lanes, Lanes]:
    """Quotient towards zero, and remainder; of a division by zero, nothing that means anything."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    remainder = a - quotient * b
    away = (remainder != 0) & ((remainder < 0) != (a < 0)) if a.dtype.kind == "i" else np.zeros((1, 1), bool)
    return quotient + away.astype(a.dtype), np.where(away, remainder - b, remainder)


def _extract(a: Lanes, begin: Lanes, count: Lanes) -> Lanes:
    """Bits ``begin`` to ``begin + count``, sign-extended for signed types."""
    width = 8 * a.dtype.itemsize
    bits = a.view(f"u{a.dtype.itemsize}").astype(np.uint64)
    begin, count = begin.astype(np.uint64), count.astype(np.uint64)
    field = (bits >> begin) & ((np.uint64(1) << count) - np.uint64(1))
    if a.dtype.kind == "i":
        sign = (field >> (count - np.uint64(1))) & np.uint64(1)
        field = np.where(sign == 1, field | ~((np.uint64(1) << count) - np.uint64(1)), field)
    return (field & np.uint64((1 << width) - 1)).astype(f"u{width // 8}").view(a.dtype)


def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """Four bytes out of eight."""
    eight = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros((1, 1), np.uint64)
    for i in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(0xF)
        byte = (eight >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        byte = np.where(choice & np.uint64(8), np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)), byte)
        result = result | (byte << np.uint64(8 * i))
    return result.astype(np.uint32)


def _select(a: Lanes, b: Lanes, chosen: Lanes) -> Lanes:
    return np.asarray(np.where(chosen, a, b))


def fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """One rounding: float64 holds a product of two float32 exactly."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _high(a: Lanes, b: Lanes, kind: str) -> Lanes:
    return ((a.astype(_wide(kind)) * b.astype(_wide(kind))) >> (8 * a.dtype.itemsize)).astype(a.dtype)


_BINARY: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: _shift(a, b, left=True),
    "shr": lambda a, b: _shift(a, b, left=False),
    "rem": _remainder,
}
_UNARY: dict[str, Callable[[Lanes], Lanes]] = {
    "mov": lambda a: a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "not": lambda a: ~a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
}
_SMALLEST: dict[str, Callable[..., Lanes]] = {
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}
_COMPARE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & ((a == a) & (b == b)),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def compare(name: str) -> Callable[[Lanes, Lanes], Lanes]:
    """``setp``: the forms that end in u hold for NaN, too; lo, ls, hi, hs are of unsigned integers."""
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    if name == "nan":
        return lambda a, b: (a != a) | (b != b)
    if name == "num":
        return lambda a, b: (a == a) & (b == b)
    if len(name) == 3 and name[2] == "u":
        ordered = _COMPARE[name[:2]]
        return lambda a, b: ordered(a, b) | (a != a) | (b != b)
    return _COMPARE[name]


def _convert(to: str, of: str, modifiers: list[str]) -> Callable[[Lanes], Lanes]:
    if is_float(of) and not is_float(to):
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        chosen = next(rounding[m] for m in modifiers if m in rounding)
        limits = np.iinfo(TYPES[to])
        return lambda a: np.nan_to_num(np.clip(chosen(a.astype(np.float64)), limits.min, limits.max)).astype(TYPES[to])
    if to == "bf16":
        return lambda a: to_bfloat(a.astype(np.float32))
    if of == to and is_float(of):
        raise NotImplementedError(f"cvt.{to}.{of}")
    return lambda a: a.astype(TYPES[to])


def _widened(wide: str) -> Callable[..., Lanes]:
    """The whole product, plus what is given, twice as wide as the factors."""

    def product(a: Lanes, b: Lanes, c: Any = 0) -> Lanes:
        return np.asarray(a.astype(wide) * b.astype(wide) + np.asarray(c, wide))

    return product


def operation(opcode: str) -> tuple[Callable[..., Lanes], tuple[str, ...]]:
    """An instruction's function, and the types of its operands.

    Raises:
        NotImplementedError: an instruction that is not known here.
    """
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    if name == "cvt" and modifiers[-2] in ("bf16x2", "f16x2"):
        half = to_bfloat if modifiers[-2] == "bf16x2" else to_half
        return (lambda a, b: (half(a).astype(np.uint32) << 16) | half(b)), (kind, kind)
    if name == "cvt":
        return _convert(modifiers[-2], kind, modifiers), (kind,)
    if name == "setp" and len(modifiers) == 2:
        return compare(modifiers[0]), (kind, kind)
    if name == "selp":
        return _select, (kind, kind, "pred")
    if name == "fma":
        return fused, (kind, kind, kind)
    if name in ("min", "max"):
        # Of a NaN and a number it is the number, unless asked otherwise.
        return _SMALLEST[f"{name}.NaN" if "NaN" in modifiers else name], (kind, kind)
    if name in ("mul", "mad") and not is_float(kind):
        extra = (kind,) if name == "mad" else ()
        if modifiers[0] == "wide":
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            return _widened(TYPES[wide]), (kind, kind, *((wide,) if extra else ()))
        if modifiers[0] == "hi":
            return (lambda a, b, c=0: _high(a, b, kind) + np.asarray(c, a.dtype)), (kind, kind, *extra)
        return (lambda a, b, c=0: a * b + np.asarray(c, a.dtype)), (kind, kind, *extra)
    if name == "mul":
        return (lambda a, b: a * b), (kind, kind)
    if name == "div":
        quotient = (lambda a, b: a / b) if is_float(kind) else (lambda a, b: _divide(a, b)[0])
        return quotient, (kind, kind)
    if name in ("shl", "shr"):
        return _BINARY[name], (kind, "u32")
    if name in _BINARY:
        return _BINARY[name], (kind, kind)
    if name == "bfe":
        return _extract, (kind, "u32", "u32")
    if name == "prmt":
        return permute, ("b32", "b32", "b32")
    if name in _UNARY:
        return _UNARY[name], (kind,)
    raise NotImplementedError(opcode)
