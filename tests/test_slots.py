"""`LatentSlots`: what it computes, where its slots stand, `generate()` from them; saving, several sharers."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_slots import FAMILIES, family_model, ragged_ids, slots_adapter
from torch import Tensor

from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, Message, reference, use_backend
from lcf_fast.caches import cache_layers
from lcf_fast.checkpoint import load_any
from lcf_fast.errors import (
    CheckpointError,
    DTypeError,
    GeometryError,
    IndexRangeError,
    LCFError,
    MessageError,
    ShapeError,
    SpanError,
)
from lcf_fast.placement import PLACEMENTS, placement_of, slot_positions, with_slots
from lcf_fast.reading.prefill import dynamic_cache, prefill
from lcf_fast.rotary import Rotary

Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return family_model("qwen2", 1), family_model("qwen3", 2)


@pytest.fixture
def adapter(models: tuple[Any, Any]) -> LatentSlots:
    return slots_adapter(*models)


def heard(sharer: Any, lengths: list[int] | None = None) -> tuple[list[Pair], Tensor]:
    ids, mask = ragged_ids(lengths or [9, 6, 9], 7)
    return prefill(sharer, ids, mask), mask


def test_it_computes_what_the_reference_does(models: tuple[Any, Any], adapter: LatentSlots) -> None:
    cache, mask = heard(models[0])
    message = adapter.summarize(cache, attention_mask=mask, slot_weights=True)
    weights = {name: p.detach().double() for name, p in adapter.named_parameters()}
    double = [(k.double(), v.double()) for k, v in (cache[s] for s in adapter.sharer_layers.tolist())]
    latent = reference.summarize_slots_layers(double, weights, attention_mask=mask)
    assert message.latent is not None
    assert (message.slots, message.spans, message.latent.dtype) == (3, 1, torch.float32)
    torch.testing.assert_close(message.latent.double(), latent, rtol=1e-5, atol=1e-5)
    for pair, expected in zip(adapter.expand(message), reference.expand_slots_layers(latent, weights, kv_heads=2)):
        for side, truth in zip(pair, expected):
            torch.testing.assert_close(side.double(), truth, rtol=1e-4, atol=1e-4)
    assert message.slot_weights is not None
    for layer, pair in enumerate(double):
        query = weights["slot_query"][layer]
        shares = reference.slot_pool(*pair, query, attention_mask=mask, return_weights=True)[2]
        torch.testing.assert_close(message.slot_weights[layer].double(), shares.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_fewer_slots_are_the_first_ones(models: tuple[Any, Any], adapter: LatentSlots) -> None:
    cache, mask = heard(models[0])
    whole = adapter.summarize(cache, attention_mask=mask)
    some = adapter.summarize(cache, attention_mask=mask, slots=2)
    assert whole.latent is not None and some.latent is not None
    torch.testing.assert_close(some.latent, whole.latent[:, :, :2])
    own, own_mask = heard(models[1], [5, 4, 5])
    longer = adapter.append(models[1], own, whole.take_slots(1), attention_mask=own_mask)
    assert {side.shape[2] for pair in longer for side in pair} == {6}


# --- placement
# ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_move_by_the_rotation_alone(name: str) -> None:
    receiver = family_model(name)
    adapter = slots_adapter(receiver, receiver)
    cache, mask = heard(receiver)
    message = adapter.summarize(cache, attention_mask=mask)
    here = torch.tensor([[0, 1, 2], [5, 6, 7], [3, 9, 20]])
    rotary = Rotary.of(receiver)
    first, second = adapter.place(receiver, message, here), adapter.place(rotary, message, here + 17)
    bare = rotary.unrotate([key for key, _ in first], here)
    for got, (expected, _) in zip(rotary.rotate(bare, here + 17), second):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for (key, value), (moved, same), (unplaced, own) in zip(first, second, adapter.expand(message)):
        assert torch.equal(value, same)
        assert torch.equal(value, own)
        torch.testing.assert_close(moved.norm(dim=-1), key.norm(dim=-1), rtol=1e-4, atol=1e-4)
        assert unplaced.shape == key.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_that_hold_a_texts_own_keys_are_that_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a prefix they are the text read before the prompt: for ragged rows, to the last of the answer's tokens."""
    receiver = family_model(name)
    adapter = slots_adapter(receiver, receiver, slots=4)
    text, _ = ragged_ids([4, 4], 3)
    ids, mask = ragged_ids([6, 3], 4)
    rotary, at = Rotary.of(receiver), torch.arange(4)[None]
    read = prefill(receiver, text, torch.ones_like(text))
    bare = list(zip(rotary.unrotate([key for key, _ in read], at), [value for _, value in read]))
    monkeypatch.setattr(adapter, "expand", lambda message: bare)
    message = adapter.summarize(read)
    cache = adapter.prefix(receiver, message)
    long_ids, long_mask = with_slots(ids, mask, 4, placement="prefix")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    got = receiver.generate(long_ids, attention_mask=long_mask, past_key_values=cache, **options)
    for row, length in enumerate((6, 3)):
        whole = torch.cat([text[row : row + 1], ids[row : row + 1, 6 - length :]], 1)
        expected = receiver.generate(whole, attention_mask=torch.ones_like(whole), **options)
        assert got[row, 10:].tolist() == expected[0, 4 + length :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("placement", ["append", "prefix"])
def test_a_ragged_batch_under_generate_is_its_rows(name: str, placement: Any) -> None:
    receiver = family_model(name)
    adapter = slots_adapter(receiver, receiver)
    cache, mask = heard(receiver)
    message = adapter.summarize(cache, attention_mask=mask)
    ids, own_mask = ragged_ids([8, 3, 5], 4)

    def answered(rows: list[int], keep: int) -> Tensor:
        """Logits of each new token for these rows of ``(B, keep)`` columns."""
        some, some_mask = ids[rows, -keep:], own_mask[rows, -keep:]
        assert message.latent is not None
        theirs = replace(message, latent=message.latent[:, rows])
        if placement == "append":
            own = prefill(receiver, some[:, :-1], some_mask[:, :-1])
            from lcf_fast.reading.prefill import dynamic_cache

            made = dynamic_cache(adapter.append(receiver, own, theirs, attention_mask=some_mask[:, :-1]))
        else:
            made = adapter.prefix(receiver, theirs)
        long_ids, long_mask = with_slots(some, some_mask, 3, placement=placement)
        out = receiver.generate(
            long_ids,
            attention_mask=long_mask,
            past_key_values=made,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    batch = answered([0, 1, 2], 8)
    for row, length in enumerate((8, 3, 5)):
        torch.testing.assert_close(batch[row], answered([row], length)[0], rtol=2e-3, atol=2e-3)
    alone = receiver(ids[:1], attention_mask=own_mask[:1]).logits[:, -1]
    assert float((alone - batch[:1, 0]).abs().max()) > 1e-2, "the slots are not read"


def test_appended_slots_stand_between_the_prompt_and_its_last_token(
    models: tuple[Any, Any], adapter: LatentSlots
) -> None:
    """By hand: the last token, one position further for each slot, reads the receiver's own keys and the slots."""
    sharer, receiver = models
    cache, mask = heard(sharer, [9])
    message = adapter.summarize(cache, attention_mask=mask)
    ids, _ = ragged_ids([6], 4)
    own = receiver(ids[:, :-1], use_cache=True).past_key_values
    made = adapter.append(receiver, own, message)
    assert own.get_seq_length() == 5, "the given cache has changed"
    assert made.get_seq_length() == 8
    placed = adapter.place(receiver, message, torch.tensor([[5, 6, 7]]))
    for layer, before, pair in zip(made.layers, own.layers, placed):
        assert torch.equal(layer.keys, torch.cat([before.keys, pair[0]], 2))
        assert torch.equal(layer.values, torch.cat([before.values, pair[1]], 2))
    logits = receiver(ids[:, -1:], past_key_values=made, position_ids=torch.tensor([[8]])).logits
    made = adapter.append(receiver, [(layer.keys, layer.values) for layer in own.layers], message)
    assert isinstance(made, tuple)
    long_ids, long_mask = with_slots(ids, None, message.slots)
    assert long_ids[0, 5:].tolist() == [int(ids[0, -1])] * 4
    assert long_mask.tolist() == [[1] * 9]
    cache_again = adapter.append(receiver, receiver(ids[:, :-1], use_cache=True).past_key_values, message)
    out = receiver.generate(
        long_ids, attention_mask=long_mask, past_key_values=cache_again, max_new_tokens=1, pad_token_id=0,
        do_sample=False,
    )  # fmt: skip
    assert int(out[0, -1]) == int(logits[0, -1].argmax())


@pytest.mark.parametrize("method", ["place", "append", "prefix"])
def test_placing_compiles_whole(method: str, models: tuple[Any, Any], adapter: LatentSlots) -> None:
    rotary, message = Rotary.of(models[1]), adapter.summarize(heard(models[0])[0])
    own, mask = heard(models[1])

    def call() -> list[Pair]:
        if method == "place":
            return adapter.place(rotary, message, torch.arange(message.slots)[None] + 5)
        if method == "append":
            return [*adapter.append(rotary, own, message, attention_mask=mask)]
        return cache_layers(adapter.prefix(rotary, message))

    with torch.no_grad():
        made = torch.compile(call, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(made, call(), rtol=1e-5, atol=1e-5)


def test_positions_count_what_is_real() -> None:
    device = torch.device("cpu")
    assert slot_positions(4, 2, 1, device).tolist() == [[4, 5]]
    there = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]])
    assert slot_positions(torch.tensor([4, 2, 0]), there, 3, device).tolist() == [[4, 4, 5], [1, 2, 3], [0, 0, 0]]
    ids, mask = torch.tensor([[7, 8, 9], [0, 5, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    got = with_slots(ids, mask, torch.tensor([[1, 1], [0, 1]]), placement="prefix")
    assert got[0].tolist() == [[9, 9, 7, 8, 9], [6, 6, 0, 5, 6]]
    assert got[1].tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]
    got = with_slots(ids, mask, torch.tensor([[1, 1], [0, 1]]))
    assert got[1].tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]


def test_a_sliding_cache_grows_while_nothing_slides_out() -> None:
    from transformers import DynamicCache

    receiver = family_model("gemma3")
    adapter = slots_adapter(receiver, receiver)
    message = adapter.summarize(heard(receiver, [9])[0])
    ids, _ = ragged_ids([6], 4)
    receiver.config.sliding_window = 16
    own = DynamicCache(config=receiver.config)
    receiver(ids[:, :-1], past_key_values=own, use_cache=True)
    grown = adapter.append(receiver, own, message)
    assert {layer.get_seq_length() for layer in grown.layers} == {8}
    plain = adapter.append(receiver, prefill(receiver, ids[:, :-1], torch.ones(1, 5)), message)
    from lcf_fast.reading.prefill import dynamic_cache

    at = torch.tensor([[8]])
    a = receiver(ids[:, -1:], past_key_values=grown, position_ids=at).logits
    b = receiver(ids[:, -1:], past_key_values=dynamic_cache(plain), position_ids=at).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for layer in own.layers:
        if layer.is_sliding:
            layer.sliding_window = 8
    with pytest.raises(GeometryError, match="sliding window"):
        adapter.append(receiver, own, message)


def test_slots_take_the_dtype_of_the_cache(models: tuple[Any, Any], adapter: LatentSlots) -> None:
    sharer, receiver = models
    own = [(key.bfloat16(), value.bfloat16()) for key, value in heard(receiver, [9])[0]]
    grown = adapter.append(receiver, own, adapter.summarize(heard(sharer, [9])[0]))
    assert {tensor.dtype for pair in grown for tensor in pair} == {torch.bfloat16}


def test_a_static_cache_is_refused(
    models: tuple[Any, Any], adapter: LatentSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import StaticCache

    monkeypatch.setattr(adapter, "place", None)  # before anything is computed

    sharer, receiver = models
    own = StaticCache(config=receiver.config, max_cache_len=32)
    receiver(ragged_ids([5], 4)[0], past_key_values=own, use_cache=True)
    with pytest.raises(GeometryError, match=r"can grow \(append_"):
        adapter.append(receiver, own, adapter.summarize(heard(sharer, [9])[0]))


# --- messages and several sharers
# ---------------------------------------------------------------------


def test_messages_go_through_bytes_and_one_serves_every_row(models: tuple[Any, Any], adapter: LatentSlots) -> None:
    sharer, receiver = models
    message = adapter.summarize(heard(sharer, [9])[0])
    again = Message.from_bytes(message.to_bytes())
    own, mask = heard(receiver, [5, 3])
    made = adapter.append(receiver, own, again, attention_mask=mask)
    assert message.latent is not None
    twice = replace(message, latent=message.latent.repeat(1, 2, 1, 1))
    for pair, expected in zip(made, adapter.append(receiver, own, twice, attention_mask=mask)):
        torch.testing.assert_close(pair, expected)


def test_several_sharers_side_by_side(models: tuple[Any, Any], adapter: LatentSlots) -> None:
    sharer, receiver = models
    other = family_model("llama", 3)
    side = adapter.for_sharer(CacheGeometry.of(other), slots=2)
    frozen = [name for name, parameter in side.named_parameters() if not parameter.requires_grad]
    assert frozen == ["norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias"]
    first = adapter.summarize(heard(sharer, [9])[0])
    second = Message.from_bytes(side.summarize(heard(other, [9])[0]).to_bytes())
    with pytest.raises(MessageError, match="accept_sharer"):
        adapter.join([first, second])
    adapter.accept_sharer(side)
    joined = adapter.join([first, second])
    assert joined.slots == 5
    assert joined.latent is not None and first.latent is not None and second.latent is not None
    assert torch.equal(joined.latent, torch.cat([first.latent, second.latent], 2))
    adapter.expand(Message.from_bytes(joined.to_bytes()))
    assert adapter.join([second]).slots == 2
    two = adapter.join([adapter.summarize(heard(sharer, [9, 4])[0]), second])
    assert two.latent is not None and two.latent.shape[1:3] == (2, 5)
    # Whoever sends alone is read as it is read among others.
    alone, among = adapter.expand(first), adapter.expand(joined)
    for pair, both in zip(alone, among):
        torch.testing.assert_close(pair[0], both[0][:, :, :3])
    stranger = slots_adapter(sharer, receiver, seed=9)
    for wrong in (stranger, "f" * 31):
        with pytest.raises(LCFError, match="sharer"):
            adapter.accept_sharer(wrong)
    with pytest.raises(MessageError, match="adapter"):
        adapter.expand(stranger.summarize(heard(sharer, [9])[0]))


# --- training mode
# ---------------------------------------------------------------------


def test_every_parameter_has_a_gradient_in_either_placement(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    ids, mask = ragged_ids([6, 3, 5], 4)
    cache, heard_mask = heard(sharer)
    for placement in ("append", "prefix"):
        adapter = slots_adapter(sharer, receiver, dropout=0.1).train()
        message = adapter.summarize(cache, attention_mask=heard_mask)
        if placement == "append":
            own = prefill(receiver, ids[:, :-1], mask[:, :-1])
            made: Any = adapter.append(receiver, own, message, attention_mask=mask[:, :-1])
            sum((side * side).sum() for pair in made for side in pair).backward()
        else:
            made = adapter.prefix(receiver, message)
            sum((layer.keys * layer.values).sum() for layer in made.layers).backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("placement", ["append", "prefix"])
def test_a_training_step_on_the_kernels_is_the_eager_paths(models: tuple[Any, Any], placement: str) -> None:
    """From the sharer's cache to the receiver's loss and back, with dropout, a padded batch and some of the slots."""
    sharer, receiver = models
    ids, mask = ragged_ids([6, 3, 5], 4)
    cache, heard_mask = heard(sharer)
    own = prefill(receiver, ids[:, :-1], mask[:, :-1])
    adapter = slots_adapter(sharer, receiver, dropout=0.2).train()

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        adapter.zero_grad()
        message = adapter.summarize(cache, attention_mask=heard_mask, slots=2)
        if placement == "append":
            grown = dynamic_cache(adapter.append(receiver, own, message, attention_mask=mask[:, :-1]))
            long_ids, long_mask = with_slots(ids, mask, 2)
            rest = long_ids[:, -1:]
        else:
            grown = adapter.prefix(receiver, message)
            long_ids, long_mask = with_slots(ids, mask, 2, placement="prefix")
            rest = ids
        logits = receiver(rest, attention_mask=long_mask, past_key_values=grown).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 5, 7]))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}

    expected_loss, expected = step()
    with use_backend("triton"):
        loss, got = step()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert set(got) == {name for name, _ in adapter.named_parameters()}
    for name, gradient in got.items():
        largest = float(expected[name].abs().max())
        assert largest > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_dropout_is_drawn_from_torchs_generator_in_training_alone(models: tuple[Any, Any]) -> None:
    adapter = slots_adapter(*models, dropout=0.3)
    message = adapter.summarize(heard(models[0])[0])
    quiet = adapter.expand(message)[0][1]
    assert torch.equal(adapter.expand(message)[0][1], quiet)
    adapter.train()
    torch.manual_seed(1)
    noisy = [adapter.expand(message)[0][1] for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(adapter.expand(message)[0][1], noisy[0])
    assert not torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], quiet)


