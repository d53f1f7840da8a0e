"""A fuser where a channel takes an adapter: over `generate()`, with batches, padding and two tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_tokenizers import CHATML, CHATML_SYSTEM, tiny_tokenizer

from lcf_fast import CacheGeometry
from lcf_fast.c2c import C2CConfig, C2CFuser, FaithfulFuser
from lcf_fast.channels import Agent, Channel, LCFChannel, NoneChannel, Request, Sharer
from lcf_fast.errors import GeometryError

REQUESTS = [
    Request("Where is it?", "The cat sat."),
    Request("Who?", "Six seven. Eight nine ten eleven."),
    Request("What is the capital of France?", ""),
]
SIZES: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


def agent(name: str, family: str, seed: int, template: str) -> Agent:
    import transformers as t

    torch.manual_seed(seed)
    if family == "qwen3":
        model: Any = t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16))
    else:
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, num_key_value_heads=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # answers that depend on what is read
    return Agent(name, model.eval(), tiny_tokenizer("bytes" if seed % 2 else "metaspace", template=template))


@pytest.fixture(scope="module")
def pair() -> tuple[Agent, Agent]:
    return agent("a", "qwen2", 2, CHATML_SYSTEM), agent("me", "qwen3", 1, CHATML)


def fuser_of(sharer: Agent, receiver: Agent, logit: float) -> C2CFuser:
    torch.manual_seed(8)
    config = C2CConfig(CacheGeometry.of(sharer.model), CacheGeometry.of(receiver.model), hidden=32, intermediate=32)
    fuser = C2CFuser(config).eval().requires_grad_(False)
    for name, parameter in fuser.named_parameters():
        if "gate_logit" in name:
            parameter.fill_(logit)
        elif "proj_out" in name:
            parameter.mul_(20.0)
    return fuser


def texts(channel: Channel, requests: Sequence[Request]) -> list[str]:
    return [answer.text for answer in channel.answer(requests, max_new_tokens=8, do_sample=False)]


def test_a_fuser_serves_a_channel(pair: tuple[Agent, Agent]) -> None:
    sharer, receiver = pair
    alone = NoneChannel(receiver)
    fuser = fuser_of(sharer, receiver, 1.0)
    channel = LCFChannel(receiver, [Sharer(sharer, fuser)], name="c2c")
    whole, sent, _ = channel.next_logits(REQUESTS)
    assert all(sent)
    assert not torch.allclose(whole, alone.next_logits(REQUESTS)[0], atol=1e-2)
    for row, request in enumerate(REQUESTS):
        torch.testing.assert_close(whole[row], channel.next_logits([request])[0][0], rtol=1e-4, atol=1e-4)
    assert texts(channel, REQUESTS[::-1]) == texts(channel, REQUESTS)[::-1] != texts(alone, REQUESTS)[::-1]
    original = LCFChannel(receiver, [Sharer(sharer, FaithfulFuser(fuser))], name="c2c, as released")
    torch.testing.assert_close(original.next_logits(REQUESTS)[0], whole, rtol=1e-4, atol=1e-4)


def test_closed_gates_are_no_channel(pair: tuple[Agent, Agent]) -> None:
    sharer, receiver = pair
    channel = LCFChannel(receiver, [Sharer(sharer, fuser_of(sharer, receiver, 0.0))], name="c2c")
    assert torch.equal(channel.next_logits(REQUESTS)[0], NoneChannel(receiver).next_logits(REQUESTS)[0])


def test_a_fuser_of_other_models(pair: tuple[Agent, Agent]) -> None:
    sharer, receiver = pair
    with pytest.raises(GeometryError, match="sharer"):
        LCFChannel(receiver, [Sharer(receiver, fuser_of(sharer, receiver, 1.0))])
