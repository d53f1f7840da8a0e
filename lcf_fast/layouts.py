"""What a list of layers' tensors looks like, found out once: the host's part of a launch must not grow with layers.

A call on 28 layers holds 112 tensors, and to ask each for its shape, strides, dtype and device costs more than all the
rest of a call. `KnownLayouts` asks torch to compare the whole list with one that was looked at before, in a single call
of what ``torch.compile`` guards its graphs with. It holds no tensor, and compares everything that a look would see; so
a tensor that was swapped, moved or changed since is looked at anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Found = TypeVar("Found")
#: Torch's own, without a promise: where a version lacks it nothing is remembered, and each call looks anew.
_TensorGuards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
_adding = Lock()


@dataclass(frozen=True, eq=False)
class Layout:
    """Of layers ``[k0, v0, k1, v1, ...]``, each ``(B, H, N, D)``, which agree in all but their strides.

    Compared by identity: layouts are found again by `KnownLayouts`, and plans of launches by their layouts.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[tuple[int, ...], ...]
    requires_grad: bool

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        first = tensors[0]
        strides = tuple([tensor.stride() for tensor in tensors])
        wants_gradient = True in [tensor.requires_grad for tensor in tensors]
        return cls(first.shape, first.dtype, first.device, strides, wants_gradient)

    @cached_property
    def has_unit_rows(self) -> bool:
        """Stride 1 along the head dim, which the kernels need."""
        return all(strides[-1] == 1 for strides in {*self.strides})

    @cached_property
    def extent(self) -> int:
        """Bytes from a tensor's first element to behind its last, of the one that reaches furthest."""
        if 0 in self.shape:
            return 0
        ends = [sum(stride * (size - 1) for size, stride in zip(self.shape, strides)) for strides in {*self.strides}]
        return self.dtype.itemsize * (1 + max(ends))

    @cached_property
    def first_unwritable(self) -> int | None:
        """The first tensor that cannot be edited in place: its elements share memory, or its last axis is strided."""
        bad = {strides for strides in {*self.strides} if not _is_writable(self.shape, strides)}
        return next((i for i, strides in enumerate(self.strides) if strides in bad), None) if bad else None


def _is_writable(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    return has_own_elements(sizes, strides) and (strides[-1] == 1 or sizes[-1] <= 1)


def has_own_elements(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether no two elements share memory: a step along an axis leaves all that the shorter steps reach behind.

    As it does in all slices and permutations of a buffer; strides made up otherwise may be refused.
    """
    reach = 0
    for stride, size in sorted(zip(strides, sizes)):
        if size > 1 and stride <= reach:
            return 0 in sizes
        reach += stride * (size - 1)
    return True


class Layers:
    """Tensors ``[k0, v0, k1, v1, ...]`` and their layout."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout) -> None:
        self.tensors = tensors
        self.layout = layout
        self._addresses: list[int] | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layers:
        return cls(tensors, Layout.of(tensors))

    @property
    def addresses(self) -> list[int]:
        """Read once: a list lives no longer than a call."""
        if self._addresses is None:
            self._addresses = [*map(Tensor.data_ptr, self.tensors)]
        return self._addresses


def is_ordinary(value: object) -> bool:
    """A tensor of no subclass, whose looks `KnownLayouts` may remember."""
    return type(value) is Tensor or type(value) is nn.Parameter


@dataclass
class KnownLayouts(Generic[Found]):
    """What was found out about a list of tensors, by what the list looks like.

    Attributes:
        most: entries; the oldest goes first.
        only_again: keep nothing of what comes once, since keeping costs more than a look: prompts have many lengths.
    """

    most: int = 256
    only_again: bool = False
    _entries: dict[tuple[Any, ...], tuple[Any, Found]] = field(default_factory=dict)
    _once: dict[tuple[Any, ...], None] = field(default_factory=dict)

    def find(self, tensors: Sequence[Tensor], *context: Any) -> Found | None:
        """What `remember` was given for tensors of exactly these looks (and hashable ``context``); else None."""
        if not tensors or not is_ordinary(tensors[0]) or not is_ordinary(tensors[-1]):
            return None
        known = self._entries.get(_key(tensors, context))
        return known[1] if known is not None and known[0].check(*tensors) else None

    def remember(self, found: Found, tensors: Sequence[Tensor], *context: Any) -> None:
        """Have `find` return ``found`` for tensors like these.

        Of subclasses of Tensor, and where a tensor is in the list twice, which the guards do not take, nothing is kept.
        """
        if _TensorGuards is None or not all(map(is_ordinary, tensors)) or len({*map(id, tensors)}) < len(tensors):
            return
        key = _key(tensors, context)
        if self.only_again and key not in self._once:
            _add(self._once, key, None, 4 * self.most)
            return
        guard = _TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
        _add(self._entries, key, (guard, found), self.most)


def _add(entries: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    with _adding:
        while len(entries) >= most:
            del entries[next(iter(entries))]
        entries[key] = value


def _key(tensors: Sequence[Tensor], context: tuple[Any, ...]) -> tuple[Any, ...]:
    first, last = tensors[0], tensors[-1]
    # What calls of one program are likely to differ in; the guard compares the rest.
    looks = (first.shape, first.stride(), first.dtype, first.requires_grad, last.stride())
    return (*context, len(tensors), looks, torch.is_inference_mode_enabled())
