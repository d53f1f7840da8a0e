"""Notes: how they are written, and that they fit."""

from __future__ import annotations

from tiny_agents import agent

from lcf_fast.channels import Request, TextChannel

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
