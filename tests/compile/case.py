"""What the compile gate needs to know of one kernel at one configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        name: unique, for the test's id.
        kernel: the ``@triton.jit`` function.
        signature: Triton type of each parameter, ``"constexpr"`` for those in ``constexprs``; a tuple of types for a
            launch table.
        constexprs: values of the compile-time parameters.
        attrs: what the launcher's specialisation would know, by path into the parameters:
            ``{(0,): [["tt.divisibility", 16]]}``.
        num_warps, num_stages: launch options.
        expect_mma: whether tensor instructions must appear.
        max_registers: a limit on registers a thread, where the launcher sets one.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    expect_mma: bool
    max_registers: int | None = None

    def options(self, chip: str) -> dict[str, int]:
        """What the launcher passes to Triton for a chip."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None and chip.startswith("sm_"):
            options["maxnreg"] = self.max_registers
        return options


def make(
    name: str,
    kernel: Any,
    types: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int = 3,
    unaligned: Iterable[str] = (),
    *,
    expect_mma: bool = False,
    max_registers: int | None = None,
) -> Case:
    """A case as a launch would specialise it: pointers and strides divide by 16, ``unaligned`` and lengths do not.

    ``types``: Triton type by parameter; a missing one is an ``i32`` (a stride or a length).
    """
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.arg_names):
        kind = "constexpr" if parameter in constexprs else types.get(parameter, "i32")
        signature[parameter] = kind
        if kind == "constexpr" or parameter in unaligned or parameter in kernel.do_not_specialize:
            continue
        if isinstance(kind, tuple):
            attrs.update({(i, j): [["tt.divisibility", 16]] for j in range(len(kind))})
        else:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return Case(name, kernel, signature, constexprs, attrs, num_warps, num_stages, expect_mma, max_registers)
