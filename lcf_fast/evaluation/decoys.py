"""Another item for each, whose message is sent in its place under the mismatched control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice

from ..channels.request import Request
from .extractive import WHOLE, normalized
from .failures import EvaluationError
from .run import Item

__all__ = ["tells", "with_decoys"]

#: Others that are looked at for one that does not tell the answer; where none of them is, hardly any is.
_MOST = 200


def with_decoys(items: Sequence[Item]) -> tuple[Item, ...]:
    """Each item with the next one of another answer and another request, of those the first that does not tell its
    answer (`tells`); where all do, one that at least holds other contexts, if there is one.

    Raises:
        EvaluationError: there is none of another answer and request for an item.
    """
    answers = [item.answer if item.choices else normalized(item.answer) for item in items]  # as they are scored
    found = []
    for i, item in enumerate(items):
        others = ((i + step) % len(items) for step in range(1, len(items)))
        able = (items[j].request for j in others if answers[j] != answers[i] and _apart(items[j].request, item.request))
        best: tuple[int, Request] | None = None
        for request in islice(able, _MOST):
            telling = _telling(item, request)
            if best is None or telling < best[0]:
                best = telling, request
            if not telling:
                break
        if best is None:
            expected = "two items of different answers, for the mismatched control (or --no-controls)"
            raise EvaluationError("items", expected=expected, got=f"none for {item.id!r} among {len(items)}")
        found.append(replace(item, request=replace(item.request, decoy=best[1])))
    return tuple(found)


def tells(item: Item) -> bool:
    """Whether the decoy's message could hold the answer to the item's question, as far as texts show.

    It could where the sharers have read the same for both, where both have a paragraph in common that the answer is in,
    or where both have read the words of the answer, as they are scored ("yes" and "no" are words of any text). Where
    the receiver has read everything itself, as in shared context, there is nothing that a text could tell it.
    """
    return item.request.decoy is not None and _telling(item, item.request.decoy) > 0


def _telling(item: Item, decoy: Request) -> int:
    """2: it has read the same. 1: it has read the answer. 0: neither."""
    own, other = _read(item.request), _read(decoy)
    if not own:
        return 0
    if own == other:
        return 2
    if any(item.answer in paragraph for paragraph in set(own) & set(other)):
        return 1
    answer = normalized(item.answer)
    if not answer or answer in WHOLE:
        return 0
    return int(f" {answer} " in _words(own) and f" {answer} " in _words(other))


def _apart(one: Request, other: Request) -> bool:
    return (one.sharer_contexts, one.asked()) != (other.sharer_contexts, other.asked())


def _read(request: Request) -> tuple[str, ...]:
    """What sharers alone have read."""
    return tuple(paragraph for paragraphs in request.sharer_contexts.values() for paragraph in paragraphs)


@lru_cache(maxsize=4 * _MOST)
def _words(paragraphs: tuple[str, ...]) -> str:
    """The words of all of it, with a space around each."""
    return f" {normalized(' '.join(paragraphs))} "