# --- saving
# ---------------------------------------------------------------------


def test_there_and_back(models: tuple[Any, Any], adapter: LatentSlots, tmp_path: Path) -> None:
    adapter.accept_sharer("a" * 32)
    adapter.save_pretrained(tmp_path)
    again = LatentSlots.from_pretrained(tmp_path, sharer=models[0], receiver=models[1])
    assert again.config == adapter.config
    assert again.accepted_sharers == {"a" * 32}
    assert again.origin == adapter.origin
    assert not again.training
    assert {p.requires_grad for p in again.parameters()} == {True}
    for (name, a), b in zip(again.named_parameters(), adapter.parameters()):
        assert torch.equal(a, b), name
    message = Message.from_bytes(adapter.summarize(heard(models[0])[0]).to_bytes())
    half = LatentSlots.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.expand(message)  # cast, it is still the same adapter
    assert isinstance(load_any(tmp_path), LatentSlots)
    with pytest.raises(GeometryError, match="receiver"):
        LatentSlots.from_pretrained(tmp_path, receiver=CacheGeometry(9, 9, 9))


def test_a_folder_says_where_slots_stood_in_training(adapter: LatentSlots, tmp_path: Path) -> None:
    """Folders of before it was recorded do not, and what is not known is not written."""
    adapter.save_pretrained(tmp_path)
    assert "placement" not in json.loads((tmp_path / "config.json").read_text())
    old = LatentSlots.from_pretrained(tmp_path)
    assert (old.trained_placement, old.placement) == (None, "append")
    for placement in PLACEMENTS:
        adapter.trained_placement = placement
        adapter.save_pretrained(tmp_path)
        again = LatentSlots.from_pretrained(tmp_path)
        assert again.trained_placement == again.placement == placement
        assert again.for_sharer(CacheGeometry(2, 1, 8)).trained_placement == placement
        assert again.origin == old.origin  # messages do not depend on it
    description = json.loads((tmp_path / "config.json").read_text())
    for wrong in ("between", 1, ["append"]):
        (tmp_path / "config.json").write_text(json.dumps(description | {"placement": wrong}))
        with pytest.raises(CheckpointError, match="placement"):
            LatentSlots.from_pretrained(tmp_path)
    adapter.trained_placement = "between"  # type: ignore[assignment]
    with pytest.raises(GeometryError, match="placement"):
        adapter.save_pretrained(tmp_path / "wrong")


