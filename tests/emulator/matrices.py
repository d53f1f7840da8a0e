"""Matrix instructions: ldmatrix, stmatrix, mma.sync, wgmma, each as PTX lays its operands out over a warp's threads.

Products are exact sums of exact products in float64, rounded once. Tensor cores round more, which is within what tests
allow a kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .lanes import from_bfloat
from .memory import WARP

if TYPE_CHECKING:
    from .frame import Frame

Lanes = NDArray[Any]
LANE = np.arange(WARP)
ROW, PAIR = LANE // 4, LANE % 4
#: Warps that run one wgmma.
WARPS = 4


def _rows(frame: Frame, address: Lanes, count: int) -> tuple[Lanes, Lanes, Lanes]:
    """Program, warp and address of each of ``count`` matrices' eight rows: (programs, warps, count, 8)."""
    programs, warps = len(frame.programs), frame.threads // WARP
    lanes = frame.full(address).reshape(programs, warps, WARP)[..., : 8 * count]
    shape = (programs, warps, count, 8)
    program = np.broadcast_to(np.arange(programs)[:, None, None, None], shape)
    warp = np.broadcast_to(np.arange(warps)[None, :, None, None], shape)
    return program, warp, lanes.reshape(shape)


def load(frame: Frame, address: Lanes, count: int, source: str, *, is_turned: bool) -> Lanes:
    """Registers (programs, threads, count) with two elements each."""
    program, warp, where = _rows(frame, address, count)
    frame.touch_shared(program.reshape(-1), warp.reshape(-1), where.reshape(-1), 16, source, writes=False)
    elements = np.stack([frame.shared.load(program, where + 2 * i, 2) for i in range(8)], -1)
    if is_turned:
        elements = elements.swapaxes(-1, -2)
    low, high = (elements[:, :, :, ROW, 2 * PAIR + i].astype(np.uint32) for i in range(2))
    registers = low | (high << 16)  # (programs, warps, count, lanes)
    return np.asarray(registers.swapaxes(2, 3).reshape(len(frame.programs), frame.threads, count))


def store(frame: Frame, address: Lanes, registers: Lanes, source: str, *, is_turned: bool) -> None:
    count = registers.shape[-1]
    program, warp, where = _rows(frame, address, count)
    frame.touch_shared(program.reshape(-1), warp.reshape(-1), where.reshape(-1), 16, source, writes=True)
    held = registers.reshape(len(frame.programs), -1, WARP, count).swapaxes(2, 3)
    elements = np.zeros((*held.shape[:3], 8, 8), np.uint16)
    elements[..., ROW, 2 * PAIR] = held & 0xFFFF
    elements[..., ROW, 2 * PAIR + 1] = held >> 16
    if is_turned:
        elements = elements.swapaxes(-1, -2)
    for i in range(8):
        frame.shared.store(program, where + 2 * i, 2, elements[..., i])


def _values(bits: Lanes, kind: str) -> Lanes:
    """16-bit elements as float32."""
    return from_bfloat(bits) if kind == "bf16" else bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _halves(registers: Lanes, kind: str) -> tuple[Lanes, Lanes]:
    return _values((registers & 0xFFFF).astype(np.uint16), kind), _values((registers >> 16).astype(np.uint16), kind)


def _by_warp(registers: Lanes) -> Lanes:
    """(programs, warps, lanes, registers)."""
    return registers.reshape(len(registers), -1, WARP, registers.shape[-1])


