"""KVComm against plain concatenation, and against attention written out layer by layer."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import CHATML, tiny_tokenizer
from torch import Tensor

pytest.importorskip("transformers")

from lcf_fast.channels import Agent, NoneChannel, Request
from lcf_fast.channels.base import Clock
from lcf_fast.channels.kvcomm import KVCommChannel, LayerSelection
from lcf_fast.channels.kvcomm_selection import layer_scores, top_layers
from lcf_fast.errors import BackendError, CheckpointError, GeometryError, IndexRangeError, ShapeError

KINDS = ("Qwen2", "Qwen3", "Llama", "Mistral", "Gemma")
LAYERS = 4
TOKENIZER = tiny_tokenizer(template=CHATML)
#: Contexts and prompts of different lengths, the longest of each in different rows; the last is nobody's.
REQUESTS = [
    Request("Who?", "Six seven.", {"a": ("Paris is a city.",)}),
    Request("Where is it that the cat sat?", "The cat sat.", {"a": ("One two three.", "Four five! Six seven eight.")}),
    Request("What is the capital?", "", {"a": ("Twelve.",)}),
    Request("How many are there?", "Nine ten."),
]


def model(kind: str = "Qwen3", *, seed: int = 1, attention: str = "sdpa", **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": TOKENIZER.eos_token_id,
        **changes,
    }
    torch.manual_seed(seed)
    import transformers

    named = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{named}Config")(**sizes, attn_implementation=attention)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # answers and attention that depend on what is read
    return made


def pair(made: Any) -> tuple[Agent, Agent]:
    return Agent("me", made, TOKENIZER), Agent("a", made, TOKENIZER)


def channel_of(made: Any, **keywords: Any) -> KVCommChannel:
    receiver, sharer = pair(made)
    return KVCommChannel(receiver, [sharer], **keywords)


def tokens(request: Request) -> tuple[list[int], list[int]]:
    """Of the context and of the prompt."""
    agent = Agent("", model(), TOKENIZER)
    context = "\n\n".join(request.sharer_contexts.get("a", ()))
    return agent.reader.text(context)[0] if context else [], agent.prompts([request.asked()])[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


# --- the reference: one row, no cache, attention by hand
# --------------------------------------------------------


@torch.no_grad()
def by_hand(
    made: Any, context: list[int], prompt: list[int], whole: set[int], *, second: Any = (), original: bool = False
) -> Tensor:
    """``(V,)`` float32 logits of a Qwen3 or Llama model after ``prompt``; layers outside ``whole`` see a sink alone.

    ``second``: another sharer's context, whose sink they see, too.
    """
    size, parts = 0, [list(part) for part in (context, second) if part]
    given: list[Any] = [None] * LAYERS
    for part in parts:
        heard: list[tuple[Tensor, Tensor]] = []
        through(made, part, size, [None] * LAYERS, lambda layer, n: causal(n, 0), heard)
        for layer, pair in enumerate(heard):
            crossing = pair if layer in whole else (pair[0][:, :1], pair[1][:, :1])
            before = given[layer]
            given[layer] = crossing if before is None else [torch.cat(both, 1) for both in zip(before, crossing)]
        size += len(part)

    def mask(layer: int, n: int) -> Tensor:
        if layer in whole:
            return causal(n, size)
        if not original:
            return causal(n, len(parts))
        # What the original does: the whole mask's first columns, as many as the layer has keys.
        return causal(n, size)[:, : n + len(parts)]

    hidden = through(made, prompt, size, given, mask, [])
    return made.lm_head(made.model.norm(hidden))[-1].float()


def causal(queries: int, before: int) -> Tensor:
    return torch.ones(queries, before + queries, dtype=torch.bool).tril(before)


def through(made: Any, ids: list[int], start: int, given: list[Any], mask: Any, kept: list[Any]) -> Tensor:
    """Hidden states ``(n, width)`` after all layers; their keys and values ``(H, n, D)`` are appended to ``kept``."""
    hidden = made.model.embed_tokens(torch.tensor(ids))
    dim, rotary = 8, torch.arange(0, 8, 2).float() / 8
    theta = made.config.rope_parameters["rope_theta"]
    angles = torch.outer(torch.arange(start, start + len(ids)).float(), theta**-rotary)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

    def turned(x: Tensor) -> Tensor:
        first, second = x.split(dim // 2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    for layer, block in enumerate(made.model.layers):
        a, normed = block.self_attn, block.input_layernorm(hidden)
        q, k, v = (f(normed).view(len(ids), -1, dim) for f in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        q, k, v = turned(q.transpose(0, 1)), turned(k.transpose(0, 1)), v.transpose(0, 1)
        kept.append((k, v))
        if given[layer] is not None:
            k, v = torch.cat([given[layer][0], k], 1), torch.cat([given[layer][1], v], 1)
        k, v = (x.repeat_interleave(2, 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2)) / dim**0.5
        weights = scores.masked_fill(~mask(layer, len(ids)), -torch.inf).softmax(-1)
        hidden = hidden + a.o_proj((weights @ v).transpose(0, 1).reshape(len(ids), -1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return hidden


# --- logits
# ---------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_layers_are_a_plain_concatenation(kind: str, attention: str) -> None:
    made = model(kind, attention=attention)
    found, _, _ = channel_of(made, ratio=1.0).next_logits(REQUESTS)
    for row, request in zip(found, REQUESTS):
        context, prompt = tokens(request)
        close(row, made(input_ids=torch.tensor([context + prompt])).logits[0, -1].float())
    assert made.config._attn_implementation == attention


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("layers", [(0,), (1, 3), (2,)])
@pytest.mark.parametrize(("kind", "attention"), [("Qwen3", "sdpa"), ("Qwen3", "eager"), ("Llama", "sdpa")])
def test_some_layers_are_as_written_out_by_hand(
    kind: str, attention: str, layers: tuple[int, ...], original: bool
) -> None:
    """In a batch of contexts and prompts of different lengths; layer 0 is whole, asked for or not."""
    made = model(kind, attention=attention)
    found, _, _ = channel_of(made, layers=layers, original_mask=original).next_logits(REQUESTS)
    for row, request in zip(found, REQUESTS):
        close(row, by_hand(made, *tokens(request), {0, *layers}, original=original))


def test_the_cases_differ() -> None:
    """Sharing other layers, or by the original's mask, gives other logits: the reference above tells them apart."""
    made = model()
    ways: list[dict[str, Any]] = [
        {"ratio": 1.0},
        {"layers": (1, 3)},
        {"layers": (2,)},
        {"layers": (2,), "original_mask": True},
    ]
    found = [channel_of(made, **way).next_logits(REQUESTS[:1])[0] for way in ways]
    found.append(NoneChannel(pair(made)[0]).next_logits(REQUESTS[:1])[0])
    for i, one in enumerate(found):
        for other in found[:i]:
            assert float((one - other).abs().max()) > 1e-2 * float(one.abs().max())


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "Gemma"])
def test_rows_do_not_depend_on_their_batch(kind: str, original: bool) -> None:
    channel = channel_of(model(kind), layers=(2,), original_mask=original)
    found, sent, _ = channel.next_logits(REQUESTS)
    order = [2, 0, 3]
    close(channel.next_logits([REQUESTS[i] for i in order])[0], found[order])
    for row, request in enumerate(REQUESTS):
        alone, size, _ = channel.next_logits([request])
        close(alone[0], found[row])
        assert size == [sent[row]]