def test_where_slots_go_is_as_told_or_as_trained(adapter: LatentSlots) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert placement_of(adapter, None) == "append"
        assert [placement_of(adapter, told) for told in PLACEMENTS] == list(PLACEMENTS)  # nothing is contradicted
        adapter.trained_placement = "prefix"
        assert [placement_of(adapter, told) for told in (None, "prefix")] == ["prefix"] * 2
    with pytest.warns(UserWarning, match="'append' of slots whose adapter was trained with 'prefix'"):
        assert placement_of(adapter, "append") == "append"
    with pytest.raises(GeometryError, match="placement"):
        placement_of(adapter, "between")


def test_each_class_says_which_one_reads_a_folder(adapter: LatentSlots, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path / "slots")
    config = LCFConfig(CacheGeometry(2, 1, 8), CacheGeometry(2, 1, 8), bottleneck=64, cross_context=True)
    LatentCacheFlow(config).save_pretrained(tmp_path / "lcf_x")
    assert "slots" not in json.loads((tmp_path / "lcf_x" / "config.json").read_text())["config"]
    with pytest.raises(CheckpointError, match=r"LatentSlots\.from_pretrained"):
        LatentCacheFlow.from_pretrained(tmp_path / "slots")
    with pytest.raises(CheckpointError, match=r"LatentCacheFlow\.from_pretrained"):
        LatentSlots.from_pretrained(tmp_path / "lcf_x")
    assert isinstance(load_any(tmp_path / "lcf_x"), LatentCacheFlow)
    with pytest.raises(GeometryError, match="LatentSlots"):
        LatentCacheFlow(adapter.config)
    with pytest.raises(GeometryError, match="LatentCacheFlow"):
        LatentSlots(config)