def _left(registers: Lanes, kind: str) -> Lanes:
    """16 rows and 16 columns a warp: (programs, warps, 16, 16)."""
    low, high = _halves(_by_warp(registers), kind)
    rows = np.zeros((*low.shape[:2], 16, 16), np.float32)
    for i in range(4):
        for j, half in enumerate((low, high)):
            rows[:, :, ROW + 8 * (i % 2), 2 * PAIR + 8 * (i // 2) + j] = half[..., i]
    return rows


def multiply(a: Lanes, b: Lanes, c: Lanes, shape: str, kind: str) -> Lanes:
    """``mma.sync``: registers (programs, threads, n) of the three, and of the result."""
    if shape == "m16n8k16":
        left = _left(a, kind)
        right = np.zeros((*left.shape[:2], 16, 8), np.float32)
        for i in range(2):
            for j, half in enumerate(_halves(_by_warp(b), kind)):
                right[:, :, 2 * PAIR + 8 * i + j, ROW] = half[..., i]
    elif shape == "m16n8k8" and kind == "tf32":
        numbers, columns = (_by_warp(x & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
        left = np.zeros((*numbers.shape[:2], 16, 8), np.float32)
        right = np.zeros((*numbers.shape[:2], 8, 8), np.float32)
        for i in range(4):
            left[:, :, ROW + 8 * (i % 2), PAIR + 4 * (i // 2)] = numbers[..., i]
        for i in range(2):
            right[:, :, PAIR + 4 * i, ROW] = columns[..., i]
    else:
        raise NotImplementedError(f"mma.{shape} of {kind}")
    product = left.astype(np.float64) @ right
    sums = _by_warp(c).view(np.float32)
    result = np.empty(sums.shape, np.float32)
    for i in range(4):
        result[..., i] = product[:, :, ROW + 8 * (i // 2), 2 * PAIR + i % 2] + sums[..., i]
    return result.view(np.uint32).reshape(c.shape)


def rows_of(registers: Lanes, kind: str) -> Lanes:
    """wgmma's left operand from registers: (programs, groups of warps, 64, 16)."""
    left = _left(registers, kind)
    return left.reshape(len(left), -1, 16 * WARPS, 16)


def _field(place: Lanes, begin: int, count: int) -> Lanes:
    return ((place >> np.uint64(begin)) & np.uint64((1 << count) - 1)).astype(np.int64)


def _tile(frame: Frame, place: Lanes, outer: int, kind: str, is_turned: bool, source: str) -> Lanes:
    """``outer`` x 16 elements of shared memory as a descriptor lays them out: (programs, groups of warps, outer, 16).

    A descriptor names a start, two strides and a swizzle. Elements lie in rows of 16 << swizzle bytes, eight rows a
    tile; rows go along the 16 (or, turned, along the outer axis), and the swizzle exchanges 16-byte pieces of a row by
    the row's number, which is in the address.
    """
    programs, groups = len(frame.programs), frame.threads // (WARP * WARPS)
    place = frame.full(place).reshape(programs, groups, WARP * WARPS)
    if np.any(place != place[..., :1]):
        raise NotImplementedError("a descriptor that differs within a group of warps")
    place = place[..., 0][..., None, None]
    start, leading, stride = (_field(place, begin, 14) * 16 for begin in (0, 16, 32))
    width = {0: 1, 1: 8, 2: 4, 3: 2}
    modes = np.unique(_field(place, 62, 2))
    if len(modes) != 1 or np.any(_field(place, 49, 3)):
        raise NotImplementedError("descriptors of several kinds")
    pieces = width[int(modes[0])]  # of 16 bytes, in a row
    i, k = np.arange(outer)[:, None], np.arange(16)[None]
    if not is_turned:
        if pieces == 1:
            where = start + i // 8 * stride + i % 8 * 16 + k // 8 * leading + k % 8 * 2
        else:
            where = start + i // 8 * stride + i % 8 * (16 * pieces) + k * 2
    elif pieces == 1:
        where = start + i // 8 * stride + k // 8 * leading + k % 8 * 16 + i % 8 * 2
    else:
        along = 8 * pieces
        where = start + i // along * leading + i % along * 2 + k // 8 * stride + k % 8 * (16 * pieces)
    where = where ^ (((where >> 7) & (pieces - 1)) << 4)
    program = np.broadcast_to(np.arange(programs)[:, None, None, None], where.shape)
    frame.shared.check(where, 2, source)
    words = np.unique(frame.shared.words(program, where, 2).reshape(-1))
    frame.shared.watch_matrix(words, frame.epoch, source)
    frame.matrices[-1].append(words)
    return _values(frame.shared.load(program, where, 2), kind)


def rows_in(frame: Frame, place: Lanes, kind: str, is_turned: bool, source: str) -> Lanes:
    """wgmma's left operand from shared memory: (programs, groups of warps, 64, 16)."""
    return _tile(frame, place, 16 * WARPS, kind, is_turned, source)


def columns_in(frame: Frame, place: Lanes, columns: int, kind: str, is_turned: bool, source: str) -> Lanes:
    """Its right operand: (programs, groups of warps, 16, columns)."""
    return _tile(frame, place, columns, kind, is_turned, source).swapaxes(-1, -2)


def accumulate(left: Lanes, right: Lanes, registers: Lanes, adds: Lanes) -> Lanes:
    """Registers (programs, threads, columns / 2) of ``left @ right``, plus what they held where ``adds``."""
    product = left.astype(np.float64) @ right  # (programs, groups, 64, columns)
    programs, groups, _, columns = product.shape
    sums = np.where(adds[..., None], registers.view(np.float32), np.float32(0))
    sums = np.broadcast_to(sums, registers.shape).reshape(programs, groups, WARPS, WARP, columns // 2)
    rows = product.reshape(programs, groups, WARPS, 16, columns)
    result = np.empty(sums.shape, np.float32)
    for i in range(columns // 2):
        j, half, odd = i // 4, i % 4 // 2, i % 2
        result[..., i] = rows[:, :, :, ROW + 8 * half, 8 * j + 2 * PAIR + odd] + sums[..., i]
    return result.view(np.uint32).reshape(registers.shape)


def finish(frame: Frame, left: int) -> None:
    """All but the last ``left`` closed groups of products are done: their operands may be overwritten."""
    closed = len(frame.matrices) - 1
    done = max(closed - left, 0)
    mask = (1 << frame.threads // WARP) - 1
    for group in frame.matrices[:done]:
        for words in group:
            frame.shared.release_matrix(words, mask, frame.epoch)
    del frame.matrices[:done]
    for group in frame.matrices:
        for words in group:
            frame.shared.taken.reshape(-1)[words] = 1
