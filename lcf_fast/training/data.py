"""Examples to train on: what a line may hold, and reading a whole set of them.

Two kinds. *Shared* context (LCF): both models read the prompt; a line is ``{"messages": [{"role", "content"}, ...]}``
or ``{"prompt", "response"}``. *Cross* context (LCF-X): the sharer reads one context, the receiver another with the
question; a line is ``{"sharer_context", "receiver_context", "question", "answer"}``. Either may carry an ``"id"``; one
that does not is called after its line, ``line-17``. Other fields are passed over.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..counting import counted
from ..reading.data_errors import DataError
from ..span_text import paragraphs_of
from .rows import Row, RowError, file_rows, hub_rows

__all__ = ["CrossExample", "Example", "ExampleSet", "SharedExample", "parse_example", "read_examples"]

Kind = Literal["shared", "cross"]
OnError = Literal["skip", "refuse"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_CROSS = ("sharer_context", "receiver_context", "question", "answer")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".ndjson", ".txt", ".gz", ".csv")


@dataclass(frozen=True)
class SharedExample:
    """Both models read the prompt; the last message is the assistant's response to learn."""

    id: str
    messages: tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True)
class CrossExample:
    """The sharer reads one context, in spans; the receiver another, with the question."""

    id: str
    sharer_context: tuple[str, ...]
    receiver_context: str
    question: str
    answer: str


Example = SharedExample | CrossExample


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one kind, and what was left out.

    Attributes:
        examples: in the file's order, or in the seed's.
        broken: ``(line number, reason)`` of every line that was read and is of no use; a row number where the source
            has no lines.
    """

    examples: tuple[Example, ...]
    broken: tuple[tuple[int, str], ...]
    kind: Kind

    def __len__(self) -> int:
        return len(self.examples)

    def held_out(self, fraction: float = 0.01) -> tuple[ExampleSet, ExampleSet]:
        """Two sets: to train on, and to evaluate on (about ``fraction`` of the examples; without `broken`).

        An example's side depends on its id alone, so it stays where it is when data are appended or reordered.

        Raises:
            DataError: a fraction outside [0, 1).
        """
        if not 0 <= fraction < 1:
            raise DataError("fraction", expected="at least 0 and less than 1", got=str(fraction))
        out = [_hash("held out", example.id) < fraction * 2**64 for example in self.examples]
        kept = tuple(example for example, held in zip(self.examples, out) if not held)
        held = tuple(example for example, held in zip(self.examples, out) if held)
        return replace(self, examples=kept), replace(self, examples=held, broken=())

    def summary(self) -> str:
        """One line: how many examples there are, and how many lines are broken, the first of them named."""
        text = f"{len(self)} examples ({self.kind} context)"
        return f"{text}; left out: {name_broken(self.broken)}" if self.broken else text


def read_examples(
    source: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    split: str = "train",
    on_error: OnError = "skip",
    limit: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> ExampleSet:
    """All examples of a data set.

    Args:
        source: a file of JSON lines (or a JSON list), a parquet file or a folder of them, or a hub's id such as
            ``owner/name``. Parquet and hub sets need the `datasets` library.
        kind: "shared" or "cross"; None: as the first example. A set that holds both is refused.
        split: of a hub's set; of a file none but "train", which it is.
        on_error: "skip" leaves broken lines out and names them in `ExampleSet.broken`; "refuse" stops at the first.
        limit: at most so many examples: with a seed a sample of all, without one the first, and lines behind the last
            of them are not read.
        seed: shuffles: the order depends on the seed and the ids alone, not on the order in the file.
        progress: whether the number of lines read is shown on standard error.

    Raises:
        DataError: no such file or set; a broken line, if refused; both kinds in one set; no example at all.
        BackendError: the `datasets` library is needed and not installed.
    """
    check_choice("kind", kind, ("shared", "cross", None))
    check_choice("on_error", on_error, ("skip", "refuse"))
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError("limit", expected="an int of 1 or more, or None", got=repr(limit))
    shown, rows = _rows(source, split)
    examples: list[Example] = []
    broken: list[tuple[int, str]] = []
    first_lines: dict[str, int] = {}  # of each id
    stop = limit if seed is None else None
    for number, row in counted(rows, f"reading {shown}", shown=progress):
        try:
            example = parse_example(row, f"line-{number}")
            if (before := first_lines.setdefault(example.id, number)) != number:
                raise RowError(f"the id {example.id!r} has come before, at {before}")
        except RowError as error:
            if on_error == "refuse":
                raise DataError(f"{shown}:{number}", expected="an example", got=str(error)) from None
            broken.append((number, str(error)))
            continue
        found: Kind = "shared" if isinstance(example, SharedExample) else "cross"
        kind = found if kind is None else kind
        if found != kind:
            expected = f"examples of one kind, {kind} context"
            raise DataError(f"{shown}:{number}", expected=expected, got=f"one of {found} context")
        examples.append(example)
        if len(examples) == stop:
            break
    if not examples or kind is None:
        got = f"none; {name_broken(broken)}" if broken else "none"
        raise DataError(shown, expected="at least one example", got=got)
    if seed is not None:
        examples.sort(key=lambda example: (_hash(f"order {seed}", example.id), example.id))
    return ExampleSet(tuple(islice(examples, limit)), tuple(broken), kind)


def parse_example(row: object, name: str) -> Example:
    """One row of either kind, called ``name`` if it has no id.

    Raises:
        RowError: with the reason, if it is no example.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"{_kind_of(row)} instead of an object with fields")
    fields = {key: value for key, value in row.items() if value is not None}  # a table fills what is missing with None
    id = _id(fields.get("id", name))
    as_shared = "messages" in fields or "response" in fields
    if as_shared and "sharer_context" in fields:
        raise RowError("fields of both kinds: of shared and of cross context")
    if "messages" in fields:
        if "response" in fields:
            raise RowError("both messages and a response")
        return SharedExample(id, _messages(fields["messages"]))
    if as_shared or "prompt" in fields:
        prompt, response = _text(fields, "prompt"), _text(fields, "response")
        return SharedExample(id, (("user", prompt), ("assistant", response)))
    if any(name in fields for name in _CROSS):
        context = _spans(fields)
        receiver_context = _text(fields, "receiver_context", may_be_empty=True)
        return CrossExample(id, context, receiver_context, _text(fields, "question"), _text(fields, "answer"))
    if "conversations" in fields:
        raise RowError("'conversations' instead of 'messages'; lcf-fast convert openhermes turns one into the other")
    raise RowError(f"no messages, prompt or sharer_context among its fields: {', '.join(map(str, fields))}"[:200])


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise DataError(name, expected=" or ".join(map(repr, choices)), got=repr(value))