def test_a_folder_that_lacks_a_layer_is_refused(adapter: LatentSlots, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    for name in ("receiver_layers", "sharer_layers"):
        description[name] = description[name][:-1]
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="all receiver layers"):
        LatentSlots.from_pretrained(tmp_path)


def test_a_state_dict_of_another_layer_map_is_refused(adapter: LatentSlots) -> None:
    """It would be an adapter whose configuration contradicts it, which nobody could read back."""
    state, held = adapter.state_dict(), adapter.sharer_layers.clone()
    adapter.load_state_dict(state)
    other = {"sharer_layers": torch.zeros_like(held), "down_bias": torch.full_like(state["down_bias"], 9.0)}
    assert not torch.equal(other["sharer_layers"], held)
    with pytest.raises(GeometryError, match=r"sharer_layers: expected \(.*the configuration's layer map"):
        adapter.load_state_dict({**state, **other})
    assert torch.equal(adapter.sharer_layers, held) and not bool((adapter.get_parameter("down_bias") == 9.0).any())


# --- what is refused
# ---------------------------------------------------------------------


def test_bad_input(models: tuple[Any, Any], adapter: LatentSlots) -> None:
    sharer, receiver = models
    cache, mask = heard(sharer)
    message = adapter.summarize(cache, attention_mask=mask)
    for slots in (0, 4, 2.0, True):
        with pytest.raises(IndexRangeError):
            adapter.summarize(cache, slots=slots)  # type: ignore[arg-type]
    with pytest.raises(SpanError):
        adapter.summarize(cache, attention_mask=mask * torch.tensor([[1], [0], [1]]))
    with pytest.raises(GeometryError, match="sharer_cache"):
        adapter.summarize(cache[:-1])
    own, _ = heard(receiver, [5, 5])
    with pytest.raises(ShapeError, match="batch size 2 or 1"):
        adapter.append(receiver, own, message)
    assert message.latent is not None
    for latent, error in (
        (message.latent[:, :, 0], MessageError),
        (message.latent[:2], ShapeError),
        (message.latent[..., :32], ShapeError),
        (message.latent[:, :, :0], ShapeError),
        (message.latent.long(), DTypeError),
        (None, MessageError),
    ):
        with pytest.raises(error):
            adapter.expand(replace(message, latent=latent))
    with pytest.raises(GeometryError, match="receiver_layers"):
        adapter.expand(replace(message, receiver_layers=(0, 1)))
    with pytest.raises(DTypeError):
        adapter.expand(message.latent)  # type: ignore[arg-type]
    for wrong in ([], 3, [3]):
        with pytest.raises(DTypeError, match="messages"):
            adapter.join(wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"messages\[1\]"):
        adapter.join([message, adapter.summarize([(k[:2], v[:2]) for k, v in cache])])
    with pytest.raises(GeometryError, match="placement"):
        with_slots(torch.ones(1, 2, dtype=torch.int64), None, 2, placement="between")  # type: ignore[arg-type]
    with pytest.raises(LCFError):
        with_slots(torch.ones(1, 2, dtype=torch.int64), None, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="slots"):
        with_slots(torch.ones(1, 2, dtype=torch.int64), None, -1)
    for where in PLACEMENTS:
        with pytest.raises(ShapeError, match=r"attention_mask: .* rows that end in it: \[1\]"):
            with_slots(torch.ones(2, 2, dtype=torch.int64), torch.tensor([[0, 1], [1, 0]]), 2, placement=where)
    for dtype in (torch.int8, "float16"):
        with pytest.raises(DTypeError, match="dtype: expected a float dtype"):
            adapter.prefix(receiver, message, dtype=dtype)  # type: ignore[arg-type]
