"""Whether tensors lie in one another's memory: by addresses and strides alone, on the host, whatever the device.

Tensors may reach over the same addresses without sharing an element, as key and value do in one ``(B, N, 2, H, D)``
buffer. So ranges of addresses that overlap are only where the search begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from operator import sub

from torch import Tensor

from .layouts import Layers, Layout

__all__ = ["first_shared", "share_memory"]

#: The layers that were last found to lie apart: a loop over the same caches asks again and again.
_apart: tuple[Layout | None, Sequence[int]] = (None, ())


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


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype share an element's memory."""
    distance = other.data_ptr() - one.data_ptr()
    if one.is_contiguous() and other.is_contiguous():
        return abs(distance) < one.nbytes
    return _meet(one.shape, one.itemsize, one.stride(), other.stride(), distance)


@lru_cache(maxsize=64)
def _search(layout: Layout, places: tuple[int, ...]) -> tuple[int, int] | None:
    """`first_shared` for tensors at these places, in bytes from the first of them."""
    size = layout.dtype.itemsize
    reaching: list[int] = []
    found = []
    for i in sorted(range(len(places)), key=places.__getitem__):
        reaching = [j for j in reaching if places[j] + layout.extent > places[i]]
        for j in reaching:
            if _meet(layout.shape, size, layout.strides[j], layout.strides[i], places[i] - places[j]):
                found.append((min(i, j), max(i, j)))
        reaching.append(i)
    return min(found, key=lambda pair: pair[::-1], default=None)


@lru_cache(maxsize=4096)
def _meet(shape: Sequence[int], size: int, strides: Sequence[int], other_strides: Sequence[int], distance: int) -> bool:
    """Whether a byte of a tensor is one of another's, ``distance`` bytes further: elements of ``size`` bytes."""
    if 0 in shape:
        return False
    # Steps into the one, and back from the other's end, that lead to the distance to that end.
    steps: Counter[int] = Counter()
    for length, stride, other_stride in zip(shape, strides, other_strides):
        steps[stride * size] += length - 1
        steps[other_stride * size] += length - 1
        distance += other_stride * size * (length - 1)
    steps[1] += 2 * (size - 1)
    return _is_sum(distance + size - 1, tuple(sorted(steps.items(), reverse=True)))


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
