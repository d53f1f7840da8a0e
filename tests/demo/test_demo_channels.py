"""The channels give the receiver what they say, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from lcf_fast import Message
from lcf_fast.demo.agents import AgentSize, answers_of, make_agent
from lcf_fast.demo.channels import (
    CHANNELS,
    CrossChannels,
    SharedChannels,
    SlotsChannels,
    first_token_times,
    go_on,
    read,
    zeros,
)
from lcf_fast.demo.lessons import make_adapter, make_slots_adapter
from lcf_fast.demo.tasks import SecretTable, cross_items, others


@pytest.fixture(scope="module")
def agents() -> tuple[Any, Any]:
    sharer = make_agent(AgentSize(layers=3, width=32, heads=2, kv_heads=2), 1)
    return sharer.eval(), make_agent(AgentSize(layers=2, width=48, heads=2, kv_heads=1), 2).eval()


def logits(receiver: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = receiver(input_ids=ids).logits[:, -1]
    return out


def test_the_receiver_goes_on_from_a_cache_as_from_the_text(
    agents: tuple[Any, Any], generator: torch.Generator
) -> None:
    ids = cross_items(40, 4, generator).sharer_ids
    with torch.no_grad():
        assert torch.equal(go_on(agents[1], read(agents[1], ids[:, :-1]), ids), answers_of(agents[1], ids))
    assert torch.equal(answers_of(agents[1], ids), logits(agents[1], ids).argmax(-1))


@pytest.mark.parametrize("placement", ["append", "prefix"])
def test_slots_stand_where_the_adapter_was_trained(
    placement: Any, agents: tuple[Any, Any], generator: torch.Generator
) -> None:
    adapter = make_slots_adapter(*agents, slots=3, seed=0).eval()
    with torch.no_grad():
        adapter.get_parameter("up_weight").mul_(10.0)
    adapter.trained_placement = placement
    channels, items = SlotsChannels(adapter, *agents), cross_items(40, 2, generator)
    ids = items.receiver_ids
    with torch.no_grad():
        sent = channels.message(read(agents[0], items.sharer_ids), items)
        got = channels.answer(ids, sent)
        message = Message.from_bytes(sent).to(torch.float32)
        if placement == "prefix":
            cache = adapter.prefix(agents[1], message)
            expected = agents[1](ids, past_key_values=cache).logits[:, -1].argmax(-1)
        else:
            expected = go_on(agents[1], adapter.append(agents[1], read(agents[1], ids[:, :-1]), message), ids)
    assert torch.equal(got, expected)
    assert not torch.equal(got, answers_of(agents[1], ids))


def test_messages_are_their_own_items(agents: tuple[Any, Any], generator: torch.Generator) -> None:
    """The matched answer depends on the item's own message, the mismatched one on the other's, and on nothing else."""
    channels = CrossChannels(make_adapter(*agents, cross_context=True, seed=0), *agents)
    items = cross_items(60, 2, generator)
    other = others(items, generator)
    found = channels.answers(items, other)
    assert tuple(found) == CHANNELS
    with torch.no_grad():
        for row in range(0, 60, 7):
            mine, theirs = items[row : row + 1], items[int(other[row]) : int(other[row]) + 1]
            for channel, source in (("matching message", mine), ("another item's message", theirs)):
                sent = channels.message(read(agents[0], source.sharer_ids), source)
                assert int(channels.answer(mine.receiver_ids, sent)) == int(found[channel][row])
            assert int(answers_of(agents[1], mine.receiver_ids)) == int(found["no message"][row])
            text = torch.cat([mine.sharer_ids, mine.receiver_ids], 1)
            assert int(answers_of(agents[1], text)) == int(found["facts as text"][row])


def test_messages_of_slots_are_their_own_items(agents: tuple[Any, Any], generator: torch.Generator) -> None:
    """By hand: the receiver's own keys, the slots behind them, and the asked key one position further for each."""
    adapter = make_slots_adapter(*agents, slots=3, seed=0)
    with torch.no_grad():
        adapter.get_parameter("up_weight").mul_(4.0)
    channels = SlotsChannels(adapter, *agents)
    items = cross_items(60, 2, generator)
    other = others(items, generator)
    found = channels.answers(items, other)
    with torch.no_grad():
        for row in range(0, 60, 7):
            mine, theirs = items[row : row + 1], items[int(other[row]) : int(other[row]) + 1]
            for channel, source in (("matching message", mine), ("another item's message", theirs)):
                message = adapter.summarize(read(agents[0], source.sharer_ids)).to(torch.bfloat16).to(torch.float32)
                placed = adapter.place(agents[1], message, torch.tensor([[4, 5, 6]]))
                own = read(agents[1], mine.receiver_ids[:, :-1])
                joined = [
                    (torch.cat([key, new_key], 2), torch.cat([value, new_value], 2))
                    for (key, value), (new_key, new_value) in zip(own, placed)
                ]
                assert int(go_on(agents[1], joined, mine.receiver_ids)) == int(found[channel][row])
    assert (found["matching message"] != found["no message"]).any()
    sent = channels.sent(items[:1])
    assert 2 * 3 * 64 * 2 < sent["matching message"] < 2 * 3 * 64 * 2 + 1024  # layers, slots, d, bfloat16; a header


