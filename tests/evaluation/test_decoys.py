"""Whose message is sent under the mismatched control: none that is as good as the matching one, if there is another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcf_fast.channels import Request
from lcf_fast.channels.controls import sent_for
from lcf_fast.demo.export import save_items
from lcf_fast.demo.tasks import cross_items
from lcf_fast.evaluation.asked import Source, asked_lines
from lcf_fast.evaluation.decoys import tells, with_decoys
from lcf_fast.evaluation.extractive import score_answer
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.run import Item


def item(id: str, answer: str, *paragraphs: str, question: str = "Which?", choices: int = 0) -> Item:
    return Item(id, Request(question, "", {"sharer": paragraphs} if paragraphs else {}), answer, choices)


def of(items: Sequence[Item]) -> list[str]:
    """The id of each item's decoy, by its request."""
    named = {id(one.request): one.id for one in items}
    return [named[id(one.request.decoy)] for one in with_decoys(items)]


def test_answers_that_score_as_one_are_one() -> None:
    items = [
        item(str(i), answer, f"c{i}") for i, answer in enumerate(["Paris", "paris.", "The Paris", "Rome", "!", "?"])
    ]
    found = of(items)
    answers = {one.id: one.answer for one in items}
    for one, decoy in zip(items, found):
        assert score_answer(answers[decoy], one.answer).exact == 0, (one.answer, answers[decoy])
    letters = [item(id, id, question=f"Q {id}", choices=2) for id in "AB"]
    assert of(letters) == ["B", "A"], "of multiple choice A is no article"


def test_the_same_request_is_no_decoy() -> None:
    """One question with two answers: the channels refuse a message that says the same."""
    items = [item("0", "red", "c"), item("1", "blue", "c"), item("2", "green", "d")]
    assert of(items) == ["2", "2", "0"]
    sent_for([one.request for one in with_decoys(items)], "mismatched")
    with pytest.raises(EvaluationError, match="none for '0' among 2"):
        with_decoys(items[:2])


def test_a_decoy_does_not_hold_the_answer() -> None:
    """Neither as words of a text nor as a fact of a language without words."""
    texts = [
        item("0", "New York", "She left New York in May."),
        item("1", "June", "He came to new-york? To new york, in June."),
        item("2", "July", "New Yorkers left in July."),
    ]
    assert of(texts) == ["2", "2", "0"]
    facts = [item("0", "f", "Cf", "Dg", question="C"), item("1", "g", "Dg", "Cf", question="D"),
             item("2", "h", "Ch", "Df", question="C")]  # fmt: skip
    assert of(facts) == ["2", "2", "0"], "a value of another key does not tell"
    assert not any(tells(one) for one in with_decoys(facts))
    one_context = [item("0", "red", "a b", question="1?"), item("1", "blue", "a b", question="2?"), item("2", "c", "d")]
    assert of(one_context) == ["2", "2", "0"], "a message of the same context is the matching one"


def test_where_every_other_one_tells_one_is_taken_all_the_same() -> None:
    items = [item("0", "red", "red, blue"), item("1", "blue", "red, blue", question="Who?"),
             item("2", "blue", "blue, red"), item("3", "red", "blue or red")]  # fmt: skip
    made = with_decoys(items)
    assert of(items) == ["2", "3", "3", "1"], "of those that tell not the one that has read the same"
    assert all(tells(one) for one in made)
    # Words of any text, and prompts that both models read, tell nothing.
    yes = [item("0", "yes", "Yes, no."), item("1", "no", "No? Yes!")]
    shared = [item("0", "red", question="red or blue: 1?"), item("1", "blue", question="red or blue: 2?")]
    for some in (yes, shared):
        assert not any(tells(one) for one in with_decoys(some))
    assert not tells(items[0]), "without a decoy"


def test_many_that_tell_are_passed_over_quickly() -> None:
    """A set in which nearly all hold nearly all answers, of paragraphs of the length of a page."""
    draw = random.Random(1)
    page = " ".join(draw.choices(["red", "blue", "green", "white"], k=400))
    items = [item(str(i), ("red", "blue", "green", "white")[i % 4], f"{page} {i}") for i in range(600)]
    assert all(tells(one) for one in with_decoys(items))


def test_no_decoy_of_the_small_agents_states_the_fact(tmp_path: Path) -> None:
    """The sets as `lcf-fast eval` asks them by default: of 1,000 with four facts, 13 neighbours hold the fact asked."""
    for facts in (1, 4):
        generator = torch.Generator().manual_seed(1000 * (60 + facts))
        save_items(cross_items(1000, facts, generator), tmp_path / f"facts-{facts}.jsonl")
        asked = asked_lines(str(tmp_path / f"facts-{facts}.jsonl"), Source(), lambda text, needed: None)
        for one in asked.items:
            assert one.request.decoy is not None
            assert one.request.question + one.answer not in one.request.decoy.sharer_contexts["sharer"]
        assert asked.notes == ()


def test_what_is_no_clean_control_is_said(tmp_path: Path) -> None:
    from tiny_folders import write_lines

    rows = [
        {
            "sharer_context": [f"{i}: red, blue."],
            "receiver_context": "",
            "question": f"{i}?",
            "answer": ("red", "blue")[i % 2],
        }
        for i in range(5)
    ]
    write_lines(tmp_path / "colours.jsonl", rows)
    told: list[str] = []
    asked = asked_lines(
        str(tmp_path / "colours.jsonl"), Source(), lambda text, needed: told.append(text) if needed else None
    )
    assert told == list(asked.notes)
    assert "colours: for 5 of 5 questions (" in told[0]
    assert ", ...)" in told[0]
    assert replace(asked, notes=()).items == asked.items