@torch.no_grad()
def test_a_row_that_nobody_helps_is_the_receivers_own() -> None:
    made = model()
    channel, alone = channel_of(made, layers=(2,)), NoneChannel(pair(made)[0])
    requests = [replace(REQUESTS[0], sharers=()), REQUESTS[1], REQUESTS[3]]
    found, sent, _ = channel.next_logits(requests)
    close(found[[0, 2]], alone.next_logits([requests[0], requests[2]])[0])
    assert sent[0] == sent[2] == 0 < sent[1]
    # And where nobody helps with any.
    close(channel.next_logits(requests[::2])[0], found[[0, 2]])


@torch.no_grad()
def test_several_sharers_follow_each_other() -> None:
    """Each has read its own context alone, but at the positions behind the one before."""
    made = model()
    receiver, first = pair(made)
    second = Agent("b", model(), TOKENIZER)  # another object with the same weights
    channel = KVCommChannel(receiver, [first, second], ratio=1.0)
    contexts = {"a": ("One two three.",), "b": ("Paris is a city.",)}
    requests = [
        Request("Who?", "", {"b": contexts["b"]}),
        Request("Where is it?", "", contexts),
        Request("What?", "", contexts, sharers=("a",)),
    ]
    found, sent, _ = channel.next_logits(requests)
    a, b = (first.reader.text(contexts[name][0])[0] for name in "ab")
    rows = [[b], [a, b], [a]]
    for row, read, request in zip(found, rows, requests):
        prompt = receiver.prompts([request.asked()])[0]
        ids = [*[token for part in read for token in part], *prompt]
        # One pass in which the parts of the context do not see each other.
        mask = causal(len(ids), 0)
        if len(read) == 2:
            mask[len(a) : len(a) + len(b), : len(a)] = False
        close(row, made(input_ids=torch.tensor([ids]), attention_mask=mask[None, None]).logits[0, -1].float())
    assert sent[1] == sent[0] + sent[2]
    # In the other layers each one's first token stays.
    for original in (False, True):
        some = KVCommChannel(receiver, [first, second], layers=(2,), original_mask=original)
        for row, read, request in zip(some.next_logits(requests)[0], rows, requests):
            prompt, behind = receiver.prompts([request.asked()])[0], read[1] if len(read) == 2 else ()
            close(row, by_hand(made, read[0], prompt, {0, 2}, second=behind, original=original))


