"""Whose messages are, and who may write to whom: through casts and copies, in threads, when the adapter is gone."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, assert_close, cloned, make_adapter, make_caches
from messages import assert_same

from helpers import make_cache, to_double
from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, Message
from lcf_fast.checkpoint import load_any
from lcf_fast.errors import DTypeError, GeometryError, MessageError, ShapeError
from lcf_fast.fingerprint import (
    SHARER_OF_SLOTS,
    digest_of,
    receiver_digest,
    sharer_digest,
    slots_receiver_digest,
    slots_sharer_digest,
)
from lcf_fast.sharer import SharerSide
from lcf_fast.slots_sharer import SlotsSharerSide

OTHER = CacheGeometry(2, 1, 24)  # another sharer model


@pytest.mark.parametrize("slots", [0, 2])
def test_a_side_outlives_its_adapter(slots: int, tmp_path: Path) -> None:
    """Trained and saved when the adapter that it writes to is no longer in memory, it still knows whose it is."""
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True, slots=slots)
    adapter: Any = LatentSlots(config) if slots else LatentCacheFlow(config)
    digest = adapter.origin.adapter
    sides = [adapter.sharer_side(), type(adapter.sharer_side()).for_receiver(adapter, OTHER)]
    del adapter
    gc.collect()
    for side, geometry in zip(sides, (SHARER, OTHER)):
        with torch.no_grad():
            side.down_weight.add_(1.0)
        side.save_pretrained(tmp_path)
        read = load_any(tmp_path)
        assert side.adapter_digest == read.adapter_digest == read.origin.adapter == digest
        with torch.no_grad():
            message = Message.from_bytes(side.summarize(make_cache(geometry, 1, 4)).to_bytes())
        assert message.origin == side.origin == read.origin


def test_two_threads_make_the_first_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have seen of the weights is one and the same: either message still knows its origin."""
    adapter, cache = make_adapter(True), make_cache(SHARER, 1, 4)
    with torch.no_grad():
        adapter.get_parameter("span_query").add_(1.0)  # not seen before
    weights = adapter._weights

    def slowly() -> Any:
        time.sleep(0.05)
        return weights()

    monkeypatch.setattr(adapter, "_weights", slowly)
    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(lambda _: adapter._state(), range(2)))
    assert states[0] is states[1]
    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(lambda _: adapter.summarize(cache), range(2)))
    assert messages[0].origin == messages[1].origin == adapter.origin


def test_a_message_is_for_its_adapter_alone() -> None:
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    data = adapter.summarize(cache).to_bytes()
    adapter.inject(receiver, Message.from_bytes(data))
    for name in ("down_weight", "down_bias", "up_weight", "gate_logit", "ffn_in_weight"):
        other = copy.deepcopy(adapter)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 0.5
        assert other.origin.adapter != adapter.origin.adapter, name
        before = cloned(receiver)
        for message in (Message.from_bytes(data), adapter.summarize(cache)):
            with pytest.raises(MessageError, match=r"message\.origin\.adapter"):
                other.inject_(receiver, message)
        assert all(torch.equal(a, b) for x, y in zip(receiver, before) for a, b in zip(x, y))
    half = copy.deepcopy(adapter)
    with torch.no_grad():
        half.down_weight[0, 0, 0] += 0.5  # the sharer's columns: the receiver's half is the same
    with pytest.raises(MessageError, match=r"message\.origin\.sharer"):
        half.inject(receiver, Message.from_bytes(data))
    half.accept_sharer(adapter.origin.sharer)
    half.inject(receiver, Message.from_bytes(data))


def test_accepted_sharers_are_saved_with_the_adapter(tmp_path: Path) -> None:
    adapter, (_, receiver) = make_adapter(True), make_caches()
    side = SharerSide.for_receiver(adapter, OTHER)
    data = side.summarize(make_cache(OTHER, 2, 9)).to_bytes()
    loaded = Message.from_bytes(data)
    with pytest.raises(MessageError, match="accept_sharer"):
        adapter.inject(receiver, loaded)
    adapter.accept_sharer(side).save_pretrained(tmp_path)
    read = LatentCacheFlow.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert read.origin == adapter.origin  # casting does not make another adapter of it
    read.to(torch.float32).inject(receiver, loaded)
    twin = SharerSide.for_receiver(adapter, SHARER)  # of the same shapes
    adapter.accept_sharer(twin)
    assert not copy.deepcopy(adapter).prune([1, 3]).accepted_sharers  # theirs are for all layers
    for other in (side, twin):  # only the adapter's own W_down reads a summary
        summary = other.summarize(make_cache(other.sharer_geometry, 2, 9)).to_bytes(contents=["summary"])
        with pytest.raises(MessageError, match=r"origin\.sharer"):
            adapter.inject(receiver, Message.from_bytes(summary))
    with pytest.raises(MessageError, match="SharerSide for the adapter"):
        make_adapter(True, gate_init=0.5).requires_grad_(True).accept_sharer(_foreign_side())
    for bad in ("abc", 3, None):
        with pytest.raises(DTypeError):
            adapter.accept_sharer(bad)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="layers"):
        make_adapter(True, keep=[1]).accept_sharer(side)


