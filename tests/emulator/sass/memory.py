"""Hopper's loads, stores and copies, what the threads of a warp tell one another, and products of matrices."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import accesses, matrices
from ..frame import Frame, Step, arrive, reduced, shuffle
from ..ptx import Statement
from . import lanes
from .lanes import U32
from .operands import PREDICATE, ZERO, Operands, modifiers, size_of

Lanes = NDArray[Any]


class Memory(Operands):
    """Instructions that reach beyond a thread's own registers."""

    def _ld(self, statement: Statement, hint: list[int] | None) -> Step:
        size = size_of(statement)
        unit = min(size, 4)
        puts = [self.put(name, statement) for name in self.names(statement.operands[0], max(size // 4, 1))]
        address, guard = self.address(statement.operands[1], is_wide=hint is not None), self._guard(statement)
        if any(one.startswith("S") for one in modifiers(statement)):
            raise NotImplementedError("a load that extends a sign")

        def load(frame: Frame) -> None:
            loaded = accesses.load(frame, guard(frame), address(frame), unit, len(puts), statement.source, hint)
            for put, value in zip(puts, loaded, strict=True):
                put(frame, value.astype(U32))

        return load

    def _ldg(self, statement: Statement) -> Step:
        return self._ld(statement, [])

    def _lds(self, statement: Statement) -> Step:
        return self._ld(statement, None)

    def _st(self, statement: Statement, hint: list[int] | None) -> Step:
        size = size_of(statement)
        values = [self.word(name) for name in self.names(statement.operands[1], max(size // 4, 1))]
        address, guard = self.address(statement.operands[0], is_wide=hint is not None), self._guard(statement)

        def store(frame: Frame) -> None:
            given = [value(frame) for value in values]
            accesses.store(frame, guard(frame), address(frame), given, min(size, 4), statement.source, hint)

        return store

    def _stg(self, statement: Statement) -> Step:
        return self._st(statement, [])

    def _sts(self, statement: Statement) -> Step:
        return self._st(statement, None)

    def _own(self, text: str, count: int) -> list[str]:
        """Names of a thread's own words: its stack does not move after the first instructions."""
        found = re.fullmatch(r"\[R1(?:\+(-?0x[0-9a-f]+))?\]", text)
        assert found is not None, text
        return [f"own{int(found[1] or '0', 0) + 4 * i}" for i in range(count)]

    def _ldl(self, statement: Statement) -> Step:
        count = size_of(statement) // 4
        puts = [self.put(name, statement) for name in self.names(statement.operands[0], count)]
        own = self._own(statement.operands[1], count)

        def load(frame: Frame) -> None:
            for put, name in zip(puts, own, strict=True):
                put(frame, frame.registers.get(name, ZERO))

        return load

    def _stl(self, statement: Statement) -> Step:
        count = size_of(statement) // 4
        own, guard = self._own(statement.operands[0], count), self._guard(statement)
        values = [self.word(name) for name in self.names(statement.operands[1], count)]

        def store(frame: Frame) -> None:
            allowed = guard(frame)
            for name, value in zip(own, values, strict=True):
                held = value(frame)
                if allowed is not None:
                    held = np.where(allowed, held, frame.registers.get(name, ZERO))
                frame.registers[name] = held

        return store

    def _ldgsts(self, statement: Statement) -> Step:
        """Asynchronous copies from global to shared memory; zeros where the last predicate does not hold."""
        to, of, *read = statement.operands
        size = size_of(statement)
        target, origin = self.address(to, is_wide=False), self.address(of, is_wide=True)
        guard, is_read = self._guard(statement), self.predicate(read[0] if read else "PT")
        hint: list[int] = []
        return lambda frame: accesses.copy(
            frame, guard(frame), target(frame), origin(frame), is_read(frame), size, statement.source, hint
        )

    def _ldgdepbar(self, statement: Statement) -> Step:
        return lambda frame: frame.copies.append([])

    def _depbar(self, statement: Statement) -> Step:
        assert statement.operands[0] == "SB0" and modifiers(statement) == ["LE"], statement
        left = int(statement.operands[1], 0)
        return lambda frame: arrive(frame, left)

    def _shfl(self, statement: Statement) -> Step:
        _, to, of, lane_text, last = statement.operands
        (mode,) = modifiers(statement)
        put, value, lane = self.put(to, statement), self.word(of), self.word(lane_text)
        if last != "0x1f" or mode not in ("BFLY", "IDX"):
            raise NotImplementedError(statement.opcode)
        is_butterfly = mode == "BFLY"
        return lambda frame: put(frame, shuffle(frame, value(frame), lane(frame), is_butterfly=is_butterfly))

    def _redux(self, statement: Statement) -> Step:
        name, kind = modifiers(statement)
        function = {"SUM": np.add, "MIN": np.minimum, "MAX": np.maximum}[name]
        put, value = self.put(statement.operands[0], statement), self.word(statement.operands[1])

        def reduce(frame: Frame) -> None:
            bits = value(frame)
            put(frame, reduced(frame, function, lanes.signed(bits) if kind == "S32" else bits))

        return reduce

    def _voteu(self, statement: Statement) -> Step:
        to, of = statement.operands
        (mode,) = modifiers(statement)
        put, held, guard = self.put(to, statement), self.predicate(of), self._guard(statement)

        def vote(frame: Frame) -> None:
            allowed = guard(frame)
            # A thread that does not take part changes nothing.
            idle = np.zeros((1, 1), bool) if allowed is None else ~allowed
            value = held(frame) & ~idle if mode == "ANY" else held(frame) | idle
            put(frame, reduced(frame, np.logical_or if mode == "ANY" else np.logical_and, value))

        return vote

    # Matrices

    @staticmethod
    def _matrix(statement: Statement) -> tuple[int, bool]:
        """How many 8x8 matrices, and whether they are turned."""
        sixteen, kind, *count = modifiers(statement)
        assert sixteen == "16", statement
        return int(count[0]) if count else 1, kind == "MT88"

    def _ldsm(self, statement: Statement) -> Step:
        count, is_turned = self._matrix(statement)
        put = self._put_registers(statement.operands[0], count, statement)
        address = self.address(statement.operands[1], is_wide=False)
        assert statement.guard is None
        return lambda frame: put(
            frame, matrices.load(frame, address(frame), count, statement.source, is_turned=is_turned)
        )

    def _stsm(self, statement: Statement) -> Step:
        count, is_turned = self._matrix(statement)
        values = self._registers(statement.operands[1], count)
        address = self.address(statement.operands[0], is_wide=False)
        assert statement.guard is None
        return lambda frame: matrices.store(frame, address(frame), values(frame), statement.source, is_turned=is_turned)

    def _hmma(self, statement: Statement) -> Step:
        shape, *kinds = modifiers(statement)
        to, a_text, b_text, c_text = statement.operands
        counts = {"16816": (4, 2, "m16n8k16"), "1688": (4, 2, "m16n8k8")}[shape]
        kind = "tf32" if "TF32" in kinds else "bf16" if "BF16" in kinds else "f16"
        put = self._put_registers(to, 4, statement)
        a, b, c = (self._registers(text, n) for text, n in ((a_text, counts[0]), (b_text, counts[1]), (c_text, 4)))
        return lambda frame: put(frame, matrices.multiply(a(frame), b(frame), c(frame), counts[2], kind))

    def _warpgroup(self, statement: Statement) -> Step:
        if statement.opcode == "WARPGROUP.ARRIVE":
            return lambda frame: None
        assert statement.opcode == "WARPGROUP.DEPBAR.LE" and statement.operands[0] == "gsb0", statement
        left = int(statement.operands[1], 0)
        return lambda frame: matrices.finish(frame, left)

    def _hgmma(self, statement: Statement) -> Step:
        """``R152, R176, gdesc[UR20].tnspB, RZ, !UPT, gsb0``: a descriptor is two uniform registers, the right
        operand's the second of the four that are named."""
        if statement.operands == ("RZ", "gdesc[URZ]", "RZ", "!UPT", "gsb0"):  # of nothing: it ends a group
            return lambda frame: frame.matrices.append([])
        shape, *kinds = modifiers(statement)
        columns, kind = int(shape.split("x")[1]), "bf16" if "BF16" in kinds else "f16"
        assert "F32" in kinds and "TF32" not in kinds and statement.guard is None
        operands = list(statement.operands)
        closes = operands[-1] == "gsb0"
        if closes:
            operands.pop()
        adds = self.predicate(operands.pop()) if PREDICATE.fullmatch(operands[-1]) else self.predicate("PT")
        to, *lefts, described, sums = operands
        name, *turned = described.split(".")
        first = int(name.removeprefix("gdesc[UR").removesuffix("]"))
        a_place, b_place = self.pair(f"UR{first}"), self.pair(f"UR{first + 2}")
        a = self._registers(lefts[0], 4) if lefts else None
        put, accumulator = self._put_registers(to, columns // 2, statement), self._registers(sums, columns // 2)

        def product(frame: Frame) -> None:
            left = (
                matrices.rows_of(a(frame), kind)
                if a is not None
                else matrices.rows_in(frame, a_place(frame), kind, "tnspA" in turned, statement.source)
            )
            right = matrices.columns_in(frame, b_place(frame), columns, kind, "tnspB" in turned, statement.source)
            put(frame, matrices.accumulate(left, right, accumulator(frame), adds(frame)))
            if closes:
                frame.matrices.append([])

        return product
