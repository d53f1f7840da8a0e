"""The sharer's half of slots by itself: its messages, its folder, more sharers of one receiver; contexts that grow."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from tiny_slots import family_model, ragged_ids, slots_adapter
from torch import Tensor

from helpers import assert_within_budget, make_cache, to_double
from lcf_fast import CacheGeometry, GrowingSlots, LatentSlots, Message, SharerSide, SlotsSharerSide, reference
from lcf_fast.checkpoint import load_adapter, load_any
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
from lcf_fast.fingerprint import SHARER_OF_SLOTS
from lcf_fast.reading.prefill import prefill

Pair = tuple[Tensor, Tensor]


Models = tuple[Any, Any]
OTHER = CacheGeometry(2, 1, 24)  # another sharer model


@pytest.fixture(scope="module")
def models() -> Models:
    return family_model("qwen2", 1), family_model("qwen3", 2)


@pytest.fixture
def adapter(models: Models) -> LatentSlots:
    return slots_adapter(*models)


def heard(sharer: Any, lengths: list[int] | None = None) -> tuple[list[Pair], Tensor]:
    ids, mask = ragged_ids(lengths or [9, 6, 9], 7)
    return prefill(sharer, ids, mask), mask


def others_cache(batch: int = 3) -> list[Pair]:
    return make_cache(OTHER, batch, 8, generator=torch.Generator().manual_seed(4))


def cut(whole: list[Pair], start: int, stop: int) -> list[Pair]:
    return [(key[:, :, start:stop], value[:, :, start:stop]) for key, value in whole]


def latent(message: Message) -> Tensor:
    return message.tensors["latent"]


# --- a half is the adapter's own
# ---------------------------------------------------------------------


def test_a_side_is_the_adapters_own_half(models: Models, adapter: LatentSlots, tmp_path: Path) -> None:
    """Alone, saved and read: bitwise the adapter's messages, which the adapter takes."""
    cache, mask = heard(models[0])
    adapter.sharer_side().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sharer.safetensors"]
    side = SlotsSharerSide.from_pretrained(tmp_path, sharer=models[0])
    assert {name for name, _ in side.named_parameters()} == set(SHARER_OF_SLOTS)
    assert side.slot_count == adapter.slot_count == 3
    own = adapter.summarize(cache, attention_mask=mask, slot_weights=True)
    made = side.summarize(cache, attention_mask=mask, slot_weights=True)
    for name in ("latent", "slot_weights"):
        assert torch.equal(made.tensors[name], own.tensors[name]), name
    assert made.origin == own.origin == adapter.origin == side.origin
    fewer = side.summarize(cache, attention_mask=mask, slots=2)
    torch.testing.assert_close(latent(fewer), latent(own)[:, :, :2], rtol=1e-5, atol=1e-5)
    read = Message.from_bytes(made.to_bytes())
    for got, expected in zip(adapter.expand(read), adapter.expand(own)):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    whole = side.finish(side.merge([side.pool(cut(cache, 4, 9), attention_mask=mask[:, 4:]),
                                    side.pool(cut(cache, 0, 4), attention_mask=mask[:, :4])]))  # fmt: skip
    torch.testing.assert_close(latent(whole), latent(own), rtol=1e-5, atol=1e-5)
    assert whole.origin == own.origin
    half = SlotsSharerSide.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.origin == adapter.origin  # casting does not make another of it
    assert "3x2x16 -> 3x2x16, bottleneck=64, 3 slots" in repr(side)
    with pytest.raises(IndexRangeError, match="1 to 3"):
        side.summarize(cache, slots=4)


def test_a_copy_is_trained_for_itself(adapter: LatentSlots) -> None:
    side = adapter.sharer_side()
    with torch.no_grad():
        side.down_bias.add_(1.0)
    assert side.origin.adapter == adapter.origin.adapter
    assert side.origin.sharer != adapter.origin.sharer
    for name in SHARER_OF_SLOTS:
        assert torch.equal(side.get_parameter(name), adapter.get_parameter(name)) == (name != "down_bias")


