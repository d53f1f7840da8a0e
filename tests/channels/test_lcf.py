"""Shared context by position: what the mismatched control edits and reads, and what is charged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_agents import adapter_of, agent
from tiny_tokenizers import CHATML_SYSTEM

from lcf_fast import CacheGeometry, LatentCacheFlow
from lcf_fast.c2c import C2CConfig, C2CFuser, FaithfulFuser
from lcf_fast.caches import Pair
from lcf_fast.channels import Agent, LCFChannel, Request, Sharer
from lcf_fast.channels.base import Clock
from lcf_fast.reading.alignment import aligned_chat

SHORT, LONG = Request("Who?"), Request("What is the capital of France?", "Six seven. Eight nine ten eleven.")


@pytest.fixture(scope="module")
def receiver() -> Agent:
    return agent("me", "qwen3", 1)


@pytest.fixture(params=["same tokens", "other tokens"])
def sharer(request: pytest.FixtureRequest, receiver: Agent) -> Agent:
    other = agent("a", "qwen2", 2, template=CHATML_SYSTEM)
    return Agent("a", other.model, receiver.tokenizer) if request.param == "same tokens" else other


def edited(channel: LCFChannel, requests: Sequence[Request]) -> list[Pair]:
    with torch.no_grad():
        return channel.prepare(requests, Clock(torch.device("cpu")), 1).cache


def test_the_mismatched_control_edits_what_the_matching_message_edits(receiver: Agent, sharer: Agent) -> None:
    """An edit that says nothing is then the same: the control differs by content alone."""
    adapter = adapter_of(sharer, receiver, cross_context=False)
    with torch.no_grad():
        for name in ("up_weight", "head_gate_weight"):
            adapter.get_parameter(name).zero_()
        adapter.get_parameter("up_bias").normal_()
    requests = [replace(LONG, decoy=SHORT), replace(SHORT, decoy=LONG)]
    channels = [LCFChannel(receiver, [Sharer(sharer, adapter)], control=c) for c in ("matched", "mismatched")]
    matched, mismatched = (edited(channel, requests) for channel in channels)
    for pair, other in zip(matched, mismatched):
        assert all(map(torch.equal, pair, other))
    said = [[a.text for a in one.answer(requests, max_new_tokens=4, do_sample=False)] for one in channels]
    assert said[0] == said[1]
    assert not torch.equal(matched[0][1], edited(LCFChannel(receiver, []), requests)[0][1]), "no edit"


@pytest.mark.parametrize(("asked", "decoy"), [(LONG, SHORT), (SHORT, LONG)])
def test_the_mismatched_control_reads_the_decoy(asked: Request, decoy: Request, receiver: Agent, sharer: Agent) -> None:
    """Its rows in turn, over and over where they are fewer than the positions to edit."""
    adapter: LatentCacheFlow = adapter_of(sharer, receiver, cross_context=False)
    prompt, _, own = aligned_chat(receiver.reader, sharer.reader, asked.asked())
    told, tokens, theirs = aligned_chat(receiver.reader, sharer.reader, decoy.asked())
    if own is None or theirs is None:
        tokens, index = told[:-1], [n % (len(told) - 1) for n in range(len(prompt) - 1)]
    else:
        rows = [row for row in theirs if row >= 0]
        content = [n for n, row in enumerate(own) if row >= 0]
        index = [rows[content.index(n) % len(rows)] if n in content else -1 for n in range(len(prompt) - 1)]
    with torch.no_grad():
        sent, cache = (
            one.read(torch.tensor([ids]), torch.ones(1, len(ids)))
            for one, ids in ((sharer, tokens), (receiver, prompt[:-1]))
        )
        expected = adapter.fuse(sent, cache, sharer_index=torch.tensor([index]))
    channel = LCFChannel(receiver, [Sharer(sharer, adapter)], control="mismatched")
    for pair, other in zip(edited(channel, [replace(asked, decoy=decoy)]), expected):
        torch.testing.assert_close(pair, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [(0, 1, 2), (0, 2), (2,)])
def test_layers_that_nothing_reads_are_not_charged(kept: tuple[int, ...], receiver: Agent) -> None:
    """Those of pruned projectors; one that several read crosses once."""
    sharer = Agent("a", agent("a", "qwen2", 2).model, receiver.tokenizer)
    deep = Agent("me", agent("me", "qwen3", 1, layers=3).model, receiver.tokenizer)
    sides = CacheGeometry.of(sharer.model), CacheGeometry.of(deep.model)
    fuser = C2CFuser(C2CConfig(*sides, hidden=16, intermediate=8), keep_layers=kept).eval()
    adapters = adapter_of(sharer, deep, cross_context=False).prune(kept), fuser, FaithfulFuser(fuser)
    read = {0: 0, 1: 0, 2: 1}  # last_aligned
    tokens = len(deep.prompts([SHORT.asked()])[0]) - 1
    for adapter in adapters:
        (sent,) = LCFChannel(deep, [Sharer(sharer, adapter)]).next_logits([SHORT])[1]
        assert sent == tokens * len({read[layer] for layer in kept}) * 2 * 16 * 4  # key and value, channels, float32
