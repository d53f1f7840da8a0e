"""The sharer's half: messages that grow and merge, and several sharers of one receiver."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, assert_close, cloned, expected_of, make_adapter, make_caches
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import assert_same
from torch import Tensor

from helpers import Pair, assert_within_budget, make_cache, to_double
from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, SlotsSharerSide, reference, use_backend
from lcf_fast.backends import Backend
from lcf_fast.checkpoint import load_any
from lcf_fast.errors import (
    CheckpointError,
    DeviceError,
    DTypeError,
    GeometryError,
    IndexRangeError,
    LCFError,
    MessageError,
    ShapeError,
    SpanError,
)
from lcf_fast.growing import PartialPool
from lcf_fast.message import Message
from lcf_fast.sharer import SharerSide
from lcf_fast.spans import Spans, windows

OTHER = CacheGeometry(2, 1, 24)  # another sharer model


def sharer_cache(batch: int, length: int, geometry: CacheGeometry = SHARER, **options: Any) -> list[Pair]:
    return make_cache(geometry, batch, length, generator=torch.Generator().manual_seed(length), **options)


def cut(cache: Sequence[Pair], start: int, stop: int) -> list[Pair]:
    return [(key[:, :, start:stop], value[:, :, start:stop]) for key, value in cache]


def hold(
    message: Message, adapter: LatentCacheFlow, cache: Sequence[Pair], offsets: Tensor, mask: Tensor | None = None
) -> None:
    """Latent and summary within the budget of pooling at once."""
    weights = {name: p.detach() for name, p in adapter.named_parameters()}
    doubled = {name: p.double() for name, p in weights.items()}
    layers = [cache[s] for s in adapter.sharer_layers.tolist()]
    truth = reference.summarize_layers(to_double(layers), doubled, offsets, attention_mask=mask)
    plain = reference.summarize_layers(layers, weights, offsets, attention_mask=mask)
    for ours, exact, single in zip((message.latent, message.summary), truth, plain):
        assert ours is not None
        assert_within_budget(ours, exact, single, 4.0)


# --- growing ------------------------------------------------------------------------------------------------------


def test_a_conversation_grows() -> None:
    """Spans known piece by piece; some left open; the message can be read in between."""
    adapter, cache = make_adapter(True), sharer_cache(1, 50)
    growing = adapter.begin()
    growing.extend(cut(cache, 0, 20), [[0, 12, 20]], open=True)
    hold(growing.finish(), adapter, cut(cache, 0, 20), torch.tensor([[0, 12, 20]]))
    growing.extend(cut(cache, 20, 30), open=True)  # all of it belongs to the open span
    growing.extend(cut(cache, 30, 31), [[0, 1]])
    growing.extend(cut(cache, 31, 50), [[0, 9, 19]])
    offsets = torch.tensor([[0, 12, 31, 40, 50]])
    message = growing.finish()
    hold(message, adapter, cache, offsets)
    assert message.spans == 4
    assert growing.tokens == 50
    again = growing.finish()
    assert torch.equal(again.tensors["latent"], message.tensors["latent"])


def test_pieces_of_known_spans() -> None:
    """Overlapping windows of the whole context, cut anywhere."""
    adapter, cache = make_adapter(True), sharer_cache(2, 60)
    spans = windows([60, 60], 20, 8)
    growing = adapter.begin()
    for start, stop in ((0, 7), (7, 33), (33, 33), (33, 60)):
        growing.extend(cut(cache, start, stop), spans.piece(start, stop))
    message, whole = growing.finish(), adapter.summarize(cache, spans)
    hold(message, adapter, cache, spans.offsets, spans.to_mask(60))
    torch.testing.assert_close(message.latent, whole.latent)
    assert message.spans == whole.spans == 5


@pytest.mark.parametrize("back_end", ["eager", "triton"])
def test_a_batch_of_none(back_end: Backend) -> None:
    """At once and in pieces, with and without spans, to the edit."""
    adapter, cache = make_adapter(True), sharer_cache(0, 5)
    forms: list[Any] = [None, torch.zeros(0, 3, dtype=torch.int64), [], Spans.given([])]
    with use_backend(back_end):
        for spans in forms:
            pool = adapter.pool(cache, spans)
            growing = adapter.begin()
            growing.extend(cache, spans)
            made = [adapter.summarize(cache, spans, span_weights=True), growing.finish(), adapter.finish(pool)]
            for message in (*made, adapter.finish(adapter.merge([pool, pool]))):
                assert message.tensors["latent"].shape == (5, 0, 64)
        edited = adapter.inject(make_caches(batch=0)[1], message)
    assert edited[4][0].shape == (0, RECEIVER.kv_heads, 7, RECEIVER.head_dim)


def test_ragged_rows_and_padding() -> None:
    """A row that is out of tokens keeps its span open through the piece; padding at either end is not pooled."""
    adapter, cache = make_adapter(True), sharer_cache(2, 30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :4] = 0  # left padding in the first piece
    mask[1, 13:22] = 0  # the middle of the second, and all of the third
    mask[1, 23] = 0  # within a span that was left open
    poisoned = [(key.clone(), value.clone()) for key, value in cache]
    for key, value in poisoned:
        key[1, :, mask[1] == 0], value[1, :, mask[1] == 0] = torch.nan, torch.inf
    growing = adapter.begin()
    growing.extend(cut(poisoned, 0, 10), [[0, 6, 10], [4, 7, 10]], open=True, attention_mask=mask[:, :10])
    growing.extend(cut(poisoned, 10, 15), [[0, 2, 5], [0, 3]], open=[False, True])
    growing.extend(cut(poisoned, 15, 20), [[0, 5], [0, 0]])
    growing.extend(cut(poisoned, 20, 30), [[0, 4, 10], [2, 5, 10]], attention_mask=mask[:, 20:])
    offsets = torch.tensor([[0, 6, 12, 15, 20, 24, 30], [4, 7, 25, 30, 30, 30, 30]])
    hold(growing.finish(), adapter, cache, offsets, mask)
    assert growing.partial.spans == (6, 3)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_pieces_open_or_not(data: st.DataObject) -> None:
    """One row, any cuts, any spans in each piece, left open or not: as the same spans pooled at once."""
    adapter = make_adapter(True)
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    cache = sharer_cache(1, sum(lengths))
    growing, whole, at, was_open = adapter.begin(), [0], 0, False
    for length in lengths:
        cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))})
        is_open = data.draw(st.booleans())
        growing.extend(cut(cache, at, at + length), [cuts], open=is_open)
        if was_open:
            whole.pop()
        whole += [at + c for c in cuts[1:]]
        at, was_open = at + length, is_open
    message = growing.finish()
    hold(message, adapter, cache, torch.tensor([whole]))
    assert message.spans == len(whole) - 1


def test_state_is_of_a_fixed_size() -> None:
    adapter = make_adapter(True)
    sizes = set()
    for length in (3, 40, 700):
        growing = adapter.begin().extend(sharer_cache(1, length), open=True)
        growing.extend(sharer_cache(1, length), [[*range(length + 1)]])
        sizes.add(growing.partial.nbytes)
    assert len(sizes) == 1
    layers, heads, dim = 5, SHARER.kv_heads, SHARER.head_dim
    assert sizes == {layers * heads * (3 * 2 * dim + 8) * 4}


def test_growing_refuses_and_stays_as_it_was() -> None:
    adapter, cache = make_adapter(True), sharer_cache(1, 10)
    growing = adapter.begin()
    with pytest.raises(SpanError, match="call extend"):
        growing.finish()
    growing.extend(cache, [[0, 4, 10]], open=True)
    before = growing.finish().tensors["latent"]
    attempts: list[tuple[type[Exception], dict[str, Any]]] = [
        (SpanError, {"spans": [[0, 4, 11]]}),
        (SpanError, {"spans": [[5, 4]]}),
        (SpanError, {"spans": Spans.given([[(0, 6), (3, 10)]]), "open": True}),
        (SpanError, {"spans": Spans.given([[0, 20]]).piece(5, 15), "open": True}),
        (ShapeError, {"spans": [[0, 4], [0, 3]]}),
        (ShapeError, {"open": [True, False]}),
        (DTypeError, {"open": 1}),
        (ShapeError, {"attention_mask": torch.ones(1, 9)}),
    ]
    for error, arguments in attempts:
        with pytest.raises(error):
            growing.extend(cache, **arguments)
    with pytest.raises(ShapeError, match="batch size 1 as before"):
        growing.extend(sharer_cache(2, 10))
    with pytest.raises(GeometryError):
        growing.extend(cache[:2])
    assert torch.equal(growing.finish().tensors["latent"], before)
    with torch.no_grad():
        adapter.get_parameter("global_query").add_(1.0)
    with pytest.raises(MessageError, match="weights changed"):
        growing.extend(cache)


def test_a_row_without_a_token_has_no_message() -> None:
    adapter = make_adapter(True)
    growing = adapter.begin().extend(sharer_cache(2, 6), [[0, 6], [3, 3]], open=True)
    with pytest.raises(SpanError, match=r"none in rows \[1\]"):
        growing.finish()
    growing.extend(sharer_cache(2, 6))
    assert torch.isfinite(growing.finish().tensors["latent"]).all()


# --- merging ------------------------------------------------------------------------------------------------------


def test_parts_merge_in_any_grouping() -> None:
    adapter, cache = make_adapter(True), sharer_cache(2, 40)
    spans = Spans.given([[(0, 15), (10, 40)], [(3, 5), (5, 39), (20, 22)]])
    cuts = [0, 12, 20, 21, 40]
    parts = [adapter.pool(cut(cache, a, b), spans.piece(a, b)) for a, b in zip(cuts, cuts[1:])]
    left = adapter.merge([adapter.merge(parts[:2]), adapter.merge(parts[2:])])
    flat = adapter.merge(parts)
    for whole in (left, flat):
        assert whole.tokens == 40
        assert whole.spans == (2, 3)
        hold(adapter.finish(whole), adapter, cache, spans.offsets, spans.to_mask(40))


def test_merging_refuses_what_does_not_fit() -> None:
    adapter = make_adapter(True)
    part = adapter.pool(sharer_cache(1, 5))
    with pytest.raises(SpanError):
        adapter.merge([])
    with pytest.raises(DTypeError):
        adapter.merge([part, "part"])  # type: ignore[list-item]
    with pytest.raises(ShapeError, match=r"parts\[1\]"):
        adapter.merge([part, adapter.pool(sharer_cache(2, 5))])
    double = PartialPool(part.states.double(), part.stats.double(), part.spans, part.tokens)
    with pytest.raises(DTypeError, match=r"parts\[1\]"):
        adapter.merge([part, double])
    with pytest.raises(DeviceError, match=r"parts\[1\]"):
        adapter.merge([part, part.to("meta")])
    with pytest.raises(DTypeError, match="PartialPool"):
        adapter.finish(part.states)  # type: ignore[arg-type]
    lcf = make_adapter()
    for call in (lcf.begin, lambda: lcf.pool([]), lcf.sharer_side, lambda: lcf.origin):
        with pytest.raises(GeometryError, match="LCF-X"):
            call()


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ({"states": None}, DTypeError),
        ({"states": torch.zeros(2, 1, 2, 1, 3, 16)}, ShapeError),
        ({"stats": torch.zeros(2, 1, 2, 1, 7)}, ShapeError),
        ({"stats": torch.zeros(5, 1, 2, 1, 8).double()}, DTypeError),
        ({"spans": None}, DTypeError),
        ({"spans": (1, 1)}, ShapeError),
        ({"tokens": 5.0}, DTypeError),
    ],
    ids=str,
)
def test_pools_that_are_none(field: dict[str, Any], error: type[LCFError]) -> None:
    part = make_adapter(True).pool(sharer_cache(1, 5))
    with pytest.raises(error) as caught:
        replace(part, **field)
    assert caught.value.argument == next(iter(field))


def test_halves_of_what_is_no_adapter() -> None:
    adapter = make_adapter(True)
    wrong: Any
    for wrong in (None, make_adapter().config):
        for make in (SharerSide.of, lambda it: SharerSide.for_receiver(it, OTHER)):
            with pytest.raises(DTypeError, match=r"^adapter: expected a LatentCacheFlow"):
                make(wrong)
    with pytest.raises(DTypeError, match=r"^sharer: expected a CacheGeometry"):
        SharerSide.for_receiver(adapter, (2, 1, 24))  # type: ignore[arg-type]
    right: dict[str, Any] = {"bottleneck": 8, "receiver_layers": [0, 1], "sharer_layers": [0, 1]}
    wrong_fields: list[tuple[dict[str, Any], type[LCFError]]] = [
        ({"bottleneck": None}, DTypeError),
        ({"receiver_layers": 2}, DTypeError),
        ({"receiver_layers": [1, 0]}, GeometryError),
        ({"sharer_layers": [0, 9]}, IndexRangeError),
        ({"sharer_layers": "01"}, DTypeError),
    ]
    SharerSide(OTHER, RECEIVER, **right)
    for field, error in wrong_fields:
        with pytest.raises(error, match=f"^{next(iter(field))}: "):
            SharerSide(OTHER, RECEIVER, **{**right, **field})


def test_only_the_half_that_pooled_takes_a_pool() -> None:
    adapter, cache = make_adapter(True), sharer_cache(1, 12)
    parts = [adapter.pool(cut(cache, 0, 5)), adapter.pool(cut(cache, 5, 12))]
    sent: list[PartialPool] = pickle.loads(pickle.dumps(parts))  # as another process has them
    anyones = [PartialPool(part.states, part.stats, part.spans, part.tokens) for part in parts]
    other = copy.deepcopy(adapter)
    with torch.no_grad():
        other.get_parameter("span_query").mul_(2.0)
    for pools in (parts, sent):
        with pytest.raises(MessageError, match=r"parts\[0\]: expected what the sharer's half"):
            other.merge(pools)
        with pytest.raises(MessageError, match=r"parts\[1\]"):
            other.merge([other.pool(cut(cache, 0, 5)), pools[1]])
        with pytest.raises(MessageError, match="pool"):
            other.finish(pools[0])
    expected = adapter.finish(adapter.merge(parts))
    for half in (adapter, copy.deepcopy(adapter), SharerSide.of(adapter)):
        for pools in (parts, sent, anyones):
            assert_same(half.finish(half.merge(pools)), expected)
    with torch.no_grad():
        adapter.get_parameter("span_query").mul_(2.0)
    for attempt in (lambda: adapter.finish(parts[0]), lambda: adapter.merge(parts), lambda: pickle.dumps(parts)):
        with pytest.raises(MessageError, match="changed since"):
            attempt()


# --- spans --------------------------------------------------------------------------------------------------------


def test_summarize_takes_spans() -> None:
    adapter, cache = make_adapter(True), sharer_cache(2, 30)
    spans = Spans.given([[(2, 9), (5, 20), (25, 30)], [(0, 30)]])
    message = adapter.summarize(cache, spans, span_weights=True)
    hold(message, adapter, cache, spans.offsets, spans.to_mask(30))
    assert message.spans == 3
    mask = torch.ones(2, 30)
    mask[0, 5:9] = 0
    hold(
        adapter.summarize(cache, spans, attention_mask=mask),
        adapter, cache, spans.offsets, spans.to_mask(30) & (mask != 0)[:, None],
    )  # fmt: skip
    with pytest.raises(ShapeError, match="spans of 2 items"):
        adapter.summarize(cache, Spans.given([[0, 30]]))
    with pytest.raises(SpanError, match="within"):
        adapter.summarize(cache, Spans.given([[0, 31], [0, 30]]))


def test_span_weights_are_the_cross_span_softmax() -> None:
    """In the order of the spans, padded with zeros; the summary is the mean of the spans' own under them."""
    adapter, cache = make_adapter(True), sharer_cache(2, 30)
    bounds = [[(2, 9), (5, 20), (25, 30)], [(0, 30)]]
    weights = adapter.summarize(cache, Spans.given(bounds), span_weights=True).span_weights
    assert weights is not None
    assert weights.shape == (5, 2, SHARER.kv_heads, 3)
    torch.testing.assert_close(weights.sum(3), torch.ones(5, 2, SHARER.kv_heads))
    assert (weights[:, 1, :, 1:] == 0).all()
    for item, spans in enumerate(bounds):
        one = [(key[item : item + 1], value[item : item + 1]) for key, value in cache]
        own = [adapter.summarize(one, [[*span]]).tensors["summary"] for span in spans]
        together = adapter.summarize(one, Spans.given([spans])).tensors["summary"]
        shares = [weight[:, None, None, :, None] for weight in weights[:, item].unbind(2)]
        mean = torch.stack([share * summary for share, summary in zip(shares, own)]).sum(0)
        torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-5)
    offsets = adapter.summarize(cache, [[0, 0, 30], [0, 10, 30]], span_weights=True).span_weights
    assert offsets is not None
    assert (offsets[:, 0, :, 0] == 0).all()  # an empty span


