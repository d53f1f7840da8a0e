"""Statements as functions of a frame."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import accesses, matrices
from .frame import END, Frame, Step, arrive, barrier, fence, jump, reduced, shuffle
from .lanes import BITS, immediate, operation, read, write
from .memory import WARP
from .ptx import Kernel, Statement

Lanes = NDArray[Any]


class Translator:
    """Statements as functions of a frame; a function that jumps returns where to."""

    def __init__(self, kernel: Kernel, parameters: dict[str, int]) -> None:
        self._kernel = kernel
        #: Eight bytes apart in a space of their own, where Triton picks an entry of a launch table by its address.
        self._parameters = np.array([value & (1 << 64) - 1 for value in parameters.values()], np.uint64)
        self._symbols = {"global_smem": 0, **{name: 8 * i for i, name in enumerate(parameters)}}
        self.steps: list[Step] = [self._step(statement) for statement in kernel.statements]

    def _guard(self, statement: Statement) -> Callable[[Frame], Lanes | None]:
        """Which threads an instruction is for; None for all."""
        name, is_negated = statement.guard, statement.is_negated

        def guard(frame: Frame) -> Lanes | None:
            if name is None:
                return frame.mask
            held = ~frame.registers[name] if is_negated else frame.registers[name]
            return held if frame.mask is None else held & frame.mask

        return guard

    def source(self, text: str, kind: str) -> Callable[[Frame], Lanes]:
        """An operand's value."""
        if text.startswith("!"):
            inner = self.source(text[1:], kind)
            return lambda frame: ~inner(frame)
        if text.startswith("%"):
            name = text[1:]
            if name in self._kernel.registers:
                return lambda frame: read(frame.registers[name], kind)
            return self._special(name, kind)
        value = immediate(str(self._symbols.get(text, text)), kind)
        return lambda frame: value

    @staticmethod
    def _special(name: str, kind: str) -> Callable[[Frame], Lanes]:
        axis = "xyz".find(name[-1])
        if name.startswith("tid."):
            return lambda frame: (np.arange(frame.threads, dtype=np.uint32) if axis == 0 else np.zeros(1, "u4"))[None]
        if name.startswith("ctaid."):
            return lambda frame: frame.places[axis]
        if name == "laneid":
            return lambda frame: (np.arange(frame.threads, dtype=np.uint32) % WARP)[None]
        raise NotImplementedError(f"%{name}")

    def target(self, text: str, statement: Statement) -> Callable[[Frame, Any], None]:
        """What writes a result to a register, where the guard allows."""
        name, guard = text.lstrip("%"), self._guard(statement)
        register = self._kernel.registers[name]
        zero = np.zeros((1, 1), BITS[register])

        def put(frame: Frame, value: Any) -> None:
            allowed = guard(frame)
            value = write(value, register)
            if allowed is not None:
                value = np.where(allowed, value, frame.registers.get(name, zero))
            frame.registers[name] = value

        return put

    def address(self, text: str) -> Callable[[Frame], Lanes]:
        """``[%rd + 16]`` as signed 64-bit numbers."""
        base, _, offset = re.sub(r"[\[\]\s]", "", text).partition("+")
        shift = int(offset or "0", 0)
        if base.startswith("%"):
            name = base[1:]
            wide = self._kernel.registers[name] == "b64"
            if wide:
                return lambda frame: frame.registers[name].view(np.int64) + shift
            return lambda frame: frame.registers[name].astype(np.int64) + shift
        place = np.array([[shift + (self._symbols[base] if base in self._symbols else int(base, 0))]], np.int64)
        return lambda frame: place

    def names(self, text: str) -> list[str]:
        return [part.strip() for part in text.strip("{} ").split(",")]

    def _step(self, statement: Statement) -> Step:
        head = statement.opcode.split(".")[0]
        special = getattr(self, f"_{head}", None)
        try:
            if special is not None:
                return special(statement)  # type: ignore[no-any-return]
            return self._arithmetic(statement)
        except (NotImplementedError, KeyError, ValueError, StopIteration) as error:
            raise NotImplementedError(f"{statement}: {error!r}") from error

    def _arithmetic(self, statement: Statement) -> Step:
        if statement.opcode.startswith("mov.") and "{" in "".join(statement.operands):
            return self._pack(statement)
        function, kinds = operation(statement.opcode)
        put = self.target(statement.operands[0], statement)
        sources = [self.source(text, kind) for text, kind in zip(statement.operands[1:], kinds, strict=True)]
        return lambda frame: put(frame, function(*[source(frame) for source in sources]))

    def _pack(self, statement: Statement) -> Step:
        """``mov`` between one register and the two or four that make it up."""
        to, of = statement.operands
        if "{" in to:
            names = self.names(to)
            puts = [None if name == "_" else self.target(name, statement) for name in names]
            whole = self.source(of, statement.opcode.split(".")[1])
            bits = int(statement.opcode.split(".")[1][1:]) // len(names)

            def unpack(frame: Frame) -> None:
                value = whole(frame)
                for i, put in enumerate(puts):
                    if put is not None:
                        put(frame, (value >> value.dtype.type(bits * i)).astype(f"u{bits // 8}"))

            return unpack
        parts = self.names(of)
        size = int(statement.opcode.split(".")[1][1:])
        sources = [self.source(part, f"b{size // len(parts)}") for part in parts]
        put_whole = self.target(to, statement)

        def pack(frame: Frame) -> None:
            value: Any = np.zeros((1, 1), f"u{size // 8}")
            for i, source in enumerate(sources):
                value = value | (source(frame).astype(value.dtype) << value.dtype.type(size // len(parts) * i))
            put_whole(frame, value)

        return pack

    # Control

    def _bra(self, statement: Statement) -> Step:
        to = self._kernel.labels[statement.operands[0]]
        name, guard = statement.guard, self._guard(statement)
        if name is None:
            return lambda frame: to

        def branch(frame: Frame) -> int | None:
            allowed = guard(frame)
            assert allowed is not None
            return jump(frame, allowed, to, statement.number)

        return branch

    def _ret(self, statement: Statement) -> Step:
        if statement.guard is not None:
            raise NotImplementedError("a guarded return")
        return lambda frame: END

    def _bar(self, statement: Statement) -> Step:
        """A barrier of all warps. That of one warp orders what this counts as ordered anyway."""
        if statement.opcode == "bar.warp.sync":
            return lambda frame: None
        if statement.operands != ("0",) or statement.guard is not None:
            raise NotImplementedError("a barrier of some of a program's warps")
        return lambda frame: barrier(frame, statement.source)

    def _fence(self, statement: Statement) -> Step:
        return fence

    # Memory

    def _createpolicy(self, statement: Statement) -> Step:
        """What leaves a cache first: changes no value, and a load or store that names it is one like any other."""
        return lambda frame: None

    def _ld(self, statement: Statement) -> Step:
        parts = statement.opcode.split(".")
        kind, space = parts[-1], parts[1]
        puts = [self.target(name, statement) for name in self.names(statement.operands[0])]
        if space == "param":
            place, wanted = self.address(statement.operands[1]), f"u{int(kind[1:]) // 8}"
            return lambda frame: puts[0](frame, self._parameters[place(frame) // 8].astype(wanted))
        size = int(kind[1:]) // 8
        address, guard = self.address(statement.operands[1]), self._guard(statement)
        hint: list[int] | None = [] if space == "global" else None

        def load(frame: Frame) -> None:
            loaded = accesses.load(frame, guard(frame), address(frame), size, len(puts), statement.source, hint)
            for put, value in zip(puts, loaded, strict=True):
                put(frame, value)

        return load

    def _st(self, statement: Statement) -> Step:
        parts = statement.opcode.split(".")
        kind, space = parts[-1], parts[1]
        size = int(kind[1:]) // 8
        values = [self.source(text, kind) for text in self.names(statement.operands[1])]
        address, guard = self.address(statement.operands[0]), self._guard(statement)
        hint: list[int] | None = [] if space == "global" else None

        def store(frame: Frame) -> None:
            given = [value(frame) for value in values]
            accesses.store(frame, guard(frame), address(frame), given, size, statement.source, hint)

        return store

    def _cp(self, statement: Statement) -> Step:
        """Asynchronous copies from global to shared memory: there once their group is waited for."""
        what = statement.opcode.removeprefix("cp.async.")
        if what == "commit_group":
            return lambda frame: frame.copies.append([])
        if what in ("wait_group", "wait_all"):
            left = int(statement.operands[0], 0) if what == "wait_group" else 0
            return lambda frame: arrive(frame, left, everything=what == "wait_all")
        to, of, size_text, *rest = statement.operands
        size = int(size_text, 0)
        target, origin, guard = self.address(to), self.address(of), self._guard(statement)
        count = self.source(rest[0], "u32") if rest else (lambda frame: np.full((1, 1), size, np.uint32))
        hint: list[int] = []

        def copy(frame: Frame) -> None:
            bytes_, allowed = count(frame), guard(frame)
            partial = (bytes_ != 0) & (bytes_ != size)
            if np.any(partial if allowed is None else partial & allowed):
                raise NotImplementedError("a copy of some of its bytes")
            accesses.copy(frame, allowed, target(frame), origin(frame), bytes_ != 0, size, statement.source, hint)

        return copy

    # Warps

    def _shfl(self, statement: Statement) -> Step:
        mode = statement.opcode.split(".")[2]
        put = self.target(statement.operands[0].split("|")[0], statement)
        value, lane = self.source(statement.operands[1], "b32"), self.source(statement.operands[2], "s32")
        if statement.operands[3] not in ("31", "0x1f") or mode not in ("bfly", "idx"):
            raise NotImplementedError(statement.opcode)
        is_butterfly = mode == "bfly"
        return lambda frame: put(frame, shuffle(frame, value(frame), lane(frame), is_butterfly=is_butterfly))

    def _redux(self, statement: Statement) -> Step:
        kind = statement.opcode.split(".")[-1]
        function = {"add": np.add, "min": np.minimum, "max": np.maximum}[statement.opcode.split(".")[2]]
        put, value = self.target(statement.operands[0], statement), self.source(statement.operands[1], kind)

        return lambda frame: put(frame, reduced(frame, function, value(frame)))

    # Matrices

    def _registers(self, texts: Sequence[str], *, may_be_unset: bool = False) -> Callable[[Frame], Lanes]:
        """Registers as one array ``(programs, threads, registers)``."""
        if may_be_unset:  # a sum that begins here
            names, zero = [text.lstrip("%") for text in texts], np.zeros((1, 1), np.uint32)
            return lambda frame: np.stack([frame.full(frame.registers.get(name, zero)) for name in names], -1)
        sources = [self.source(text, "b32") for text in texts]
        return lambda frame: np.stack([frame.full(source(frame)) for source in sources], -1)

    def _put_registers(self, texts: Sequence[str], statement: Statement) -> Callable[[Frame, Lanes], None]:
        puts = [self.target(text, statement) for text in texts]

        def put(frame: Frame, values: Lanes) -> None:
            for i, one in enumerate(puts):
                one(frame, values[..., i])

        return put

    def _ldmatrix(self, statement: Statement) -> Step:
        names = self.names(statement.operands[0])
        put, address = self._put_registers(names, statement), self.address(statement.operands[1])
        is_turned = ".trans" in statement.opcode
        return lambda frame: put(
            frame, matrices.load(frame, address(frame), len(names), statement.source, is_turned=is_turned)
        )

    def _stmatrix(self, statement: Statement) -> Step:
        names = self.names(statement.operands[1])
        values, address = self._registers(names), self.address(statement.operands[0])
        is_turned = ".trans" in statement.opcode
        return lambda frame: matrices.store(frame, address(frame), values(frame), statement.source, is_turned=is_turned)

    def _mma(self, statement: Statement) -> Step:
        parts = statement.opcode.split(".")
        shape, kind = parts[3], parts[-2]
        put = self._put_registers(self.names(statement.operands[0]), statement)
        a, b, c = (self._registers(self.names(text)) for text in statement.operands[1:])
        return lambda frame: put(frame, matrices.multiply(a(frame), b(frame), c(frame), shape, kind))

    def _wgmma(self, statement: Statement) -> Step:
        if statement.opcode.startswith("wgmma.fence"):
            return lambda frame: None
        if statement.opcode.startswith("wgmma.commit_group"):
            return lambda frame: frame.matrices.append([])
        if statement.opcode.startswith("wgmma.wait_group"):
            left = int(statement.operands[0], 0)
            return lambda frame: matrices.finish(frame, left)
        parts = statement.opcode.split(".")
        columns, kind = int(re.split("[nk]", parts[4])[1]), parts[-1]
        names = self.names(statement.operands[0])
        put, accumulator = self._put_registers(names, statement), self._registers(names, may_be_unset=True)
        in_registers = statement.operands[1].startswith("{")
        a = self._registers(self.names(statement.operands[1])) if in_registers else None
        a_place = None if in_registers else self.source(statement.operands[1], "b64")
        b_place, adds = self.source(statement.operands[2], "b64"), self.source(statement.operands[3], "pred")
        signs, turned = statement.operands[4:6], statement.operands[6:]
        if signs != ("1", "1"):
            raise NotImplementedError("negated operands")
        is_turned = [text == "1" for text in turned]

        def product(frame: Frame) -> None:
            left = (
                matrices.rows_of(a(frame), kind)
                if a is not None
                else matrices.rows_in(frame, a_place(frame), kind, is_turned[0], statement.source)  # type: ignore[misc]
            )
            right = matrices.columns_in(frame, b_place(frame), columns, kind, is_turned[-1], statement.source)
            put(frame, matrices.accumulate(left, right, accumulator(frame), adds(frame)))

        return product
