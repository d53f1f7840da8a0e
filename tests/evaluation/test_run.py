"""A whole evaluation over channels of tiny models: cells, controls, resuming, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_agents import adapter_of, agent

from lcf_fast.channels import Channel, LCFXChannel, NoneChannel, Request, Sharer
from lcf_fast.evaluation import run
from lcf_fast.evaluation.decoys import with_decoys
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.predictions import PredictionStore
from lcf_fast.evaluation.run import AskedSet, Entrant, Item, Trial, choice_item, evaluate, write_report
from lcf_fast.evaluation.sets import Question
from lcf_fast.evaluation.summary import Summary
from lcf_fast.evaluation.verdicts import NO_CONTENT
from lcf_fast.files import only_writer

WORDS = ("cat", "city", "user", "France", "seven", "Paris")


def facts(count: int) -> AskedSet:
    items = [
        Item(str(i), Request(f"Where is {i}?", "One two.", {"a": (f"It is {WORDS[i % 6]}.",)}), WORDS[i % 6])
        for i in range(count)
    ]
    return AskedSet("facts", with_decoys(items))


def choices(count: int) -> AskedSet:
    asked = [Question(str(i), "letters", f"Which is {i}?", ("one", "two", "three"), i % 3) for i in range(count)]
    return AskedSet("letters", with_decoys([choice_item(question) for question in asked]))


def ask(entrants: Sequence[Entrant], sets: Sequence[AskedSet], folder: Path, **options: Any) -> Summary:
    return evaluate([Trial(asked, tuple(entrants)) for asked in sets], folder, **options)


@pytest.fixture(scope="module")
def entrants() -> list[Entrant]:
    receiver, sharer = agent("me", "qwen3", 1), agent("a", "qwen2", 2)
    adapter = adapter_of(sharer, receiver, cross_context=True)

    def crossing(control: str) -> Channel:
        return LCFXChannel(receiver, adapter, [Sharer(sharer, adapter)], control=control)

    return [
        Entrant("none", lambda control: NoneChannel(receiver), ("matched",), {}),
        Entrant("lcf_x", crossing, ("matched", "mismatched", "zero", "random"), {"dtype": "bfloat16"}),
    ]


def test_every_cell_is_there_and_says_what_the_channel_says(entrants: list[Entrant], tmp_path: Path) -> None:
    asked = facts(7)
    summary = ask(entrants, [asked, choices(5)], tmp_path, batch_size=3, max_new_tokens=4)
    store = PredictionStore(tmp_path)
    predictions = store.read()
    assert len(predictions) == 5 * (7 + 5)
    channel = entrants[1].make("mismatched")
    found = {p.id: p for p in predictions if (p.set, p.channel, p.control) == ("facts", "lcf_x", "mismatched")}
    assert list(found) == [item.id for item in asked.items], "the record is not in the set's order"
    for item in asked.items:
        (said,) = channel.answer([item.request], max_new_tokens=4, do_sample=False)
        assert found[item.id].prediction == said.text
        assert found[item.id].sent == said.sent > 0
    letters = [p for p in predictions if p.set == "letters"]
    assert {p.prediction for p in letters} <= {"A", "B", "C"}
    assert all(p.correct == (p.prediction == "ABC"[int(p.id) % 3]) for p in letters)
    result = {one.set: one for one in summary.sets}["facts"]
    assert [one.channel for one in result.channels] == ["none", "lcf_x"]
    verdict = result.channels[1].verdict
    assert verdict is not None
    assert NO_CONTENT in verdict.sentence, "nothing was learned, so nothing may be claimed"


def test_answers_are_greedy_whatever_the_model_comes_with(tmp_path: Path) -> None:
    receiver = agent("me", "qwen3", 1)
    alone = [Entrant("none", lambda control: NoneChannel(receiver), ("matched",), {})]
    said = []
    for penalty in (1.0, 1.5):
        receiver.model.generation_config.repetition_penalty = penalty
        ask(alone, [facts(4)], tmp_path / f"{penalty}", max_new_tokens=8)
        said.append([one.prediction for one in PredictionStore(tmp_path / f"{penalty}").read()])
    assert said[0] == said[1]


def test_a_cells_first_batch_is_asked_once_before_it_is_timed(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    class Watched(NoneChannel):
        def prepare(self, requests: Sequence[Request], *given: Any) -> Any:
            asked.append([request.question for request in requests])
            return super().prepare(requests, *given)

    receiver = agent("me", "qwen3", 1)
    watched = Entrant("none", lambda control: Watched(receiver), ("matched",), {})
    ask([watched], [facts(3)], tmp_path, batch_size=2, max_new_tokens=1)
    assert len(asked) == 3 and asked[0] == asked[1] and len(asked[2]) == 1


def test_a_finished_cell_is_not_run_again(entrants: list[Entrant], tmp_path: Path) -> None:
    made: list[str] = []

    def watched(entrant: Entrant) -> Entrant:
        def make(control: str) -> Channel:
            made.append(f"{entrant.name} {control}")
            if len(made) == stop:
                raise KeyboardInterrupt
            return entrant.make(control)

        return replace(entrant, make=make)

    # Each channel is made once to check what is read under a control, of zeros and noise what the matching message is
    # made of; then once a cell.
    stop = 3 + 3
    some = [watched(entrant) for entrant in entrants]
    with pytest.raises(KeyboardInterrupt):
        ask(some, [facts(4)], tmp_path, max_new_tokens=2)
    assert len(PredictionStore(tmp_path).read()) == 2 * 4
    made.clear()
    stop = -1
    summary = ask(some, [facts(4)], tmp_path, max_new_tokens=2)
    left = ["lcf_x mismatched", "lcf_x zero", "lcf_x random"]
    assert made == ["lcf_x mismatched", "lcf_x zero", *left], "what was done was checked or asked again"
    assert ask(some, [facts(4)], tmp_path, max_new_tokens=2) == summary
    assert len(made) == 5
    with pytest.raises(EvaluationError, match="max_new_tokens"):
        ask(some, [facts(4)], tmp_path, max_new_tokens=3)


def test_what_is_written(entrants: list[Entrant], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    asked = replace(facts(4), notes=("two of them are no clean control",))
    summary = ask(entrants, [asked], tmp_path, max_new_tokens=2)
    written = write_report(summary, tmp_path)
    assert {path.name for path in written} == {"summary.json", "report.md", "bytes.png", "first_token.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "matched − mismatched" in report
    assert report.endswith("\n\ntwo of them are no clean control.\n")
    assert json.loads((tmp_path / "summary.json").read_text())["sets"][0]["set"] == "facts"


def test_decoys_have_other_answers() -> None:
    items = facts(13).items
    answers = {id(item.request): item.answer for item in items}
    by_text = {item.request.question: item.answer for item in items}
    assert len(answers) == 13
    for item in items:
        assert item.request.decoy is not None
        assert by_text[item.request.decoy.question] != item.answer
    with pytest.raises(EvaluationError, match="different answers"):
        with_decoys([replace(item, answer="same") for item in items])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda entrants, sets: ([], sets), "entrants"),
        (lambda entrants, sets: (entrants, []), "sets"),
        (lambda entrants, sets: ([*entrants, entrants[0]], sets), "twice"),
        (lambda entrants, sets: ([replace(entrants[0], controls=("silence",))], sets), "control"),
    ],
)
def test_bad_input(change: Any, match: str, entrants: list[Entrant], tmp_path: Path) -> None:
    some: tuple[Sequence[Entrant], Sequence[AskedSet]] = change(entrants, [facts(3)])
    with pytest.raises(EvaluationError, match=match):
        ask(*some, tmp_path)
    assert torch.is_grad_enabled()


def test_other_questions_are_another_run(
    entrants: list[Entrant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same names and number, by whatever channel: nothing is paired that was not asked alike."""
    none, lcf_x = (replace(entrant, controls=("matched",)) for entrant in entrants)
    asked = facts(3)
    ask([none], [asked], tmp_path, max_new_tokens=2)

    def changed(**fields: Any) -> AskedSet:
        last = asked.items[-1]
        names = {name: fields.pop(name) for name in ("id", "answer") if name in fields}
        last = replace(last, request=replace(last.request, **fields), **names)
        return replace(asked, items=(*asked.items[:-1], last))

    before = (tmp_path / "predictions.jsonl").read_bytes()
    for other in (
        changed(question="Who?"),
        changed(context="Two."),
        changed(sharer_contexts={"a": ("It is.",)}),
        changed(answer="blue"),
        changed(id="7"),
        replace(asked, items=asked.items[::-1]),
    ):
        for entrant in (none, lcf_x):
            with pytest.raises(EvaluationError, match="questions: '"):
                ask([entrant], [other], tmp_path, max_new_tokens=2)
    with pytest.raises(EvaluationError, match="batch_size: 3 instead of 8"):
        ask([lcf_x], [asked], tmp_path, max_new_tokens=2, batch_size=3)
    with pytest.raises(EvaluationError, match="models: 'b' instead of None"):
        ask([lcf_x], [asked], tmp_path, max_new_tokens=2, settings={"models": "b"})
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    # Without controls there are no decoys: the matching message's cells are the same.
    bare = replace(asked, items=tuple(replace(i, request=replace(i.request, decoy=None)) for i in asked.items))
    ask([none, lcf_x], [bare], tmp_path, max_new_tokens=2)
    mismatched = replace(lcf_x, controls=("mismatched",))
    ask([mismatched], [asked], tmp_path, max_new_tokens=2)
    with pytest.raises(EvaluationError, match="decoys: '"):
        ask([mismatched], [changed(decoy=asked.items[1].request)], tmp_path, max_new_tokens=2)
    # An earlier version's rules, or a later one's.
    monkeypatch.setattr(run, "RULES", 1)
    with pytest.raises(EvaluationError, match="rules: 1 instead of 2"):
        ask([lcf_x], [asked], tmp_path, max_new_tokens=2)


