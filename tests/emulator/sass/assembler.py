"""Hopper's instructions as functions of a frame."""

from __future__ import annotations

import re

from ..frame import Step
from ..ptx import Kernel, Statement
from .arithmetic import Arithmetic
from .control import Control
from .memory import Memory

#: What a whole warp has in common is computed once: the twin of an instruction, which does the same.
_UNIFORM = re.compile(r"U(?=(?:IADD3|IMAD|ISETP|LDC|LEA|LOP3|MOV|PLOP3|SEL|SGXT|SHF|PRMT|P2UR)\b)")


class Assembler(Control, Arithmetic, Memory):
    """Statements as functions of a frame; a function that jumps returns where to.

    Raises:
        NotImplementedError: an instruction, or a form of one, whose meaning is not written down here.
    """

    def __init__(self, kernel: Kernel, bank: bytes) -> None:
        super().__init__(kernel, bank)
        self.steps: list[Step] = [self._step(statement) for statement in kernel.statements]

    def _step(self, statement: Statement) -> Step:
        head = _UNIFORM.sub("", statement.opcode.split(".")[0])
        try:
            return getattr(self, f"_{head.lower()}")(statement)  # type: ignore[no-any-return]
        except (NotImplementedError, AttributeError, KeyError, ValueError, IndexError, AssertionError) as error:
            raise NotImplementedError(f"{statement}: {error!r}") from error