def test_bytes_are_whole_layers_and_sinks() -> None:
    channel = channel_of(model(), layers=(1, 3))
    _, sent, _ = channel.next_logits(REQUESTS)
    sizes = [len(tokens(request)[0]) for request in REQUESTS]
    a_token = 2 * 2 * 8 * 4  # keys and values, two heads of eight channels, float32
    assert sent == [a_token * (3 * size + 1) for size in sizes[:3]] + [0]


def test_controls_send_other_contents() -> None:
    made = model()
    requests = [replace(one, decoy=REQUESTS[1]) for one in REQUESTS[::2]]
    told = [replace(one, sharer_contexts=REQUESTS[1].sharer_contexts) for one in requests]
    matched = channel_of(made, layers=(2,))
    found = channel_of(made, layers=(2,), control="mismatched").next_logits(requests)[0]
    close(found, matched.next_logits(told)[0])
    others = {name: channel_of(made, layers=(2,), control=name).next_logits(requests)[0] for name in ("zero", "random")}
    others["matched"] = matched.next_logits(requests)[0]
    others["mismatched"] = found
    values = list(others.values())
    assert all(not torch.allclose(a, b, rtol=1e-2) for i, a in enumerate(values) for b in values[:i])


def test_random_numbers_are_of_their_request() -> None:
    """In whatever batch: rows of other lengths and other places make no difference."""
    channel = channel_of(model(), layers=(2,), control="random")
    whole = channel.next_logits(REQUESTS)[0]
    close(torch.cat([channel.next_logits([request])[0] for request in REQUESTS]), whole)
    close(channel.next_logits(REQUESTS[::-1])[0].flip(0), whole)


