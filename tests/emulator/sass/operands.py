"""What Hopper's instructions take and give: registers, pairs of them, predicates, constants, addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..frame import Frame
from ..memory import EmulationError
from ..ptx import Kernel, Statement
from . import lanes
from .code import PARAMETERS
from .lanes import U32, U64

Lanes = NDArray[Any]
Source = Callable[[Frame], Lanes]

ZERO, FALSE, TRUE = np.zeros((1, 1), U32), np.zeros((1, 1), bool), np.ones((1, 1), bool)
#: A register or predicate by name; those of a whole warp have a U before them.
REGISTER, PREDICATE = re.compile(r"(U?R)(Z|\d+)"), re.compile(r"!?U?P[T\d]")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def modifiers(statement: Statement) -> list[str]:
    return statement.opcode.split(".")[1:]


def size_of(statement: Statement) -> int:
    """Bytes that a load, store or copy moves for a thread."""
    return next((_BYTES[one] for one in modifiers(statement) if one in _BYTES), 4)


class Operands:
    """A kernel's operands as functions of a frame; `bank` holds its parameters."""

    def __init__(self, kernel: Kernel, bank: bytes) -> None:
        self._kernel = kernel
        self._bank = np.frombuffer(bank + bytes(-len(bank) % 4), np.uint8)

    def _guard(self, statement: Statement) -> Callable[[Frame], Lanes | None]:
        """Which threads an instruction is for; None for all."""
        if statement.guard is None:
            return lambda frame: frame.mask
        held = self.predicate(("!" if statement.is_negated else "") + statement.guard)

        def guard(frame: Frame) -> Lanes | None:
            allowed = held(frame)
            return allowed if frame.mask is None else allowed & frame.mask

        return guard

    @staticmethod
    def predicate(text: str) -> Source:
        name = text.lstrip("!")
        assert PREDICATE.fullmatch(text), text
        if name in ("PT", "UPT"):
            constant = FALSE if text[0] == "!" else TRUE
            return lambda frame: constant
        if text[0] == "!":
            return lambda frame: ~frame.registers.get(name, FALSE)
        return lambda frame: frame.registers.get(name, FALSE)

    def word(self, text: str) -> Source:
        """32 bits: a register, a constant, a number, with whatever sign and brackets."""
        if text[0] in "-~":
            inner = self.word(text[1:])
            return (lambda frame: ~inner(frame)) if text[0] == "~" else (lambda frame: ZERO - inner(frame))
        if found := REGISTER.fullmatch(text):
            if found[2] == "Z":
                return lambda frame: ZERO
            return lambda frame: frame.registers.get(text, ZERO)
        if text.startswith("c["):
            return self._constant(text, 4)
        value = np.array([[int(text, 0) & 0xFFFFFFFF]], U32)
        return lambda frame: value

    def pair(self, text: str) -> Source:
        """64 bits: two registers, or a number with its sign."""
        if text[0] in "-~":
            inner = self.pair(text[1:])
            return (lambda frame: ~inner(frame)) if text[0] == "~" else (lambda frame: U64(0) - inner(frame))
        if found := REGISTER.fullmatch(text):
            if found[2] == "Z":
                return lambda frame: np.zeros((1, 1), U64)
            lower, upper = self.word(text), self.word(f"{found[1]}{int(found[2]) + 1}")
            return lambda frame: lanes.paired(lower(frame), upper(frame))
        value = np.array([[int(text, 0) & (1 << 64) - 1]], U64)
        return lambda frame: value

    def number(self, text: str, *, flushes: bool = False) -> Source:
        """float32."""
        if text[0] == "-" and text[1:2] != "I" and not text[1:2].isdigit():
            inner = self.number(text[1:], flushes=flushes)
            return lambda frame: -inner(frame)
        if text[0] == "|":
            inner = self.number(text.strip("|"), flushes=flushes)
            return lambda frame: np.abs(inner(frame))
        name, _, half = text.partition(".H")
        if REGISTER.fullmatch(name) and half:
            raise NotImplementedError(text)
        if REGISTER.fullmatch(text) or text.startswith("c["):
            bits = self.word(text)
            if flushes:
                return lambda frame: lanes.flush(bits(frame).view(np.float32))
            return lambda frame: bits(frame).view(np.float32)
        names = {"INF": np.inf, "QNAN": np.nan}
        plain = text.strip()
        value = names.get(plain.lstrip("+-"))
        if value is None:
            value = float(plain)
        elif plain[0] == "-":
            value = -value
        constant = np.array([[value]], np.float32)
        return lambda frame: constant

    def _constant(self, text: str, size: int) -> Source:
        """``c[0x0][R14+0x210]``."""
        found = re.fullmatch(r"c\[0x0\]\[(?:(U?R\d+)\+)?(0x[0-9a-f]+)\]", text)
        if found is None:
            raise NotImplementedError(text)
        begin, bank = int(found[2], 16), self._bank
        if found[1] is None:
            value = bank[begin : begin + size].view(f"u{size}").reshape(1, 1) if size > 1 else bank[begin : begin + 1]
            return lambda frame: value.reshape(1, 1)
        register = self.word(found[1])

        def load(frame: Frame) -> Lanes:
            place = register(frame).astype(np.int64) + begin
            if place.min() < PARAMETERS or place.max() + size > len(bank):
                raise EmulationError(f"{self._kernel.name}: a constant out of the parameters' bounds")
            parts = [bank[place + i].astype(f"u{size}") << np.array(8 * i, f"u{size}") for i in range(size)]
            return np.bitwise_or.reduce(np.stack(parts))

        return load

    def put(self, text: str, statement: Statement) -> Callable[[Frame, Any], None]:
        """What writes a register or predicate, where the guard allows."""
        if text in ("RZ", "URZ", "PT", "UPT"):
            return lambda frame, value: None
        is_predicate = PREDICATE.fullmatch(text) is not None
        assert is_predicate or REGISTER.fullmatch(text), text
        guard, empty = self._guard(statement), FALSE if is_predicate else ZERO

        def put(frame: Frame, value: Any) -> None:
            if not is_predicate and value.dtype != U32:
                value = value.view(U32) if value.dtype.itemsize == 4 else value.astype(U32)
            allowed = guard(frame)
            if allowed is not None:
                value = np.where(allowed, value, frame.registers.get(text, empty))
            frame.registers[text] = value

        return put

    def put_pair(self, text: str, statement: Statement) -> Callable[[Frame, Lanes], None]:
        found = REGISTER.fullmatch(text)
        assert found is not None, text
        second = text if found[2] == "Z" else f"{found[1]}{int(found[2]) + 1}"
        lower, upper = self.put(text, statement), self.put(second, statement)

        def put(frame: Frame, value: Lanes) -> None:
            lower(frame, lanes.low(value))
            upper(frame, lanes.high(value))

        return put

    def names(self, text: str, count: int) -> list[str]:
        """Registers that follow one another, from this one on."""
        found = REGISTER.fullmatch(text)
        assert found is not None, text
        return [text] * count if found[2] == "Z" else [f"{found[1]}{int(found[2]) + i}" for i in range(count)]

    @staticmethod
    def _parts(statement: Statement) -> tuple[str, list[str], list[str], list[str]]:
        """Destination, predicates that are written, operands, predicates that are read."""
        to, *rest = statement.operands
        written = []
        while rest and PREDICATE.fullmatch(rest[0]):
            written.append(rest.pop(0))
        read: list[str] = []
        while rest and PREDICATE.fullmatch(rest[-1]):
            read.insert(0, rest.pop())
        return to, written, rest, read

    def address(self, text: str, *, is_wide: bool) -> Source:
        """``[R36+UR4+0x4000]``, ``desc[UR8][R16.64+-0x10]`` as signed 64-bit numbers."""
        inner = re.fullmatch(r"(?:desc\[UR\d+\])?\[(.*)\]", text)
        assert inner is not None, text
        terms: list[Source] = []
        shift = 0
        for term in inner[1].split("+"):
            if term.endswith(".64"):
                terms.append(self.pair(term[:-3]))
            elif REGISTER.fullmatch(term):
                terms.append(self.word(term))
            else:
                shift += int(term, 0)

        def place(frame: Frame) -> Lanes:
            total: Any = np.full((1, 1), shift, np.int64)
            for term in terms:
                value = term(frame)
                total = total + (value.view(np.int64) if value.dtype == U64 else value.astype(np.int64))
            return np.asarray(total if is_wide else total & 0xFFFFFFFF)

        return place

    def _registers(self, text: str, count: int) -> Source:
        """Registers as one array ``(programs, threads, registers)``."""
        sources = [self.word(name) for name in self.names(text, count)]
        return lambda frame: np.stack([frame.full(source(frame)) for source in sources], -1)

    def _put_registers(self, text: str, count: int, statement: Statement) -> Callable[[Frame, Lanes], None]:
        puts = [self.put(name, statement) for name in self.names(text, count)]

        def put(frame: Frame, values: Lanes) -> None:
            for i, one in enumerate(puts):
                one(frame, values[..., i])

        return put
