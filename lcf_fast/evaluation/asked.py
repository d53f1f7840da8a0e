"""Sources of questions as sets of items: lines of cross and of shared context, HotpotQA, multiple choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..channels.request import Request
from ..training.data import CrossExample, Example, name_broken, read_examples
from .decoys import tells, with_decoys
from .failures import EvaluationError
from .run import AskedSet, Item, choice_item
from .sets import read_hotpotqa, read_questions

__all__ = ["Source", "asked_lines", "asked_sets"]

#: Told of what is left out: the text, and whether it has to be seen.
Say = Callable[[str, bool], None]


@dataclass(frozen=True)
class Source:
    """Where questions come from.

    Attributes:
        data: files of lines, or hub ids, of cross or of shared context (`lcf_fast.training.data`).
        hotpotqa: a file of HotpotQA.
        choices: ``NAME`` or ``NAME=FILE`` of multiple choice.
        limit: of each set so many, drawn by the seed; None: all.
        decoys: whether each item gets another one for the mismatched control.
    """

    data: tuple[str, ...] = ()
    hotpotqa: Path | None = None
    choices: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 42
    decoys: bool = True


def asked_sets(source: Source, say: Say) -> list[AskedSet]:
    """Every set, each item with another one as its decoy, if wanted; what is of no use is said.

    Raises:
        DataError, EvaluationError: no such source, no question of use in it, or no decoy for one.
    """
    found = [asked_lines(name, source, say) for name in source.data]
    options = {"limit": source.limit, "seed": source.seed}
    if source.hotpotqa is not None:
        hotpotqa = read_hotpotqa(source.hotpotqa, **options)  # type: ignore[arg-type]
        say(hotpotqa.summary(), bool(hotpotqa.broken))
        found.append(_asked("hotpotqa", [_crossing(one) for one in hotpotqa.items], source, say))
    for given in source.choices:
        name, _, file = given.partition("=")
        questions = read_questions(name, file or None, progress=True, **options)  # type: ignore[arg-type]
        say(questions.summary(), bool(questions.broken))
        found.append(_asked(name, [choice_item(one) for one in questions.items], source, say))
    return found


def asked_lines(path: str, source: Source, say: Say, *, name: str | None = None) -> AskedSet:
    """One set of lines, named by its file unless by ``name``."""
    examples = read_examples(path, limit=source.limit, seed=source.seed)
    say(examples.summary(), bool(examples.broken))
    if examples.kind == "cross":
        items = [_crossing(example) for example in examples.examples]
    else:
        items = _single_turns(path, examples.examples, say)
    return _asked(name or Path(path).stem, items, source, say)


def _asked(name: str, items: Sequence[Item], source: Source, say: Say) -> AskedSet:
    """Items with their decoys, if wanted; that some of these are no clean control is noted."""
    made = with_decoys(items) if source.decoys else tuple(items)
    telling = [item.id for item in made if tells(item)]
    if not telling:
        return AskedSet(name, made)
    shown = ", ".join([*telling[:3], *(["..."] if len(telling) > 3 else [])])
    note = (
        f"{name}: for {len(telling):,} of {len(made):,} questions ({shown}) no other one was found whose contexts do "
        "not hold the answer, too: there the mismatched message may tell it"
    )
    say(note, True)
    return AskedSet(name, made, (note,))


def _crossing(example: Example) -> Item:
    assert isinstance(example, CrossExample)
    contexts = {"sharer": example.sharer_context}
    return Item(example.id, Request(example.question, example.receiver_context, contexts), example.answer)


def _single_turns(path: str, examples: Iterable[Example], say: Say) -> list[Item]:
    """Chats of one user's turn and its response; a channel asks nothing else."""
    items: list[Item] = []
    others: list[tuple[int | str, str]] = []
    for example in examples:
        assert not isinstance(example, CrossExample)
        *before, (_, answer) = example.messages
        if [role for role, _ in before] != ["user"]:
            others.append((example.id, f"{len(before)} turns before the response"))
        else:
            items.append(Item(example.id, Request(before[0][1]), answer))
    if others:
        say(f"{path}: left out: {name_broken(others, what='chat')}", True)
    if not items:
        raise EvaluationError(path, expected="chats of one user's turn and its response", got="none")
    return items
