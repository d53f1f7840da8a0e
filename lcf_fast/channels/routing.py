"""Which rows of a batch a sharer helps with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..caches import Pair
from ..errors import GeometryError
from .request import Request

__all__ = ["replace_rows", "rows_of", "rows_told", "take_rows"]


def rows_of(requests: Sequence[Request], sharer: str, known: Collection[str]) -> list[int]:
    """The requests that this sharer may help with, in order.

    Raises:
        GeometryError: a request names a sharer that is not ``known``.
    """
    for i, request in enumerate(requests):
        for name in (*(request.sharers or ()), *request.sharer_contexts):
            if name not in known:
                expected = f"sharers of this channel: {', '.join(known) or 'none'}"
                raise GeometryError(f"requests[{i}].sharers", expected=expected, got=repr(name))
    return [i for i, request in enumerate(requests) if request.sharers is None or sharer in request.sharers]


def rows_told(requests: Sequence[Request], sharer: str, known: Collection[str]) -> list[int]:
    """Those of `rows_of` that the sharer has read something for."""
    return [row for row in rows_of(requests, sharer, known) if sharer in requests[row].sharer_contexts]


def take_rows(cache: Sequence[Pair], rows: list[int], batch: int) -> list[Pair]:
    """Some items of a cache; the very tensors where they are all of them."""
    if rows == list(range(batch)):
        return list(cache)
    return [(key[rows], value[rows]) for key, value in cache]


def replace_rows(cache: Sequence[Pair], rows: list[int], part: Sequence[Pair], batch: int) -> list[Pair]:
    """The cache with some items replaced, in place where they are not all of them."""
    if rows == list(range(batch)):
        return list(part)
    for (key, value), (new_key, new_value) in zip(cache, part):
        key[rows], value[rows] = new_key, new_value
    return list(cache)
