"""Where a text's paragraphs, sentences and chat turns begin and end, in characters.

Plain functions on strings. What they return goes into `lcf_fast.spans.from_characters`; `lcf_fast.spans.paragraphs`
and `lcf_fast.spans.sentences` do both steps. Paragraphs and sentences *tile* their text: every character is in
exactly one of them, white space in the unit before it and leading white space in the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import DTypeError, SpanError

__all__ = ["Bounds", "paragraph_bounds", "paragraphs_of", "sentence_bounds", "turn_bounds"]

#: Half-open ranges ``(start, stop)``.
Bounds = list[tuple[int, int]]

_WHITE = re.compile(r"\s+")
# \r\n first, and without backtracking into it: it is one line break, not two.
_LINE_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028]")
_PARAGRAPH_SEPARATOR = "\u2029"

_EAST_ASIAN_STOPS = "。！？｡"  # these need no white space after them
_STOPS = ".!?…؟۔।॥" + _EAST_ASIAN_STOPS
_OPENING = "\"'“‘«‹„([{「『（【《〈¿¡*_"
_CLOSING = "\"'”’»›)]}」』）】》〉*_"
_END = re.compile(f"([{re.escape(_STOPS)}]+)([{re.escape(_CLOSING)}]*)")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A full stop after one of these ends nothing (titles as they are written: "5 ms." is no title) ...
_TITLES = _words(
    "Mr Mrs Ms Mx Dr Prof St Mt Messrs Mme Mlle Hon Rev Fr Gen Col Maj Capt Cmdr Lt Sgt Cpl Pvt Gov Sen Rep Pres"
)
_NEVER_LAST = _words("vs v cf e.g i.e eg ie viz approx ca al ff resp incl excl esp")
# ... after one of these where a number follows ...
_BEFORE_NUMBERS = _words(
    "no nos nr fig figs eq eqs sec sect ch chap vol p pp art par ed tab ref refs "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
# ... and after one of these where no capital follows.
_SOMETIMES_LAST = _words(
    "etc inc ltd co corp llc plc bros dept univ est ave blvd jr sr ph.d m.d b.a m.a b.sc m.sc d.phil a.m p.m a.d b.c"
)
_LONGEST = max(map(len, _TITLES | _NEVER_LAST | _BEFORE_NUMBERS | _SOMETIMES_LAST))
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J, or U.S before its last full stop
_LIST_NUMBER = re.compile(r"(?:^|[\n\r\x85\u2028\u2029])[ \t]*\d{1,3}$")
# What a chat template may put between a role's name and the content: <special tokens>, [ones like these], colons.
_TEMPLATE_SIGNS = re.compile(r"[\s:]|<[^<>]*>|\[[^\[\]]*\]")


def paragraph_bounds(text: str) -> Bounds:
    r"""Paragraphs of ``text``: what one or more blank lines separate.

    A blank line may hold white space; ``\n``, ``\r\n``, ``\r`` and the Unicode line separator break lines, and the
    Unicode paragraph separator ends a paragraph by itself.

    Returns:
        ``(start, stop)`` in characters, ascending, which tile the text; none for an empty text.

    Raises:
        DTypeError: ``text`` is not a str.
    """
    _check_text("text", text)
    return _tiles(text, _paragraph_starts(text))


def paragraphs_of(text: str) -> tuple[str, ...]:
    """The paragraphs of :func:`paragraph_bounds` themselves, without outer white space; none that is empty."""
    parts = (text[start:stop].strip() for start, stop in paragraph_bounds(text))
    return tuple(part for part in parts if part)


def sentence_bounds(text: str) -> Bounds:
    """Sentences of ``text``, by a few rules (no model, no language's grammar).

    A sentence ends after ``. ! ? …`` (and the Arabic and Devanagari signs), with the quotes and brackets that close
    after it, where white space follows; after ``。 ！ ？`` whatever follows; and at a blank line, but not at a line
    break alone. A full stop after a common English abbreviation, an initial or the number of a list's item ends
    nothing, nor does one inside a number, a name or an address; nor does what is quoted (``"Stop!" he said``) or
    trails off (``well ... maybe``) where a small letter follows.

    Returns:
        ``(start, stop)`` in characters, ascending, which tile the text; none for an empty text.

    Raises:
        DTypeError: ``text`` is not a str.
    """
    _check_text("text", text)
    starts = set(_paragraph_starts(text))
    for end in _END.finditer(text):
        stops, closing = end.groups()
        white = _WHITE.match(text, end.end())
        begins = white.end() if white else end.end()  # where the next sentence would begin
        if begins == len(text):
            continue
        east_asian = any(stop in _EAST_ASIAN_STOPS for stop in stops)
        if east_asian or (white and _ends_sentence(text, end.start(), stops, closing, begins)):
            starts.add(begins)
    return _tiles(text, sorted(starts))


def turn_bounds(rendered_text: str, messages: Sequence[Any]) -> Bounds:
    """Where each message's content lies in a rendered chat, so that the template's own text can be left out.

    Contents are found one after the other, each behind the one before; where a template has trimmed one, it is
    found without its outer white space. A content that could be mistaken for the role's name (a user who writes
    "user") is looked for behind that name first. Give the result, in a list of one an item, to
    `lcf_fast.spans.from_characters`.

    Args:
        rendered_text: what ``apply_chat_template(messages, tokenize=False)`` returned.
        messages: mappings with ``content`` and, if there is one, ``role``, or the contents themselves. A content is a
            str, a list of parts of which those with ``text`` count (the message then reaches from the first to the
            last of them), or None.

    Returns:
        ``(start, stop)`` in characters, one a message, ascending; an empty range for a message without text.

    Raises:
        SpanError: a content that does not come behind the one before, as where a template rewrites or drops it.
        DTypeError: arguments of other types.
    """
    _check_text("rendered_text", rendered_text)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DTypeError("messages", expected="a list of messages", got=type(messages).__name__)
    cursor, bounds = 0, []
    for i, message in enumerate(messages):
        role, texts = _role_and_texts(f"messages[{i}]", message)
        found: Bounds = []
        for text in texts:
            place = _find(rendered_text, text, cursor, "" if found else role)
            if place is None:
                expected = f"its content in the rendered text, from character {cursor} on"
                raise SpanError(f"messages[{i}]", expected=expected, got=f"none: {_shortened(text)}")
            found.append(place)
            cursor = place[1]
        bounds.append((found[0][0], cursor) if found else (cursor, cursor))
    return bounds


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise DTypeError(name, expected="a str", got=type(text).__name__)


def _tiles(text: str, starts: Sequence[int]) -> Bounds:
    """From the ascending places where units after the first begin."""
    if not text:
        return []
    return list(zip([0, *starts], [*starts, len(text)]))


def _paragraph_starts(text: str) -> list[int]:
    """Where paragraphs after the first begin: at their first character that is not white."""
    starts = []
    for white in _WHITE.finditer(text):
        if white.start() > 0 and white.end() < len(text):
            run = white.group()
            if _PARAGRAPH_SEPARATOR in run or len(_LINE_BREAK.findall(run)) > 1:
                starts.append(white.end())
    return starts


def _ends_sentence(text: str, at: int, stops: str, closing: str, begins: int) -> bool:
    """Whether ``stops`` at ``at``, with white space behind, end a sentence; the next would begin at ``begins``."""
    after = begins
    while after < len(text) - 1 and text[after] in _OPENING:
        after += 1
    following = text[after]
    if text[begins] in _STOPS:
        return False  # ". . .": the last one decides
    if following.islower() and (closing or stops == "…" or stops.endswith("..")):
        return False
    if stops != ".":
        return True
    word = _word_before(text, at)
    name = word.casefold()
    if word in _TITLES or name in _NEVER_LAST or (_INITIALS.fullmatch(word) and word[0].isupper()):
        return False
    if name in _BEFORE_NUMBERS:
        return not following.isdigit()
    if name in _SOMETIMES_LAST:
        return following.isupper()
    return not (word.isdigit() and _LIST_NUMBER.search(text, max(0, at - 80), at))


def _word_before(text: str, end: int) -> str:
    """Letters, digits, apostrophes and inner full stops before ``end``; one character more than the longest
    abbreviation is enough to see that it is none."""
    start = end
    while start > 0 and end - start <= _LONGEST and (text[start - 1].isalnum() or text[start - 1] in ".'’"):
        start -= 1
    return text[start:end].lstrip("'’")


def _role_and_texts(name: str, message: object) -> tuple[str, list[str]]:
    """A message's role, "" if it has none, and its contents that are not empty."""
    role = ""
    content = message
    if isinstance(message, Mapping):
        role = message.get("role") or ""
        content = message.get("content")
        if not isinstance(role, str):
            raise DTypeError(f"{name}['role']", expected="a str", got=type(role).__name__)
    parts: Iterable[object]
    if content is None or isinstance(content, str):
        parts = [content]
    elif isinstance(content, Sequence):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    else:
        raise DTypeError(name, expected="a content: a str, a list of parts, or None", got=type(content).__name__)
    texts = []
    for part in parts:
        if part is not None and not isinstance(part, str):
            raise DTypeError(name, expected="parts that are mappings or str", got=type(part).__name__)
        if part and not part.isspace():
            texts.append(part)
    return role, texts


def _find(rendered: str, content: str, cursor: int, role: str) -> tuple[int, int] | None:
    """The first place of ``content`` from ``cursor`` on; behind the role's name where that heads the content."""
    core = content.strip()
    start = _behind_role(rendered, core, cursor, role)
    if start < 0:
        start = rendered.find(core, cursor)
    if start < 0:
        return None
    stop = start + len(core)
    # With the outer white space, where the template has kept it.
    at = content.index(core)
    before, after = content[:at], content[at + len(core) :]
    if start - at >= cursor and rendered.startswith(before, start - at):
        start -= at
    if rendered.startswith(after, stop):
        stop += len(after)
    return start, stop


def _behind_role(rendered: str, core: str, cursor: int, role: str) -> int:
    """Where ``core`` comes behind the role's name with no more than a template's own signs between, or -1."""
    name = rendered.find(role, cursor) if role else -1
    if name < 0:
        return -1
    at = name + len(role)
    while not rendered.startswith(core, at):
        sign = _TEMPLATE_SIGNS.match(rendered, at)
        if sign is None:
            return -1
        at = sign.end()
    return at


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