def name_broken(broken: Sequence[tuple[int | str, str]], most: int = 3, what: str = "broken line") -> str:
    """``12 broken lines (7: not JSON ...; 9: ...; and 10 more)``."""
    shown = [f"{number}: {reason}" for number, reason in broken[:most]]
    if len(broken) > most:
        shown.append(f"and {len(broken) - most} more")
    return f"{len(broken)} {what}{'s' if len(broken) != 1 else ''} ({'; '.join(shown)})"


def _rows(source: str | os.PathLike[str], split: str) -> tuple[str, Iterable[Row]]:
    if not isinstance(source, (str, os.PathLike)):
        raise DataError("source", expected="a path or a hub's id", got=type(source).__name__)
    path = Path(source).expanduser()
    name = os.fspath(source)
    by_name = isinstance(source, str) and _HUB_NAME.fullmatch(name) and not name.endswith(_FILE_ENDINGS)
    if by_name and not path.exists():
        return name, hub_rows(name, split)
    if split != "train":
        expected = "a hub's data set beside it, since files have none"
        raise DataError("split", expected=expected, got=f"{split!r} of {path}")
    return str(path), file_rows(path)


def _messages(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(f"messages: {_kind_of(value)} instead of a list of messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise RowError(f"messages[{i}]: {_kind_of(message)} instead of an object")
        role = message.get("role")
        if role not in ROLES:
            raise RowError(f"messages[{i}]: role {role!r}, none of {', '.join(ROLES)}"[:200])
        last = i == len(value) - 1
        if last and role != "assistant":
            raise RowError(f"the last message is the {role}'s, not the assistant's")
        content = _text(message, "content", f"messages[{i}].content", may_be_empty=not last)
        messages.append((role, content))
    if not any(role == "user" and content.strip() for role, content in messages):
        raise RowError("no user's turn")
    return tuple(messages)


def _spans(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(fields.get("sharer_context"), str):
        text = _text(fields, "sharer_context")
        return paragraphs_of(text)
    listed = fields.get("sharer_context")
    if listed is None:
        raise RowError("no sharer_context")
    if not isinstance(listed, Sequence) or not listed:
        raise RowError(f"sharer_context: {_kind_of(listed)} instead of a text or a list of texts")
    return tuple(_text({name: span}, name) for i, span in enumerate(listed) for name in [f"sharer_context[{i}]"])


def _text(fields: Mapping[str, Any], key: str, name: str | None = None, *, may_be_empty: bool = False) -> str:
    name, value = name or key, fields.get(key)
    if value is None:
        raise RowError(f"no {name}")
    if not isinstance(value, str):
        raise RowError(f"{name}: {_kind_of(value)} instead of a text")
    if not may_be_empty and not value.strip():
        raise RowError(f"{name} is empty")
    if _SURROGATE.search(value):
        raise RowError(f"{name}: half a surrogate pair, which is no character")
    return value


def _id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"id: {_kind_of(value)} instead of a text or an integer")
    return _text({"id": value}, "id")


def _kind_of(value: object) -> str:
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list" if value else "an empty list"
    return names.get(type(value), type(value).__name__)


def _hash(what: str, id: str) -> int:
    """64 bits that depend on nothing but the two texts: not on the process, the platform or the version."""
    data = f"{what}\n{id}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