def test_any_folder_is_known_by_what_it_holds(adapter: LatentSlots, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.sharer_side().save_pretrained(tmp_path / "side")
    make_adapter(True).sharer_side().save_pretrained(tmp_path / "spans")
    assert isinstance(load_any(tmp_path / "side"), SlotsSharerSide)
    assert isinstance(load_any(tmp_path / "spans"), SharerSide)
    assert isinstance(load_any(tmp_path / "adapter"), LatentSlots)
    with pytest.raises(CheckpointError, match="format"):
        load_adapter(tmp_path / "side")
    with pytest.raises(CheckpointError, match="with slots"):
        SharerSide.from_pretrained(tmp_path / "side")
    with pytest.raises(CheckpointError, match="without slots"):
        SlotsSharerSide.from_pretrained(tmp_path / "spans")


def _changed(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"slots": 0}, "slots"),
        ({"slots": "3"}, "slots"),
        ({"slots": True}, "slots"),
        ({"slots": 4}, "slot_query"),
        ({"per_span": "yes"}, "per_span"),
        ({"receiver_layers": [0, 1], "sharer_layers": [0, 1]}, "all receiver layers"),
        ({"bottleneck": 0}, "bottleneck"),
        ({"bottleneck": True}, "bottleneck"),
        ({"origin": {"adapter": "x"}}, "origin"),
        ({"origin": {"adapter": "x", "sharer": "y"}}, "origin"),
        ({"sharer_layers": [0, 1, 9]}, "sharer_layers"),
        ({"sharer_layers": [0, 0, 0]}, "sharer_layers"),
    ],
)
def test_a_damaged_folder_is_refused(changes: Any, match: str, adapter: LatentSlots, tmp_path: Path) -> None:
    adapter.sharer_side().save_pretrained(tmp_path)
    _changed(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=match):
        SlotsSharerSide.from_pretrained(tmp_path)


