"""The slots channel over `generate()`: what crosses, where it stands, that a row's answer is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_agents import agent
from tiny_slots import by_length, family_model, slots_adapter
from tiny_tokenizers import CHATML_SYSTEM
from torch import Tensor

from lcf_fast import CacheGeometry, LatentSlots, LCFConfig, SlotsSharerSide
from lcf_fast.channels import Agent, NoneChannel, Request, Sharer, SlotsChannel
from lcf_fast.channels.base import Clock
from lcf_fast.channels.controls import CONTROLS
from lcf_fast.errors import GeometryError, IndexRangeError, LCFError, MessageError, ShapeError
from lcf_fast.evaluation.entrants import entrants
from lcf_fast.fingerprint import digest_of
from lcf_fast.placement import PLACEMENTS, with_slots
from lcf_fast.reading.prefill import dynamic_cache, prefill

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma")
REQUESTS = [
    Request("Where is it?", "The cat sat.", {"a": ("One two three.", "Four five!")}),
    Request("Who?", "Six seven. Eight nine ten eleven.", {"a": ("Paris is a city.",)}),
    Request("What is the capital of France?", "", {"a": ("Twelve.", "You are a user.", "Nine.")}),
]


@pytest.fixture(scope="module")
def receiver() -> Agent:
    return agent("me", "qwen3", 1)


@pytest.fixture(scope="module")
def sharer() -> Agent:
    return agent("a", "qwen2", 2, template=CHATML_SYSTEM)


def channel(receiver: Agent, sharer: Agent, **options: Any) -> SlotsChannel:
    adapter = slots_adapter(sharer.model, receiver.model)
    return SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], **options)


def texts(made: SlotsChannel, requests: Sequence[Request]) -> list[str]:
    return [answer.text for answer in made.answer(requests, max_new_tokens=8, do_sample=False)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(placement: str, receiver: Agent, sharer: Agent) -> None:
    """Permuted, padded by a longer one, beside one that has no message: the same logits and the same answer."""
    made = channel(receiver, sharer, placement=placement)
    requests = [*REQUESTS, replace(REQUESTS[1], sharers=())]
    whole, sent, _ = made.next_logits(requests)
    for row, request in enumerate(requests):
        logits, (size,), _ = made.next_logits([request])
        torch.testing.assert_close(whole[row], logits[0], rtol=1e-4, atol=1e-4)
        assert sent[row] == size
    turned, _, _ = made.next_logits(requests[::-1])
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-4, atol=1e-4)
    nobody, _, _ = NoneChannel(receiver).next_logits([requests[3]])
    torch.testing.assert_close(whole[3], nobody[0], rtol=1e-4, atol=1e-4)
    assert sent[3] == 0
    assert float((whole[1] - nobody[0]).abs().max()) > 1e-2
    assert texts(made, requests) == [texts(made, [request])[0] for request in requests]
    (alone,) = NoneChannel(receiver).answer([requests[3]], max_new_tokens=8, do_sample=False)
    assert texts(made, requests)[3] == alone.text


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_is_what_the_adapter_does_by_hand(placement: Any, receiver: Agent, sharer: Agent) -> None:
    made = channel(receiver, sharer, placement=placement, dtype="float32")
    logits, _, _ = made.next_logits(REQUESTS[:1])
    heard = torch.tensor([sharer.reader.text("One two three.\n\nFour five!")[0]])
    ids = torch.tensor(receiver.prompts([REQUESTS[0].asked()]))
    with torch.no_grad():
        message = made.adapter.summarize(prefill(sharer.model, heard, torch.ones_like(heard)))
        if placement == "append":
            own = prefill(receiver.model, ids[:, :-1], torch.ones_like(ids[:, :-1]))
            cache = dynamic_cache(made.adapter.append(receiver.model, own, message))
            long_ids, long_mask = with_slots(ids, None, 3)
            new = long_ids[:, -1:]
            at = torch.tensor([[ids.shape[1] + 2]])
        else:
            cache, new = made.adapter.prefix(receiver.model, message), ids
            at = torch.arange(3, 3 + ids.shape[1])[None]
            long_mask = torch.ones(1, 3 + ids.shape[1], dtype=torch.int64)
        expected = receiver.model(
            input_ids=new, attention_mask=long_mask, position_ids=at, past_key_values=cache
        ).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_serves_on_both_sides(family: str) -> None:
    me, other = agent("me", family, 1), agent("a", family, 2)
    plain, _, _ = NoneChannel(me).next_logits(REQUESTS)
    for placement in PLACEMENTS:
        logits, sent, timings = channel(me, other, placement=placement).next_logits(REQUESTS)
        assert float((logits - plain).abs().max()) > 1e-2, "no slot is read"
        assert min(sent) > 0
        assert 0 < timings.sharer + timings.communication + timings.receiver <= timings.first_token <= timings.end


def test_bytes_do_not_grow_with_the_context_but_with_the_slots(receiver: Agent, sharer: Agent) -> None:
    short, long = (Request("Who?", "", {"a": ("One two.",) * n}) for n in (1, 20))
    made = channel(receiver, sharer)
    sizes = [made.next_logits([one])[1][0] for one in (short, long)]
    assert abs(sizes[0] - sizes[1]) < 64
    latent = 2 * 3 * 64 * 2  # layers x slots x width x bfloat16
    assert latent < sizes[0] < latent + 1024
    fewer = channel(receiver, sharer, slots=1)
    assert abs(made.next_logits([short])[1][0] - fewer.next_logits([short])[1][0] - 2 * 2 * 64 * 2) < 64


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_sharers_side_by_side_and_requests_choose(placement: str, receiver: Agent, sharer: Agent) -> None:
    second = agent("b", "llama", 4)
    adapter = slots_adapter(sharer.model, receiver.model)
    side = adapter.for_sharer(CacheGeometry.of(second.model), slots=2).eval()
    adapter.accept_sharer(side)
    both = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter), Sharer(second, side)], placement=placement)
    told = {"a": ("One two three.",), "b": ("Paris is a city.",)}
    requests = [Request("Who?", "Six.", told, sharers=names) for names in (None, ("a",), ("b",), ())]
    logits, sent, _ = both.next_logits(requests)
    for i in range(4):
        for j in range(i):
            assert float((logits[i] - logits[j]).abs().max()) > 1e-3, (i, j)
    alone = torch.cat([both.next_logits([request])[0] for request in requests])
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
    assert sent[0] == sent[1] + sent[2]
    assert sent[3] == 0
    assert texts(both, requests) == [texts(both, [request])[0] for request in requests]


def test_the_clock_waits_for_the_sharers_device_too(
    receiver: Agent, sharer: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = channel(receiver, sharer)
    monkeypatch.setattr(Agent, "device", property(lambda agent: torch.device("cpu", int(agent.name == "a"))))
    assert [*made._devices] == [torch.device("cpu", 0), torch.device("cpu", 1)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_slots_stand_where_the_adapter_was_trained(placement: Any, receiver: Agent, sharer: Agent) -> None:
    adapter = slots_adapter(sharer.model, receiver.model)
    adapter.trained_placement = placement
    made = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)])
    told = channel(receiver, sharer, placement=placement)
    assert torch.equal(made.next_logits(REQUESTS)[0], told.next_logits(REQUESTS)[0])
    (entrant,) = (one for one in entrants(receiver, sharer, adapters=[adapter]) if one.name == "slots")
    assert entrant.settings["placement"] == placement
    (other,) = (one for one in PLACEMENTS if one != placement)
    with pytest.warns(UserWarning, match=f"trained with {placement!r}"):
        turned = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], placement=other)
    assert turned.placement == other
    assert float((turned.next_logits(REQUESTS)[0] - made.next_logits(REQUESTS)[0]).abs().max()) > 1e-3


def test_a_sharers_half_sends_as_the_adapter_does(receiver: Agent, sharer: Agent) -> None:
    """Its own, alone; and another's, of fewer slots, for whom the prompt's room is counted as they are."""
    adapter = slots_adapter(sharer.model, receiver.model)
    alone = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter.sharer_side())])
    assert torch.equal(alone.next_logits(REQUESTS)[0], channel(receiver, sharer).next_logits(REQUESTS)[0])
    second = agent("b", "llama", 4)
    side = SlotsSharerSide.for_receiver(adapter, CacheGeometry.of(second.model), slots=1)
    request = Request("Who?", "Six.", {"b": ("Paris is a city.",)})
    made = SlotsChannel(receiver, adapter.accept_sharer(side), [Sharer(second, side)])
    made.next_logits([request])
    words = len(receiver.prompts([request.asked()])[0])
    tight = agent("me", "qwen3", 1, limit=words + 2)  # room for the prompt, one slot and a token
    SlotsChannel(tight, adapter, [Sharer(second, side)]).check([request], 1)
    with pytest.raises(ShapeError, match="max_position_embeddings"):
        SlotsChannel(tight, adapter, [Sharer(second, side)]).check([request], 2)


def test_controls_send_something_else(receiver: Agent, sharer: Agent) -> None:
    def logits(control: str, requests: Sequence[Request]) -> Tensor:
        return channel(receiver, sharer, control=control).next_logits(requests)[0]

    requests = [replace(one, decoy=other) for one, other in zip(REQUESTS, REQUESTS[1:] + REQUESTS[:1])]
    found = {control: logits(control, requests) for control in CONTROLS}
    for i, one in enumerate(CONTROLS):
        for other in CONTROLS[:i]:
            assert float((found[one] - found[other]).abs().amax(1).min()) > 1e-3, (one, other)
    assert torch.equal(logits("random", requests), found["random"])
    told = [replace(one, sharer_contexts=one.decoy.sharer_contexts) for one in requests if one.decoy]
    assert torch.equal(logits("matched", told), found["mismatched"])
    with pytest.raises(GeometryError, match="decoy"):
        logits("mismatched", REQUESTS)


@pytest.mark.parametrize("per_span", [False, True])
def test_random_numbers_are_of_their_request(per_span: bool, receiver: Agent, sharer: Agent) -> None:
    """In whatever batch, also beside a request of more slots."""
    torch.manual_seed(5)
    sides = CacheGeometry.of(sharer.model), CacheGeometry.of(receiver.model)
    adapter = LatentSlots(LCFConfig(*sides, bottleneck=64, slots=2, per_span=per_span)).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(3.0)
    made = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], dtype="float32", control="random")
    whole = made.next_logits(REQUESTS)[0]
    alone = torch.cat([made.next_logits([request])[0] for request in REQUESTS])
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-3)
    matched = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], dtype="float32").next_logits(REQUESTS)[0]
    assert float((matched - whole).abs().amax(1).min()) > 1e-2


def test_generates_options_reach_it(receiver: Agent, sharer: Agent) -> None:
    made = channel(receiver, sharer)
    torch.manual_seed(0)
    sampled = made.answer(REQUESTS[:1], max_new_tokens=8, do_sample=True, num_return_sequences=3, top_k=0)
    assert len(sampled) == 3
    beams = made.answer(REQUESTS[:2], max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams[0].text == made.answer(REQUESTS[:1], max_new_tokens=4, num_beams=3, do_sample=False)[0].text


def test_the_evaluation_has_an_entrant_of_slots(receiver: Agent, sharer: Agent) -> None:
    adapter = slots_adapter(sharer.model, receiver.model)
    made = {one.name: one for one in entrants(receiver, sharer, adapters=[adapter], placement="prefix")}
    entrant = made["slots"]
    # The tiny models have one geometry: the adapter serves where the receiver is its own sharer, too.
    assert entrant.controls == CONTROLS
    assert entrant.context == "cross"
    assert entrant.settings["weights"] == digest_of({}, dict(adapter.named_parameters()))
    assert torch.equal(
        entrant.make("self").next_logits(REQUESTS)[0],
        entrant.make("self").next_logits([replace(one, sharer_contexts={"a": ("Nine.",)}) for one in REQUESTS])[0],
    )
    entrant.make("matched").check(REQUESTS, 4)
    assert entrant.settings["placement"] == "prefix"
    assert entrant.make("zero").next_logits(REQUESTS)[0].shape[0] == 3
    with pytest.raises(LCFError, match="one of a kind"):
        entrants(receiver, sharer, adapters=[adapter, adapter])


def test_what_is_refused(receiver: Agent, sharer: Agent) -> None:
    with pytest.raises(GeometryError, match="placement"):
        channel(receiver, sharer, placement="between")
    with pytest.raises(GeometryError, match="control"):
        channel(receiver, sharer, control="silence")
    with pytest.raises(IndexRangeError):
        channel(receiver, sharer, slots=4).answer(REQUESTS[:1])
    with pytest.raises(GeometryError, match="nobody"):
        channel(receiver, sharer).answer([Request("Who?", sharers=("nobody",))])
    adapter = slots_adapter(sharer.model, receiver.model)
    torch.manual_seed(77)
    stranger = LatentSlots(adapter.config).eval()
    with pytest.raises(MessageError):
        SlotsChannel(receiver, adapter, [Sharer(sharer, stranger)]).answer(REQUESTS[:1])
    other = agent("other", "qwen3", 3, layers=3)
    with pytest.raises(GeometryError, match="adapter"):
        SlotsChannel(other, adapter, [Sharer(sharer, adapter)])
    words = len(receiver.prompts([REQUESTS[0].asked()])[0])
    short = agent("short", "qwen3", 1, limit=words + 1)  # room for the prompt and a token, not for slots
    NoneChannel(short).answer(REQUESTS[:1], max_new_tokens=1)
    for call in (channel(short, sharer).answer, lambda some, max_new_tokens: channel(short, sharer).check(some, 1)):
        with pytest.raises(ShapeError, match="max_position_embeddings"):
            call(REQUESTS[:1], max_new_tokens=1)


def test_a_prefix_turns_by_the_frequencies_of_the_prompt_behind_it(sharer: Agent) -> None:
    model = family_model("llama", vocab_size=640, **by_length("longrope"))
    me = Agent("me", model, agent("me", "llama", 1).tokenizer)
    made = channel(me, sharer, placement="prefix", dtype="float32")
    request = replace(REQUESTS[0], context="Six seven. Eight nine ten eleven. " * 3)
    tokens = len(me.prompts([request.asked()])[0])
    assert tokens > 60
    prepared = made.prepare([request], Clock(me.device), 1)
    heard = torch.tensor([sharer.reader.text("One two three.\n\nFour five!")[0]])
    with torch.no_grad():
        message = made.adapter.summarize(prefill(sharer.model, heard, torch.ones_like(heard)))
        cache = made.adapter.prefix(model, message, length=tokens - 1 + 3)
    for (key, _), layer in zip(prepared.cache, cache.layers):
        torch.testing.assert_close(key[:, :, :3], layer.keys, rtol=1e-4, atol=1e-4)
    # As the model turns the same keys where it reads that far itself.
    bare = made.adapter.expand(message)[0][0]
    cos, sin = model.base_model.rotary_emb(bare, torch.arange(tokens + 2)[None])
    half = torch.cat([-bare[..., 8:], bare[..., :8]], -1)
    torch.testing.assert_close(cache.layers[0].keys, bare * cos[:, None, :3] + half * sin[:, None, :3])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_length_at_which_keys_turn_otherwise_is_not_crossed(family: str, placement: str, sharer: Agent) -> None:
    """By appended slots, behind a prompt within it; and by an answer of Phi-3, which forgets its cache there."""
    model = family_model(family, vocab_size=640, **by_length("longrope"))
    me = Agent("me", model, agent("me", "llama", 1).tokenizer)
    made = channel(me, sharer, placement=placement)
    request = replace(REQUESTS[0], context="Six seven. Eight nine ten eleven.")
    (prompt,) = me.prompts([request.asked()])
    held = len(prompt) - 1
    across = range(held, held + 3) if placement == "append" else range(0)
    if family == "phi3":
        across = range(held if placement == "append" else held + 3, held + 3 + 8)
    for most in range(held - 2, held + 14):
        model.config.rope_parameters["original_max_position_embeddings"] = most
        if family == "phi3":
            model.config.original_max_position_embeddings = most
        if most in across:
            with pytest.raises(ShapeError, match=f"within {most} tokens"):
                made.check([request], 8)
            with pytest.raises(ShapeError, match=f"within {most} tokens"):
                texts(made, [request])
        else:
            made.check([request], 8)
            texts(made, [request])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_slide_out_of_a_window_as_they_do_alone(placement: str, sharer: Agent) -> None:
    """A window counts columns: neither padding nor another row's slots take any of it."""
    me = agent("me", "mistral", 1)
    longer = replace(REQUESTS[1], context="Six seven. Eight nine ten eleven. " * 3)
    requests = [replace(REQUESTS[2], context="Six."), longer, replace(REQUESTS[1], sharers=())]
    lengths = [len(prompt) for prompt in me.prompts([request.asked() for request in requests])]
    me.model.config.sliding_window = min(lengths) + 6
    assert max(lengths) > me.model.config.sliding_window + 20
    made = channel(me, sharer, placement=placement)
    made.check(requests, 8)
    alone = torch.cat([made.next_logits([request])[0] for request in requests])
    torch.testing.assert_close(made.next_logits(requests)[0], alone, rtol=1e-4, atol=1e-4)
    assert texts(made, requests) == [texts(made, [request])[0] for request in requests]
    nobody = NoneChannel(me).next_logits(requests[:1])[0]
    assert float((alone[0] - nobody[0]).abs().max()) > 1e-2
