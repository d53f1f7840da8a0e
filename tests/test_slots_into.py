"""Slots written into memory that is there: the free room of a StaticCache, pages, on both back ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from slot_formulas import EPS, expand_formula, make_slot_weights
from tiny_slots import FAMILIES, family_model, ragged_ids, slots_adapter
from torch import Tensor

from helpers import Pair, assert_within_budget
from lcf_fast import LatentSlots, Message, ops_slots, use_backend
from lcf_fast.caches import cache_layers
from lcf_fast.errors import (
    DeviceError,
    DTypeError,
    GeometryError,
    IndexRangeError,
    LCFError,
    MessageError,
    ShapeError,
)
from lcf_fast.placement import with_slots
from lcf_fast.reading.prefill import dynamic_cache, positions_of, prefill
from lcf_fast.rotary import Rotary

pytest.importorskip("triton")

Backend = Literal["eager", "triton"]
BACKENDS: tuple[Backend, ...] = ("eager", "triton")
SLOTS = 3


def static_cache(receiver: Any, ids: Tensor, mask: Tensor, room: int = 32) -> Any:
    """A StaticCache that holds what the receiver has read."""
    from transformers import StaticCache

    cache = StaticCache(config=receiver.config, max_cache_len=room)
    with torch.no_grad():
        receiver(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
    return cache


def told(receiver: Any, lengths: list[int] | None = None) -> tuple[LatentSlots, Message]:
    """An adapter of the receiver with itself, and a message of rows that have read so much."""
    adapter = slots_adapter(receiver, receiver, SLOTS)
    ids, mask = ragged_ids(lengths or [9, 6], 7)
    return adapter, adapter.summarize(prefill(receiver, ids, mask), attention_mask=mask)


def buffers(cache: Any) -> list[Tensor]:
    """Everything that a StaticCache holds, copied."""
    counts = [torch.tensor(int(layer.get_seq_length())) for layer in cache.layers]
    return [*(side.clone() for layer in cache.layers for side in (layer.keys, layer.values)), *counts]


# --- generate()
# ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_goes_on_as_from_a_dynamic_cache(name: str) -> None:
    """A batch padded on the left: the same logits at every step, and the same tokens."""
    receiver = family_model(name)
    adapter, message = told(receiver)
    ids, mask = ragged_ids([8, 5], 4)
    static = static_cache(receiver, ids[:, :-1], mask[:, :-1])
    same = adapter.append_(receiver, static, message, attention_mask=mask[:, :-1])
    assert same is static
    assert {int(layer.get_seq_length()) for layer in static.layers} == {7 + SLOTS}
    own = dynamic_cache(prefill(receiver, ids[:, :-1], mask[:, :-1]))
    grown = adapter.append(receiver, own, message, attention_mask=mask[:, :-1])
    long_ids, long_mask = with_slots(ids, mask, SLOTS)
    answers = [
        receiver.generate(
            long_ids,
            attention_mask=long_mask,
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for cache in (static, grown)
    ]
    torch.testing.assert_close(torch.stack(answers[0].logits), torch.stack(answers[1].logits), rtol=2e-3, atol=2e-3)
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    alone = receiver(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1]
    assert float((alone - answers[0].logits[0]).abs().max()) > 1e-2, "the slots are not read"


def test_a_sliding_window_slides_on_over_the_slots() -> None:
    """Filled to the window's last position, then past it: as a plain forward over keys that hold the same."""
    from transformers import StaticCache

    receiver = family_model("gemma3")
    receiver.config.sliding_window = 10
    adapter, message = told(receiver, [9])
    ids, _ = ragged_ids([8], 4)
    static = StaticCache(config=receiver.config, max_cache_len=32)
    receiver(ids[:, :-1], past_key_values=static)
    assert {layer.keys.shape[2] for layer in static.layers} == {10, 32}
    adapter.append_(receiver, static, message)
    own = prefill(receiver, ids[:, :-1], torch.ones(1, 7))
    dynamic = dynamic_cache(adapter.append(receiver, own, message))  # its masks cut the window, whatever is held
    token = ids[:, -1:]
    for step in range(6):
        at = torch.tensor([[7 + SLOTS + step]])
        logits = [receiver(token, past_key_values=c, position_ids=at).logits[:, -1] for c in (static, dynamic)]
        torch.testing.assert_close(logits[0], logits[1], rtol=2e-3, atol=2e-3)
        token = logits[0].argmax(-1, keepdim=True)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_into_an_empty_cache_they_are_a_prefix(name: str) -> None:
    """Allocated and not filled yet: the prompt is then read behind them."""
    from transformers import StaticCache

    receiver = family_model(name)
    adapter, message = told(receiver)
    ids, mask = ragged_ids([8, 5], 4)
    static = StaticCache(config=receiver.config, max_cache_len=32)
    static.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    adapter.append_(receiver, static, message)
    long_ids, long_mask = with_slots(ids, mask, SLOTS, placement="prefix")
    options = {"attention_mask": long_mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = receiver.generate(long_ids, past_key_values=static, **options)
    assert torch.equal(got, receiver.generate(long_ids, past_key_values=adapter.prefix(receiver, message), **options))


# --- what is written, and what is not
# ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_free_room_is_written_and_nothing_else(backend: Backend, dtype: torch.dtype) -> None:
    receiver = family_model("qwen3").to(dtype)
    adapter, message = told(receiver)
    ids, mask = ragged_ids([8, 5], 4)
    static = static_cache(receiver, ids, mask)
    places = [side.data_ptr() for layer in static.layers for side in (layer.keys, layer.values)]
    with use_backend(backend), torch.no_grad():
        grown = adapter.append(receiver, cache_layers(static), message, attention_mask=mask)
    for layer in static.layers:
        layer.keys[:, :, 8:], layer.values[:, :, 8:] = torch.nan, torch.nan
    before = buffers(static)
    with use_backend(backend):
        adapter.append_(receiver, static, message, attention_mask=mask)
    assert places == [side.data_ptr() for layer in static.layers for side in (layer.keys, layer.values)]
    for i, (layer, pair) in enumerate(zip(static.layers, grown)):
        for part, got, expected in zip((0, 1), (layer.keys, layer.values), pair):
            assert torch.equal(got[:, :, :8], before[2 * i + part][:, :, :8])
            assert bool(got[:, :, 8 + SLOTS :].isnan().all())
            new = got[:, :, 8 : 8 + SLOTS]
            if backend == "eager" or dtype == torch.float32:
                assert torch.equal(new, expected[:, :, 8:])
            else:  # products in the cache's dtype, where `append` rounds once to it
                torch.testing.assert_close(new, expected[:, :, 8:], rtol=4e-2, atol=4e-2)
    assert all(not side.requires_grad for layer in static.layers for side in (layer.keys, layer.values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned", [True, False])
def test_autograd_sees_what_is_written(turned: bool, backend: Backend, generator: torch.Generator) -> None:
    weights, leaf = make_slot_weights(3, SLOTS, 64, 16, 2 * 16, generator), torch.ones((), requires_grad=True)
    pool = torch.ones(3, 2, 2, 2, SLOTS, 16) * leaf
    into = [(key, value) for key, value in pool.detach()]  # views, as of pages
    total = (pool**2).sum()
    with use_backend(backend):
        turn = (lambda keys: keys) if turned else None
        ops_slots.expand_slots_layers_(torch.randn(3, 2, SLOTS, 64), weights, into, kv_heads=2, turn=turn)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_made_in_inference_mode_is_filled_outside_it(backend: Backend) -> None:
    """Its counters are tensors of that mode, too."""
    receiver = family_model("qwen3")
    adapter, message = told(receiver)
    ids, mask = ragged_ids([8, 5], 4)
    plain = static_cache(receiver, ids, mask)
    with torch.inference_mode():
        inferred = static_cache(receiver, ids, mask)
    assert inferred.layers[0].keys.is_inference()
    with use_backend(backend):
        for cache in (plain, inferred):
            adapter.append_(receiver, cache, message, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(buffers(inferred), buffers(plain)))


def test_one_message_serves_every_row_and_positions_count_what_is_real() -> None:
    receiver = family_model("qwen3")
    adapter, message = told(receiver, [9])
    ids, mask = ragged_ids([8, 5, 1], 4)
    static = static_cache(receiver, ids, mask)
    adapter.append_(receiver, static, Message.from_bytes(message.to_bytes()), attention_mask=mask)
    placed = adapter.place(
        receiver,
        replace(message, latent=message.tensors["latent"].expand(-1, 3, -1, -1)),
        torch.tensor([[8, 9, 10], [5, 6, 7], [1, 2, 3]]),
    )
    for layer, (key, value) in zip(static.layers, placed):
        torch.testing.assert_close(layer.keys[:, :, 8:11], key)
        torch.testing.assert_close(layer.values[:, :, 8:11], value)


# --- pages
# ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_of_a_paged_cache(backend: Backend) -> None:
    """Pages ``(block, token, head, dim)``, keys and values in one pool, the slots in the middle of a block."""
    receiver = family_model("llama, llama3 rope")
    adapter, message = told(receiver, [9])
    pool = torch.full((3, 2, 5, 8, 2, 16), torch.nan)  # layer, key or value, block, token, head, dim
    into = [tuple(pool[layer, side, 3, 2 : 2 + SLOTS].transpose(0, 1)[None] for side in (0, 1)) for layer in range(3)]
    at = torch.tensor([[20, 21, 40]])
    expected = adapter.place(receiver, message, at)
    with use_backend(backend):
        made = adapter.place(receiver, message, at, into=into)  # type: ignore[arg-type]
    for got, there, pair in zip(made, into, expected):
        for side, view, wanted in zip(got, there, pair):
            assert side.data_ptr() == view.data_ptr()
            torch.testing.assert_close(view, wanted, rtol=1e-5, atol=1e-5)
    assert int((~pool.isnan()).sum()) == 3 * 2 * SLOTS * 2 * 16
    assert not made[0][0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_within_the_error_budget(
    backend: Backend, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """Against float64, turned and not; huge latents, and such as came in a narrower dtype."""
    receiver = family_model("llama, yarn").to(device)
    rotary, layers, at = Rotary.of(receiver), 3, torch.tensor([[3, 4, 9], [0, 60, 61]])
    weights = make_slot_weights(layers, SLOTS, 64, 16, 2 * 16, generator, device=device)
    latent = torch.randn(layers, 2, SLOTS, 64, generator=generator).to(device)
    latent[1, 0, 1] *= 1e3
    for sent in (latent, latent.bfloat16()):
        truth, plain = (expand_formula(sent, weights, 2, kind) for kind in (torch.float64, dtype))
        turned = [rotary.rotate([key for key, _ in one], at) for one in (truth, [(k.float(), v) for k, v in plain])]
        for turn in (None, lambda keys: rotary.rotate(keys, at)):
            pairs = [
                (key, value)
                for key, value in torch.full((layers, 2, 2, 2, SLOTS, 16), torch.nan, dtype=dtype, device=device)
            ]
            with use_backend(backend):
                ops_slots.expand_slots_layers_(sent, weights, pairs, kv_heads=2, norm_eps=EPS, turn=turn)
            for i, (key, value) in enumerate(pairs):
                assert_within_budget(value, truth[i][1], plain[i][1])
                exact, same = (truth[i][0], plain[i][0]) if turn is None else (turned[0][i], turned[1][i].to(dtype))
                assert_within_budget(key, exact.double(), same)


# --- what is refused leaves everything as it was
# ---------------------------------------------------------------------


def test_refused_before_anything_is_written() -> None:
    receiver = family_model("qwen3")
    adapter, message = told(receiver)
    ids, mask = ragged_ids([8, 5], 4)
    tight = static_cache(receiver, ids, mask, room=8 + SLOTS - 1)
    roomy = static_cache(receiver, ids, mask)
    latent = message.tensors["latent"]
    stranger = slots_adapter(receiver, receiver, SLOTS, seed=9).summarize(prefill(receiver, ids, mask))
    attempts: list[tuple[type[LCFError], Any, Any, Any, str]] = [
        (GeometryError, tight, message, mask, "room for 3 positions behind 8"),
        (ShapeError, roomy, message, mask[:, 1:], "attention_mask"),
        (ShapeError, roomy, replace(message, latent=latent.repeat(1, 2, 1, 1)), mask, "batch size 2 or 1"),
        (ShapeError, roomy, replace(message, latent=latent[..., :32]), mask, "latent"),
        (MessageError, roomy, stranger, mask, "origin"),
        (MessageError, roomy, replace(message, latent=None), mask, "slots"),
        (DTypeError, roomy, latent, mask, "Message"),
    ]
    for error, cache, sent, its_mask, match in attempts:
        before = buffers(cache)
        with pytest.raises(error, match=match):
            adapter.append_(receiver, cache, sent, attention_mask=its_mask)
        assert all(torch.equal(a, b) for a, b in zip(buffers(cache), before))
    mixed = static_cache(receiver, ids, mask)
    mixed.layers[2].values = mixed.layers[2].values.double()
    halved = static_cache(receiver, ids, mask)
    del halved.layers[2]
    shared = static_cache(receiver, ids, mask)
    shared.layers[2].values = shared.layers[1].keys
    for error, cache in ((DTypeError, mixed), (GeometryError, halved), (ShapeError, shared)):
        before = buffers(cache)
        with pytest.raises(error, match="receiver_cache"):
            adapter.append_(receiver, cache, message, attention_mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(buffers(cache), before))


def test_only_what_has_room_is_filled() -> None:
    receiver = family_model("qwen3")
    adapter, message = told(receiver)
    ids, mask = ragged_ids([8, 5], 4)
    pairs = prefill(receiver, ids, mask)
    for cache in (pairs, dynamic_cache(pairs)):
        with pytest.raises(GeometryError, match="StaticCache"):
            adapter.append_(receiver, cache, message, attention_mask=mask)
    with pytest.raises(GeometryError, match="append_"):
        adapter.append(receiver, static_cache(receiver, ids, mask), message, attention_mask=mask)
    from transformers import StaticCache

    with pytest.raises(GeometryError, match="uninitialised"):
        adapter.append_(receiver, StaticCache(config=receiver.config, max_cache_len=32), message)


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_that_do_not_fit(backend: Backend) -> None:
    receiver = family_model("qwen3")
    adapter, message = told(receiver)

    def fresh(
        *, batch: int = 2, heads: int = 2, slots: int = SLOTS, layers: int = 3, dtype: Any = torch.float32
    ) -> list[Pair]:
        sevens = torch.full((layers, 2, batch, heads, slots, 32 // heads), 7.0).to(dtype)
        return [(key, value) for key, value in sevens]

    def last(change: Callable[[Tensor], Tensor]) -> list[Pair]:
        into = fresh()
        return [*into[:2], (into[2][0], change(into[2][1]))]

    at = torch.arange(SLOTS)[None]
    room = torch.full((2, 2, SLOTS + 1, 16), 7.0)
    overlapping = [*fresh()[:2], (room[:, :, :SLOTS], room[:, :, 1:])]
    attempts: list[tuple[type[LCFError], list[Pair], Tensor, str]] = [
        (GeometryError, fresh(layers=2), at, "into"),
        (ShapeError, fresh(slots=4), at, "into"),
        (ShapeError, fresh(batch=1), at, "into"),
        (ShapeError, fresh(heads=1), at, r"into\[0\].key: expected .* = \(2, 2, 3, 16\)"),
        (DTypeError, fresh(dtype=torch.int64), at, "into"),
        (DTypeError, last(lambda x: x.double()), at, r"into\[2\].value"),
        (ShapeError, last(lambda x: x[:, :, :1].expand(-1, -1, SLOTS, -1)), at, r"into\[2\].value"),
        (ShapeError, last(lambda x: torch.full((2, 2, SLOTS, 32), 7.0)[..., ::2]), at, r"into\[2\].value"),
        (ShapeError, [fresh()[0]] * 3, at, r"into\[1\].key: expected memory of its own, got that of into\[0\].key"),
        (ShapeError, [(key, key) for key, _ in fresh()], at, r"into\[0\].value"),
        (ShapeError, overlapping, at, r"into\[2\].value: expected memory of its own, got that of into\[2\].key"),
        (DeviceError, last(lambda x: x.to("meta")), at, r"into\[2\].value"),
        (ShapeError, fresh(), at[:, 1:], "positions"),
        (ShapeError, fresh(), at.repeat(3, 1), "positions"),
        (DTypeError, fresh(), at.float(), "positions"),
        (IndexRangeError, fresh(), at - 1, "positions"),
        (DTypeError, fresh(), at.to(torch.complex64), "positions"),
        (DeviceError, fresh(), at.to("meta"), "positions: expected a device with memory"),
    ]
    for error, into, positions, match in attempts:
        with use_backend(backend), pytest.raises(error, match=match):
            adapter.place(receiver, message, positions, into=into)
        for pair in into:
            assert all(side.is_meta or bool((side == 7.0).all()) for side in pair)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"head_dim": 32}, {"num_key_value_heads": 4}, {"num_hidden_layers": 2}], ids=str)
def test_a_model_of_another_geometry_is_refused_before_anything_is_written(
    sizes: dict[str, int], backend: Backend
) -> None:
    receiver, other = family_model("qwen3"), family_model("qwen3", **sizes)
    adapter, message = told(receiver)
    ids, mask = ragged_ids([8, 5], 4)
    static = static_cache(receiver, ids, mask)
    before = buffers(static)
    calls: list[Callable[[], Any]] = [
        lambda: adapter.append_(other, static, message, attention_mask=mask),
        lambda: adapter.append(other, cache_layers(static), message, attention_mask=mask),
        lambda: adapter.prefix(other, message),
    ]
    for call in calls:
        with use_backend(backend), pytest.raises(GeometryError, match="as the model's"):
            call()
    assert all(torch.equal(a, b) for a, b in zip(buffers(static), before))