def _foreign_side() -> SharerSide:
    adapter = make_adapter(True)
    with torch.no_grad():
        adapter.get_parameter("up_bias").add_(1.0)
    return adapter.sharer_side()


def test_a_summary_alone_is_folded_by_the_receiver() -> None:
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    message = adapter.summarize(cache)
    read = Message.from_bytes(message.to_bytes(contents=["summary"]))
    assert read.latent is None
    assert_close(adapter.inject(receiver, read), to_double(adapter.inject(receiver, message)))
    neither = Message(None, message.receiver_layers, 1)
    with pytest.raises(MessageError, match="a latent or a summary"):
        adapter.inject(receiver, neither)
    thin = Message(None, message.receiver_layers, 1, summary=torch.zeros(5, 2, 2, 2, 3))
    with pytest.raises(ShapeError, match="summary"):
        adapter.inject(receiver, thin)


def test_the_origin_is_of_the_weights_that_made_it() -> None:
    adapter, cache = make_adapter(True), make_caches()[0]
    early = adapter.summarize(cache)
    read = adapter.summarize(cache)
    known = read.origin
    with torch.no_grad():
        adapter.gate_logit[0, 0] += 1.0
    assert adapter.origin != known
    assert read.origin == known
    with pytest.raises(MessageError, match="have changed since"):
        early.to_bytes()
    assert adapter.prune([0, 2]).origin != known
    moved = make_adapter(True)
    before = moved.origin
    assert moved.to(torch.float16).origin == before


def test_a_cast_half_is_the_same_half(tmp_path: Path) -> None:
    """Casting and moving give a module new buffers: whose messages they are stays, and a change is still seen."""
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    adapter.sharer_side().save_pretrained(tmp_path)
    read = SharerSide.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert read.origin == adapter.origin
    adapter.inject(receiver, Message.from_bytes(read.summarize(cache).to_bytes()))

    side = adapter.sharer_side()
    early, growing = side.summarize(cache), side.begin().extend(cache)
    outer = torch.nn.ModuleDict({"side": side}).to(torch.float16)
    outer.double()
    assert side.down_bias.dtype == torch.float64
    assert side.origin == early.origin == growing.finish().origin == adapter.origin
    with torch.no_grad():
        side.down_weight[0, 0, 0] += 0.5
    side.float()
    assert side.origin != adapter.origin
    stale = side.summarize(cache)
    with torch.no_grad():
        side.down_bias.add_(1.0)
    with pytest.raises(MessageError, match="have changed since"):
        side.double() and stale.origin


def test_a_copied_half_is_the_same_half() -> None:
    """In another process it knows its adapter by the digest, as it was; in this one by the adapter, whatever becomes of
    it."""
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    for side in (adapter.sharer_side(), SharerSide.for_receiver(adapter, SHARER)):
        origin = side.origin
        side.half()  # which a copy cannot see
        sent = pickle.loads(pickle.dumps(side))
        assert sent.origin == origin and sent.adapter_digest == adapter.origin.adapter
        assert pickle.loads(pickle.dumps(sent)).origin == origin
        copied = copy.deepcopy(side)
        assert copied.origin == origin
        adapter.inject(receiver, copied.summarize(cache))
        for made in (sent, copied):
            assert_same(made.summarize(cache), side.summarize(cache))
            with torch.no_grad():
                made.down_weight.add_(1.0)
            assert made.origin.sharer != origin.sharer
    with torch.no_grad():
        adapter.gate_logit.add_(1.0)
    assert copied.adapter_digest == side.adapter_digest == adapter.origin.adapter != sent.adapter_digest


def test_geometry_of_the_message_is_checked() -> None:
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    message = adapter.summarize(cache)
    assert (message.sharer, message.receiver) == (SHARER, RECEIVER)
    wrong = Message(message.latent, message.receiver_layers, 1, receiver=CacheGeometry(5, 3, 16))
    with pytest.raises(GeometryError, match=r"message\.receiver"):
        adapter.inject(receiver, wrong)


