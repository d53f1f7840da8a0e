"""Questions of published sets, from the hub or from local files in the published layout.

Multiple choice: MMLU-Redux 2.0, ARC-Challenge, OpenBookQA, MMLU-Pro. Extractive: HotpotQA's bridge questions
(distractor setting), cut into two contexts as `lcf_fast.training.converters` cuts them. A row that is of no use is
counted and named, or refused; one that is sound and not wanted is counted by what it is.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..counting import counted
from ..errors import BackendError
from ..reading.data_errors import DataError
from ..training.converters import LeftOut, hotpotqa_row
from ..training.data import CrossExample, OnError, check_choice, name_broken, parse_example
from ..training.rows import RowError, file_rows

__all__ = ["SETS", "Question", "QuestionSet", "parse_question", "read_hotpotqa", "read_questions"]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: MMLU-Redux's notes on a question: these have no one right choice. The rest are asked, with the corrected answer where
#: the noted error is a wrong one; C2C's evaluation does the same.
_NO_ANSWER = ("no_correct_answer", "expert")
_ANSWERED = ("ok", "bad_question_clarity", "bad_options_clarity", "multiple_correct_answers", "wrong_groundtruth")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; ``answer_index`` 0 is the first choice. Ids are unique within a set."""

    id: str
    set: str
    question: str
    choices: tuple[str, ...]
    answer_index: int


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_HasId)


@dataclass(frozen=True)
class QuestionSet(Generic[Item]):
    """Questions, and what became of the other rows.

    Attributes:
        items: in the source's order, or in the seed's.
        left_out: how many sound rows were not wanted, by what they are.
        broken: ``(row, reason)`` of those that are of no use; of a hub's set with parts, ``part:row``.
    """

    name: str
    items: tuple[Item, ...]
    left_out: dict[str, int]
    broken: tuple[tuple[int | str, str], ...]

    def __len__(self) -> int:
        return len(self.items)

    def summary(self) -> str:
        """One line: how many questions there are, what was left out, what is broken, the first of it named."""
        parts = [f"{self.name}: {len(self)} questions"]
        parts += [f"left out: {count} ({what})" for what, count in sorted(self.left_out.items())]
        return "; ".join([*parts, name_broken(self.broken, what="broken row")] if self.broken else parts)


@dataclass(frozen=True)
class _Layout:
    """Where a set is published, and what a row of it holds. ``part`` None: all parts of the hub's set."""

    hub: str
    part: str | None
    split: str
    parse: Callable[[Mapping[str, Any]], tuple[object, object, list[Any], int]]


# --- multiple choice
# ---------------------------------------------------------------------------------------------------------


