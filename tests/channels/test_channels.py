"""Channels over `generate()`: what is read, what is edited, what crosses; a row's answer is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_agents import adapter_of, agent, tiny_model
from tiny_tokenizers import CHATML_SYSTEM
from torch import Tensor

from lcf_fast import CacheGeometry, LatentCacheFlow
from lcf_fast.channels import (
    Agent,
    Channel,
    FullContextChannel,
    LCFChannel,
    LCFXChannel,
    NoneChannel,
    Request,
    Sharer,
    TextChannel,
)
from lcf_fast.channels.clock import Clock
from lcf_fast.channels.controls import CONTROLS, Noise, controlled_cache, controlled_message
from lcf_fast.errors import BackendError, DTypeError, GeometryError, LCFError, MessageError, ShapeError, SpanError
from lcf_fast.sharer import SharerSide

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma")
REQUESTS = [
    Request("Where is it?", "The cat sat.", {"a": ("One two three.", "Four five!")}),
    Request("Who?", "Six seven. Eight nine ten eleven.", {"a": ("Paris is a city.",)}),
    Request("What is the capital of France?", "", {"a": ("Twelve.", "You are a user.", "Nine.")}),
]


@pytest.fixture(scope="module")
def receiver() -> Agent:
    return agent("me", "qwen3", 1)


def channels_of(receiver: Agent, name: str, family: str = "qwen2") -> Channel:
    """A channel by name, with one sharer ``a`` of another family and another tokenizer."""
    if name == "none":
        return NoneChannel(receiver)
    if name == "full_context":
        return FullContextChannel(receiver)
    sharer = agent("a", family, 2, template=CHATML_SYSTEM)
    if name == "text":
        return TextChannel(receiver, [sharer], most_tokens=5)
    made = adapter_of(sharer, receiver, cross_context=name == "lcf_x")
    return LCFXChannel(receiver, made, [Sharer(sharer, made)]) if name == "lcf_x" else LCFChannel(
        receiver, [Sharer(sharer, made)])  # fmt: skip


NAMES = ("none", "full_context", "text", "lcf", "lcf_x")


def texts(channel: Channel, requests: Sequence[Request], **options: Any) -> list[str]:
    return [answer.text for answer in channel.answer(requests, max_new_tokens=8, do_sample=False, **options)]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(name: str, receiver: Agent) -> None:
    """Permuted, dropped, padded by a longer one: the same logits, to rounding, and the same answer."""
    channel = channels_of(receiver, name)
    whole, sent, _ = channel.next_logits(REQUESTS)
    alone = [channel.next_logits([request]) for request in REQUESTS]
    for row, (logits, size, _) in enumerate(alone):
        torch.testing.assert_close(whole[row], logits[0], rtol=1e-4, atol=1e-4)
        assert sent[row] == size[0]
    turned, _, _ = channel.next_logits(REQUESTS[::-1])
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-4, atol=1e-4)
    assert texts(channel, REQUESTS) == [texts(channel, [request])[0] for request in REQUESTS]


@pytest.mark.parametrize("name", NAMES)
def test_the_clock_waits_for_the_sharers_device_too(
    name: str, receiver: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agent, "device", property(lambda agent: torch.device("cpu", int(agent.name == "a"))))
    clocks: list[tuple[torch.device, ...]] = []

    class Watched(Clock):
        def __init__(self, *devices: torch.device) -> None:
            clocks.append(devices)
            raise TimeoutError

    monkeypatch.setattr("lcf_fast.channels.base.Clock", Watched)
    channel = channels_of(receiver, name)
    for call in (channel.answer, channel.next_logits):
        with pytest.raises(TimeoutError):
            call(REQUESTS)
    own = [torch.device("cpu", 0)]
    assert [*map(list, clocks)] == 2 * [own if name in ("none", "full_context") else [*own, torch.device("cpu", 1)]]


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_generate_would_drop_is_refused(name: str) -> None:
    """Phi-3 reads anew where it goes beyond a length, and has forgotten what was edited: only a plain cache may go."""
    me = agent("me", "phi3", 1)
    channel, request = channels_of(me, name), REQUESTS[1]
    held = len(me.prompts([request.asked()])[0]) - 1
    fed: list[int] = []
    hook = me.model.register_forward_pre_hook(lambda _, a, kw: fed.append(kw["input_ids"].shape[1]), with_kwargs=True)
    me.model.generation_config.eos_token_id = None
    for most, is_across in [(held - 1, False), (held, True), (held + 7, True), (held + 8, False)]:
        me.model.config.original_max_position_embeddings = most
        if name.startswith("lcf") and is_across:
            for call in (lambda: texts(channel, [request]), lambda: channel.check([request], 8)):
                with pytest.raises(ShapeError, match=f"within {most} tokens"):
                    call()
            continue
        fed.clear()
        channel.check([request], 8)
        texts(channel, [request])
        if name.startswith("lcf"):
            assert fed == [1] * 8, "the cache was dropped"
        channel.next_logits([request])
    hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_serves_on_both_sides(family: str) -> None:
    receiver = agent("me", family, 1)
    plain, _, _ = NoneChannel(receiver).next_logits(REQUESTS)
    for name in ("lcf", "lcf_x"):
        channel = channels_of(receiver, name, family)
        logits, sent, timings = channel.next_logits(REQUESTS)
        assert float((logits - plain).abs().max()) > 1e-2, "no edit"
        assert min(sent) > 0
        assert 0 < timings.sharer + timings.communication + timings.receiver <= timings.first_token <= timings.end


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_channel_is_what_generate_says_by_itself(attention: str, receiver: Agent) -> None:
    receiver.model.set_attn_implementation(attention)
    request = REQUESTS[0]
    ids = receiver.prompts([request.asked()])[0]
    out = receiver.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=8, do_sample=False
    )
    (answer,) = NoneChannel(receiver).answer([request], max_new_tokens=8, do_sample=False)
    assert NoneChannel(receiver).launches([request]) is None  # there is no GPU to launch on
    assert answer.ids.tolist() == out[0, len(ids) :].tolist()
    assert answer.sent == 0
    receiver.model.set_attn_implementation("sdpa")


def test_full_context_reads_what_the_sharers_read(receiver: Agent) -> None:
    (answer,) = FullContextChannel(receiver).answer(REQUESTS[:1], max_new_tokens=8, do_sample=False)
    told = Request(REQUESTS[0].question, "One two three.\n\nFour five!\n\nThe cat sat.")
    (same,) = NoneChannel(receiver).answer([told], max_new_tokens=8, do_sample=False)
    assert answer.ids.tolist() == same.ids.tolist()
    assert answer.sent == len("One two three.\n\nFour five!")
    assert FullContextChannel(receiver).crossed(Request("Who?", "", {"a": ("Ünï", "x")})) == 8, "bytes, not characters"


def test_text_is_what_the_sharer_writes(receiver: Agent) -> None:
    channel = channels_of(receiver, "text")
    assert isinstance(channel, TextChannel)
    sharer = channel.sharers["a"]
    (answer,) = channel.answer(REQUESTS[:1], max_new_tokens=8, do_sample=False)
    asked = "\n\n".join(("One two three.\n\nFour five!", channel.instruction, REQUESTS[0].question))
    ids = sharer.prompts([[("user", asked)]])[0]
    out = sharer.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=5, do_sample=False
    )
    note = sharer.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    told = replace(REQUESTS[0], context=f"{note}\n\n{REQUESTS[0].context}" if note else REQUESTS[0].context)
    assert texts(NoneChannel(receiver), [told]) == [answer.text]
    assert answer.sent == len(note.encode())


@pytest.fixture
def unpadded() -> tuple[Agent, int]:
    """An agent whose tokenizer has no padding and a word as token 0, and a token that it says to the first request
    alone, not at once."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Every id of the model's is a character.
    vocabulary = {token: i for i, token in enumerate([*map(chr, range(ord("!"), ord("!") + 638)), " ", "\n"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = Agent("a", tiny_model("qwen2", 2), PreTrainedTokenizerFast(tokenizer_object=characters))
    made.model.generation_config.eos_token_id = None
    said = [answer.ids.tolist() for answer in NoneChannel(made).answer(REQUESTS, max_new_tokens=8, do_sample=False)]
    end = next(token for token in said[0][1:6] if token != said[0][0] and token not in said[1] + said[2])
    return made, end


def test_a_note_ends_where_it_ends_alone(receiver: Agent, unpadded: tuple[Agent, int]) -> None:
    """What fills up the shorter notes of a batch is no part of them, whatever token it is."""
    sharer, _ = unpadded
    channel = TextChannel(receiver, [sharer], most_tokens=8)
    rows = sharer.prompts(channel._asked(sharer, REQUESTS))
    said = [
        sharer.model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row) :] for row in rows
    ]
    written = [row.tolist() for row in said]
    sharer.model.generation_config.eos_token_id = next(t for t in written[0][1:6] if t not in written[1] + written[2])
    alone = [channel._write(sharer, [request])[0] for request in REQUESTS]
    assert len(alone[0]) < len(sharer.tokenizer.decode(written[0]).strip()), "it did not end early"
    assert channel._write(sharer, REQUESTS) == alone


def test_an_answer_ends_where_it_ends_alone(unpadded: tuple[Agent, int]) -> None:
    """By whatever way ``generate`` is told what ends one."""
    from transformers import GenerationConfig

    made, end = unpadded
    channel = NoneChannel(made)
    for options in (
        {"eos_token_id": end},
        {"eos_token_id": [end, 3]},
        {"generation_config": GenerationConfig(eos_token_id=end)},
    ):
        whole = channel.answer(REQUESTS, max_new_tokens=8, do_sample=False, **options)
        alone = [channel.answer([request], max_new_tokens=8, do_sample=False, **options)[0] for request in REQUESTS]
        assert len(whole[0].ids) < 8
        assert [answer.ids.tolist() for answer in whole] == [answer.ids.tolist() for answer in alone]
        assert [answer.text for answer in whole] == [answer.text for answer in alone]
    made.model.generation_config.eos_token_id = end
    (told,) = channel.answer(REQUESTS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert len(told.ids) == 8, "cut where generate was told not to end"


def test_padding_is_never_a_word_where_there_is_another_token(unpadded: tuple[Agent, int]) -> None:
    made, _ = unpadded
    assert made.padding() == 0
    made.tokenizer.eos_token = made.tokenizer.convert_ids_to_tokens(7)
    assert made.padding() == 7
    made.tokenizer.pad_token = made.tokenizer.convert_ids_to_tokens(9)
    assert made.padding() == 9


def test_a_note_stands_in_its_template(receiver: Agent) -> None:
    """With the receiver's own question, whoever's note it is; what crosses is the note alone."""
    plain = channels_of(receiver, "text")
    assert isinstance(plain, TextChannel)
    sharers = list(plain.sharers.values())
    requests = [replace(one, decoy=other) for one, other in zip(REQUESTS, REQUESTS[1:] + REQUESTS[:1])]
    for control in ("matched", "mismatched"):
        bare = TextChannel(receiver, sharers, most_tokens=5, control=control)
        framed = TextChannel(receiver, sharers, most_tokens=5, control=control, template="{question}: <{note}>")
        told = requests if control == "matched" else [one.decoy for one in requests if one.decoy]
        notes = bare._write(sharers[0], told)
        answers = framed.answer(requests, max_new_tokens=4, do_sample=False)
        assert [answer.sent for answer in answers] == [len(note.encode()) for note in notes]
        for request, note, answer in zip(requests, notes, answers):
            context = "\n\n".join(part for part in (f"{request.question}: <{note}>", request.context) if part)
            (same,) = NoneChannel(receiver).answer(
                [Request(request.question, context)], max_new_tokens=4, do_sample=False
            )
            assert same.text == answer.text
    for template in ("no place", "{note} {answer}", "{note} {", "{}"):
        with pytest.raises(GeometryError, match="template"):
            TextChannel(receiver, sharers, template=template)


def test_a_note_of_the_receivers_own_says_nothing_of_the_sharers(receiver: Agent) -> None:
    own = TextChannel(receiver, [receiver.called("a")], most_tokens=5, control="self")
    other = [replace(one, sharer_contexts={"a": ("Nine.",)}) for one in REQUESTS]
    assert texts(own, other) == texts(own, REQUESTS)
    with pytest.raises(GeometryError, match="of text"):
        TextChannel(receiver, [receiver.called("a")], control="zero")


def test_a_context_is_cut_as_asked(receiver: Agent) -> None:
    sharer = agent("a", "qwen2", 2)
    parts = ("One two three. Four five!", "Six seven.")
    text = "\n\n".join(parts)
    ids, paragraphs = sharer.reader.paragraphs(parts)
    cut = {spans: sharer.reader.paragraphs(parts, spans=spans) for spans in ("sentences", "one", "windows:4")}
    assert all(found[0] == ids for found in cut.values())
    assert [len(found) for _, found in cut.values()] == [3, 1, -(-len(ids) // 4)]
    assert len(paragraphs) == 2
    assert cut["sentences"][1][0][0] == paragraphs[0][0]
    assert cut["sentences"][1][1][1] == paragraphs[0][1], "two sentences make the first paragraph"
    offsets = sharer.reader.text(text)[1]
    assert offsets is not None
    first, last = cut["sentences"][1][1]
    assert text[offsets[first][0] : offsets[last - 1][1]].strip().startswith("Four five!")
    assert cut["windows:4"][1] == [(0, 4), (4, len(ids))]
    adapter = adapter_of(sharer, receiver, cross_context=True)
    with torch.no_grad():
        adapter.span_query.mul_(100.0)  # type: ignore[operator]
        adapter.global_query.mul_(100.0)  # type: ignore[operator]
    logits = [
        LCFXChannel(receiver, adapter, [Sharer(sharer, adapter)], spans=spans).next_logits(
            [Request("Who?", "", {"a": parts})]
        )[0]
        for spans in ("paragraphs", *cut)
    ]
    for i, one in enumerate(logits):
        assert all(float((one - other).abs().max()) > 1e-4 for other in logits[:i])
    with pytest.raises(DTypeError, match="dtype"):
        LCFXChannel(receiver, adapter, [Sharer(sharer, adapter)], dtype="foo")
    for bad in ("windows", "windows:0", "windows:-3", "windows:x", "words", "one:2", "windows:N"):
        with pytest.raises(SpanError, match="spans"):
            LCFXChannel(receiver, adapter, [Sharer(sharer, adapter)], spans=bad)


def test_lcf_edits_with_the_same_tokens_what_fuse_edits(receiver: Agent) -> None:
    """One tokenizer: the edit is that of `fuse` on both caches of the prompt but its last token."""
    sharer = Agent("a", tiny_model("qwen2", 4), receiver.tokenizer)
    adapter = adapter_of(sharer, receiver, cross_context=False)
    logits, sent, _ = LCFChannel(receiver, [Sharer(sharer, adapter)]).next_logits(REQUESTS[:1])
    ids = torch.tensor(receiver.prompts([REQUESTS[0].asked()]))
    with torch.no_grad():
        caches = [one.model(ids[:, :-1], use_cache=True).past_key_values for one in (sharer, receiver)]
        expected = receiver.model(ids[:, -1:], past_key_values=adapter.fuse(*caches)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert sent == [(ids.shape[1] - 1) * 2 * 2 * 16 * 4]  # layers x (key, value) x channels x float32


def test_lcf_x_sends_what_to_bytes_makes(receiver: Agent) -> None:
    channel = channels_of(receiver, "lcf_x")
    assert isinstance(channel, LCFXChannel)
    short, long = (Request("Who?", "", {"a": ("One two.",) * n}) for n in (1, 20))
    sizes = [channel.next_logits([one])[1][0] for one in (short, long)]
    assert abs(sizes[0] - sizes[1]) < 64, "a message grows with what was read"
    latent = 2 * 64 * 2  # layers x width x bfloat16
    assert latent < sizes[0] < latent + 1024 + 64
    wide = LCFXChannel(receiver, channel.adapter, list(channel.sharers.values()), dtype="float32")
    assert abs(wide.next_logits([short])[1][0] - sizes[0] - latent) < 64, "not in the dtype that was asked for"


def test_several_sharers_add_up_and_requests_choose(receiver: Agent) -> None:
    first, second = agent("a", "qwen2", 2), agent("b", "llama", 4)
    adapter = adapter_of(first, receiver, cross_context=True)
    torch.manual_seed(9)
    side = SharerSide.for_receiver(adapter, CacheGeometry.of(second.model))
    adapter.accept_sharer(side)
    channel = LCFXChannel(receiver, adapter, [Sharer(first, adapter), Sharer(second, side)])
    told = {"a": ("One two three.",), "b": ("Paris is a city.",)}
    requests = [Request("Who?", "Six.", told, sharers=names) for names in (None, ("a",), ("b",), ())]
    logits, sent, _ = channel.next_logits(requests)
    for i in range(4):
        for j in range(i):
            assert float((logits[i] - logits[j]).abs().max()) > 1e-3, (i, j)
    alone = torch.cat([channel.next_logits([request])[0] for request in requests])
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
    nobody, _, _ = NoneChannel(receiver).next_logits([Request("Who?", "Six.")])
    torch.testing.assert_close(logits[3], nobody[0], rtol=1e-4, atol=1e-4)
    assert sent[0] == sent[1] + sent[2]
    assert sent[3] == 0


def test_rows_of_a_shared_context_batch_choose_their_sharers(receiver: Agent) -> None:
    sharers = [agent("a", "qwen2", 2), agent("b", "llama", 4)]
    channel = LCFChannel(receiver, [Sharer(one, adapter_of(one, receiver, cross_context=False)) for one in sharers])
    requests = [Request("Who?", "Six seven.", sharers=names) for names in (("a",), (), ("b",), None)]
    logits, sent, _ = channel.next_logits(requests)
    alone = torch.cat([channel.next_logits([request])[0] for request in requests])
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
    assert sent[1] == 0
    assert sent[3] == sent[0] + sent[2]


def test_generates_options_reach_it(receiver: Agent) -> None:
    from transformers import StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

    channel = channels_of(receiver, "lcf_x")

    class AfterThree(StoppingCriteria):  # type: ignore[misc]
        start: int | None = None

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            self.start = input_ids.shape[1] - 1 if self.start is None else self.start
            return torch.full((len(input_ids),), input_ids.shape[1] - self.start >= 3)

    class Counter(BaseStreamer):  # type: ignore[misc]
        puts = 0

        def put(self, value: Tensor) -> None:
            self.puts += 1

        def end(self) -> None: ...

    counter = Counter()
    (answer,) = channel.answer(REQUESTS[:1], max_new_tokens=8, stopping_criteria=[AfterThree()], streamer=counter)
    assert len(answer.ids) <= 3
    assert counter.puts >= len(answer.ids)
    torch.manual_seed(0)
    sampled = channel.answer(REQUESTS[:1], max_new_tokens=8, do_sample=True, num_return_sequences=3, top_k=0)
    assert len(sampled) == 3
    assert len({tuple(one.ids.tolist()) for one in sampled}) > 1
    whole = FullContextChannel(receiver)
    told = whole.answer(REQUESTS[:2], max_new_tokens=1, do_sample=True, num_return_sequences=2)
    one, other = (whole.crossed(request) for request in REQUESTS[:2])
    assert [answer.sent for answer in told] == [one, one, other, other] and one != other
    beams = channel.answer(REQUESTS[:2], max_new_tokens=4, num_beams=3, do_sample=False)
    assert len(beams) == 2
    assert beams[0].text == channel.answer(REQUESTS[:1], max_new_tokens=4, num_beams=3, do_sample=False)[0].text


@pytest.mark.parametrize(
    ("option", "value"),
    [("use_cache", False), ("cache_implementation", "static"), ("prompt_lookup_num_tokens", 3), ("use_mtp", True)],
)
def test_generate_goes_on_from_the_cache(option: str, value: Any, receiver: Agent) -> None:
    """Whatever the model's generation config says; the caller who says otherwise would lose the message."""
    from transformers import GenerationConfig

    if not hasattr(GenerationConfig(), option):  # of another transformers
        return
    channel, own, given = channels_of(receiver, "lcf_x"), receiver.model.generation_config, GenerationConfig()
    (expected,) = channel.answer(REQUESTS[:1], max_new_tokens=8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(own, option, value)
        (answer,) = channel.answer(REQUESTS[:1], max_new_tokens=8)
    assert torch.equal(answer.ids, expected.ids)
    setattr(given, option, value)
    for options in ({option: value}, {"generation_config": given}):
        with pytest.raises(BackendError, match=f"{option}: .* lose what was communicated"):
            channel.answer(REQUESTS[:1], **options)


def test_an_assistant_model_is_refused(receiver: Agent) -> None:
    with pytest.raises(BackendError, match=r"assistant_model: .* got Qwen3ForCausalLM$"):
        NoneChannel(receiver).answer(REQUESTS[:1], assistant_model=receiver.model)


@pytest.mark.parametrize("name", ["lcf", "lcf_x"])
@pytest.mark.parametrize("same_tokens", [False, True])
def test_controls_send_something_else(name: str, same_tokens: bool, receiver: Agent) -> None:
    sharer = agent("a", "qwen2", 2, template=CHATML_SYSTEM)
    if same_tokens:
        sharer = Agent("a", sharer.model, receiver.tokenizer)
    adapter = adapter_of(sharer, receiver, cross_context=name == "lcf_x")

    def logits(control: str, requests: Sequence[Request]) -> Tensor:
        one = [Sharer(receiver.called("a") if control == "self" else sharer, adapter)]
        channel = LCFXChannel(receiver, adapter, one, control=control) if name == "lcf_x" else LCFChannel(
            receiver, one, control=control)  # fmt: skip
        return channel.next_logits(requests)[0]

    requests = [replace(one, decoy=other) for one, other in zip(REQUESTS, REQUESTS[1:] + REQUESTS[:1])]
    found = {control: logits(control, requests) for control in CONTROLS}
    for i, one in enumerate(CONTROLS):
        for other in CONTROLS[:i]:
            assert float((found[one] - found[other]).abs().amax(1).min()) > 1e-3, (one, other)
    assert torch.equal(logits("random", requests), found["random"])
    assert torch.equal(logits("matched", REQUESTS), found["matched"])
    if name == "lcf_x":  # what the decoys' message does is what it does when it is sent openly
        told = [replace(one, sharer_contexts=one.decoy.sharer_contexts) for one in requests if one.decoy]
        assert torch.equal(logits("matched", told), found["mismatched"])
        # Of its own, the receiver sends what it has read itself, whatever the sharers have.
        others = [replace(one, sharer_contexts={"a": ("Nine.",)}) for one in requests]
        assert torch.equal(logits("self", others), found["self"])
        assert not torch.equal(logits("self", [replace(one, context="Nine.") for one in requests]), found["self"])
    with pytest.raises(GeometryError, match="decoy"):
        logits("mismatched", REQUESTS)
    with pytest.raises(GeometryError, match="decoy"):
        logits("mismatched", [replace(REQUESTS[0], decoy=REQUESTS[0])])
    with pytest.raises(GeometryError, match="control"):
        logits("silence", REQUESTS)


def test_random_numbers_have_the_moments_of_what_they_replace() -> None:
    cache = [(3 + 2 * torch.randn(2, 1, 400, 4), torch.randn(2, 1, 400, 4) - 5)]
    mask = torch.ones(2, 400)
    mask[0, :100] = 0
    cache[0][0][0, :, :100] = 1e6  # padding counts for nothing
    ((key, value),) = controlled_cache(cache, mask, "random", Noise(REQUESTS[:2], "a", 0))
    for made, mean, deviation in ((key, 3.0, 2.0), (value, -5.0, 1.0)):
        assert float((made.mean(2) - mean).abs().max()) < 0.6
        assert float((made.std(2) - deviation).abs().max()) < 0.5
    # Of one token each channel's mean is its content; a head's over its channels is not.
    short = torch.tensor([[0.0, 10, 20, 30], [1000.0, 1010, 1020, 1030]])[None, :, None]
    ((key, _),) = controlled_cache([(short, short)], torch.ones(1, 1), "random", Noise(REQUESTS[:1], "a", 0))
    assert float((key - short).abs().max()) > 5 and float((key - short).abs().max()) < 100

    @dataclass
    class Told:
        latent: Tensor

    layers = torch.stack([3 + 2 * torch.randn(1, 400), 0.5 * torch.randn(1, 400) - 50])
    drawn = controlled_message(Told(layers), "random", Noise(REQUESTS[:1], "a", 0), 0).latent  # type: ignore[arg-type]
    assert drawn is not None and not torch.equal(drawn, layers)
    assert drawn.mean(2).flatten().tolist() == pytest.approx([3.0, -50.0], abs=0.4)
    assert drawn.std(2).flatten().tolist() == pytest.approx([2.0, 0.5], rel=0.2)


@pytest.mark.parametrize("name", ["lcf", "lcf_x"])
def test_random_numbers_are_of_their_request(name: str, receiver: Agent) -> None:
    """Whatever batch it is in and wherever there; and of another question, sharer or seed they are others."""
    sharer = agent("a", "qwen2", 2, template=CHATML_SYSTEM)
    adapter = adapter_of(sharer, receiver, cross_context=name == "lcf_x")

    def logits(requests: Sequence[Request], seed: int = 0) -> Tensor:
        one = [Sharer(sharer, adapter)]
        told: dict[str, Any] = {"control": "random", "seed": seed}
        channel = LCFXChannel(receiver, adapter, one, dtype="float32", **told) if name == "lcf_x" else LCFChannel(
            receiver, one, **told)  # fmt: skip
        return channel.next_logits(requests)[0]

    whole = logits(REQUESTS)
    torch.testing.assert_close(torch.cat([logits([one]) for one in REQUESTS]), whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(REQUESTS[::-1]).flip(0), whole, rtol=1e-3, atol=1e-3)
    assert float((logits(REQUESTS, 1) - whole).abs().amax(1).min()) > 1e-2


def test_no_two_questions_get_the_same_random_numbers() -> None:
    """Nor two sharers of one question, nor two that share their contexts: of 40 no pair is alike."""
    asked = [Request(f"Who is {i}?", "One.", {"a": (f"Two {i % 4}.",)}) for i in range(40)]
    drawn = [Noise(asked, "a", 42).generator(row) for row in range(40)]
    drawn += [Noise(asked, "b", 42).generator(0), Noise(asked, "a", 43).generator(0)]
    numbers = torch.stack([torch.randn(400, generator=one) for one in drawn])
    alike = torch.corrcoef(numbers) - torch.eye(len(drawn))
    assert float(alike.abs().max()) < 0.3
    again = torch.randn(400, generator=Noise(asked[7:8], "a", 42).generator(0))
    assert torch.equal(again, numbers[7])
    # Of version and process independent: what Python's own hash is not.
    assert Noise(asked, "a", 42).generator(0).initial_seed() == 2804217770


def other_pair(receiver: Agent) -> Channel:
    sharer = agent("a", "qwen2", 2)
    wrong = adapter_of(sharer, agent("other", "qwen3", 3, layers=3), cross_context=False)
    return LCFChannel(receiver, [Sharer(sharer, wrong)])


def unknown_sharer(receiver: Agent) -> Any:
    return channels_of(receiver, "lcf").answer([Request("Who?", sharers=("nobody",))])


def too_long(receiver: Agent) -> Any:
    return NoneChannel(agent("short", "qwen3", 1, limit=16)).answer([Request("Who? " * 10)])


def stranger(receiver: Agent) -> Any:
    """A sharer's half that the receiver's adapter does not know."""
    sharer = agent("a", "qwen2", 2)
    adapter = adapter_of(sharer, receiver, cross_context=True)
    torch.manual_seed(77)
    foreign = SharerSide.of(LatentCacheFlow(adapter.config))
    return LCFXChannel(receiver, adapter, [Sharer(sharer, foreign)]).answer(REQUESTS[:1])


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (lambda r: Request("  "), GeometryError, "question"),
        (lambda r: Request("Who?", "", {"a": ()}), GeometryError, "paragraph"),
        (lambda r: Request("Who?", "", {"a": ("x", " ")}), GeometryError, "paragraph"),
        (lambda r: NoneChannel(r).answer([]), GeometryError, "requests"),
        (other_pair, GeometryError, "adapter"),
        (unknown_sharer, GeometryError, "nobody"),
        (too_long, ShapeError, "max_position_embeddings"),
        (stranger, MessageError, "message"),
        (lambda r: TextChannel(r, [], most_tokens=0), GeometryError, "most_tokens"),
    ],
)
def test_bad_input(act: Any, error: type[LCFError], match: str, receiver: Agent) -> None:
    with pytest.raises(error, match=match):
        act(receiver)


def test_a_tokenizer_without_offsets_is_refused_where_they_are_needed(receiver: Agent) -> None:
    sharer = agent("a", "qwen2", 2)
    adapter = adapter_of(sharer, receiver, cross_context=True)

    class Slow:
        is_fast = False
        chat_template, bos_token_id, eos_token_id, pad_token_id = None, None, 4, 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [5] * len(text)}

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return ""

    slow = Agent("a", sharer.model, Slow())
    with pytest.raises(LCFError, match="fast tokenizer"):
        LCFXChannel(receiver, adapter, [Sharer(slow, adapter)]).answer(REQUESTS[:1])
