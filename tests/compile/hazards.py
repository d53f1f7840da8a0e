"""Whether a compiled kernel touches registers that a matrix instruction of Hopper's is still at work on.

HGMMA runs on by itself: its left operand, where it comes from registers, and its sums may not be touched before a wait.
ptxas sees to that. Some versions do not (CUDA 12.9 reuses operands too early, says NVIDIA's notes on 13.3), and no test
without a GPU shows wrong sums, so the assembly is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"\[?[-~|]*R(\d+)")
#: Instructions whose first operand is not what they write.
_WRITE_NO_REGISTER = frozenset(
    ("ST", "STS", "STG", "STL", "STSM", "RED", "BAR", "BRA", "EXIT", "WARPGROUP", "DEPBAR", "LDGSTS", "LDGDEPBAR",
     "MEMBAR", "FENCE", "NOP", "R2UR", "ISETP", "FSETP", "PLOP3", "UISETP", "BSSY", "BSYNC", "WARPSYNC", "CALL", "RET")
)  # fmt: skip


@dataclass
class _Product:
    at: str
    operand: set[int]
    sums: set[int]
    ends_group: bool


def _width(opcode: str) -> int:
    """Registers that an instruction writes."""
    if opcode.startswith("LDSM"):
        last = opcode.rsplit(".", 1)[1]
        return int(last) if last.isdigit() else 1
    if ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R" else 1


def _registers(operand: str, count: int) -> set[int]:
    found = _REGISTER.match(operand)
    return set(range(int(found[1]), int(found[1]) + count)) if found else set()


def _waited_for(flying: list[_Product], left: int) -> list[_Product]:
    """What may still run once all but ``left`` groups are done."""
    ends = [i for i, product in enumerate(flying) if product.ends_group]
    if not left:
        return []
    return flying[ends[-left - 1] + 1 :] if len(ends) > left else flying


def register_hazards(sass: str) -> list[str]:
    """Instructions, in the order of the text, that touch a running product's registers; one line each."""
    flying: list[_Product] = []
    found = []
    for at, opcode, rest in _INSTRUCTION.findall(sass):
        head = opcode.split(".")[0]
        operands = [text.strip() for text in re.split(r",(?![^\[]*\])", rest)]
        if head == "HGMMA":
            columns = int(opcode.split(".")[1].split("x")[1])
            is_register = re.match(r"R\d", operands[1]) is not None
            operand = _registers(operands[1], 4) if is_register else set()
            flying.append(_Product(at, operand, _registers(operands[0], columns // 2), "gsb" in rest))
            continue
        if head == "WARPGROUP" and "DEPBAR" in opcode:
            flying = _waited_for(flying, int(operands[-1], 16))
            continue
        writes = set() if head in _WRITE_NO_REGISTER else _registers(operands[0], _width(opcode))
        reads = set().union(*(_registers(text, 1) for text in operands[head not in _WRITE_NO_REGISTER :]))
        for product in flying:
            if writes & (product.operand | product.sums) or reads & product.sums:
                found.append(f"{at}: {opcode} {rest} while the product at {product.at} runs")
    return found
