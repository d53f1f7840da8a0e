"""Slots for each span of a context: each span by itself, rows that differ, from the module to channel and training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_agents import agent
from tiny_slots import family_model, ragged_ids, slots_adapter
from torch import Tensor

from helpers import make_cache
from lcf_fast import CacheGeometry, LatentSlots, LCFConfig, Message, SlotsSharerSide, use_backend
from lcf_fast.backends import Backend
from lcf_fast.channels import Request, Sharer, SlotsChannel
from lcf_fast.checkpoint import load_any
from lcf_fast.errors import DTypeError, GeometryError, LCFError, ShapeError, SpanError
from lcf_fast.placement import PLACEMENTS
from lcf_fast.reading.prefill import dynamic_cache, prefill
from lcf_fast.slot_spans import slots_there, summarize_spans
from lcf_fast.spans import Spans, windows
from lcf_fast.training.batches import Batch
from lcf_fast.training.step import OnlinePrefills, TrainingStep

Pair = tuple[Tensor, Tensor]
SIDE = CacheGeometry(3, 2, 16)


def adapter_of(slots: int = 2, *, per_span: bool = True) -> LatentSlots:
    torch.manual_seed(3)
    return LatentSlots(LCFConfig(SIDE, SIDE, bottleneck=64, slots=slots, per_span=per_span)).eval()


def cache_of(batch: int = 3, tokens: int = 9) -> list[Pair]:
    return make_cache(SIDE, batch, tokens, generator=torch.Generator().manual_seed(4))


def cut(cache: list[Pair], row: int, start: int, stop: int) -> list[Pair]:
    return [(key[row : row + 1, :, start:stop], value[row : row + 1, :, start:stop]) for key, value in cache]


def latent(message: Message) -> Tensor:
    return message.tensors["latent"]


@torch.no_grad()
def by_hand(adapter: Any, cache: list[Pair], row: int, bounds: list[tuple[int, int]]) -> Tensor:
    """``(L, P·k, d)``: each span's tokens as a context of their own."""
    return torch.cat([latent(adapter.summarize(cut(cache, row, *pair)))[:, 0] for pair in bounds], 1)


@pytest.mark.parametrize("per_span", [False, True])
def test_a_batch_of_none(per_span: bool) -> None:
    adapter, cache = adapter_of(per_span=per_span), cache_of(0)
    forms: list[Any] = [None, torch.zeros(0, 3, dtype=torch.int64), [], Spans.given([])]
    for spans in forms:
        message = adapter.summarize(cache, spans, slot_weights=True)
        assert latent(message).shape == (3, 0, 2, 64)
        assert message.tensors["slot_weights"].shape == (3, 0, SIDE.kv_heads, 2, 9)
    assert adapter.expand(message)[0][0].shape == (0, SIDE.kv_heads, 2, SIDE.head_dim)


@pytest.mark.parametrize("form", ["lists", "offsets", "Spans"])
def test_each_span_is_pooled_by_itself(form: str) -> None:
    adapter, cache = adapter_of(), cache_of()
    offsets = [[0, 2, 5, 9], [0, 1, 2, 9], [3, 4, 8, 9]]
    given: Any = {"lists": offsets, "offsets": torch.tensor(offsets), "Spans": Spans.given(offsets)}[form]
    with torch.no_grad():
        message = adapter.summarize(cache, given)
    assert (message.slots, message.spans) == (6, 3)
    for row, bounds in enumerate(offsets):
        expected = by_hand(adapter, cache, row, list(zip(bounds, bounds[1:])))
        torch.testing.assert_close(latent(message)[:, row], expected, rtol=1e-5, atol=1e-5)


