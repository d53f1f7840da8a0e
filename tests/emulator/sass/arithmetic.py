"""Hopper's arithmetic, of whole numbers and of floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..frame import Frame, Step
from ..lanes import compare, from_bfloat, fused, operation, to_bfloat, to_half
from ..ptx import Statement
from . import lanes
from .lanes import U32, U64
from .operands import PREDICATE, Operands, Source, modifiers

Lanes = NDArray[Any]


class Arithmetic(Operands):
    """Instructions that compute a register or predicate from others."""

    # Integers

    def _iadd3(self, statement: Statement) -> Step:
        to, written, texts, read = self._parts(statement)
        if "64" in modifiers(statement):
            wide, sources = self.put_pair(to, statement), [self.pair(text) for text in texts]
            return lambda frame: wide(frame, np.asarray(sum(source(frame) for source in sources)))
        put, carried = self.put(to, statement), [self.put(name, statement) for name in written]
        terms = [(self.word(text.removeprefix("-")), text[0] == "-") for text in texts]
        carries = [self.predicate(name) for name in read]

        def add(frame: Frame) -> None:
            total, over = lanes.add([(term(frame), off) for term, off in terms], [c(frame) for c in carries])
            put(frame, total)
            for i, one in enumerate(carried):
                one(frame, over > U32(i))

        return add

    _viadd = _iadd3

    def _imad(self, statement: Statement) -> Step:
        to, written, (a_text, b_text, c_text), read = self._parts(statement)
        kinds = modifiers(statement)
        a, b, carries = self.word(a_text), self.word(b_text), [self.predicate(name) for name in read]
        is_signed = "U32" not in kinds
        if "WIDE" not in kinds and "HI" not in kinds:
            assert not written
            put, c = self.put(to, statement), self.word(c_text)

            def multiply(frame: Frame) -> None:
                value = a(frame) * b(frame) + c(frame)
                for carry in carries:
                    value = value + carry(frame).astype(U32)
                put(frame, value)

            return multiply
        c = self.pair(c_text)
        carried = [self.put(name, statement) for name in written]
        put_low = None if "HI" in kinds else self.put_pair(to, statement)
        put_high = self.put(to, statement) if "HI" in kinds else None

        def widen(frame: Frame) -> None:
            product = lanes.wide(a(frame), is_signed=is_signed) * lanes.wide(b(frame), is_signed=is_signed)
            total = product + c(frame)
            for carry in carries:
                total = total + carry(frame).astype(U64)
            over = total < product
            if put_high is not None:
                put_high(frame, lanes.high(total))
            elif put_low is not None:
                put_low(frame, total)
            for one in carried:
                one(frame, over)

        return widen

    def _lea(self, statement: Statement) -> Step:
        to, written, texts, read = self._parts(statement)
        kinds, put, carries = modifiers(statement), self.put(to, statement), [self.predicate(name) for name in read]
        carried = [self.put(name, statement) for name in written]
        a, b, count = self.word(texts[0]), self.word(texts[1]), int(texts[-1], 0)
        upper = self.word(texts[2]) if len(texts) == 4 else None

        def lead(frame: Frame) -> None:
            value = a(frame)
            if "HI" in kinds:
                both = (
                    lanes.wide(value, is_signed="SX32" in kinds) if upper is None else lanes.paired(value, upper(frame))
                )
                value = lanes.high(both << U64(count))
            else:
                value = value << U32(count)
            total, over = lanes.add([(value, False), (b(frame), False)], [carry(frame) for carry in carries])
            put(frame, total)
            for one in carried:
                one(frame, over != 0)

        return lead

    def _lop3(self, statement: Statement) -> Step:
        first, *rest = statement.operands
        written = None
        if PREDICATE.fullmatch(first):
            written, (first, *rest) = self.put(first, statement), rest
        a, b, c = (self.word(text) for text in rest[:3])
        put, table, before = self.put(first, statement), int(rest[3], 0), self.predicate(rest[4])

        def join(frame: Frame) -> None:
            value = lanes.look_up(table, a(frame), b(frame), c(frame))
            put(frame, value)
            if written is not None:
                written(frame, (value != 0) | before(frame))

        return join

    def _plop3(self, statement: Statement) -> Step:
        first, second, *texts = statement.operands
        a, b, c = (self.predicate(text) for text in texts[:3])
        puts = [(self.put(name, statement), int(text, 0)) for name, text in zip((first, second), texts[3:])]

        def join(frame: Frame) -> None:
            values = a(frame), b(frame), c(frame)
            for put, table in puts:
                put(frame, lanes.look_up(table, *values))

        return join

    def _shf(self, statement: Statement) -> Step:
        to, lower, count, upper = statement.operands
        kinds, put = modifiers(statement), self.put(to, statement)
        if "W" in kinds:
            raise NotImplementedError("a shift that wraps")
        low, by, high = self.word(lower), self.word(count), self.word(upper)
        left, is_signed, takes_high = kinds[0] == "L", kinds[1][0] == "S", "HI" in kinds

        def shift(frame: Frame) -> None:
            value = lanes.paired(low(frame), high(frame))
            value = lanes.shift_pair(value, by(frame), left=left, is_signed=is_signed)
            put(frame, lanes.high(value) if takes_high else lanes.low(value))

        return shift

    def _sgxt(self, statement: Statement) -> Step:
        to, of, width_text = statement.operands
        put, value, width = self.put(to, statement), self.word(of), int(width_text, 0)
        kind, rest = np.uint32 if "U32" in modifiers(statement) else np.int32, 32 - width
        return lambda frame: put(frame, ((value(frame) << U32(rest)).view(kind) >> kind(rest)).view(U32))

    def _iabs(self, statement: Statement) -> Step:
        put, value = self.put(statement.operands[0], statement), self.word(statement.operands[1])
        return lambda frame: put(frame, np.abs(lanes.signed(value(frame))))

    def _isetp(self, statement: Statement) -> Step:
        first, second, a_text, b_text, *read = statement.operands
        name, *kinds = modifiers(statement)
        holds = compare(name.lower())
        join = lanes.JOIN[next(kind for kind in kinds if kind in lanes.JOIN)]
        a, b = self.word(a_text), self.word(b_text)
        is_signed, predicates = "U32" not in kinds, [self.predicate(text) for text in read]
        puts = self.put(first, statement), self.put(second, statement)

        def decide(frame: Frame) -> None:
            one, other = a(frame), b(frame)
            if is_signed:
                one, other = lanes.signed(one), lanes.signed(other)
            if "EX" in kinds:
                held = lanes.compare_upper(name, one, other, predicates[1](frame))
            else:
                held = holds(one, other)
            with_ = predicates[0](frame)
            puts[0](frame, join(held, with_))
            puts[1](frame, join(~held, with_))

        return decide

    def _vimnmx(self, statement: Statement) -> Step:
        """The smallest, where the predicate holds, or the largest; of a sum of the first two, for VIADDMNMX."""
        to, *texts, chosen = statement.operands
        put, is_least = self.put(to, statement), self.predicate(chosen)
        sources = [self.word(text) for text in texts]
        adds, is_signed = statement.opcode.startswith("VIADDMNMX"), "U32" not in modifiers(statement)

        def choose(frame: Frame) -> None:
            values = [source(frame) for source in sources]
            if adds:
                values = [values[0] + values[1], values[2]]
            if is_signed:
                values = [lanes.signed(value) for value in values]
            least, most = values[0], values[0]
            for value in values[1:]:
                least, most = np.minimum(least, value), np.maximum(most, value)
            put(frame, np.where(is_least(frame), least, most))

        return choose

    _vimnmx3 = _viaddmnmx = _vimnmx

    # Numbers

    def _float(self, statement: Statement, function: Callable[..., Lanes]) -> Step:
        kinds = modifiers(statement)
        if set(kinds) - {"FTZ", "SAT", "RN"}:
            raise NotImplementedError(statement.opcode)
        put, flushes = self.put(statement.operands[0], statement), "FTZ" in kinds
        sources = [self.number(text, flushes=flushes) for text in statement.operands[1:]]

        def compute(frame: Frame) -> None:
            value = function(*[source(frame) for source in sources])
            if flushes:
                value = lanes.flush(value)
            if "SAT" in kinds:
                value = np.where(np.isnan(value), np.float32(0), np.clip(value, np.float32(0), np.float32(1)))
            put(frame, value)

        return compute

    def _fadd(self, statement: Statement) -> Step:
        return self._float(statement, lambda a, b: a + b)

    def _fmul(self, statement: Statement) -> Step:
        return self._float(statement, lambda a, b: a * b)

    def _ffma(self, statement: Statement) -> Step:
        return self._float(statement, fused)

    def _fmnmx(self, statement: Statement) -> Step:
        to, a_text, b_text, chosen = statement.operands
        put, a, b, is_least = self.put(to, statement), self.number(a_text), self.number(b_text), self.predicate(chosen)
        least, most = (np.minimum, np.maximum) if "NAN" in modifiers(statement) else (np.fmin, np.fmax)

        def choose(frame: Frame) -> None:
            one, other = a(frame), b(frame)
            put(frame, np.where(is_least(frame), least(one, other), most(one, other)))

        return choose

    def _float_test(self, kinds: list[str], texts: Sequence[str]) -> tuple[Source, Source]:
        """``GT.AND`` of two numbers and a predicate: what holds, and the same of what the comparison denies."""
        name, join = kinds[0], lanes.JOIN[kinds[1]]
        a, b = (self.number(text, flushes="FTZ" in kinds) for text in texts[:2])
        holds, before = compare(name.lower()), self.predicate(texts[2])

        def test(frame: Frame, *, denied: bool = False) -> Lanes:
            held = holds(a(frame), b(frame))
            return join(~held if denied else held, before(frame))

        return test, partial(test, denied=True)

    def _fsetp(self, statement: Statement) -> Step:
        first, second, *texts = statement.operands
        puts = self.put(first, statement), self.put(second, statement)
        tests = self._float_test(modifiers(statement), texts)

        def decide(frame: Frame) -> None:
            values = [test(frame) for test in tests]
            for put, value in zip(puts, values):
                put(frame, value)

        return decide

    def _fset(self, statement: Statement) -> Step:
        """A comparison as 1.0 or 0.0."""
        form, *kinds = modifiers(statement)
        assert form == "BF", statement
        put, (test, _) = self.put(statement.operands[0], statement), self._float_test(kinds, statement.operands[1:])
        return lambda frame: put(frame, test(frame).astype(np.float32))

    def _mufu(self, statement: Statement) -> Step:
        (name,) = modifiers(statement)
        function, _ = operation("rsqrt" if name == "RSQ" else name.lower())
        put, value = self.put(statement.operands[0], statement), self.number(statement.operands[1])
        return lambda frame: put(frame, function(value(frame)))

    def _half(self, text: str, kind: str) -> Source:
        """One half of a register: ``R8.H0_H0``."""
        sign, name, part = text[0] == "-", *text.lstrip("-").split(".")
        bits, shift = self.word(name), U32(0 if part == "H0_H0" else 16)

        def number(frame: Frame) -> Lanes:
            half = (bits(frame) >> shift).astype(np.uint16)
            value = from_bfloat(half) if kind == "BF16_V2" else half.view(np.float16).astype(np.float32)
            return -value if sign else value

        return number

    def _hadd2(self, statement: Statement) -> Step:
        """A half as float32: nothing is added."""
        to, nothing, of = statement.operands
        assert statement.opcode == "HADD2.F32" and nothing == "-RZ", statement
        put, value = self.put(to, statement), self._half(of, "F16")
        return lambda frame: put(frame, value(frame))

    def _hfma2(self, statement: Statement) -> Step:
        """Two constants."""
        to, nothing, zero, upper, lower = statement.operands
        assert (nothing, zero) == ("-RZ", "RZ") and modifiers(statement) == ["MMA"], statement
        bits = [int(np.array(float(text), np.float16).view(np.uint16)) for text in (upper, lower)]
        put, value = self.put(to, statement), np.array([[bits[0] << 16 | bits[1]]], U32)
        return lambda frame: put(frame, value)

    def _hsetp2(self, statement: Statement) -> Step:
        first, second, a_text, b_text, read = statement.operands
        assert second == "PT"
        *kinds, name, join_name = modifiers(statement)
        a, b = (self._half(text, kinds[0] if kinds else "F16") for text in (a_text, b_text))
        holds = compare(name.lower())
        put, join, before = self.put(first, statement), lanes.JOIN[join_name], self.predicate(read)
        return lambda frame: put(frame, join(holds(a(frame), b(frame)), before(frame)))

    def _f2fp(self, statement: Statement) -> Step:
        kind, *rest = modifiers(statement)
        assert rest == ["F32", "PACK_AB"], statement
        put, upper, lower = (
            self.put(statement.operands[0], statement),
            *(self.number(text) for text in statement.operands[1:]),
        )
        return lambda frame: put(
            frame, (_rounded(upper(frame), kind).astype(U32) << U32(16)) | _rounded(lower(frame), kind)
        )

    def _f2f(self, statement: Statement) -> Step:
        kind, of = modifiers(statement)
        assert of == "F32", statement
        put, value = self.put(statement.operands[0], statement), self.number(statement.operands[1])
        return lambda frame: put(frame, _rounded(value(frame), kind).astype(U32))

    def _i2f(self, statement: Statement) -> Step:
        kinds, (to, of) = modifiers(statement), statement.operands
        put = self.put(to, statement)
        value = self.pair(of) if "U64" in kinds else self.word(of)
        is_signed, up = not {"U32", "U64"} & set(kinds), "RP" in kinds

        def convert(frame: Frame) -> None:
            bits = value(frame)
            whole = lanes.signed(bits) if is_signed else bits
            put(frame, lanes.rounded_up(whole) if up else whole.astype(np.float64).astype(np.float32))

        return convert

    def _i2fp(self, statement: Statement) -> Step:
        put, value = self.put(statement.operands[0], statement), self.word(statement.operands[1])
        is_signed = "S32" in modifiers(statement)

        def convert(frame: Frame) -> None:
            bits = value(frame)
            put(frame, (lanes.signed(bits) if is_signed else bits).astype(np.float64).astype(np.float32))

        return convert

    def _f2i(self, statement: Statement) -> Step:
        kinds, (to, of) = modifiers(statement), statement.operands
        assert "TRUNC" in kinds
        kind = "u8" if "U64" in kinds else "u4" if "U32" in kinds else "i4"
        put = (self.put_pair if kind == "u8" else self.put)(to, statement)
        value = self.number(of)
        return lambda frame: put(frame, lanes.truncated(value(frame), kind))


def _rounded(value: Lanes, kind: str) -> Lanes:
    return to_bfloat(value) if kind == "BF16" else to_half(value)