def test_a_folder_of_another_model_or_of_other_bytes(adapter: LatentSlots, tmp_path: Path) -> None:
    adapter.sharer_side().save_pretrained(tmp_path)
    with pytest.raises(GeometryError, match="sharer"):
        SlotsSharerSide.from_pretrained(tmp_path, sharer=CacheGeometry(3, 1, 16))
    data = bytearray((tmp_path / "sharer.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "sharer.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        SlotsSharerSide.from_pretrained(tmp_path)


# --- more sharers of one receiver
# ---------------------------------------------------------------------


def test_another_sharer_is_trained_against_a_frozen_adapter(models: Models) -> None:
    """Its loss falls, through the message alone; then it is saved, accepted, and read beside the first."""
    sharer, receiver = models
    adapter = slots_adapter(sharer, receiver).requires_grad_(False)
    side = SlotsSharerSide.for_receiver(adapter, OTHER, slots=2)
    cache, mask = others_cache(), ragged_ids([8, 5, 8])[1]
    own = prefill(receiver, *ragged_ids([5, 5, 4], 3))
    target = adapter.append(receiver, own, adapter.summarize(heard(sharer)[0], slots=2))
    optimizer, losses = torch.optim.Adam(side.parameters(), lr=3e-2), []
    for _ in range(15):
        placed = adapter.append(receiver, own, side.summarize(cache, attention_mask=mask))
        loss = sum((a - b).square().mean() for x, y in zip(placed, target) for a, b in zip(x, y))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in side.parameters())
    assert all(p.grad is None for p in adapter.parameters())


def test_only_accepted_sides_are_heard(models: Models, adapter: LatentSlots, tmp_path: Path) -> None:
    sharer, receiver = models
    side = SlotsSharerSide.for_receiver(adapter, OTHER, slots=2, layers=[1, 0, 1])
    assert side.sharer_layers.tolist() == [1, 0, 1]
    first = adapter.summarize(heard(sharer, [9])[0])
    sent = Message.from_bytes(side.summarize(others_cache(1)).to_bytes())
    with pytest.raises(MessageError, match="accept_sharer"):
        adapter.expand(sent)
    side.save_pretrained(tmp_path / "side")
    adapter.accept_sharer(SlotsSharerSide.from_pretrained(tmp_path / "side")).save_pretrained(tmp_path / "adapter")
    again = LatentSlots.from_pretrained(tmp_path / "adapter")
    joined = again.join([Message.from_bytes(first.to_bytes()), sent])
    assert torch.equal(latent(joined), torch.cat([latent(first), latent(sent)], 2))
    stranger = slots_adapter(sharer, receiver, seed=9)
    with pytest.raises(MessageError, match="origin"):
        stranger.expand(sent)
    with pytest.raises(MessageError, match="receiver's half"):
        stranger.accept_sharer(side)
    small = LatentSlots(type(adapter.config)(CacheGeometry.of(sharer), CacheGeometry(2, 2, 16), bottleneck=64, slots=1))
    with pytest.raises(GeometryError, match="sharer"):
        adapter.accept_sharer(small.sharer_side())
    for wrong in (None, 3, "f" * 31, SharerSide):
        with pytest.raises(DTypeError, match="sharer"):
            adapter.accept_sharer(wrong)  # type: ignore[arg-type]


def test_the_half_of_an_adapter_for_another_sharer(adapter: LatentSlots) -> None:
    """`for_sharer` is trained as an adapter, and sends as a side: the first adapter takes either."""
    trained = adapter.for_sharer(OTHER, slots=2)
    side = trained.sharer_side()
    assert side.origin == trained.origin
    assert side.origin.adapter == adapter.origin.adapter
    adapter.accept_sharer(side)
    assert adapter.accepted_sharers == {trained.origin.sharer}
    adapter.expand(Message.from_bytes(side.summarize(others_cache()).to_bytes()))


def test_a_state_dict_brings_its_routing_to_a_half(adapter: LatentSlots) -> None:
    layers = adapter.receiver_geometry.layers
    side = SlotsSharerSide.for_receiver(adapter, OTHER, layers=[1] * layers)
    other = SlotsSharerSide.for_receiver(adapter, OTHER, layers=[0] * layers)
    other.load_state_dict(side.state_dict())
    assert torch.equal(latent(other.summarize(others_cache())), latent(side.summarize(others_cache())))
    assert other.origin == side.origin


def test_a_fresh_half_goes_to_another_process(adapter: LatentSlots) -> None:
    side = SlotsSharerSide.for_receiver(adapter, OTHER)
    sent = pickle.loads(pickle.dumps(side))
    assert sent.origin == side.origin and sent.origin.adapter == adapter.origin.adapter
    assert torch.equal(latent(sent.summarize(others_cache())), latent(side.summarize(others_cache())))


def test_what_makes_no_half(adapter: LatentSlots) -> None:
    for options in ({"slots": 0}, {"slots": 2.0}, {"slots": True}, {"layers": [0, 1]}, {"layers": [0, 1, 9]}):
        with pytest.raises((GeometryError, IndexRangeError)):
            SlotsSharerSide.for_receiver(adapter, OTHER, **options)  # type: ignore[arg-type]


def test_the_digests_cover_every_weight(adapter: LatentSlots) -> None:
    """A changed weight of either half changes that half's digest, and no other."""
    before = adapter.origin
    for name, _ in adapter.named_parameters():
        changed = copy.deepcopy(adapter)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 0.5
        is_sharers = name in SHARER_OF_SLOTS
        assert (changed.origin.sharer != before.sharer) == is_sharers, name
        assert (changed.origin.adapter != before.adapter) == (not is_sharers), name


# --- growing
# ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "side"])
def test_a_context_grows(kind: str, models: Models, adapter: LatentSlots) -> None:
    """Ragged rows, an empty piece, one in which a row has no token: at every stop what pooling at once gives."""
    half = adapter if kind == "adapter" else adapter.sharer_side()
    whole, mask = heard(models[0], [14, 5, 9])
    for key, value in whole:
        key[1, :, :9], value[1, :, :9] = torch.nan, torch.inf  # padding holds anything
    weights = {name: p.detach() for name, p in adapter.named_parameters()}
    doubled = {name: p.double() for name, p in weights.items()}
    growing, sizes = half.begin(), set()
    assert isinstance(growing, GrowingSlots)
    for start, stop in ((0, 6), (6, 6), (6, 10), (10, 14)):
        growing.extend(cut(whole, start, stop), attention_mask=mask[:, start:stop])
        sizes.add(growing.partial.nbytes)
        assert growing.tokens == stop
        if not bool(mask[:, :stop].any(1).all()):
            with pytest.raises(SpanError, match=r"rows \[1\]"):
                growing.finish()
            continue
        layers = [cut(whole, 0, stop)[s] for s in adapter.sharer_layers.tolist()]
        layers = [tuple(side.nan_to_num(0.0, 0.0, 0.0) for side in pair) for pair in layers]  # type: ignore[misc]
        truth = reference.summarize_slots_layers(to_double(layers), doubled, attention_mask=mask[:, :stop])
        plain = reference.summarize_slots_layers(layers, weights, attention_mask=mask[:, :stop])
        message = growing.finish()
        assert_within_budget(latent(message), truth, plain, 4.0)
        assert torch.equal(latent(growing.finish()), latent(message))
        assert message.origin == adapter.origin
    assert len(sizes) == 1


def test_growing_refuses_and_stays_as_it_was(models: Models, adapter: LatentSlots) -> None:
    cache, mask = heard(models[0])
    growing = adapter.begin()
    with pytest.raises(SpanError, match="extend"):
        growing.finish()
    growing.extend(cut(cache, 0, 5), attention_mask=mask[:, :5])
    before = latent(growing.finish())
    wrong: list[tuple[type[LCFError], Any, Any]] = [
        (ShapeError, [(key[:2], value[:2]) for key, value in cache], None),
        (GeometryError, cache[:2], None),
        (GeometryError, [(key[..., :8], value[..., :8]) for key, value in cache], None),
        (DTypeError, [(key.double(), value.double()) for key, value in cache], None),
        (ShapeError, [*cache[:2], (cache[2][0][:, :, :3], cache[2][1])], None),
        (ShapeError, cache, mask[:, :3]),
    ]
    for error, piece, piece_mask in wrong:
        with pytest.raises(error):
            growing.extend(piece, attention_mask=piece_mask)
        assert growing.tokens == 5
    assert torch.equal(latent(growing.finish()), before)
    with torch.no_grad():
        adapter.get_parameter("slot_query").add_(1.0)
    with pytest.raises(MessageError, match="weights changed"):
        growing.extend(cache)
