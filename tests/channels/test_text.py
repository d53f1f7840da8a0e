"""Notes: how they are written, and that they fit."""

from __future__ import annotations

import pytest
import torch
from tiny_agents import agent, tiny_model
from tiny_tokenizers import tiny_tokenizer

from lcf_fast.channels import Agent, Request, TextChannel
from lcf_fast.channels.base import Clock
from lcf_fast.errors import ShapeError

REQUESTS = [
    Request("Where is it?", "The cat sat.", {"a": ("One two three.", "Four five!")}),
    Request("Who?", "Six seven. Eight nine ten eleven.", {"a": ("Paris is a city.",)}),
]


def test_a_note_is_greedy_whatever_the_model_comes_with() -> None:
    receiver, sharer = agent("me", "qwen3", 1), agent("a", "qwen2", 2)
    channel = TextChannel(receiver, [sharer], most_tokens=8)
    expected = channel._write(sharer, REQUESTS)
    sharer.model.generation_config.repetition_penalty = 1.5
    assert channel._write(sharer, REQUESTS) == expected


NEW, MOST = 4, 12


def limited(limit: int, kind: str, template: str = "{note}") -> TextChannel:
    """A receiver that reads a character a token, and a sharer that writes notes of just as many tokens as it may."""
    receiver = Agent("me", tiny_model("qwen3", 1, limit=limit), tiny_tokenizer("characters"))
    sharer = Agent("a", tiny_model("qwen2", 2), tiny_tokenizer(kind))
    sharer.model.generation_config.eos_token_id = None
    return TextChannel(receiver, [sharer], most_tokens=MOST, template=template)


@pytest.mark.parametrize("template", ["{note}", "It is said: {note}"])
def test_what_joins_a_note_to_the_prompt_needs_room_too(template: str) -> None:
    reader = limited(512, "characters").receiver.reader
    alone = len(reader.prompt(reader.render(REQUESTS[0].asked()))[0])
    joined = len(template.format(note="")) + len("\n\n")
    with pytest.raises(ShapeError, match="max_position_embeddings"):
        limited(alone + joined + MOST + NEW - 1, "characters", template).check(REQUESTS[:1], NEW)
    channel = limited(alone + joined + MOST + NEW + 1, "characters", template)
    channel.check(REQUESTS[:1], NEW)
    assert channel.answer(REQUESTS[:1], max_new_tokens=NEW, do_sample=False)


def test_a_note_that_the_receiver_takes_more_tokens_for_is_cut_to_what_fits() -> None:
    """It must not stop a run that was checked; the part that is read is the note's beginning."""
    whole, request = limited(512, "metaspace"), REQUESTS[0]
    (note,) = whole._write(whole.sharers["a"], [request])
    assert len(note) > MOST + 1, "a character is a token"
    reader = whole.receiver.reader
    alone = len(reader.prompt(reader.render(request.asked()))[0])
    limit = alone + len("\n\n") + MOST + 1 + NEW
    channel = limited(limit, "metaspace")
    channel.check([request], NEW)
    with torch.no_grad():
        prepared = channel.prepare([request], Clock(torch.device("cpu")), NEW)
    assert prepared.ids[0].tolist() == reader.prompt(reader.render(request.asked(note[: MOST + 1])))[0]
    assert prepared.ids.shape[1] + NEW == limit
    assert prepared.sent == [len(note.encode())]
    assert channel.answer([request], max_new_tokens=NEW, do_sample=False)
    with pytest.raises(ShapeError, match="max_position_embeddings"):
        limited(alone + NEW - 1, "metaspace").answer([request], max_new_tokens=NEW)


def test_every_sharers_note_needs_room() -> None:
    me = agent("me", "qwen3", 1)
    channel = TextChannel(me, [agent(name, "qwen2", 2) for name in "ab"], most_tokens=50)
    request = Request("Who?", "", {"a": ("One.",), "b": ("Two.",)})
    assert me.limit is not None
    room = me.limit - len(me.prompts([channel._chat(request, ["x", "x"])])[0]) - 2 * 50
    channel.check([request], room)
    with pytest.raises(ShapeError, match="to come"):
        channel.check([request], room + 1)
