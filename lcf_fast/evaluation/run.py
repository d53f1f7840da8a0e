"""Asking channels the questions of sets, under every control, cell by cell; and the files that a run leaves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..channels.base import Channel
from ..channels.request import Request
from ..counting import counted
from ..errors import LCFError
from ..files import only_writer, sweep, write_whole
from .choice import choice_token_ids, letters, predicted_choices
from .extractive import score_answer
from .failures import EvaluationError
from .predictions import CONTROLS, MATCHED, MISMATCHED, RANDOM, ZERO, Cell, Prediction, PredictionStore
from .report import markdown
from .sets import Question
from .summary import Summary, check_pairs, summarize, summary_json

__all__ = ["AskedSet", "Entrant", "Item", "Trial", "check_size", "choice_item", "evaluate", "write_report"]

REPORT, SUMMARY = "report.md", "summary.json"
#: Raised when the same settings come to mean other answers, scores or times: cells of both would look like one run's.
RULES = 2


@dataclass(frozen=True)
class Item:
    """A question and what is right.

    Attributes:
        answer: the text, of an extractive question; the letter, of multiple choice.
        choices: how many, of multiple choice; 0 otherwise.
    """

    id: str
    request: Request
    answer: str
    choices: int = 0


@dataclass(frozen=True)
class AskedSet:
    """Items under a name; all of one kind. ``notes``: what a report of them has to say."""

    name: str
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entrant:
    """A channel in all its controls.

    Attributes:
        make: the channel under a control.
        controls: that it is run under; of a channel that sends nothing of its own "matched" alone.
        settings: that its answers depend on and that are its own: the adapter's digest, bytes' dtype ...
        context: "cross": it carries what the sharer alone has read; "shared": what both have; or "either".
    """

    name: str
    make: Callable[[str], Channel]
    controls: tuple[str, ...]
    settings: Mapping[str, Any]
    context: Literal["cross", "shared", "either"] = "either"


@dataclass(frozen=True)
class Trial:
    """A set, and who takes part in it."""

    asked: AskedSet
    entrants: tuple[Entrant, ...]


def choice_item(question: Question) -> Item:
    """A multiple-choice question as the receiver is asked it: choices with their letters, one to be named."""
    names = letters(len(question.choices))
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(names, question.choices))
    text = f"{question.question}\n\n{listed}\n\nAnswer with the letter of the right choice."
    return Item(question.id, Request(text), names[question.answer_index], len(question.choices))


def evaluate(
    trials: Sequence[Trial],
    folder: str | os.PathLike[str],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Summary:
    """Every entrant of each set under each of its controls. A cell that ``folder`` holds already is not run again.

    Answers are greedy. Multiple choice is judged by the logits of the letters, extractive answers by EM and F1. Before
    the first cell all questions of all cells that are to be run are checked against the models' limits, with what the
    cell's control sends; a cell's first batch is asked once before, to warm up.

    Args:
        pairs: channels to test against each other; None: `lcf_fast.evaluation.comparisons.default_pairs`.
        settings: that all cells depend on, beside the questions: models. Where the folder holds cells of a set of
            other settings or questions, of whatever channel, they are refused.
        progress: whether it is shown how far each cell is.

    Raises:
        BlockingIOError: another run is writing into ``folder``. OSError: it cannot be written.
        EvaluationError: no entrant or set, names that come twice, an unknown control, a batch or an answer of nothing;
            settings other than the folder's, a pair of channels that no set will have both of. And what channels raise,
            naming the question where it is of one.
    """
    for name, size in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        check_size(name, size)
    _check_names("sets", [trial.asked.name for trial in trials])
    store = PredictionStore(folder)
    missing: list[tuple[AskedSet, Entrant, Cell]] = []
    for asked, entrants in ((trial.asked, trial.entrants) for trial in trials):
        _check_names("entrants", [entrant.name for entrant in entrants])
        shared = {
            **(settings or {}),
            "rules": RULES,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,  # times are of a batch
            "items": len(asked.items),
            "questions": _digest([item.request for item in asked.items], asked.items),
        }
        decoys = _digest([item.request.decoy for item in asked.items])
        for entrant in entrants:
            for control in entrant.controls:
                if control not in CONTROLS:
                    raise EvaluationError("control", expected=" or ".join(CONTROLS), got=repr(control))
                own = {**entrant.settings, **({"decoys": decoys} if control == MISMATCHED else {})}
                cell = Cell(asked.name, entrant.name, control, {**shared, **own})
                store.check_shared(cell, shared)
                if not store.is_finished(cell):
                    missing.append((asked, entrant, cell))
    there: dict[str, list[str]] = {}
    for set_name, channel_name, _ in [*store.finished, *(cell.key for *_, cell in missing)]:
        there.setdefault(set_name, []).append(channel_name)
    check_pairs(there, pairs)
    checked: set[tuple[str, str, str]] = set()
    for asked, entrant, cell in missing:
        # Zeros and noise are of the matching message's shape: the same is read for all three.
        read = MATCHED if cell.control in (ZERO, RANDOM) else cell.control
        if (key := (asked.name, entrant.name, read)) not in checked:
            checked.add(key)
            _check_questions(entrant.make(cell.control), asked, cell, max_new_tokens, progress)
    with only_writer(store.folder) if missing else nullcontext():
        for number, (asked, entrant, cell) in enumerate(missing, 1):
            label = f"cell {number} of {len(missing)}: {', '.join(cell.key)}"
            channel = entrant.make(cell.control)
            store.append(cell, _ask(channel, cell, asked.items, batch_size, max_new_tokens, label, progress))
    notes = tuple(note for trial in trials for note in trial.asked.notes)
    return replace(summarize(store.read(), pairs=pairs, progress=progress), notes=notes)


def write_report(summary: Summary, folder: str | os.PathLike[str], *, plots: bool = True) -> list[Path]:
    """``summary.json``, ``report.md`` and, with matplotlib, ``bytes.png`` and ``first_token.png``."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    write_whole(out / SUMMARY, summary_json(summary).encode())
    write_whole(out / REPORT, markdown(summary).encode())
    written = [out / SUMMARY, out / REPORT]
    if plots:
        from .plots import write_png

        write_png(summary, out / "bytes.png", "bytes")
        write_png(summary, out / "first_token.png", "first_token")
        written += [out / "bytes.png", out / "first_token.png"]
    return written


