"""Which of the sharer's tokens a receiver's token aligns with, where the two models read renderings of their own.

Both renderings hold the same messages, each in its own template. Tokens align by the characters of the messages'
contents; what a template adds aligns with nothing. No text is tokenized anew: each model reads what it would read
without the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..span_text import Bounds
from .chat import ChatReader, Messages

__all__ = ["align", "aligned_chat", "shared_pieces"]

#: Characters ``[receiver, receiver + length)`` of one rendering are ``[sharer, sharer + length)`` of the other.
Piece = tuple[int, int, int]


def shared_pieces(
    contents: Sequence[str], receiver_text: str, receiver_bounds: Bounds, sharer_text: str, sharer_bounds: Bounds
) -> list[Piece]:
    """The characters that two renderings have in common: each content, with outer white space where both kept it.

    Args:
        contents: what the messages say.
        receiver_bounds, sharer_bounds: where each content lies in its rendering, ``(start, stop)`` in characters, with
            or without its outer white space; an empty range where it is not to be found.

    Returns:
        ``(receiver, sharer, length)`` a piece, ascending in both.
    """
    pieces = []
    for content, mine, theirs in zip(contents, receiver_bounds, sharer_bounds):
        length = len(content.strip())
        if not length or mine[0] == mine[1] or theirs[0] == theirs[1]:
            continue
        before_mine, after_mine = _outer_white(receiver_text[slice(*mine)])
        before_theirs, after_theirs = _outer_white(sharer_text[slice(*theirs)])
        before, after = min(before_mine, before_theirs), min(after_mine, after_theirs)
        pieces.append((mine[0] + before_mine - before, theirs[0] + before_theirs - before, before + length + after))
    return pieces


def align(receiver_offsets: Any, sharer_offsets: Any, pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """For each of the receiver's tokens the sharer's token that covers its last character of content, -1: none.

    The sharer's token has then read, in its own context, all that the receiver's token says. Where several tokens
    cover a character (its bytes) it is the last of them.

    Args:
        receiver_offsets, sharer_offsets: ``(N, 2)`` and ``(M, 2)`` ints, half-open character ranges in each rendering;
            empty ones are special tokens, which align with nothing.
        pieces: as `shared_pieces` returns them.

    Returns:
        ``(N,)`` int64.
    """
    mine = np.asarray(receiver_offsets, dtype=np.int64).reshape(-1, 2)
    theirs = np.asarray(sharer_offsets, dtype=np.int64).reshape(-1, 2)
    # Of each character of the receiver's rendering: the sharer's character, -1 where it is the template's.
    like = np.full(_length(mine, [(start, length) for start, _, length in pieces]), -1, dtype=np.int64)
    for start, other, length in pieces:
        like[start : start + length] = np.arange(other, other + length)
    covering = np.full(_length(theirs, [(start, length) for _, start, length in pieces]), -1, dtype=np.int64)
    lengths = theirs[:, 1] - theirs[:, 0]
    within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    # Of several tokens for one character the last assigned stays, the last in order.
    covering[np.repeat(theirs[:, 0], lengths) + within] = np.repeat(np.arange(len(theirs)), lengths)
    # The last character of content up to and with each character; a token that has none finds one before itself.
    last = np.maximum.accumulate(np.where(like >= 0, np.arange(len(like)), -1))
    index = np.full(len(mine), -1, dtype=np.int64)
    starts, stops = mine[:, 0], mine[:, 1]
    tokens = np.flatnonzero(starts < stops)
    ends = last[stops[tokens] - 1]
    tokens, ends = tokens[ends >= starts[tokens]], ends[ends >= starts[tokens]]
    index[tokens] = covering[like[ends]]
    return index


def aligned_chat(
    receiver: ChatReader, sharer: ChatReader, messages: Messages
) -> tuple[list[int], list[int], list[int] | None]:
    """A chat as both models read it: the receiver's tokens, the sharer's, and the row there of each of the receiver's.

    Where the sharer's tokenizer gives the receiver's rendering the same ids, both read those, and the rows are None.
    Otherwise the sharer reads its own rendering, and a token without a row has -1.

    Raises:
        DataError: messages that a template refuses. TokenizerError: a slow tokenizer, where offsets are needed.
    """
    text = receiver.render(messages)
    prompt, mine = receiver.prompt(text)
    if sharer.tokenizer is receiver.tokenizer or sharer.prompt(text)[0] == prompt:
        return prompt, prompt, None
    sharer_text = sharer.render(messages)
    tokens, theirs = sharer.prompt(sharer_text)
    for reader, offsets in ((receiver, mine), (sharer, theirs)):
        if offsets is None:
            raise reader.slow()
    pieces = shared_pieces(
        [content for _, content in messages],
        text,
        receiver.content_bounds(messages, text),
        sharer_text,
        sharer.content_bounds(messages, sharer_text),
    )
    return prompt, tokens, align(mine, theirs, pieces).tolist()


def _outer_white(text: str) -> tuple[int, int]:
    """How much white space ``text`` begins and ends with."""
    return len(text) - len(text.lstrip()), len(text) - len(text.rstrip())


def _length(offsets: NDArray[np.int64], ranges: Sequence[tuple[int, int]]) -> int:
    """Characters that offsets and ``(start, length)`` ranges reach over."""
    return max(int(offsets[:, 1].max(initial=0)), *(start + length for start, length in ranges), 0)
