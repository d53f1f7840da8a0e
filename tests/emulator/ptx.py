"""PTX text of one Triton kernel, taken apart: parameters, instructions with their lines, labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Bytes of a register of each kind; predicates are one boolean.
REGISTER_BYTES = {"pred": 1, "b16": 2, "b32": 4, "b64": 8}

_STATEMENT = re.compile(r"(?:@(?P<not>!?)%(?P<guard>\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_PARAMETER = re.compile(r"\.param\s+\.(?:align\s+\d+\s+)?\.?(\w+)\s+.*?(\w+_param_\d+)(?:\[(\d+)\])?")
_SOURCE = re.compile(r"(\w+\.py:\d+)")


@dataclass(frozen=True)
class Statement:
    """One instruction: ``@guard opcode operands``, the line of the kernel that it comes from, and its number."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    is_negated: bool
    source: str
    number: int


@dataclass
class Kernel:
    """A kernel's instructions, in order; ``labels`` say which statement follows each; registers by name."""

    name: str = ""
    target: str = ""
    threads: int = 0
    parameters: list[str] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)


def split_operands(text: str) -> tuple[str, ...]:
    """``a, {b, c}, [d+4]`` at its outer commas."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[begin:i].strip())
            begin = i + 1
    last = text[begin:].strip()
    return (*parts, last) if last else tuple(parts)


def _declare(kernel: Kernel, kind: str, names: str) -> None:
    """``%r<100>`` or ``%a, %b``; kinds that are as wide are one (``.u32`` and ``.b32``)."""
    kind = kind if kind == "pred" else f"b{kind[1:]}"
    for name in names.rstrip(";").split(","):
        name, _, count = name.strip().lstrip("%").partition("<")
        for i in [""] if not count else range(int(count.rstrip(">"))):
            kernel.registers[f"{name}{i}"] = kind


def parse(text: str) -> Kernel:
    """The only kernel of a file as Triton writes it.

    Raises:
        ValueError: a line that is none of what such files hold.
    """
    kernel, source, is_body, pending = Kernel(), "", False, ""
    for line in text.splitlines():
        line, _, comment = line.partition("//")
        line = line.strip()
        if line.startswith(".loc"):  # where it was written, and where that was inlined
            source = " in ".join(_SOURCE.findall(comment)) or source
        if not is_body:
            entry = re.match(r"\.visible \.entry (\w+)\(", line)
            parameter = _PARAMETER.match(line)
            threads = re.match(r"\.(?:reqntid|maxntid) (\d+)", line)
            target = re.match(r"\.target (sm_\d+)", line)
            if target:
                kernel.target = target[1]
            elif entry:
                kernel.name = entry[1]
            elif parameter:
                kernel.parameters.append(parameter[2])
            elif threads:
                kernel.threads = int(threads[1])
            is_body = line == "{" and bool(kernel.name)
            continue
        if not line or (line in "{}" and not pending):
            continue
        if line.startswith(".section"):
            break
        if line.endswith(":") and not pending:
            kernel.labels[line[:-1]] = len(kernel.statements)
            continue
        registers = _REGISTERS.match(line)
        if registers:
            _declare(kernel, registers[1], registers[2])
            continue
        if line.startswith((".loc", ".pragma", ".file", ".shared")):
            continue
        pending = f"{pending} {line}".strip()
        if not pending.endswith(";"):
            continue
        for statement in pending[:-1].split(";"):
            _add(kernel, statement.strip(), source)
        pending = ""
    return kernel


def _add(kernel: Kernel, text: str, source: str) -> None:
    found = _STATEMENT.fullmatch(text.replace("\t", " "))
    if found is None:
        raise ValueError(f"not an instruction: {text!r}")
    kernel.statements.append(
        Statement(
            opcode=found["opcode"],
            operands=split_operands(found["operands"]),
            guard=found["guard"],
            is_negated=bool(found["not"]),
            source=source,
            number=len(kernel.statements),
        )
    )