def _digest(requests: Sequence[Request | None], items: Sequence[Item] = ()) -> str:
    """Of what is asked, and of the items' names and what is right, in order."""
    told: list[Any] = [[item.id, item.answer, item.choices] for item in items]
    for one in requests:
        contexts = None if one is None else sorted(one.sharer_contexts.items())
        told.append(None if one is None else [one.question, one.context, contexts, one.sharers])
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()


def check_size(name: str, size: int) -> None:
    """Refuse a number of less than 1."""
    if size < 1:
        raise EvaluationError(name, expected="1 or more", got=str(size))


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names:
        raise EvaluationError(what, expected="at least one", got="none")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EvaluationError(what, expected="names of their own", got=f"{twice[0]!r} twice")


def _check_questions(channel: Channel, asked: AskedSet, cell: Cell, room: int, progress: bool) -> None:
    """Refuse questions that the channel cannot ask, before anything has run."""
    name = cell.channel if cell.control == MATCHED else f"{cell.channel} {cell.control}"
    label = f"checking {asked.name}, {name}"
    for item in counted(asked.items, label, total=len(asked.items), shown=progress):
        try:
            channel.check([item.request], room)
        except LCFError as error:
            where = f"{asked.name}, question {item.id}, {name}: {error.argument}"
            raise type(error)(where, expected=error.expected, got=error.got) from error


def _ask(
    channel: Channel,
    cell: Cell,
    items: Sequence[Item],
    batch_size: int,
    max_new_tokens: int,
    label: str,
    progress: bool,
) -> list[Prediction]:
    made: list[Prediction] = []
    # Of one length, more or less, in a batch: less padding. The order of the record stays the set's.
    order = sorted(range(len(items)), key=lambda i: len(items[i].request.question) + len(items[i].request.context))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    channel.next_logits([items[row].request for row in batches[0]])  # what is loaded and compiled once is not timed
    for rows in counted(batches, label, total=len(batches), shown=progress):
        some = [items[row] for row in rows]
        made += _choose(channel, cell, some) if some[0].choices else _say(channel, cell, some, max_new_tokens)
    by_id = {prediction.id: prediction for prediction in made}
    return [by_id[item.id] for item in items]


def _say(channel: Channel, cell: Cell, items: Sequence[Item], max_new_tokens: int) -> list[Prediction]:
    asked = [item.request for item in items]
    answers = channel.answer(asked, max_new_tokens=max_new_tokens, **channel.receiver.greedy())
    found = []
    for item, said in zip(items, answers):
        score = score_answer(said.text, item.answer)
        part: dict[str, Any] = {"em": score.exact, "f1": score.f1, "timings": asdict(said.timings), "sent": said.sent}
        found.append(Prediction(item.id, *cell.key, said.text, **part))
    return found


def _choose(channel: Channel, cell: Cell, items: Sequence[Item]) -> list[Prediction]:
    reader = channel.receiver.reader
    logits, sent, timings = channel.next_logits([item.request for item in items])
    tokens = [
        choice_token_ids(reader.tokenizer, reader.render(item.request.asked()), item.choices) for item in items
    ]  # fmt: skip
    found = []
    for item, choice, size in zip(items, predicted_choices(logits, tokens), sent):
        letter = letters(item.choices)[choice]
        right = letter == item.answer
        found.append(Prediction(item.id, *cell.key, letter, correct=right, timings=asdict(timings), sent=size))
    return found