def read_questions(
    name: str,
    source: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    on_error: OnError = "skip",
    limit: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> QuestionSet[Question]:
    """The questions of one set.

    Args:
        name: one of `SETS`.
        source: a local file in the published layout (JSON lines, a JSON list, parquet, a folder of parquet); None: the
            hub's, through the `datasets` library, which downloads and keeps it.
        split: of the hub's; None: the one with answers that is evaluated on (test).
        on_error: "skip" leaves broken rows out and names them; "refuse" stops at the first.
        limit: at most so many questions: with a seed a sample of all, without one the first.
        seed: shuffles: the order depends on the seed and the ids alone.
        progress: whether the number of rows read is shown on standard error.

    Raises:
        DataError: an unknown set, no such file, a broken row (if refused; one without an answer is broken), no question
            at all. BackendError: the `datasets` library is needed and not installed.
    """
    check_choice("name", name, tuple(SETS))
    layout = SETS[name]
    shown, rows = _rows(source, layout.hub, layout.part, split or layout.split)

    def parse(row: Mapping[str, Any], called: str) -> Question:
        return parse_question(name, row, called)

    return _read(name, shown, rows, parse, on_error, limit, seed, progress)


def parse_question(name: str, row: object, called: str) -> Question:
    """One row of the set ``name``, called ``called`` if the set has no ids.

    Raises:
        RowError: of another layout, or without an answer. LeftOut: sound, and not wanted.
    """
    if not isinstance(row, Mapping):
        raise RowError("no object with fields")
    id, text, choices, answer = SETS[name].parse(row)
    if not isinstance(text, str) or not text.strip():
        raise RowError("no question")
    if not all(isinstance(choice, str) for choice in choices):
        raise RowError("a choice that is no text")
    if not 2 <= len(choices) <= len(_LETTERS):
        raise RowError(f"{len(choices)} choices instead of 2 to {len(_LETTERS)}")
    if not 0 <= answer < len(choices):
        raise RowError(f"answer {answer} of {len(choices)} choices")
    if id is not None and (not isinstance(id, (str, int)) or isinstance(id, bool) or not str(id).strip()):
        raise RowError(f"id: {id!r}"[:100])
    made = Question(called if id is None else str(id), name, text, tuple(choices), answer)
    try:
        "".join((made.id, text, *choices)).encode()
    except UnicodeEncodeError:
        raise RowError("half a surrogate pair, which is no character") from None
    return made


def _mmlu_redux(row: Mapping[str, Any]) -> tuple[object, object, list[Any], int]:
    choices, answer = _list(row, "choices"), _index(row, "answer")
    noted = row.get("error_type") or "ok"
    if noted in _NO_ANSWER:
        raise LeftOut(f"noted as {noted}")
    if noted not in _ANSWERED:
        raise RowError(f"error_type {noted!r}, none of {', '.join((*_ANSWERED, *_NO_ANSWER))}"[:200])
    if noted == "wrong_groundtruth":
        answer = _corrected(row.get("correct_answer"), choices)
    return None, row.get("question"), choices, answer


def _corrected(answer: object, choices: list[Any]) -> int:
    """MMLU-Redux writes it as an index, as a letter or as the choice's text: "2" may be the third choice or say two."""
    said = str(answer if answer is not None else "").strip()
    meant = {i for i, choice in enumerate(choices) if said and str(choice).strip() == said}
    for names in ("0123456789", _LETTERS):
        if len(said) == 1 and said.upper() in names[: len(choices)]:
            meant.add(names.index(said.upper()))
    if len(meant) != 1:
        raise LeftOut("noted as wrong_groundtruth, without one corrected choice")
    return meant.pop()


def _labelled(row: Mapping[str, Any]) -> tuple[object, object, list[Any], int]:
    """ARC and OpenBookQA, as the hub has them and as their authors' JSON lines do, which nest the question."""
    nested = row.get("question")
    holder = nested if isinstance(nested, Mapping) else row
    text = holder.get("stem") or row.get("question_stem") or nested
    listed = holder.get("choices")
    if isinstance(listed, Mapping):
        choices, labels = _list(listed, "text"), _list(listed, "label")
    else:
        listed = _list(holder, "choices")
        if not all(isinstance(choice, Mapping) for choice in listed):
            raise RowError("choices: no objects with text and label")
        choices, labels = [c.get("text") for c in listed], [c.get("label") for c in listed]
    key = row.get("answerKey")
    if not isinstance(key, str) or not key.strip():
        raise RowError("no answerKey: a question without an answer; take a split that has them")
    if len(labels) != len(choices) or labels.count(key.strip()) != 1:
        raise RowError(f"answerKey {key!r} is not one of the labels {labels}"[:200])
    if row.get("id") is None:
        raise RowError("no id")
    return row["id"], text, choices, labels.index(key.strip())


def _mmlu_pro(row: Mapping[str, Any]) -> tuple[object, object, list[Any], int]:
    choices, answer = _list(row, "options"), _index(row, "answer_index")
    letter = row.get("answer")
    if letter is not None and letter != _LETTERS[answer : answer + 1]:
        raise RowError(f"answer {letter!r} at answer_index {answer}")
    while len(choices) > answer + 1 and choices[-1] == "N/A":  # what early versions fill ten options up with
        choices = choices[:-1]
    if row.get("question_id") is None:
        raise RowError("no question_id")
    return row["question_id"], row.get("question"), choices, answer


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError(f"no {key}" if value is None else f"{key}: {type(value).__name__} instead of a list")
    return list(value)


def _index(row: Mapping[str, Any], key: str) -> int:
    value = row.get(key)
    if value is None:
        raise RowError(f"no {key}: a question without an answer; take a split that has them")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RowError(f"{key}: {value!r} instead of an index"[:100])
    return value


#: By the names that predictions carry.
SETS: dict[str, _Layout] = {
    "mmlu-redux": _Layout("edinburgh-dawg/mmlu-redux-2.0", None, "test", _mmlu_redux),
    "arc-c": _Layout("allenai/ai2_arc", "ARC-Challenge", "test", _labelled),
    "openbookqa": _Layout("allenai/openbookqa", "main", "test", _labelled),
    "mmlu-pro": _Layout("TIGER-Lab/MMLU-Pro", "default", "test", _mmlu_pro),
}


# --- HotpotQA
# ---------------------------------------------------------------------------------------------------------


def read_hotpotqa(
    source: str | os.PathLike[str] | None = None,
    *,
    cut_seed: int = 42,
    split: str = "validation",
    on_error: OnError = "skip",
    limit: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> QuestionSet[CrossExample]:
    """HotpotQA's bridge questions; five paragraphs go to the sharer, five to the receiver, a supporting one to each.

    Args:
        source: HotpotQA's own JSON (hot_dev_distractor), the hub's layout as a local file, or what `lcf-fast convert
            hotpotqa` wrote, which is cut already; None: the hub's.
        cut_seed: of the cut, which depends on it and the question's id alone.
        split, on_error, limit, seed, progress: as in `read_questions`.

    Raises: as `read_questions`.
    """
    shown, rows = _rows(source, "hotpotqa/hotpot_qa", "distractor", split)

    def parse(row: Mapping[str, Any], called: str) -> CrossExample:
        is_cut = isinstance(row, Mapping) and "sharer_context" in row
        example = parse_example(row if is_cut else hotpotqa_row(_as_published(row), cut_seed), called)
        if not isinstance(example, CrossExample):
            raise RowError("an example of shared context")
        return example

    return _read("hotpotqa", shown, rows, parse, on_error, limit, seed, progress)


def _as_published(row: object) -> object:
    """HotpotQA's own layout: the hub's holds lists of titles and of sentences where it has lists of pairs."""
    if not isinstance(row, Mapping):
        return row
    made = {**row, "_id": row.get("_id", row.get("id"))}
    for field, other in (("context", "sentences"), ("supporting_facts", "sent_id")):
        value = row.get(field)
        if isinstance(value, Mapping):
            titles, values = _list(value, "title"), _list(value, other)
            if len(titles) != len(values):
                raise RowError(f"{field}: {len(titles)} titles and {len(values)} of {other}")
            made[field] = [list(pair) for pair in zip(titles, values)]
    return made


# --- reading
# ---------------------------------------------------------------------------------------------------------

_Row = tuple[int | str, Any, str]  # its number, the row, what it is called if it has no id


def _read(
    name: str,
    shown: str,
    rows: Iterable[_Row],
    parse: Callable[[Any, str], Item],
    on_error: OnError,
    limit: int | None,
    seed: int | None,
    progress: bool,
) -> QuestionSet[Item]:
    check_choice("on_error", on_error, ("skip", "refuse"))
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError("limit", expected="an int of 1 or more, or None", got=repr(limit))
    items: list[Item] = []
    left_out, broken = Counter[str](), []
    first_rows: dict[str, int | str] = {}
    stop = limit if seed is None else None
    for number, row, called in counted(rows, f"reading {shown}", shown=progress):
        try:
            if isinstance(row, RowError):
                raise row
            item = parse(row, called)
            if (before := first_rows.setdefault(item.id, number)) != number:
                raise RowError(f"the id {item.id!r} has come before, at {before}")
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except RowError as error:
            if on_error == "refuse":
                raise DataError(f"{shown}:{number}", expected=f"a question of {name}", got=str(error)) from None
            broken.append((number, str(error)))
            continue
        items.append(item)
        if len(items) == stop:
            break
    if seed is not None:
        items.sort(key=lambda item: (_hash(seed, item.id), item.id))
    result = QuestionSet(name, tuple(items[:limit]), dict(left_out), tuple(broken))
    if not items:
        raise DataError(shown, expected=f"questions of {name}", got=result.summary())
    return result


def _rows(source: str | os.PathLike[str] | None, hub: str, part: str | None, split: str) -> tuple[str, Iterator[_Row]]:
    if source is None:
        return hub, _hub_rows(hub, part, split)
    path = Path(source).expanduser()
    return str(path), ((number, row, _called(row, number)) for number, row in file_rows(path))


def _called(row: object, number: int) -> str:
    subject = row.get("subject") if isinstance(row, Mapping) else None
    return f"{subject}-{number}" if isinstance(subject, str) and subject.strip() else f"line-{number}"


def _hub_rows(hub: str, part: str | None, split: str) -> Iterator[_Row]:
    try:
        import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        expected = "the datasets library, which pip install 'lcf-fast[eval]' brings"
        raise BackendError(hub, expected=expected, got="an environment without it") from None

    def rows() -> Iterator[_Row]:
        try:
            for name in sorted(datasets.get_dataset_config_names(hub)) if part is None else [part]:
                for number, row in enumerate(datasets.load_dataset(hub, name, split=split), 1):
                    yield (number, row, f"line-{number}") if part else (f"{name}:{number}", row, f"{name}-{number}")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            expected = f"a set that can be loaded, with a split {split!r} (or a local file in its layout)"
            raise DataError(hub, expected=expected, got=first[:300]) from error

    return rows()


def _hash(seed: int, id: str) -> bytes:
    return hashlib.blake2b(f"order {seed}\n{id}".encode(), digest_size=8).digest()