def test_a_digest_is_of_settings_names_dtypes_shapes_and_bits() -> None:
    one = torch.arange(6.0)
    tensors: list[dict[str, torch.Tensor]] = [
        {"a": one},
        {"b": one},
        {"a": one.view(2, 3)},
        {"a": one.view(torch.int32)},
        {"a": one.masked_fill(one == 0, -0.0)},
        {"a": one[:3], "b": one[3:]},
        {"a": one[:4], "b": one[4:]},
    ]
    digests = [digest_of({}, named) for named in tensors] + [digest_of({"eps": 1}, tensors[0])]
    assert len({*digests}) == len(digests)
    assert digest_of({}, {"a": one.view(2, 3).mT.contiguous().mT}) == digests[2]  # wherever they lie
    assert digest_of({}, {name: tensors[5][name] for name in ("b", "a")}) == digests[5]  # in whatever order


def _drawn(*names: str) -> dict[str, torch.Tensor]:
    columns = 2 * SHARER.channels + 2 * RECEIVER.channels
    return {name: torch.randn(2, 4, columns) for name in names}


def _stepped(weights: dict[str, torch.Tensor], name: str, column: int = 0) -> dict[str, torch.Tensor]:
    changed = weights[name].clone()
    changed[-1, -1, column] += 1.0
    return {**weights, name: changed}


def test_a_halfs_digest_is_of_all_that_gives_its_numbers_a_meaning_and_of_nothing_else() -> None:
    weights, theirs = _drawn("span_query", "global_query", "down_weight", "down_bias"), 2 * SHARER.channels
    layers, args = (0, 2), (RECEIVER, (0, 2), 1e-6)
    other = CacheGeometry(5, 6, 4)  # of as many channels as the receiver
    sharers = [
        sharer_digest(SHARER, layers, (0, 1), weights),
        sharer_digest(CacheGeometry(3, 4, 8), layers, (0, 1), weights),
        sharer_digest(CacheGeometry(4, 2, 16), layers, (0, 1), weights),
        sharer_digest(SHARER, (0, 3), (0, 1), weights),
        sharer_digest(SHARER, layers, (0, 2), weights),
        *(sharer_digest(SHARER, layers, (0, 1), _stepped(weights, name)) for name in ("span_query", "global_query")),
        *(sharer_digest(SHARER, layers, (0, 1), _stepped(weights, "down_weight", at)) for at in (0, theirs - 1)),
    ]
    assert len({*sharers}) == len(sharers)
    for name, at in (("down_weight", theirs), ("down_weight", -1), ("down_bias", 0)):
        assert sharer_digest(SHARER, layers, (0, 1), _stepped(weights, name, at)) == sharers[0]
    receivers = [
        receiver_digest(*args, weights),
        receiver_digest(other, layers, 1e-6, weights),
        receiver_digest(RECEIVER, (0, 3), 1e-6, weights),
        receiver_digest(RECEIVER, layers, 1e-5, weights),
        receiver_digest(*args, _stepped(weights, "down_bias")),
        *(receiver_digest(*args, _stepped(weights, "down_weight", at)) for at in (theirs, -1)),
    ]
    assert len({*receivers}) == len(receivers)
    narrow = {**weights, "down_weight": weights["down_weight"][:, :, 8:]}  # for another sharer
    for same in (narrow, _stepped(weights, "down_weight", theirs - 1), _stepped(weights, "span_query")):
        assert receiver_digest(*args, same) == receivers[0]


def test_the_digest_of_a_half_of_slots_is_as_those_of_lcf_x() -> None:
    weights = _drawn(*SHARER_OF_SLOTS, "up_weight")
    sharers = [
        slots_sharer_digest(SHARER, (0, 1), weights),
        slots_sharer_digest(CacheGeometry(3, 4, 8), (0, 1), weights),
        slots_sharer_digest(SHARER, (0, 2), weights),
        *(slots_sharer_digest(SHARER, (0, 1), _stepped(weights, name)) for name in SHARER_OF_SLOTS),
    ]
    assert len({*sharers}) == len(sharers)
    assert slots_sharer_digest(SHARER, (0, 1), _stepped(weights, "up_weight")) == sharers[0]
    receivers = [
        slots_receiver_digest(RECEIVER, 1e-6, weights),
        slots_receiver_digest(CacheGeometry(5, 6, 4), 1e-6, weights),
        slots_receiver_digest(RECEIVER, 1e-5, weights),
        slots_receiver_digest(RECEIVER, 1e-6, _stepped(weights, "up_weight")),
    ]
    assert len({*receivers}) == len(receivers)
    for name in SHARER_OF_SLOTS:
        assert slots_receiver_digest(RECEIVER, 1e-6, _stepped(weights, name)) == receivers[0]


