"""Whether tensors lie in one another's memory: by addresses and strides alone, on the host, whatever the device.

Tensors may reach over the same addresses without sharing an element, as key and value do in one ``(B, N, 2, H, D)``
buffer. So ranges of addresses that overlap are only where the search begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from operator import gt, sub

from torch import Tensor

from .layouts import Layers, Layout

__all__ = ["first_met", "first_shared", "share_memory"]

#: The layers that were last found to lie apart: a loop over the same caches asks again and again.
_apart: tuple[Layout | None, Sequence[int]] = (None, ())
#: Two sides' layers, likewise.
_sides_apart: tuple[object, ...] = ()
#: Of a tensor: shape, strides, bytes of an element.
_Form = tuple[Sequence[int], Sequence[int], int]


def first_shared(layers: Layers) -> tuple[int, int] | None:
    """The first two of the tensors ``[k0, v0, k1, v1, ...]`` that share an element's memory; None: none do."""
    global _apart
    layout, addresses = layers.layout, layers.addresses
    last, places = _apart
    if layout is last and addresses == places:
        return None
    ordered = sorted(addresses)
    # Ordinary caches: each tensor ends before the next one begins.
    if min(map(sub, ordered[1:], ordered), default=layout.extent) < layout.extent:
        found = _search(layout, tuple([address - ordered[0] for address in addresses]))
        if found is not None:
            return found
    _apart = layout, addresses
    return None


def first_met(layers: Layers, others: Layers) -> tuple[int, int] | None:
    """The first of ``others`` that shares an element's memory with one of ``layers``, and that one; None: none do."""
    global _sides_apart
    sides = layers.layout, layers.addresses, others.layout, others.addresses
    if sides == _sides_apart:
        return None
    extent, reach = layers.layout.extent, others.layout.extent
    own, different = layers.addresses, dict.fromkeys(others.addresses)  # of which several may be one layer
    if max(different) + reach > min(own) and max(own) + extent > min(different):
        # Ordinary caches: each tensor ends before the next one begins.
        starts = sorted([*own, *different])
        ends = sorted([address + extent for address in own] + [address + reach for address in different])
        if any(map(gt, ends, starts[1:])):
            found = _search_sides(layers, others)
            if found is not None:
                return found
    _sides_apart = sides
    return None


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype share an element's memory."""
    distance = other.data_ptr() - one.data_ptr()
    if one.is_contiguous() and other.is_contiguous():
        return abs(distance) < one.nbytes
    return _meet((one.shape, one.stride(), one.itemsize), (other.shape, other.stride(), other.itemsize), distance)


@lru_cache(maxsize=64)
def _search(layout: Layout, places: tuple[int, ...]) -> tuple[int, int] | None:
    """`first_shared` for tensors at these places, in bytes from the first of them."""
    forms = _forms(layout)
    reaching: list[int] = []
    found = []
    for i in sorted(range(len(places)), key=places.__getitem__):
        reaching = [j for j in reaching if places[j] + layout.extent > places[i]]
        for j in reaching:
            if _meet(forms[j], forms[i], places[i] - places[j]):
                found.append((min(i, j), max(i, j)))
        reaching.append(i)
    return min(found, key=lambda pair: pair[::-1], default=None)


def _search_sides(layers: Layers, others: Layers) -> tuple[int, int] | None:
    """`first_met`, one by one."""
    sides = (others, layers)
    ends = [[address + side.layout.extent for address in side.addresses] for side in sides]
    forms = [_forms(side.layout) for side in sides]
    reaching: list[list[int]] = [[], []]
    found = []
    for place, side, i in sorted((address, s, i) for s in (0, 1) for i, address in enumerate(sides[s].addresses)):
        for s in (0, 1):
            reaching[s] = [j for j in reaching[s] if ends[s][j] > place]
        for j in reaching[1 - side]:
            if _meet(forms[1 - side][j], forms[side][i], place - sides[1 - side].addresses[j]):
                found.append((i, j) if side == 0 else (j, i))
        reaching[side].append(i)
    return min(found, default=None)


def _forms(layout: Layout) -> list[_Form]:
    return [(layout.shape, strides, layout.dtype.itemsize) for strides in layout.strides]


@lru_cache(maxsize=4096)
def _meet(one: _Form, other: _Form, distance: int) -> bool:
    """Whether a byte of a tensor is one of another's, ``distance`` bytes further."""
    if 0 in one[0] or 0 in other[0]:
        return False
    # Steps into the one, and back from the other's end, that lead to the distance to that end.
    steps: Counter[int] = Counter()
    for shape, strides, size in (one, other):
        for length, stride in zip(shape, strides):
            steps[stride * size] += length - 1
        steps[1] += size - 1
    shape, strides, size = other
    end = sum(stride * size * (length - 1) for length, stride in zip(shape, strides)) + size - 1
    return _is_sum(distance + end, tuple(sorted(steps.items(), reverse=True)))


def _is_sum(total: int, steps: tuple[tuple[int, int], ...]) -> bool:
    """Whether so many steps, at most, of these lengths, longest first, come to ``total``.

    Few numbers of each step can do: of an axis of a cache, its step is longer than all that the shorter ones reach.
    """
    if not steps:
        return total == 0
    (step, most), *shorter = steps
    if not step:
        return _is_sum(total, tuple(shorter))
    reach = sum(length * count for length, count in shorter)
    fewest = max(0, -((reach - total) // step))
    return any(_is_sum(total - step * count, tuple(shorter)) for count in range(fewest, min(most, total // step) + 1))