def test_a_zero_message_says_nothing_and_costs_the_same(agents: tuple[Any, Any], generator: torch.Generator) -> None:
    channels = CrossChannels(make_adapter(*agents, cross_context=True, seed=0), *agents)
    item = cross_items(1, 2, generator)
    sent = channels.message(read(agents[0], item.sharer_ids), item)
    nothing = zeros(sent)
    assert len(nothing) == len(sent)
    latent = Message.from_bytes(nothing).latent
    assert latent is not None and latent.dtype == torch.bfloat16 and not latent.any()
    assert Message.from_bytes(sent).latent.any()  # type: ignore[union-attr]


def test_bytes_are_those_of_one_item(agents: tuple[Any, Any], generator: torch.Generator) -> None:
    cross = CrossChannels(make_adapter(*agents, cross_context=True, seed=0), *agents)
    one, four = (cross.sent(cross_items(1, n, generator)) for n in (1, 4))
    assert one["matching message"] == four["matching message"] > 2 * 64 * 2  # two layers, d = 64, bfloat16; a header
    assert (one["facts as text"], four["facts as text"], one["no message"]) == (2, 8, 0)
    shared = SharedChannels(make_adapter(*agents, cross_context=False, seed=0), *agents)
    sent = shared.sent(SecretTable(generator).held_out[:1])
    # Two of the sharer's three layers are read: keys and values of 2 heads of 32, three positions, float32.
    assert sent["matching message"] == 2 * 2 * 2 * 32 * 3 * 4
    assert sent["facts as text"] == 1


def test_the_shared_cache_is_the_items_own(agents: tuple[Any, Any], generator: torch.Generator) -> None:
    adapter = make_adapter(*agents, cross_context=False, seed=0)
    channels = SharedChannels(adapter, *agents)
    items = SecretTable(generator).held_out
    other = others(items, generator)
    found = channels.answers(items, other)
    with torch.no_grad():
        for row in range(0, len(items), 17):
            ids, theirs = items.ids[row : row + 1], items.ids[other[row : row + 1]]
            for channel, source in (("matching message", ids), ("another item's message", theirs)):
                expected = go_on(
                    agents[1], adapter.fuse(read(agents[0], source[:, :-1]), read(agents[1], ids[:, :-1])), ids
                )
                assert int(expected) == int(found[channel][row])


def test_times_are_medians_of_ways_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def way(name: str, seconds: list[float]) -> Any:
        def go() -> None:
            order.append(name)
            clock[0] += seconds.pop(0)

        return go

    monkeypatch.setattr("lcf_fast.demo.channels.time.perf_counter", lambda: clock[0])
    ways = {"a": way("a", [9.0, 1.0, 5.0, 2.0]), "b": way("b", [9.0, 4.0, 4.0, 4.0])}
    assert first_token_times(ways, 3) == {"a": 2.0, "b": 4.0}  # the first round is not counted
    assert order == ["a", "b"] * 4
