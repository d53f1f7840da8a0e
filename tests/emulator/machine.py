"""Programs of one launch, run instruction by instruction, a group of them in step.

Programs of a group that part go on as two groups. Threads of a program that part (the branches of an error function,
say) take both sides one after the other, and meet where the sides do.
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx
import numpy as np

from .frame import END, RETURN, Calling, Diverging, Frame, Parting, Step
from .memory import WARP, Findings, GlobalMemory, SharedMemory
from .ptx import Kernel

#: Threads that run in step. Larger groups spend less time in Python, smaller ones fit caches.
GROUP_THREADS = 8192


def meeting_points(kernel: Kernel) -> dict[int, int]:
    """Where the ways from each branch meet again: a branch's first statement that all of them come to, or `END`."""
    graph = networkx.DiGraph([(END, RETURN)])
    for statement in kernel.statements:
        head = statement.opcode.split(".")[0]
        to = END if head in ("ret", "EXIT") else RETURN if head == "RET" else None
        if head in ("bra", "BRA"):
            to = kernel.labels[statement.operands[-1]]
        if to is not None:
            graph.add_edge(to, statement.number)
            if statement.guard is None and len(statement.operands) < 2:
                continue
        if statement.number + 1 < len(kernel.statements):
            graph.add_edge(statement.number + 1, statement.number)
    return dict(networkx.immediate_dominators(graph, END))


def run(
    kernel: Kernel,
    steps: Sequence[Step],
    grid: tuple[int, int, int],
    shared: int,
    memory: GlobalMemory,
    findings: Findings,
    reserved: int = 0,
) -> None:
    """All programs of a launch, one group after another.

    Args:
        shared: bytes of shared memory, behind ``reserved`` ones that are not a program's own.

    Raises:
        EmulationError: an access out of bounds or not aligned, or a barrier that some threads miss.
    """
    total = grid[0] * grid[1] * grid[2]
    size = max(GROUP_THREADS // kernel.threads, 1)
    runner = _Runner(kernel, steps)
    for begin in range(0, total, size):
        programs = np.arange(begin, min(begin + size, total))
        places = (programs % grid[0], programs // grid[0] % grid[1], programs // (grid[0] * grid[1]))
        frame = Frame(
            programs=programs,
            places=tuple(place[:, None].astype(np.uint32) for place in places),  # type: ignore[arg-type]
            threads=kernel.threads,
            registers={},
            shared=SharedMemory(len(programs), shared, kernel.threads // WARP, findings, reserved),
            memory=memory,
            findings=findings,
        )
        waiting = [frame]
        while waiting:
            frame = waiting.pop()
            try:
                runner.run(frame, frame.statement, END)
            except Parting as parting:
                waiting.append(frame.take(parting.jumping, parting.to))
                waiting.append(frame.take(parting.staying, parting.after))


class _Runner:
    def __init__(self, kernel: Kernel, steps: Sequence[Step]) -> None:
        self._kernel, self._steps = kernel, steps
        self._meeting: dict[int, int] | None = None

    def run(self, frame: Frame, number: int, end: int) -> None:
        """From one statement to another, where it stops."""
        while number != end:
            try:
                to = self._steps[number](frame)
            except Calling as call:
                self.run(frame, call.to, RETURN)
                to = call.after
            except Diverging as parting:
                if self._meeting is None:
                    self._meeting = meeting_points(self._kernel)
                to, mask = self._meeting[parting.at], frame.mask
                for part, begin in ((parting.staying, parting.at + 1), (parting.jumping, parting.to)):
                    frame.mask = part
                    self.run(frame, begin, to)
                frame.mask = mask
            number = number + 1 if to is None else to
