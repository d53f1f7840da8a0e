"""The demo's items: who knows what, and that a control tells nothing."""

from __future__ import annotations

import pytest
import torch

from lcf_fast.demo.tasks import (
    BLANK,
    KEYS,
    NAMES,
    NOTHING,
    VALUES,
    VOCABULARY,
    SecretTable,
    cross_items,
    echo_lines,
    others,
    recall_lines,
    written,
)


@pytest.mark.parametrize("facts", [1, 2, 4])
def test_the_receiver_never_holds_what_it_is_asked(facts: int, generator: torch.Generator) -> None:
    items = cross_items(2000, facts, generator)
    held = items.receiver_facts[..., 0]
    assert not (held[:, :, None] == items.sharer_facts[:, None, :, 0]).any()
    assert not (held == items.keys[:, None]).any()
    assert torch.equal(items.receiver_ids[:, -1], items.keys)
    for row in range(50):  # the sharer holds it, once, with the answer behind it
        facts_of = [tuple(fact) for fact in items.sharer_facts[row].tolist()]
        assert len({key for key, _ in facts_of}) == facts
        assert facts_of.count((int(items.keys[row]), int(items.answers[row]))) == 1
        flat = items.sharer_ids[row].tolist()
        assert list(zip(flat[::2], flat[1::2])) == facts_of
    # Every key is asked, and the answers are even: guessing is worth 1 in 16.
    assert set(items.keys.tolist()) == set(range(KEYS))
    counts = torch.bincount(items.answers - KEYS, minlength=VALUES)
    assert len(counts) == VALUES and counts.min() > 2000 / VALUES * 0.6 and counts.max() < 2000 / VALUES * 1.4


def test_fewer_keys_are_the_sharers_alone(generator: torch.Generator) -> None:
    items = cross_items(500, 2, generator, keys=2)
    assert int(items.sharer_facts[..., 0].max()) == 1
    assert int(items.receiver_facts[..., 0].min()) >= 2


@pytest.mark.parametrize("facts", [1, 2, 4])
def test_the_mismatched_message_is_of_an_item_that_does_not_tell_the_answer(
    facts: int, generator: torch.Generator
) -> None:
    items = cross_items(1000, facts, generator)
    other = others(items, generator)
    assert not (other == torch.arange(1000)).any()
    assert len(other.unique()) > 500  # not one item's message for all
    for row in range(1000):
        told = [tuple(fact) for fact in items.sharer_facts[other[row]].tolist()]
        assert (int(items.keys[row]), int(items.answers[row])) not in told


def test_one_span_a_fact(generator: torch.Generator) -> None:
    batch = cross_items(3, 4, generator).batch()
    assert batch.spans is not None and batch.spans.offsets.tolist() == [[[0, 2, 4, 6, 8]]] * 3
    assert batch.sharer_ids.shape == (3, 8) and batch.receiver_ids.shape == (3, 5)
    assert batch.response_ids.shape == (3, 1)


def test_the_table_holds_pairs_out(generator: torch.Generator) -> None:
    table = SecretTable(generator)
    pairs = [set(zip(part.names.tolist(), part.keys.tolist())) for part in (table.known, table.held_out)]
    assert len(pairs[0]) + len(pairs[1]) == NAMES * KEYS and not pairs[0] & pairs[1]
    assert len(pairs[1]) == NAMES * KEYS // 4
    sampled = table.sample(5000, generator)
    assert set(zip(sampled.names.tolist(), sampled.keys.tolist())) <= pairs[0]
    rows = [(part.names * KEYS + part.keys).tolist() for part in (table.everything, sampled)]
    truth = dict(zip(rows[0], table.everything.answers.tolist()))
    assert [truth[row] for row in rows[1]] == sampled.answers.tolist()
    other = others(table.held_out, generator)
    assert (table.held_out.answers[other] != table.held_out.answers).all()


def test_both_read_the_same_question_and_it_holds_no_value(generator: torch.Generator) -> None:
    batch = SecretTable(generator).held_out.batch()
    assert batch.spans is None and batch.sharer_index is None
    assert torch.equal(batch.receiver_ids, batch.sharer_ids)
    values = (batch.receiver_ids >= KEYS) & (batch.receiver_ids < KEYS + VALUES)
    assert not values.any() and (batch.receiver_ids[:, 2] == BLANK).all()


def test_recall_asks_for_what_can_be_known(generator: torch.Generator) -> None:
    ids, labels = recall_lines(200, 4, 3, generator, keys=8)
    assert int(ids[:, ::2].max()) < 8
    for line, wanted in zip(ids.tolist(), labels.tolist()):
        facts = dict(zip(line[:8:2], line[1:8:2]))
        assert len(facts) == 4 and wanted[:9] == [NOTHING] * 9
        for at in range(8, 14, 2):
            assert wanted[at] == NOTHING and wanted[at + 1] == line[at + 1] == facts[line[at]]


def test_echo_repeats_the_key(generator: torch.Generator) -> None:
    ids, labels = echo_lines(50, 3, generator)
    assert torch.equal(ids[:, ::3], ids[:, 2::3]) and torch.equal(labels[:, 2::3], ids[:, ::3])
    assert (labels[:, ::3] == NOTHING).all() and (labels[:, 1::3] == NOTHING).all()


def test_a_token_is_a_character() -> None:
    (text,) = written(torch.arange(VOCABULARY)[None])
    assert len(text) == VOCABULARY == len(set(text))
    assert text[:2] == "AB" and text[KEYS] == "b" and text[-1] == "?"


def test_items_repeat_by_seed() -> None:
    first, second = (cross_items(10, 2, torch.Generator().manual_seed(4)).sharer_ids for _ in range(2))
    assert torch.equal(first, second)
