"""Which rows of a batch a sharer helps with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from ..caches import Pair
from ..errors import GeometryError
from .request import Request

__all__ = ["collected", "replace_rows", "rows_of", "rows_told", "take_rows"]


Named = TypeVar("Named")


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


def collected(
    requests: Sequence[Request],
    sharers: Mapping[str, Named],
    write: Callable[[Named, list[Request]], Iterable[bytes]],
) -> list[list[bytes]]:
    """What each request is sent, one message a sharer that has read something for it, in the sharers' order.

    ``write``: a sharer's messages about the contexts that so many requests have for it.
    """
    sent: list[list[bytes]] = [[] for _ in requests]
    for name, sharer in sharers.items():
        rows = rows_told(requests, name, sharers)
        if rows:
            for row, data in zip(rows, write(sharer, [requests[row] for row in rows])):
                sent[row].append(data)
    return sent


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