def test_spans_may_overlap_and_fewer_slots_may_be_made_of_each() -> None:
    adapter, cache = adapter_of(3), cache_of(2)
    spans = windows([9, 9], 4, 2)
    with torch.no_grad():
        message = adapter.summarize(cache, spans, slots=2)
    for row, bounds in enumerate(spans.bounds()):
        assert message.slots == 2 * len(bounds)
        whole = by_hand(adapter, cache, row, bounds).unflatten(1, (-1, 3))[:, :, :2].flatten(1, 2)
        torch.testing.assert_close(latent(message)[:, row], whole, rtol=1e-5, atol=1e-5)


def test_padding_is_pooled_by_no_span() -> None:
    adapter, cache = adapter_of(), cache_of(2)
    mask = torch.ones(2, 9)
    mask[0, :2] = mask[1, 4] = 0
    for key, value in cache:
        for side in (key, value):
            side.masked_fill_(mask[:, None, :, None] == 0, torch.nan)
    with torch.no_grad():
        message = adapter.summarize(cache, [[0, 3, 9], [0, 4, 9]], attention_mask=mask)
    expected = by_hand(adapter, cache, 0, [(2, 3), (3, 9)])
    torch.testing.assert_close(latent(message)[:, 0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latent(message)[:, 1, :2], by_hand(adapter, cache, 1, [(0, 4)]), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(latent(message)).all()


def test_weights_of_each_span_are_told() -> None:
    adapter, cache = adapter_of(), cache_of(2)
    with torch.no_grad():
        message = adapter.summarize(cache, [[0, 4, 9], [0, 7, 9]], slot_weights=True)
    shares = message.slot_weights
    assert shares is not None
    assert shares.shape == (3, 2, 2, 4, 9)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 2, 2, 4))
    assert not shares[:, 0, :, :2, 4:].any()
    assert not shares[:, 1, :, 2:, :7].any()
    assert (shares[:, 1, :, :2, :7] > 0).all()
    again = Message.from_bytes(message.to_bytes(contents=["latent", "slot_weights"]))
    torch.testing.assert_close(again.slot_weights, shares)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=5), min_size=1, max_size=4)
)
def test_rows_of_different_numbers_of_spans(drawn: list[list[tuple[int, int]]]) -> None:
    bounds = [sorted((min(a, b - 1), max(a + 1, b)) for a, b in row) for row in drawn]
    adapter, cache = adapter_of(), cache_of(len(bounds))
    spans = Spans.given(bounds)
    with torch.no_grad():
        message, there = summarize_spans(adapter, cache, spans)
    assert there.sum(1).tolist() == [2 * len(row) for row in bounds]
    assert message.spans == max(map(len, bounds))
    assert torch.equal(there, slots_there(spans, torch.ones(len(bounds), 9), message.slots))
    for row, own in enumerate(bounds):
        expected = by_hand(adapter, cache, row, own)
        torch.testing.assert_close(latent(message)[:, row, : 2 * len(own)], expected, rtol=1e-5, atol=1e-5)
        assert not latent(message)[:, row, 2 * len(own) :].any()


@torch.no_grad()
def test_rows_that_differ_are_taken_as_summarize_takes_them() -> None:
    """A model's own cache, a batch of none; what is wrong is named."""
    adapter, cache = adapter_of(), cache_of(2)
    spans, mask = [[0, 4, 9], [0, 9]], torch.ones(2, 9, dtype=torch.bool)
    message, there = summarize_spans(adapter, dynamic_cache(cache), spans, attention_mask=mask)
    assert torch.equal(latent(message), latent(summarize_spans(adapter, cache, spans)[0]))
    assert there.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    one = summarize_spans(adapter, cache, spans, slots=1)[0]
    torch.testing.assert_close(latent(one), latent(message)[:, :, ::2], rtol=1e-5, atol=1e-5)
    padded, given = mask.clone(), Spans.given([[(0, 4), (4, 9)], [(0, 2), (2, 9)]])
    padded[1, :2] = False  # of which the second row's first span is then none
    message, there = summarize_spans(adapter, cache, given, attention_mask=padded)
    assert there.tolist() == slots_there(given, padded, message.slots).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    message, there = summarize_spans(adapter, cache_of(0), Spans.given([]))
    assert (latent(message).shape, there.shape) == ((3, 0, 2, 64), (0, 2))
    short = [*cache[:2], (cache[2][0], cache[2][1][:, :, 1:])]
    fewer = [*cache[:2], (cache[2][0][:1], cache[2][1][:1])]
    for bad in (None, [], cache[:2], short, fewer):
        with pytest.raises(LCFError, match="sharer_cache"):
            summarize_spans(adapter, bad, spans)
    with pytest.raises(DTypeError, match="attention_mask"):
        summarize_spans(adapter, cache, spans, attention_mask=mask.tolist())  # type: ignore[arg-type]


