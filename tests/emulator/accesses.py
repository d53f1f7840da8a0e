"""Loads, stores and copies of a group of programs: each checked, and remembered for the races it may be part of.

``hint`` of an instruction on global memory is a list that stays with it; None means shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .frame import Frame

Lanes = NDArray[Any]


def load(
    frame: Frame, allowed: Lanes | None, place: Lanes, unit: int, count: int, source: str, hint: list[int] | None
) -> list[Lanes]:
    """``count`` times ``unit`` bytes a thread, each an array of all threads, with zeros where none is allowed."""
    program, warp, where = frame.flat(allowed, place)
    if not len(where):
        return [np.zeros((1, 1), f"u{unit}")] * count
    if hint is None:
        frame.touch_shared(program, warp, where, unit * count, source, writes=False)
        values = [frame.shared.load(program, where + unit * i, unit) for i in range(count)]
    else:
        frame.touch_global(program, warp, where, unit * count, source, hint, writes=False)
        values = [frame.memory.load(where + unit * i, unit) for i in range(count)]
    if allowed is None:
        return [value.reshape(frame.shape) for value in values]
    spread = [np.zeros(frame.shape, f"u{unit}") for _ in values]
    for whole, value in zip(spread, values):
        whole[frame.full(allowed)] = value
    return spread


def store(
    frame: Frame,
    allowed: Lanes | None,
    place: Lanes,
    values: Sequence[Lanes],
    unit: int,
    source: str,
    hint: list[int] | None,
) -> None:
    """The lower ``unit`` bytes of each of the values, one behind the other."""
    program, warp, where, *given = frame.flat(allowed, place, *values)
    if not len(where):
        return
    if hint is None:
        frame.touch_shared(program, warp, where, unit * len(given), source, writes=True)
    else:
        frame.touch_global(program, warp, where, unit * len(given), source, hint, writes=True)
    for i, value in enumerate(given):
        if hint is None:
            frame.shared.store(program, where + unit * i, unit, value)
        else:
            frame.memory.store(where + unit * i, unit, value)


def copy(
    frame: Frame,
    allowed: Lanes | None,
    to: Lanes,
    of: Lanes,
    is_read: Lanes,
    size: int,
    source: str,
    hint: list[int],
) -> None:
    """From global to shared memory once its group is waited for; zeros where nothing is read."""
    program, warp, there, here, some = frame.flat(allowed, to, of, is_read)
    if not len(there):
        return
    words = frame.touch_shared(program, warp, there, size, source, writes=True, arrives=False)
    value = np.zeros((len(there), size // 4), np.uint32)
    if np.any(some):
        begin = here[some]
        frame.touch_global(program[some], warp[some], begin, size, source, hint, writes=False)
        for i in range(size // 4):
            value[some, i] = frame.memory.load(begin + 4 * i, 4)
    frame.copies[-1].append((program, there, words, warp, value))
