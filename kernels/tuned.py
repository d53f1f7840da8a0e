"""Rows that stand in for the policy's: a tuning's on this very chip, or one that is being tried.

``python -m bench.tune`` times other rows than the policy's tables have and writes the faster ones to a file. The
environment variable ``LCF_FAST_TUNED`` names such a file, which is read when the kernels are imported. Each entry names
the row that it replaces, its chip, width and element size, so that a file for another chip or for older tables changes
nothing. Imports neither torch nor triton.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

Row = TypeVar("Row")
VARIABLE = "LCF_FAST_TUNED"
SCHEMA = 1


@dataclass(frozen=True)
class Place:
    """Where the policy looked a row up.

    Attributes:
        kind: which of its tables, ``tile``, ``split``, ``backward``, ``ffn_weights``, ``columns``, ``pooling``,
            ``slot_pool`` or ``slot_expand``.
        target: the chip, ``sm_90``.
        width: the bottleneck, or a head's width where that is what the table goes by.
        itemsize: bytes an element.
    """

    kind: str
    target: str
    width: int
    itemsize: int


#: What replaces a row: by place and the row's fields, the new fields; None: no such row, the launch is not split.
Table = Mapping[tuple[Place, frozenset[tuple[str, int]]], "dict[str, int] | None"]


def in_place_of(row: Row, kind: str, target: str, width: int, itemsize: int) -> Row:
    """What to launch with where the policy has chosen ``row``: itself, unless something stands in for it.

    Of kind ``split`` that may be None: the launch is not split.
    """
    if not (_table or _trials):
        return row
    place = Place(kind, target, width, itemsize)
    if _trials:
        rows, asked = _trials[-1]
        asked.append((place, row))
        if kind in rows:
            return cast(Row, rows[kind])
    return cast(Row, _replaced(row, place))


@lru_cache(maxsize=1024)
def _replaced(row: Any, place: Place) -> Any:
    key = place, frozenset(asdict(row).items())
    if key not in _table:
        return row
    fields = _table[key]
    return None if fields is None else type(row)(**fields)


@contextmanager
def trying(rows: Mapping[str, Any]) -> Iterator[list[tuple[Place, Any]]]:
    """Within the context rows of these kinds are launched with, whatever the policy says; for tuning, in one thread.

    Gives the list of what the policy is asked for meanwhile: places, and the rows that it chose there. Plans of
    `fusion_plan`, which keep rows, are the caller's to forget.
    """
    asked: list[tuple[Place, Any]] = []
    _trials.append((dict(rows), asked))
    try:
        yield asked
    finally:
        _trials.pop()


def entry(place: Place, row: Any, better: Any) -> dict[str, Any]:
    """A file's entry: ``better`` in the place of ``row``; None: instead of splitting by it."""
    assert is_dataclass(row) and not isinstance(row, type)
    return {**asdict(place), "instead_of": asdict(row), "row": None if better is None else asdict(better)}


def read(path: str | os.PathLike[str]) -> Table:
    """A file's rows.

    Raises:
        ValueError: there is no such file, or it is none of a tuning's.
    """
    named = f"{VARIABLE}: {str(path)!r}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{named} cannot be read: {error}; `python -m bench.tune` writes such a file") from None
    try:
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}, and this version reads {SCHEMA}")
        return dict(_parsed(one) for one in data["rows"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{named} is no tuning's file: {type(error).__name__}: {error}") from None


def _parsed(one: dict[str, Any]) -> tuple[tuple[Place, frozenset[tuple[str, int]]], dict[str, int] | None]:
    place = Place(*(one[name] for name in ("kind", "target", "width", "itemsize")))
    old, new = one["instead_of"], one["row"]
    if new is None:
        if place.kind != "split":
            raise ValueError(f"{place.kind} without a row: only a split can be left out")
    elif new.keys() != old.keys():
        raise ValueError(f"{place.kind}: fields {sorted(new)} in the place of {sorted(old)}")
    for name, value in {**old, **(new or {})}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{place.kind}: {name} must be a positive integer, not {value!r}")
    return (place, frozenset(old.items())), new


_trials: list[tuple[dict[str, Any], list[tuple[Place, Any]]]] = []
_table: Table = read(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else {}