def _steps(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.add_(1.0)


@pytest.mark.parametrize("is_uncounted", [False, True])
def test_a_weight_that_is_put_in_anothers_place_is_another(is_uncounted: bool) -> None:
    """Of the same shape, changed as many times; the other's memory, by which it is known, is not free to be reused."""
    adapter = make_adapter(True)
    old = adapter.get_parameter("up_bias")
    if is_uncounted:
        _steps(old)  # or else the weights were last seen by a cast
    origin = adapter.origin
    with torch.inference_mode(is_uncounted):
        new = torch.nn.Parameter(old + 1.0, requires_grad=False)
        if not is_uncounted:
            for _ in range(old._version - new._version):
                new.add_(0.0)
            assert new._version == old._version
    adapter.up_bias = new
    old_lives = weakref.ref(old)
    del old
    assert old_lives() is not None
    seen = adapter.origin
    assert seen.adapter != origin.adapter and seen.sharer == origin.sharer
    with torch.inference_mode(is_uncounted):
        _steps(new)
    assert adapter.origin.adapter not in (seen.adapter, origin.adapter)


def test_a_copy_of_weights_whose_changes_are_not_counted_is_digested_anew(tmp_path: Path) -> None:
    make_adapter(True).save_pretrained(tmp_path)
    with torch.inference_mode():
        adapter = LatentCacheFlow.from_pretrained(tmp_path)
        loaded = adapter.origin
        _steps(adapter.get_parameter("up_bias"))
        sent = pickle.dumps(adapter)
    assert pickle.loads(sent).origin == adapter.origin != loaded


@pytest.mark.parametrize("is_uncounted", [False, True])
def test_a_side_follows_its_adapter(is_uncounted: bool, tmp_path: Path) -> None:
    """A message is made with the bias of the adapter whose digest it bears, wherever the side is read or written."""
    with torch.inference_mode(is_uncounted):
        adapter, cache = make_adapter(True), make_cache(SHARER, 1, 4)
        side = SharerSide.of(adapter)
        before = side.summarize(cache)
        assert (old := side.origin) == adapter.origin
        _steps(adapter.get_parameter("down_bias"))
        assert adapter.origin.adapter != old.adapter
        own = adapter.summarize(cache).tensors["latent"]
        side.save_pretrained(tmp_path)
        copies = [side, copy.deepcopy(side), pickle.loads(pickle.dumps(side)), SharerSide.from_pretrained(tmp_path)]
        for half in copies:
            made = half.summarize(cache)
            assert torch.equal(made.tensors["latent"], own)
            assert made.origin == half.origin == adapter.origin
        if not is_uncounted:
            with pytest.raises(MessageError, match="changed since"):
                _ = before.origin
        side.load_state_dict({**side.state_dict(), "down_bias": torch.zeros_like(side.down_bias)})
        assert torch.equal(side.summarize(cache).tensors["latent"], own)


def test_a_compiled_side_follows_its_adapter() -> None:
    adapter, cache = make_adapter(True), make_cache(SHARER, 1, 4)
    side = SharerSide.of(adapter)
    compiled = torch.compile(lambda c: side.summarize(c).latent, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(cache), adapter.summarize(cache).latent)
            _steps(adapter.get_parameter("down_bias"))


@pytest.mark.parametrize("is_known", [False, True])
def test_a_digest_that_nobody_asked_for_goes_with_the_adapter(is_known: bool) -> None:
    """A side that took over a bias may not bear the digest of the bias before."""
    adapter, cache = make_adapter(True), make_cache(SHARER, 1, 4)
    side = SharerSide.of(adapter)
    _steps(adapter.get_parameter("down_bias"))
    side.summarize(cache)
    digest = adapter.origin.adapter if is_known else ""
    del adapter
    gc.collect()
    assert side.adapter_digest == digest


def test_a_side_of_slots_bears_the_digest_of_its_adapter() -> None:
    """Of the adapter as it was when the message was made, asked for before and after."""
    adapter = LatentSlots(LCFConfig(SHARER, RECEIVER, bottleneck=64, slots=2)).eval()
    side, cache = SlotsSharerSide.of(adapter), make_cache(SHARER, 1, 4)
    before = side.summarize(cache)
    assert side.origin == adapter.origin
    _steps(adapter.get_parameter("up_bias"))
    assert side.origin == adapter.origin
    assert side.summarize(cache).origin == adapter.origin
    with pytest.raises(MessageError, match="changed since"):
        _ = before.origin


def test_a_side_leaves_an_adapter_that_was_pruned() -> None:
    adapter, cache = make_adapter(True), make_cache(SHARER, 1, 4)
    side, digest = SharerSide.of(adapter), adapter.origin.adapter
    before = side.summarize(cache).tensors["latent"]
    adapter.prune(adapter.receiver_layers.tolist()[:2])
    assert torch.equal(side.summarize(cache).tensors["latent"], before)
    assert side.adapter_digest == digest
