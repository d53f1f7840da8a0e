"""Where Hopper's code goes on, and what it only moves about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..frame import END, RETURN, Calling, Frame, Step, barrier, fence, jump
from ..lanes import permute
from ..memory import WARP
from ..ptx import Statement
from .lanes import U32, U64
from .operands import TRUE, ZERO, Operands, size_of


class Control(Operands):
    """Jumps, calls, barriers, and moves between registers."""

    def _nop(self, statement: Statement) -> Step:
        return lambda frame: None

    def _bra(self, statement: Statement) -> Step:
        *conditions, target = statement.operands
        to = self._kernel.labels[target]
        return self._jump(statement, to, conditions)

    def _exit(self, statement: Statement) -> Step:
        return self._jump(statement, END, [])

    def _jump(self, statement: Statement, to: int, conditions: Sequence[str]) -> Step:
        if statement.guard is None and not conditions:
            return lambda frame: to
        guard, held = self._guard(statement), [self.predicate(text) for text in conditions]

        def branch(frame: Frame) -> int | None:
            allowed = guard(frame)
            taken = TRUE if allowed is None else allowed
            for one in held:
                taken = taken & one(frame)
            return jump(frame, taken, to, statement.number)

        return branch

    def _call(self, statement: Statement) -> Step:
        assert statement.guard is None
        to, after = self._kernel.labels[statement.operands[-1]], statement.number + 1

        def call(frame: Frame) -> None:
            raise Calling(to, after)

        return call

    def _ret(self, statement: Statement) -> Step:
        assert statement.guard is None
        return lambda frame: RETURN

    def _bar(self, statement: Statement) -> Step:
        if statement.operands != ("0x0",) or statement.guard is not None:
            raise NotImplementedError("a barrier of some of a program's warps")
        return lambda frame: barrier(frame, statement.source)

    def _fence(self, statement: Statement) -> Step:
        return fence

    def _mov(self, statement: Statement) -> Step:
        put, value = self.put(statement.operands[0], statement), self.word(statement.operands[1])
        return lambda frame: put(frame, value(frame))

    _r2ur = _mov

    def _s2r(self, statement: Statement) -> Step:
        put, name = self.put(statement.operands[0], statement), statement.operands[1]
        if name == "SR_TID.X":
            return lambda frame: put(frame, np.arange(frame.threads, dtype=U32)[None])
        if name == "SR_LANEID":
            return lambda frame: put(frame, np.arange(frame.threads, dtype=U32)[None] % U32(WARP))
        if name.startswith("SR_CTAID."):
            axis = "XYZ".index(name[-1])
            return lambda frame: put(frame, frame.places[axis])
        if name in ("SR_CgaCtaId", "SRZ"):
            return lambda frame: put(frame, ZERO)
        raise NotImplementedError(name)

    _s2ur = _s2r

    def _cs2r(self, statement: Statement) -> Step:
        if statement.operands[1] != "SRZ":
            raise NotImplementedError(statement.operands[1])
        put = self.put_pair(statement.operands[0], statement)
        return lambda frame: put(frame, np.zeros((1, 1), U64))

    def _ldc(self, statement: Statement) -> Step:
        size = size_of(statement)
        value = self._constant(statement.operands[1], size)
        put = (self.put_pair if size == 8 else self.put)(statement.operands[0], statement)
        return lambda frame: put(frame, value(frame))

    def _sel(self, statement: Statement) -> Step:
        to, a, b, chosen = statement.operands
        put, one, other, first = self.put(to, statement), self.word(a), self.word(b), self.predicate(chosen)
        return lambda frame: put(frame, np.where(first(frame), one(frame), other(frame)))

    def _fsel(self, statement: Statement) -> Step:
        to, a, b, chosen = statement.operands
        put, one, other, first = self.put(to, statement), self.number(a), self.number(b), self.predicate(chosen)
        return lambda frame: put(frame, np.where(first(frame), one(frame), other(frame)))

    def _prmt(self, statement: Statement) -> Step:
        put = self.put(statement.operands[0], statement)
        a, selector, b = (self.word(text) for text in statement.operands[1:])
        return lambda frame: put(frame, permute(a(frame), b(frame), selector(frame)))

    def _p2r(self, statement: Statement) -> Step:
        to, bank, kept, mask_text = statement.operands
        put, rest, mask = self.put(to, statement), self.word(kept), int(mask_text, 0)
        bits = [self.predicate(f"{bank.removesuffix('R')}{i}") for i in range(7)]

        def gather(frame: Frame) -> None:
            value: Any = rest(frame) & U32(~mask & 0xFFFFFFFF)
            for i, bit in enumerate(bits):
                if mask >> i & 1:
                    value = value | (bit(frame).astype(U32) << U32(i))
            put(frame, value)

        return gather

    _p2ur = _p2r

    def _r2p(self, statement: Statement) -> Step:
        bank, of, mask_text = statement.operands
        value, mask = self.word(of), int(mask_text, 0)
        puts = [(i, self.put(f"{bank.removesuffix('R')}{i}", statement)) for i in range(7) if mask >> i & 1]

        def spread(frame: Frame) -> None:
            bits = value(frame)
            for i, put in puts:
                put(frame, (bits >> U32(i)) & U32(1) != 0)

        return spread