# --- answers
# ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("original", [False, True])
def test_greedy_answers_are_those_of_a_loop(original: bool) -> None:
    """Token by token, each time from the start: what is decoded sees what the mask of its layer lets it."""
    made = model()
    channel = channel_of(made, layers=(2,), original_mask=original)
    answers = channel.answer(REQUESTS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [len(answer.ids) for answer in answers] == [6] * len(REQUESTS)
    for answer, request in zip(answers, REQUESTS):
        context, prompt = tokens(request)
        # Each new token is read after the prompt, which the original reads with its mask all at once.
        step = channel.next_logits([request])[0][0].argmax()
        assert int(answer.ids[0]) == int(step)
        if not original:
            said: list[int] = []
            for _ in range(6):
                said.append(int(by_hand(made, context, prompt + said, {0, 2}).argmax()))
            assert answer.ids.tolist() == said
        (alone,) = channel.answer([request], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert alone.ids.tolist() == answer.ids.tolist()
    assert len({tuple(answer.ids.tolist()) for answer in answers}) == len(REQUESTS)


def test_sampling_beams_stopping_and_streaming_are_generates() -> None:
    from transformers.generation.streamers import BaseStreamer

    channel = channel_of(model(), layers=(2,))

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}
        return [answer.ids.tolist() for answer in channel.answer(REQUESTS[:2], max_new_tokens=5, **options)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert len(drawn(3)) == 4
    beams = [channel.answer(rows, max_new_tokens=4, num_beams=3, do_sample=False) for rows in (REQUESTS, REQUESTS[1:2])]
    assert beams[0][1].ids.tolist() == beams[1][0].ids.tolist()

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.ones(len(ids), dtype=torch.bool)

    assert len(channel.answer(REQUESTS[:1], max_new_tokens=9, do_sample=False, stopping_criteria=[stop])[0].ids) == 1
    heard: list[Tensor] = []

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def put(self, value: Tensor) -> None:
            heard.append(value)

        def end(self) -> None:
            heard.append(torch.empty(0))

    (answer,) = channel.answer(REQUESTS[:1], max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert torch.cat(heard[1:]).tolist() == answer.ids.tolist()  # behind the prompt, which comes first
    # No token that the prompt has not is penalised for coming before it.
    assert set(heard[0].flatten().tolist()) == set(tokens(REQUESTS[0])[1])
    timings = answer.timings
    assert min(timings.sharer, timings.communication, timings.receiver) > 0
    assert timings.sharer + timings.communication + timings.receiver < timings.first_token <= timings.end


@torch.no_grad()
def test_what_is_prepared_is_ragged() -> None:
    """Chosen layers hold the context, the others its first token; the model is as it was."""
    made = model()
    channel = channel_of(made, layers=(2,))
    prepared = channel.prepare(REQUESTS[1:2], Clock(torch.device("cpu")), 1)
    context, prompt = map(len, tokens(REQUESTS[1]))
    lengths = [key.shape[2] for key, _ in prepared.cache]
    assert lengths == [(context if layer in (0, 2) else 1) + prompt - 1 for layer in range(LAYERS)]
    assert prepared.ids.shape == prepared.mask.shape == (1, context + prompt)
    assert made.config._attn_implementation == "sdpa"


def test_the_clock_starts_before_the_attention_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    channel, found = channel_of(made, layers=(2,)), []

    class Watched(Clock):
        def __init__(self, *devices: torch.device) -> None:
            found.append((made.config._attn_implementation, len(devices)))
            super().__init__(*devices)

    monkeypatch.setattr("lcf_fast.channels.base.Clock", Watched)
    channel.answer(REQUESTS[:1], max_new_tokens=1)
    channel.next_logits(REQUESTS[:1])
    assert found == [("sdpa", 2)] * 2  # of receiver and sharer


def test_the_models_own_attention_is_set_back() -> None:
    made = model(attention="eager")
    channel = channel_of(made, layers=(2,))

    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("on the way")

    before = made(input_ids=torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(RuntimeError, match="on the way"):
        channel.answer(REQUESTS[:1], stopping_criteria=[fails])
    assert made.config._attn_implementation == "eager"
    assert torch.equal(made(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
    with pytest.raises(ShapeError):
        channel.answer(REQUESTS[:1], max_new_tokens=600)
    assert made.config._attn_implementation == "eager"


# --- calibration
# ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attention", "changes"),
    [
        ("Llama", "sdpa", {}),
        ("Gemma2", "eager", {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 2, "sliding_window": 128}),
    ],
)
def test_calibration_measures_the_models_own_attention(
    kind: str, attention: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = model(kind, attention=attention, **changes)
    channel = channel_of(made, ratio=0.5)
    with pytest.raises(GeometryError, match="calibrate"):
        channel.answer(REQUESTS)
    selection = channel.calibrate(REQUESTS[1])
    context, prompt = tokens(REQUESTS[1])
    eager = model(kind, attention="eager", **changes)
    with torch.no_grad():
        weights = eager(input_ids=torch.tensor([context + prompt]), output_attentions=True).attentions
    expected = [float(layer[0, :, len(context) :, : len(context)].sum(-1).mean()) for layer in weights]
    assert selection.mass == pytest.approx(expected, rel=1e-4)
    assert selection.alpha == 1.0  # no Qwen: the mass alone
    assert channel_of(made, ratio=0.5, control="zero").calibrate(REQUESTS[1]).mass == selection.mass
    greatest = sorted(range(LAYERS), key=lambda layer: expected[layer])[-2:]
    assert selection.layers == tuple(sorted(greatest)) == channel.layers
    assert channel.whole_layers == {0, *greatest}
    found = channel.next_logits(REQUESTS)[0]
    close(found, channel_of(made, layers=greatest).next_logits(REQUESTS)[0])

    selection.save(tmp_path / "layers.json")
    loaded = LayerSelection.load(tmp_path / "layers.json")
    assert loaded == selection
    assert torch.equal(channel_of(made, layers=loaded).next_logits(REQUESTS)[0], found)
    with pytest.raises(GeometryError, match="another model"):
        channel_of(model(kind, seed=2, attention=attention, **changes), layers=loaded)
    with pytest.raises(GeometryError, match="context"):
        channel.calibrate(REQUESTS[3])


def test_what_refuses() -> None:
    made = model()
    receiver, sharer = pair(made)
    with pytest.raises(GeometryError, match="within one model"):
        KVCommChannel(receiver, [Agent("a", model(seed=2), TOKENIZER)])
    with pytest.raises(GeometryError, match="within one model"):
        KVCommChannel(receiver, [Agent("a", model(rms_norm_eps=1e-3), TOKENIZER)])
    with pytest.raises(GeometryError, match="within one model"):
        KVCommChannel(receiver, [Agent("a", model().to(torch.bfloat16), TOKENIZER)])
    rounded, wide = model().to(torch.bfloat16), model().to(torch.bfloat16).float()  # the same numbers
    with pytest.raises(GeometryError, match="bfloat16"):
        KVCommChannel(Agent("me", rounded, TOKENIZER), [Agent("a", wide, TOKENIZER)])
    with pytest.raises(GeometryError, match="twice"):
        KVCommChannel(receiver, [sharer, sharer])
    for ratio in (0.0, 1.1, float("nan")):
        with pytest.raises(GeometryError, match="ratio"):
            KVCommChannel(receiver, [sharer], ratio=ratio)
    with pytest.raises(GeometryError, match="alpha"):
        KVCommChannel(receiver, [sharer], alpha=1.5)
    for layers in ((4,), (-1,), (True,)):
        with pytest.raises(IndexRangeError):
            KVCommChannel(receiver, [sharer], layers=layers)
    for few in ((), (1, 1)):
        with pytest.raises(GeometryError):
            KVCommChannel(receiver, [sharer], layers=few)
    for name, value in (("layer_types", ["chunked_attention"] * LAYERS), ("attention_chunk_size", 8)):
        other = model()
        setattr(other.config, name, value)
        with pytest.raises(GeometryError, match="full or sliding-window attention, got chunked"):
            channel_of(other)
    channel = KVCommChannel(receiver, [sharer], layers=(2,))
    with pytest.raises(GeometryError, match="sharers of this channel"):
        channel.answer([Request("Who?", "", {"b": ("One.",)})])
    with pytest.raises(ShapeError, match="max_position_embeddings"):
        channel.answer([Request("Who?", "", {"a": ("one two three " * 200,)})])
    with pytest.raises(GeometryError):
        channel.answer([])


def test_contexts_count_in_what_generate_would_drop() -> None:
    """Phi-3 reads anew where it goes beyond a length, and has forgotten what was shared."""
    made = model("Phi3")
    channel, request = channel_of(made, layers=(2,)), REQUESTS[0]
    made.config.original_max_position_embeddings = held = sum(map(len, tokens(request))) - 1
    for call in (lambda: channel.answer([request], max_new_tokens=8), lambda: channel.check([request], 8)):
        with pytest.raises(ShapeError, match=f"within {held} tokens"):
            call()
    made.config.original_max_position_embeddings = held + 8
    channel.check([request], 8)


def test_scores_are_the_mass_and_the_prior() -> None:
    mass = [0.2, 0.6, 0.4, 0.2]
    assert layer_scores(mass, 1.0) == pytest.approx([0.0, 1.0, 0.5, 0.0])
    prior = [math.exp(-4 / 200), math.exp(-1 / 200), 1.0, math.exp(-1 / 200)]  # around layer 2 of 4
    assert layer_scores(mass, 0.0) == pytest.approx(prior)
    mixed = [0.8 * m + 0.2 * p for m, p in zip([0.0, 1.0, 0.5, 0.0], prior)]
    assert layer_scores(mass, 0.8) == pytest.approx(mixed)
    assert layer_scores([0.3, 0.3], 1.0) == [0.0, 0.0]
    assert top_layers(mixed, 0.5) == (1, 2) and top_layers([0.0] * 4, 0.5) == (0, 1)
    assert [len(top_layers([0.0] * 28, ratio)) for ratio in (0.01, 0.3, 0.5, 0.7, 1.0)] == [1, 8, 14, 20, 28]
    assert [channel_of(model(kind)).alpha for kind in ("Qwen2", "Qwen3", "Llama")] == [0.8, 0.8, 1.0]


def test_two_threads_do_not_answer_with_one_model() -> None:
    channel = channel_of(model(), layers=(2,))
    refused: list[Exception] = []

    def other() -> None:
        try:
            channel.answer(REQUESTS[:1])
        except BackendError as error:
            refused.append(error)

    def meanwhile(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return torch.ones(len(ids), dtype=torch.bool)

    assert channel.answer(REQUESTS[:1], stopping_criteria=[meanwhile])
    assert "no other thread" in str(refused[0])
    alone = threading.Thread(target=other)
    alone.start()
    alone.join()
    assert len(refused) == 1


def test_an_attention_that_cannot_be_wrapped() -> None:
    made = model()
    channel = channel_of(made, layers=(2,))
    made.set_attn_implementation("flex_attention")
    with pytest.raises(BackendError, match="set_attn_implementation"):
        channel_of(made, layers=(2,))
    with pytest.raises(BackendError):
        channel.next_logits(REQUESTS)
    assert made.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(("kind", "attention"), [("Mistral", "sdpa"), ("Gemma2", "eager"), ("Gemma3", "sdpa")])
@torch.no_grad()
def test_a_sliding_window_is_served_while_all_is_within_it(kind: str, attention: str) -> None:
    # The longest of each, and the token that is asked for.
    needed = sum(max(map(len, parts)) for parts in zip(*map(tokens, REQUESTS))) + 1
    wide = windowed(kind, attention, needed)
    found, _, _ = channel_of(wide, ratio=1.0).next_logits(REQUESTS)
    for row, request in zip(found, REQUESTS):
        context, prompt = tokens(request)
        close(row, wide(input_ids=torch.tensor([context + prompt])).logits[0, -1].float())
    narrow = channel_of(windowed(kind, attention, needed - 1), ratio=1.0)
    with pytest.raises(ShapeError, match="sliding window"):
        narrow.next_logits(REQUESTS)


def windowed(kind: str, attention: str, window: int) -> Any:
    changes: dict[str, Any] = {"sliding_window": window}
    if kind == "Gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return model(kind, attention=attention, **changes)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kvcomm_selection": 2}', '{"kvcomm_selection": 1}', "broken layers", "no layers"]
)
def test_a_damaged_selection_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "layers.json"
    good = LayerSelection((1,), 0.5, 0.8, (0.1, 0.2), (0.0, 1.0), "ab")
    good.save(path)
    if text == "broken layers":
        text = path.read_text().replace("1\n ],", "7\n ],", 1)
    elif text == "no layers":
        replace(good, layers=()).save(path)
        text = path.read_text()
    path.write_text(text)
    with pytest.raises(CheckpointError):
        LayerSelection.load(path)
    with pytest.raises(CheckpointError):
        LayerSelection.load(tmp_path / "none.json")
