"""What a launch gives a compiled kernel: its parameters in order, and their bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}


def given(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """A launch's arguments that the kernel has parameters for, tuples flattened."""
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            yield from given(one, part)
    elif kind != "constexpr":
        yield kind, value


def bits(kind: str, value: Any) -> tuple[int, int]:
    """How many bytes a parameter takes, and what they are to be."""
    if kind.startswith("*"):
        return 8, 0 if value is None else value.data_ptr()
    if kind in ("fp32", "fp64"):
        return SIZES[kind], int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return SIZES[kind], int(value) & (1 << 8 * SIZES[kind]) - 1