# --- several sharers ----------------------------------------------------------------------------------------------


def test_a_side_is_the_adapter_s_own_half(tmp_path: Path) -> None:
    """Alone, saved and read: bitwise the adapter's messages, which the adapter takes."""
    adapter, (cache, receiver) = make_adapter(True, keep=[0, 2, 4]), make_caches()
    adapter.sharer_side().save_pretrained(tmp_path)
    side = SharerSide.from_pretrained(tmp_path, sharer=SHARER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sharer.safetensors"]
    for made in (side.summarize(cache, [[0, 3, 7]] * 2), side.begin().extend(cache, [[0, 3, 7]] * 2).finish()):
        own = adapter.summarize(cache, [[0, 3, 7]] * 2)
        torch.testing.assert_close(made.latent, own.latent, rtol=1e-5, atol=1e-6)
        assert made.origin == own.origin == adapter.origin == side.origin
        read = Message.from_bytes(made.to_bytes())
        assert_close(adapter.inject(receiver, read), to_double(adapter.inject(receiver, own)))
    assert torch.equal(side.summarize(cache).tensors["latent"], adapter.summarize(cache).tensors["latent"])
    with pytest.raises(GeometryError):
        SharerSide.from_pretrained(tmp_path, sharer=OTHER)
    (tmp_path / "sharer.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        SharerSide.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="format"):
        LatentCacheFlow.from_pretrained(tmp_path)


def test_several_sharers_add_up() -> None:
    """c = b + Σ w_i W_i s_i, as the reference projects it; in any order; switched off is off."""
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    side = SharerSide.for_receiver(adapter, OTHER)
    bound = (2 * OTHER.channels + 2 * RECEIVER.channels) ** -0.5  # as an adapter draws it
    assert 0.9 * bound < float(side.down_weight.detach().abs().max()) <= bound
    with torch.no_grad():
        side.span_query.normal_()
    other = sharer_cache(2, 9, OTHER)
    first, second = adapter.summarize(cache), side.summarize(other, [[0, 4, 9]] * 2)
    weights = {name: p.detach().double() for name, p in adapter.named_parameters()}
    bias = weights["down_bias"][:, None]
    parts = [message.tensors["latent"].double() - bias for message in (first, second)]
    for factors in (None, [1.0, 1.0], [0.25, -2.0], torch.tensor([[1.0, 0.0], [0.5, 3.0]])):
        values = torch.ones(2, 1) if factors is None else torch.as_tensor(factors).float().reshape(2, -1)
        latent = bias + sum(v[:, None].double() * part for v, part in zip(values, parts))
        expected = expected_of(adapter, receiver, message=latent)
        assert_close(adapter.inject(receiver, [first, second], weights=factors), expected)
        combined = adapter.combine([first, second], factors)
        torch.testing.assert_close(combined.tensors["latent"].double(), latent, rtol=1e-5, atol=1e-5)
        assert combined.spans == 2
    swapped = adapter.combine([second, first], [2.0, 0.5])
    torch.testing.assert_close(adapter.combine([first, second], [0.5, 2.0]).latent, swapped.latent)
    # The sum is the projection of both inputs side by side: one linear map of both summaries.
    both = [torch.cat([m.tensors["summary"].transpose(1, 2).flatten(2)], 2).double() for m in (first, second)]
    maps = [weights["down_weight"][:, :, : 2 * SHARER.channels], side.down_weight.detach().double()]
    joint = torch.baddbmm(bias, torch.cat(both, 2), torch.cat(maps, 2).mT)
    got = adapter.combine([first, second]).tensors["latent"].double()
    torch.testing.assert_close(got, joint, rtol=1e-5, atol=1e-5)
    broken = Message(torch.full_like(first.tensors["latent"], torch.nan), first.receiver_layers, 1)
    off = adapter.combine([first, broken], [1.0, 0.0])
    torch.testing.assert_close(off.latent, first.latent)
    for messages in ([first.to(torch.float64), second], [second, first.to(torch.float64)]):
        assert adapter.combine(messages).tensors["latent"].dtype == torch.float64
    one_row = Message(first.tensors["latent"][:, :1], first.receiver_layers, 1)
    assert adapter.combine([one_row, second]).tensors["latent"].shape[1] == 2


def test_messages_for_every_row_are_weighed_row_by_row() -> None:
    """Of batch size 1: rows of one batch have different sharers, both, or none."""
    adapter = make_adapter(True)
    first, second = adapter.summarize(sharer_cache(1, 5)), adapter.summarize(sharer_cache(1, 9))
    _, receiver = make_caches(batch=4)
    factors = [[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.5, 0.0]]
    bias = adapter.get_parameter("down_bias")
    rows = [bias + sum(w[row] * (m.tensors["latent"][:, 0] - bias) for w, m in zip(factors, (first, second)))
            for row in range(4)]  # fmt: skip
    expected = expected_of(adapter, receiver, message=torch.stack(rows, 1).double())
    assert_close(adapter.inject(receiver, [first, second], weights=factors), expected)
    assert_close(adapter.inject(receiver, adapter.combine([first, second], factors)), expected)
    assert adapter.combine([first, second], [1.0, 0.5]).tensors["latent"].shape[1] == 1
    for wrong in ([[1.0] * 3, [0.0] * 3], [[1.0], [0.5], [0.5]]):
        with pytest.raises(ShapeError, match=r"^weights: expected \(2,\) or \(2, 4\)"):
            adapter.inject(receiver, [first, second], weights=wrong)
    with pytest.raises(DTypeError, match=r"^weights: expected numbers"):
        adapter.inject(receiver, [first, second], weights=[10**400, 1.0])


def test_one_edit_whatever_the_number_of_sharers(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcf_fast import ops

    adapter, (cache, receiver) = make_adapter(True), make_caches()
    calls: list[int] = []
    original = ops.fuse_layers

    def spy(*arguments: Any, **keywords: Any) -> Any:
        calls.append(keywords["message"].shape[1])
        return original(*arguments, **keywords)

    monkeypatch.setattr(ops, "fuse_layers", spy)
    adapter.inject(receiver, [adapter.summarize(cache)] * 7)
    assert calls == [2]


def test_combine_refuses() -> None:
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    message = adapter.summarize(cache)
    wide = adapter.summarize(sharer_cache(3, 5))
    before = cloned(receiver)
    attempts: list[tuple[type[Exception], Any, Any]] = [
        (DTypeError, [], None),
        (DTypeError, [message, "m"], None),
        (DTypeError, "message", None),
        (ShapeError, [message, wide], None),
        (ShapeError, [message], [1.0, 2.0]),
        (ShapeError, [message], [[1.0, 1.0, 1.0]]),
        (DTypeError, [message], "much"),
        (MessageError, [message], [float("nan")]),
        (GeometryError, [message, Message(message.latent, (0, 1), 1)], None),
    ]
    for error, messages, weights in attempts:
        with pytest.raises(error):
            adapter.inject_(receiver, messages, weights=weights)
    assert all(torch.equal(a, b) for x, y in zip(receiver, before) for a, b in zip(x, y))


def test_a_new_sharer_is_trained_against_a_frozen_receiver() -> None:
    """Gradients reach the side through the message, and nothing else; its loss falls."""
    adapter, (_, receiver) = make_adapter(True), make_caches()
    side = SharerSide.for_receiver(adapter, OTHER)
    cache = sharer_cache(2, 9, OTHER)
    torch.manual_seed(5)
    target = adapter.inject(receiver, make_adapter(True).summarize(make_caches()[0]))
    optimizer = torch.optim.Adam(side.parameters(), lr=3e-2)
    losses = []
    for _ in range(12):
        edited = adapter.inject(receiver, side.summarize(cache, [[0, 4, 9]] * 2))
        loss = sum((a - b).square().mean() for x, y in zip(edited, target) for a, b in zip(x, y))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in side.parameters())
    assert all(p.grad is None for p in adapter.parameters())


def test_for_receiver_maps_layers() -> None:
    adapter = make_adapter(True, keep=[0, 3, 4])
    side = SharerSide.for_receiver(adapter, OTHER, layers=[1, 0, 1, 0, 1])
    assert side.sharer_layers.tolist() == [1, 0, 1]
    assert side.receiver_layers.tolist() == [0, 3, 4]
    assert torch.equal(side.down_bias, adapter.get_parameter("down_bias"))
    with pytest.raises(IndexRangeError):
        SharerSide.for_receiver(adapter, OTHER, layers=[0, 0, 0, 0, 7])
    with pytest.raises(GeometryError, match="LCF-X"):
        SharerSide.for_receiver(make_adapter(), OTHER)
    assert "3x2x16 -> 5x3x8" in repr(adapter.sharer_side())


def test_a_state_dict_brings_its_routing(tmp_path: Path) -> None:
    """Loading, and saving what was loaded, changes no message."""
    adapter, cache = make_adapter(True), sharer_cache(2, 9, OTHER)
    side, other = (SharerSide.for_receiver(adapter, OTHER, layers=layers) for layers in ([1, 0, 1, 0, 1], [0] * 5))
    message = side.summarize(cache)
    torch.nn.ModuleDict({"side": other}).load_state_dict({f"side.{k}": v for k, v in side.state_dict().items()})
    other.save_pretrained(tmp_path)
    for loaded in (other, SharerSide.from_pretrained(tmp_path)):
        assert torch.equal(loaded.summarize(cache).tensors["latent"], message.tensors["latent"])
        assert loaded.origin == message.origin
    bad: list[tuple[str, Tensor, type[LCFError]]] = [
        ("sharer_layers", torch.tensor([0, 0, 0, 0, OTHER.layers]), IndexRangeError),
        ("receiver_layers", torch.tensor([0, 1, 2, 4, 4]), GeometryError),
        ("receiver_layers", torch.tensor([0, 1, 2, 3, torch.nan]), DTypeError),
        ("sharer_layers", torch.tensor([0, 0.5, 0, 0, 1]), DTypeError),
        ("sharer_layers", torch.tensor([0j, 0, 0, 0, 1]), DTypeError),
        ("sharer_layers", torch.zeros(5, dtype=torch.int64, device="meta"), DeviceError),
    ]
    for name, layers, error in bad:
        with pytest.raises(error, match=name):
            other.load_state_dict({**side.state_dict(), name: layers})
    assert torch.equal(other.summarize(cache).tensors["latent"], message.tensors["latent"])


@pytest.mark.parametrize("kind", ["LCF-X", "slots", "side", "side of slots"])
def test_what_was_made_without_memory_keeps_its_routing(kind: str, tmp_path: Path) -> None:
    """``to_empty`` leaves buffers as memory was found; a folder of those could not be read."""
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True)
    sizes: dict[str, Any] = {"bottleneck": 64, "sharer_layers": [0, 0, 1, 1, 2], "adapter_digest": "0" * 32}
    with torch.device("meta"):
        made: Any = {
            "LCF-X": lambda: LatentCacheFlow(config, keep_layers=[1, 3]),
            "slots": lambda: LatentSlots(replace(config, cross_context=False, slots=2)),
            "side": lambda: SharerSide(SHARER, RECEIVER, receiver_layers=range(5), **sizes),
            "side of slots": lambda: SlotsSharerSide(SHARER, RECEIVER, slots=2, **sizes),
        }[kind]()
    made.to_empty(device="cpu")
    for buffer in made.buffers():
        buffer.fill_(77)
    made.reset_parameters()
    made.save_pretrained(tmp_path)
    read = load_any(tmp_path)
    assert read.receiver_layers.tolist() == list(made._kept)
    assert read.sharer_layers.tolist() == list(made._reads)
