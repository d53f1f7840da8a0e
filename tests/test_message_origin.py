"""Messages: whose they are, in copies too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from adapters import assert_equal, make_adapter, make_caches
from messages import ORIGIN, assert_same, make_message

from lcf_fast import Message, MessageError
from lcf_fast.fingerprint import Origin


class Adapter:
    """Stands for one: heavy, and asked for its digest late."""

    def __init__(self) -> None:
        self.asked = 0

    def origin(self) -> Origin:
        self.asked += 1
        return ORIGIN


def test_origin_is_found_when_first_asked_for_and_once() -> None:
    adapter = Adapter()
    message = make_message(made_by=adapter.origin)
    message.to(torch.float16)
    assert adapter.asked == 0
    parts = Message.stack([message, replace(message)])  # one function makes one origin, whatever it is
    assert adapter.asked == 0
    assert message.origin == ORIGIN and message.made_by == ORIGIN
    message.to_bytes()
    assert message.origin == ORIGIN and adapter.asked == 1
    assert parts.origin == ORIGIN and adapter.asked == 2
    assert make_message(made_by=None).origin is None
    # A function and the origin that it finds stack.
    assert Message.stack([message, make_message(made_by=Adapter().origin)]).origin == ORIGIN


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_of_the_same_adapter_and_asks_nothing(copied: Callable[[Message], Message]) -> None:
    adapter = Adapter()
    message = make_message(made_by=adapter.origin, metadata={"a": "b"})
    twin = copied(message)
    assert twin.made_by is message.made_by and adapter.asked == 0
    assert (twin.latent is message.latent) == (copied is copy.copy)
    assert_same(twin, message)
    own = make_adapter(True)
    sharer, receiver = make_caches()
    early = own.summarize(sharer)
    with torch.no_grad():
        own.get_parameter("down_weight").add_(1.0)
    twin = copied({"message": early})["message"] if copied is copy.deepcopy else copied(early)
    assert_equal(own.inject(receiver, twin), own.inject(receiver, early))  # which its own adapter still reads
    with pytest.raises(MessageError, match="have changed since"):
        pickle.dumps(twin)


def test_a_pickled_message_takes_no_adapter_along() -> None:
    adapter = Adapter()
    message = make_message(made_by=adapter.origin)
    twin = pickle.loads(pickle.dumps(message))
    assert twin.made_by == ORIGIN and adapter.asked == 1
    assert_same(twin, message)


def test_a_compiled_message_is_sent_once_it_is_told_its_origin() -> None:
    """No weights are looked at in a graph; the error says what to do."""
    adapter, (cache, receiver) = make_adapter(True), make_caches()
    with torch.no_grad():
        made = torch.compile(adapter.summarize, fullgraph=True, backend="aot_eager")(cache)
        assert made.origin is None
        with pytest.raises(MessageError, match=r"replace\(message, made_by=adapter.origin\)"):
            made.to_bytes()
        sent = Message.from_bytes(replace(made, made_by=adapter.origin).to_bytes())
        adapter.inject(receiver, sent)
        adapter.get_parameter("down_bias").add_(1.0)
        with pytest.raises(MessageError, match="this adapter"):
            adapter.inject(receiver, sent)
