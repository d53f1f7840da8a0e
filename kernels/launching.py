"""Launching a kernel again, past Triton's binder.

Triton looks at every argument of every launch, each entry of a launch table among them, to find the compiled variant:
half of what a call of few tokens costs the host. What it would find hangs, within one plan, on little: that is compared
here, and the compiled kernel then called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from .common import INTERPRETED, VECTOR_BYTES


class Variants:
    """The compiled variants of one kernel under one plan.

    The owner sees to it that everything Triton specialises on is the same in all launches, but for what is given to
    `launch` as ``tensors`` and ``flags``: other integers (strides) are the plan's, or not specialised (lengths, table
    entries by `common.odd`; aligned tables by a flag).
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        before: Sequence[Any],
        tensors: Sequence[Tensor],
        after: Sequence[Any],
        flags: Mapping[str, Any],
        keywords: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """Launch with ``(*before, *tensors, *after)``.

        Args:
            grid: programs.
            before, after: what is no tensor.
            tensors: their dtypes and alignment are compared.
            flags: compile-time parameters that may differ from launch to launch.
            keywords: those that do not.
            options: ``num_warps`` and the like, which do not.
        """
        addresses = [*map(Tensor.data_ptr, tensors)]
        key = (*flags.values(), *[tensor.dtype for tensor in tensors])
        is_aligned = not reduce(or_, addresses) % VECTOR_BYTES
        if is_aligned:
            known = self._known.get(key)
            if known is not None:
                compiled, constants = known
                compiled[grid](*before, *tensors, *after, *constants)
                return
        compiled = self._kernel[grid](*before, *tensors, *after, **flags, **keywords, **options)
        # A HIP kernel is specialised on more of a tensor than its address. A hook may have kept Triton from compiling.
        if is_aligned and not INTERPRETED and not torch.version.hip and hasattr(type(compiled), "__getitem__"):
            names: Sequence[str] = self._kernel.arg_names[len(before) + len(tensors) + len(after) :]
            value: Callable[[str], Any] = {**flags, **keywords}.__getitem__
            self._known[key] = compiled, tuple(map(value, names))


def kind_of(number: int) -> tuple[bool, bool, bool]:
    """What Triton specialises a kernel on of an integer."""
    return number % 16 == 0, number == 1, number >= 2**31


@lru_cache(maxsize=256)
def variants_of(*_: Any) -> Callable[[Any], Variants]:
    """Compiled variants by kernel, for launches that are alike in all that kernels are compiled for."""
    known: dict[int, Variants] = {}

    def of(kernel: Any) -> Variants:
        found = known.get(id(kernel))  # kernels live as long as their modules, and are slow to hash
        if found is None:
            found = known[id(kernel)] = Variants(kernel)
        return found

    return of


def launch(
    kernel: Any,
    programs: int,
    tables: Sequence[tuple[int, ...]],
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    keywords: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Launch a kernel that no plan stands for: ``(*tables, *tensors, *numbers)``, on the current device.

    Args:
        tables: launch tables, whose alignment is among the keywords.
        numbers: integers, specialised or not.
        keywords: compile-time parameters.
        options: ``num_warps`` and the like.
    """
    alike = variants_of(tensors[0].device, *keywords.values(), *map(kind_of, numbers), *options.values())
    alike(kernel).launch((programs, 1, 1), tables, tensors, numbers, {}, keywords, options)