def test_pairs_are_of_what_the_folder_will_hold(entrants: list[Entrant], tmp_path: Path) -> None:
    """Of this run and of those before it; another pair is refused before anything is asked."""
    none, lcf_x = entrants
    with pytest.raises(EvaluationError, match="pairs: expected two of none, on one set, got none and lcf_x"):
        ask([none], [facts(3)], tmp_path, pairs=[("none", "lcf_x")])
    assert not list(tmp_path.iterdir())
    ask([none], [facts(3)], tmp_path, max_new_tokens=2)
    ours = replace(lcf_x, controls=("matched",))
    summary = ask([ours], [facts(3)], tmp_path, pairs=[("none", "lcf_x")], max_new_tokens=2)
    assert [one.first for one in summary.sets[0].comparisons] == ["none"]


@pytest.mark.parametrize("name", ["batch_size", "max_new_tokens"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_of_nothing(name: str, size: int, entrants: list[Entrant], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=f"{name}: expected 1 or more, got {size}"):
        ask(entrants, [facts(3)], tmp_path, **{name: size})
    assert not list(tmp_path.iterdir())


def test_one_run_at_a_time_writes_into_a_folder(entrants: list[Entrant], tmp_path: Path) -> None:
    asked: list[str] = []

    def make(control: str) -> Channel:
        asked.append(control)
        return entrants[0].make(control)

    watched = [replace(entrants[0], make=make)]
    with only_writer(tmp_path), pytest.raises(BlockingIOError, match="another run is writing there"):
        ask(watched, [facts(4)], tmp_path, max_new_tokens=2)
    assert asked == ["matched"], "checked, not asked"
    assert not list(tmp_path.iterdir())