def test_gradients_reach_rows_that_differ() -> None:
    adapter, cache = adapter_of(), cache_of(2)
    spans = Spans.given([[(0, 4)], [(0, 2), (3, 9)]])
    latent(summarize_spans(adapter, cache, spans)[0]).square().sum().backward()
    got = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad()
    for row, own in enumerate(spans.bounds()):
        for pair in own:
            latent(adapter.summarize(cut(cache, row, *pair))).square().sum().backward()
    assert len(got) == 4
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, adapter.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spans", "mask", "said"),
    [
        ([[0, 2, 9], [0, 9]], None, "as many spans in every row"),
        ([[0, 2, 2], [0, 2, 9]], None, "1 without in row 0"),
        (torch.tensor([[0, 2, 9], [0, 0, 9]]), None, "1 without in row 1"),
        ([[0, 2, 2, 9], [0, 3, 3, 9]], None, "a token to pool in every span"),
        ([[(0, 2), (2, 2)], [(0, 2), (2, 9)]], None, "1 without in row 0"),
        ([[2, 2], [3, 3]], None, "a span with a token in every row"),
        ([[0, 10], [0, 9]], None, r"within \[0, 9\]"),
        (Spans.given([[(0, 10)], [(0, 9)]]), None, r"within \[0, 9\]"),
        (Spans.given([[(0, 9)]] * 2).piece([2, 0], [11, 9]), None, r"within \[0, 9\], got \(-2, 7\)"),
        ([[0, 3, 9], [0, 3, 9]], [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9], "1 without in row 0"),
        ([[0, 3, 9], [0, 3, 9]], [[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2, "1 without in row 0"),
        (Spans.given([[(0, 3), (3, 9)]] * 2), [[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2, "1 without in row 0"),
        (Spans.given([[(0, 9)]]), None, "2 items"),
    ],
)
def test_what_is_refused(spans: Any, mask: Any, said: str) -> None:
    given_mask = None if mask is None else torch.tensor(mask)
    with pytest.raises((SpanError, ShapeError), match=said):
        adapter_of().summarize(cache_of(2), spans, attention_mask=given_mask)


@pytest.mark.parametrize("back_end", ["eager", "triton"])
def test_a_span_without_a_token_that_nobody_saw_has_slots_that_are_no_numbers(back_end: Backend) -> None:
    """Compiled, values are not looked at; the other spans' slots are as they are."""
    adapter, cache, offsets = adapter_of(), cache_of(1), torch.tensor([[0, 4, 4, 9]])

    def summary(cache: list[Pair], offsets: Tensor) -> Tensor:
        return latent(adapter.summarize(cache, offsets))

    compiled = torch.compile(summary, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), use_backend(back_end):
        made = compiled(cache, offsets)
        whole = latent(adapter.summarize(cache, [[0, 4, 9]]))
    assert made[:, :, 2:4].isnan().all()
    torch.testing.assert_close(made[:, :, [0, 1, 4, 5]], whole, rtol=1e-5, atol=1e-5)


def test_lists_of_offsets_compile_whole() -> None:
    adapter, cache, uneven = adapter_of(), cache_of(2), [[0, 4, 9], [0, 9]]

    def summary(offsets: Any) -> Tensor:
        return latent(adapter.summarize(cache, offsets))

    with torch.no_grad():
        made = torch.compile(summary, fullgraph=True, backend="aot_eager")([[0, 4, 9], [0, 3, 9]])
        torch.testing.assert_close(made, summary([[0, 4, 9], [0, 3, 9]]), rtol=1e-5, atol=1e-5)
        with pytest.raises(SpanError, match="as many spans"):
            torch.compile(summary, backend="aot_eager")(uneven)
        spans = Spans.given([[(0, 4), (4, 9)], [(0, 3), (2, 9)]])
        made = torch.compile(summary, backend="aot_eager")(spans)
        torch.testing.assert_close(made, summary(spans), rtol=1e-5, atol=1e-5)


def test_a_row_without_a_span_is_refused() -> None:
    with pytest.raises(SpanError, match=r"rows \[1\]"):
        summarize_spans(adapter_of(), cache_of(2), Spans.given([[(0, 4)], []]))
    with pytest.raises(ShapeError, match="attention_mask"):
        summarize_spans(adapter_of(), cache_of(2), Spans.given([[(0, 4)]] * 2), attention_mask=torch.ones(2, 8))


# --- the adapter says that it is for spans
# ---------------------------------------------------------------------


def test_configuration() -> None:
    config = LCFConfig(SIDE, SIDE, slots=2, per_span=True)
    assert LCFConfig.from_dict(config.to_dict()) == config
    assert "per_span" not in LCFConfig(SIDE, SIDE, slots=2).to_dict()
    with pytest.raises(GeometryError, match="per_span"):
        LCFConfig(SIDE, SIDE, cross_context=True, per_span=True)
    with pytest.raises(DTypeError, match="per_span"):
        LCFConfig(SIDE, SIDE, slots=2, per_span=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("per_span", [False, True])
def test_it_is_stored_with_an_adapter_and_with_a_side(per_span: bool, tmp_path: Path) -> None:
    adapter = adapter_of(per_span=per_span)
    sides = [SlotsSharerSide.of(adapter), SlotsSharerSide.for_receiver(adapter, CacheGeometry(2, 1, 24))]
    made: Any
    for number, made in enumerate((adapter, *sides)):
        made.save_pretrained(tmp_path / str(number))
        assert load_any(tmp_path / str(number)).per_span is made.per_span is per_span
    with torch.no_grad():
        spans = [[0, 4, 9]] * 3
        got = latent(sides[0].summarize(cache_of(), spans))
        assert torch.equal(got, latent(adapter.summarize(cache_of(), spans)))


# --- training and channel
# ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return family_model("qwen2", 1), family_model("qwen3", 2)


def spans_adapter(models: tuple[Any, Any]) -> LatentSlots:
    made = slots_adapter(*models, 2)
    made.config = replace(made.config, per_span=True)
    return made


def batch_of(models: tuple[Any, Any]) -> Batch:
    sharer_ids, sharer_mask = ragged_ids([9, 5, 8], 1)
    receiver_ids, receiver_mask = ragged_ids([4, 6, 3], 2)
    response_ids = torch.randint(3, 61, (3, 2), generator=torch.Generator().manual_seed(3))
    spans = Spans.given([[(0, 4), (4, 9)], [(4, 9)], [(1, 3), (3, 4), (2, 9)]])
    return Batch(
        ids=("a", "b", "c"),
        receiver_ids=receiver_ids,
        receiver_mask=receiver_mask,
        response_ids=response_ids,
        response_mask=torch.ones_like(response_ids),
        sharer_ids=sharer_ids,
        sharer_mask=sharer_mask,
        spans=spans,
    )


def one_by_one(adapter: LatentSlots, models: tuple[Any, Any], batch: Batch, placement: str, shift: int = 0) -> Tensor:
    """Each item's loss by plain calls: no padding, each span summarized as a context of its own, messages joined."""
    sharer, receiver = models
    assert batch.spans is not None
    losses = []
    for i in range(3):
        j = (i - shift) % 3
        whole = prefill(sharer, batch.sharer_ids[j : j + 1], batch.sharer_mask[j : j + 1])
        message = adapter.join([adapter.summarize(cut(whole, 0, *pair)) for pair in batch.spans.bounds()[j]])
        prompt = batch.receiver_ids[i][batch.receiver_mask[i].bool()][None]
        if placement == "append":
            own = receiver(prompt[:, :-1], use_cache=True).past_key_values
            cache = dynamic_cache(adapter.append(receiver, [(x.keys, x.values) for x in own.layers], message))
        else:
            cache = adapter.prefix(receiver, message)
            receiver(prompt[:, :-1], past_key_values=cache)
        read = torch.cat([prompt[:, -1:], batch.response_ids[i : i + 1, :-1]], 1)
        logits = receiver(read, past_key_values=cache).logits[0].log_softmax(-1)
        losses.append(-logits.gather(1, batch.response_ids[i][:, None]).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_on_rows_of_different_numbers_of_spans(placement: str, models: tuple[Any, Any]) -> None:
    adapter, batch = spans_adapter(models), batch_of(models)
    step = TrainingStep(adapter, models[1], OnlinePrefills(*models), placement=placement)
    loss = step(batch)
    step.backward(loss)
    got = {name: p.grad for name, p in adapter.named_parameters()}
    adapter.zero_grad(set_to_none=True)
    expected = one_by_one(adapter, models, batch, placement).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    expected.backward()
    for name, parameter in adapter.named_parameters():
        gradient = got[name]
        assert gradient is not None and parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3 * scale)


def test_the_guard_takes_a_neighbours_slots_as_they_are(models: tuple[Any, Any]) -> None:
    adapter, batch = spans_adapter(models), batch_of(models)
    with torch.no_grad():
        matched = one_by_one(adapter, models, batch, "append")
        mismatched = one_by_one(adapter, models, batch, "append", shift=1)
        step = TrainingStep(adapter, models[1], OnlinePrefills(*models), guard_weight=0.7, guard_margin=3.0)
        loss = step(batch)
    hinge = (3.0 - (mismatched - matched) / 2).clamp_min(0)
    torch.testing.assert_close(loss, matched.sum() + 0.7 * (2 * hinge).sum(), rtol=1e-4, atol=1e-4)


REQUESTS = [
    Request("Where is it?", "The cat sat.", {"a": ("One two three.", "Four five!")}),
    Request("Who?", "Six seven. Eight nine ten eleven.", {"a": ("Paris is a city.",)}),
    Request("What is the capital of France?", "", {"a": ("Twelve.", "You are a user.", "Nine.")}),
]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_channel_sends_slots_for_each_paragraph(placement: str) -> None:
    receiver, sharer = agent("me", "qwen3", 1), agent("a", "qwen2", 2)
    adapter = slots_adapter(sharer.model, receiver.model, 2)
    adapter.config = replace(adapter.config, per_span=True)
    made = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], placement=placement, dtype="float32")
    made.check(REQUESTS, 4)
    whole, sent, _ = made.next_logits(REQUESTS)
    for row, request in enumerate(REQUESTS):
        logits, (size,), _ = made.next_logits([request])
        torch.testing.assert_close(whole[row], logits[0], rtol=1e-4, atol=1e-4)
        assert sent[row] == size
    slot = 4 * 64 * adapter.config.receiver.layers
    assert abs(sent[2] - sent[1] - 2 * 2 * slot) < 64, "two paragraphs more are four slots more"
    one = SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], placement=placement, dtype="float32", spans="one")
    assert len(set(one.next_logits(REQUESTS)[1])) == 1
    with pytest.raises(LCFError, match="spans"):
        SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], spans="verses")
