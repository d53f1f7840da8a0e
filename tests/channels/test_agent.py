"""How an agent says the likeliest tokens, whatever its model comes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_agents import agent

from lcf_fast.channels import NoneChannel, Request

REQUESTS = [Request("Where is it?", "The cat sat."), Request("What is the capital of France?")]
#: Each by itself changes or ends what ``generate(do_sample=False)`` says, or stops it.
SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "suppress_tokens": list(range(5, 300)),
    "sequence_bias": [[[7], 30.0]],
    "max_time": 1e-4,
    "stop_strings": "a",
    "guidance_scale": 2.0,
    "max_new_tokens": 3,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_answers_are_greedy(name: str) -> None:
    channel = NoneChannel(agent("me", "qwen3", 1))
    config = channel.receiver.model.generation_config
    expected = [one.ids.tolist() for one in channel.answer(REQUESTS, max_new_tokens=8, do_sample=False)]
    best = channel.next_logits(REQUESTS)[0].argmax(-1).tolist()
    assert [ids[0] for ids in expected] == best
    setattr(config, name, SETTINGS[name])
    said = channel.answer(REQUESTS, max_new_tokens=8, **channel.receiver.greedy())
    assert [one.ids.tolist() for one in said] == expected
    assert getattr(config, name) == SETTINGS[name], "the model's own was changed"


def test_what_ends_an_answer_stays_the_models() -> None:
    from transformers import GenerationConfig

    channel = NoneChannel(agent("me", "qwen3", 1))
    model = channel.receiver.model
    ids = channel.answer(REQUESTS, max_new_tokens=8, **channel.receiver.greedy())[0].ids.tolist()
    model.generation_config = GenerationConfig(eos_token_id=ids[2], repetition_penalty=1.5, do_sample=True, top_p=0.8)
    (answer,) = channel.answer(REQUESTS[:1], max_new_tokens=8, **channel.receiver.greedy())
    assert answer.ids.tolist() == ids[: ids.index(ids[2]) + 1]
    # What a caller asks for, a caller gets.
    given = {**channel.receiver.greedy(), "eos_token_id": None, "suppress_tokens": ids[:1]}
    (other,) = channel.answer(REQUESTS[:1], max_new_tokens=8, **given)
    assert len(other.ids) == 8 and other.ids[0] != ids[0]


def test_an_answer_ends_with_the_first_token_that_ends_it() -> None:
    """What fills up the rest may be that token again."""
    me = agent("me", "qwen3", 1)
    me.model.generation_config.eos_token_id = [4, 9]
    written = torch.tensor([[5, 4, 4, 4], [5, 6, 7, 8], [9, 5, 4, 4]])
    assert [row.tolist() for row in me.until_the_end(written)] == [[5, 4], [5, 6, 7, 8], [9]]
    assert [row.tolist() for row in me.until_the_end(written, {"eos_token_id": 7})] == [
        [5, 4, 4, 4],
        [5, 6, 7],
        [9, 5, 4, 4],
    ]
