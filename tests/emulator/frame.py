"""A group of programs that run in step: registers, shared memory, what is on its way, who runs at present."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import triton
from numpy.typing import NDArray

from .memory import WARP, EmulationError, Findings, GlobalMemory, SharedMemory

Lanes = NDArray[Any]


@dataclass
class Frame:
    """A group of programs: registers, shared memory, what is on its way."""

    programs: NDArray[np.int64]  # numbers in the launch, from 0
    places: tuple[Lanes, Lanes, Lanes]  # their places in the grid, each (programs, 1)
    threads: int
    registers: dict[str, Lanes]
    shared: SharedMemory
    memory: GlobalMemory
    findings: Findings
    statement: int = 0
    epoch: int = 1
    #: Groups of asynchronous copies, the last still open: (program, address, bytes, value, warp) of flat lanes.
    copies: list[list[tuple[Lanes, ...]]] = field(default_factory=lambda: [[]])
    #: Groups of wgmma's reads, the last still open: words of shared memory.
    matrices: list[list[Lanes]] = field(default_factory=lambda: [[]])
    #: Threads that run at present; None for all.
    mask: Lanes | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.programs), self.threads

    def take(self, chosen: Lanes, statement: int) -> Frame:
        """Some of the programs (indices), to go on elsewhere."""
        place = np.full(len(self.programs), -1)
        place[chosen] = np.arange(len(chosen))
        width = self.shared.words_each

        def moved(words: Lanes) -> Lanes:
            return np.asarray(place[words // width] * width + words % width)

        def kept(copy: tuple[Lanes, ...]) -> tuple[Lanes, ...]:
            some = place[copy[0]] >= 0
            program, there, words, warp, value = (array[some] for array in copy)
            return place[program], there, moved(words), warp, value

        part = {
            name: value[chosen] if value.shape[0] == len(self.programs) and value.shape[0] > 1 else value
            for name, value in self.registers.items()
        }
        return replace(
            self,
            programs=self.programs[chosen],
            places=tuple(place[chosen] for place in self.places),  # type: ignore[arg-type]
            registers=part,
            shared=self.shared.take(chosen),
            statement=statement,
            copies=[[kept(copy) for copy in group] for group in self.copies],
            matrices=[[moved(words[place[words // width] >= 0]) for words in group] for group in self.matrices],
        )

    def full(self, value: Lanes) -> Lanes:
        return np.broadcast_to(value, self.shape)

    def flat(self, guard: Lanes | None, *values: Lanes) -> tuple[Lanes, ...]:
        """Local program, warp, then ``values``, of the lanes that a guard lets through, one axis."""
        program = np.arange(len(self.programs))[:, None]
        warp = (np.arange(self.threads) // WARP)[None]
        arrays = [self.full(value) for value in (program, warp, *values)]
        if guard is None:
            return tuple(array.reshape(-1) for array in arrays)
        chosen = self.full(guard)
        return tuple(array[chosen] for array in arrays)

    def touch_global(
        self, program: Lanes, warp: Lanes, where: Lanes, size: int, source: str, hint: list[int], *, writes: bool
    ) -> None:
        """Check an access of flat lanes to global memory, and remember it.

        Args:
            hint: where an instruction's last access was, which the next is likely to be near.
        """
        holder = self.memory.check(where, size, source, hint)
        self.memory.watch(where, size, self.programs[program] + 1, warp, self.epoch, source, holder, writes=writes)

    def touch_shared(
        self, program: Lanes, warp: Lanes, where: Lanes, size: int, source: str, *, writes: bool, arrives: bool = True
    ) -> Lanes:
        """The same for shared memory; the words that it touches. ``arrives`` is False for a copy on its way."""
        self.shared.check(where, size, source)
        words = self.shared.words(program, where, size)
        if writes:
            self.shared.watch_write(words, warp, self.epoch, source, arrives=arrives)
        else:
            self.shared.watch_read(words, warp, self.epoch, source)
        return words


#: An instruction: it changes a frame, and returns the statement that it jumps to, if it does.
Step = Callable[[Frame], "int | None"]
#: Whether a copy that wgmma reads needs a proxy fence as a store does. It does, says PTX; older Triton has none there.
COPIES_ARE_FENCED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
#: Where the end of a kernel is, and that of a subroutine.
END, RETURN = -1, -2


class Diverging(Exception):
    """Threads of a program go different ways."""

    def __init__(self, jumping: Lanes, staying: Lanes, to: int, at: int) -> None:
        super().__init__("threads part")
        self.jumping, self.staying, self.to, self.at = jumping, staying, to, at


class Calling(Exception):
    """A subroutine begins, and its caller goes on behind it."""

    def __init__(self, to: int, after: int) -> None:
        super().__init__("a call")
        self.to, self.after = to, after


class Parting(Exception):
    """Programs of a group go different ways."""

    def __init__(self, jumping: Lanes, to: int, staying: Lanes, after: int) -> None:
        super().__init__("programs part")
        self.jumping, self.to, self.staying, self.after = jumping, to, staying, after


def arrive(frame: Frame, left: int, *, everything: bool = False) -> None:
    """All but the last ``left`` closed groups of copies are in shared memory, for the thread that asked."""
    if everything:
        frame.copies.append([])
    closed = len(frame.copies) - 1
    for group in frame.copies[: max(closed - left, 0)]:
        for program, there, words, warp, value in group:
            frame.shared.coming.reshape(-1)[words] = 0
            frame.shared.mark_written(words, warp[:, None], frame.epoch, needs_fence=COPIES_ARE_FENCED)
            for i in range(value.shape[1]):
                frame.shared.store(program, there + 4 * i, 4, value[:, i])
    del frame.copies[: max(closed - left, 0)]


def jump(frame: Frame, allowed: Lanes, to: int, at: int) -> int | None:
    """A branch at statement ``at``, for the threads that are allowed.

    Raises:
        Parting, Diverging: some programs, or some threads of a program, jump and others do not.
    """
    taken = frame.full(allowed)
    running = taken | True if frame.mask is None else frame.full(frame.mask)
    jumps = taken[:, 0]
    if not np.any(taken):
        return None
    if np.array_equal(taken, running):
        return to
    if frame.mask is None and not np.any(taken != jumps[:, None]):
        raise Parting(np.flatnonzero(jumps), to, np.flatnonzero(~jumps), at + 1)
    raise Diverging(taken, running & ~taken, to, at)


def barrier(frame: Frame, source: str) -> None:
    """Of all warps of a program.

    Raises:
        EmulationError: some of its threads are elsewhere.
    """
    if frame.mask is not None:
        raise EmulationError(f"{frame.findings.kernel}, {source}: a barrier that some threads miss")
    frame.epoch += 1


def fence(frame: Frame) -> None:
    """What was stored until here, wgmma may read."""
    frame.shared.fences += 1


def shuffle(frame: Frame, value: Lanes, lane: Lanes, *, is_butterfly: bool) -> Lanes:
    """Each thread's value of another one of its warp."""
    own = np.arange(frame.threads)[None]
    other = frame.full(lane).astype(np.int64)
    place = own ^ other if is_butterfly else own // WARP * WARP + other % WARP
    return np.take_along_axis(frame.full(value), place, 1)


def reduced(frame: Frame, function: Any, value: Lanes) -> Lanes:
    """A function (``np.add``) of a warp's values, for each of its threads."""
    warps = frame.full(value).reshape(len(frame.programs), -1, WARP)
    return np.repeat(function.reduce(warps, 2, dtype=warps.dtype), WARP, 1)
