"""Messages of slots: what they hold, cut, stack and send; and that all others are what they were."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from messages import EVERYTHING, PUBLISHED, SLOT_CONTENTS, assert_same, edited, header_of, make_message

from lcf_fast import CacheGeometry, Message
from lcf_fast.errors import IndexRangeError, LCFError, MessageError, ShapeError
from lcf_fast.quantization import STORAGES
from lcf_fast.wire import decode_with_layout


def slots(**options: Any) -> Message:
    return make_message(**{"slots": 3, "batch": 2, "contents": SLOT_CONTENTS, **options})


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        (None, "2deb5ba74b9f93e8aae09afeccef95a7566e742ef536a08b0272dbf6320d3399"),
        ("int8", "f29104f5519d497423b936aeacdd86726fcc8c336930ae5860a9e0d556d4a5b5"),
    ],
)
def test_messages_without_slots_are_the_bytes_that_they_were(dtype: str | None, digest: str) -> None:
    """SHA-256 of what the version before slots wrote of the same message."""
    generator = torch.Generator().manual_seed(5)
    message = make_message(generator=generator, batch=2, metadata={"a": "b"})
    data = message.to_bytes(dtype=dtype, contents=EVERYTHING)
    assert hashlib.sha256(data).hexdigest() == digest
    assert message.slots == Message.from_bytes(data).slots == 0


@pytest.mark.parametrize(("dtype", "payload"), [("bfloat16", 57_344), ("int8", 28_672 + 28 * 8 * 4)])
def test_bytes_of_the_published_pair(dtype: str, payload: int) -> None:
    message = make_message(**PUBLISHED, slots=8, contents=("latent",))
    data = message.to_bytes(dtype=dtype)
    _, layout = decode_with_layout(data, key=None, max_bytes=1 << 20)
    assert layout.payload == payload
    assert len(data) - payload < 1024
    assert message.nbytes == 2 * 57_344  # in float32, as made


@pytest.mark.parametrize("dtype", [None, *STORAGES])
@pytest.mark.parametrize("key", [None, b"secret"])
def test_there_and_back(dtype: str | None, key: bytes | None) -> None:
    message = slots(metadata={"topic": "x"})
    data = message.to_bytes(dtype=dtype, contents=SLOT_CONTENTS, key=key)
    again = Message.from_bytes(data, key=key)
    assert (again.slots, again.spans, again.metadata) == (3, 1, {"topic": "x"})
    if dtype is None:
        assert_same(again, message)
    assert message.latent is not None and again.latent is not None and again.slot_weights is not None
    relative = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 1e-2, "fp8": 0.07}.get(str(dtype), 1e-6)
    top = message.latent.abs().amax(-1, keepdim=True)
    assert float(((again.latent.float() - message.latent) / top).abs().max()) < relative
    torch.testing.assert_close(again.slot_weights.float(), message.slot_weights, rtol=0, atol=1e-2)
    # Without the weights, which are to be looked at, the latent alone.
    assert Message.from_bytes(message.to_bytes(dtype=dtype, key=key), key=key).slot_weights is None


def test_each_slot_has_a_scale_of_its_own() -> None:
    """A large slot does not take the digits of a small one beside it."""
    message = slots(batch=1)
    assert message.latent is not None
    message.latent[:, :, 1] *= 1e4
    again = Message.from_bytes(message.to_bytes(dtype="int8"))
    assert again.latent is not None
    error = (again.latent - message.latent).abs().amax(-1) / message.latent.abs().amax(-1)
    assert float(error.max()) < 0.5 / 127 * 1.01


def test_more_tokens_and_spans_than_a_million() -> None:
    sharer = CacheGeometry(1, 1, 4)
    long = slots(batch=1, slots=1, layers=(0,), sharer=sharer, tokens=(1 << 20) + 1, dtype=torch.float16)
    assert_same(Message.from_bytes(long.to_bytes(contents=SLOT_CONTENTS)), long)
    many = replace(make_message(contents=("latent",)), spans=1 << 31)
    assert_same(Message.from_bytes(many.to_bytes()), many)


def test_the_description_says_so_and_only_where_there_are_any() -> None:
    described = header_of(slots().to_bytes())[1]
    assert described["slots"] == 3
    assert "tokens" not in described
    assert header_of(slots().to_bytes(contents=SLOT_CONTENTS))[1]["tokens"] == 6
    assert not {"slots", "tokens"} & header_of(make_message().to_bytes())[1].keys()


def test_the_first_slots() -> None:
    message = slots()
    some = message.take_slots(2)
    assert message.latent is not None and message.slot_weights is not None
    assert some.slots == 2 and some.latent is not None and some.slot_weights is not None
    assert torch.equal(some.latent, message.latent[:, :, :2])
    assert torch.equal(some.slot_weights, message.slot_weights[:, :, :, :2])
    assert_same(Message.from_bytes(some.to_bytes(contents=SLOT_CONTENTS)), some)
    assert len(some.to_bytes()) < len(message.to_bytes())
    for count in (0, 4, -1, 2.0, True):
        with pytest.raises(IndexRangeError):
            message.take_slots(count)  # type: ignore[arg-type]
    with pytest.raises(IndexRangeError, match="a message of slots"):
        make_message().take_slots(1)


def test_split_and_stack() -> None:
    message = slots()
    parts = message.split()
    assert [part.slots for part in parts] == [3, 3]
    assert_same(Message.stack(parts), message)
    longer = slots(batch=1, tokens=9)
    both = Message.stack([message, longer])
    assert both.slot_weights is not None and both.slot_weights.shape[-1] == 9
    assert torch.equal(both.slot_weights[:, :2, :, :, 6:], torch.zeros(5, 2, 2, 3, 3))
    with pytest.raises(ShapeError, match="latent"):
        Message.stack([message, slots(slots=2)])
    with pytest.raises(LCFError):
        Message.stack([message, make_message(contents=("latent",))])


@pytest.mark.parametrize(
    "contents", [("summary",), ("slot_weights",), ("latent", "span_weights"), ("latent", "summary"), ()]
)
def test_slots_have_no_summary_and_no_spans(contents: tuple[str, ...]) -> None:
    message = replace(slots(), summary=torch.zeros(5, 2, 2, 2, 4), span_weights=torch.ones(5, 2, 2, 1))
    with pytest.raises(MessageError):
        message.to_bytes(contents=contents)


@pytest.mark.parametrize(
    "field",
    [
        {"slots": 0},
        {"slots": 2},
        {"slots": -3},
        {"slots": "3"},
        {"slots": True},
        {"tokens": 7},
        {"tokens": 0},
        {"more": 1},
        {"dtype": {"latent": "float32"}},
        {"dtype": {"latent": "float32", "slot_weights": "int8"}},
        {"dtype": {"slot_weights": "float32"}},
        {"dtype": {"latent": "float32", "slot_weights": "float32", "summary": "float32"}},
    ],
)
def test_what_contradicts_itself_is_refused(field: dict[str, Any]) -> None:
    data = slots().to_bytes(contents=SLOT_CONTENTS)
    with pytest.raises(MessageError):
        Message.from_bytes(edited(data, field=lambda description: description.update(field)))


@pytest.mark.parametrize("name", ["slots", "tokens"])
def test_fields_of_slots_do_not_come_without_them(name: str) -> None:
    with pytest.raises(MessageError):
        Message.from_bytes(edited(make_message().to_bytes(), field=lambda d: d.update({name: 3})))
    with pytest.raises(MessageError):
        Message.from_bytes(edited(slots().to_bytes(contents=SLOT_CONTENTS), field=lambda d: d.pop(name)))


def test_weights_that_are_none_are_refused() -> None:
    message = slots()
    assert message.slot_weights is not None
    message.slot_weights[0, 0, 0, 0, 0] = -0.5
    with pytest.raises(MessageError, match="slot_weights"):
        message.to_bytes(contents=SLOT_CONTENTS)
    message.slot_weights[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(MessageError, match="slot_weights"):
        message.to_bytes(contents=SLOT_CONTENTS)
    json.dumps(header_of(message.to_bytes())[1])  # which without them are not looked at
