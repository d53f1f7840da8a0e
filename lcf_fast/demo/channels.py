"""What may pass between the two agents, and what the receiver then answers.

Every channel is used as it would be between two machines: a message goes through its bytes, and the answers are those
of the receiver that was given what came out of them.

Time to first token begins when the question reaches the agents: with cross context the sharer has read its facts by
then, with shared context it has not read the question yet. It ends when the receiver's first token is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..adapter import LatentCacheFlow
from ..caches import Pair, cache_argument
from ..message import Message
from ..reading.prefill import dynamic_cache, prefill
from ..slots import LatentSlots
from .agents import answers_of
from .tasks import CrossItems, SharedItems, written

__all__ = ["CHANNELS", "CrossChannels", "SharedChannels", "SlotsChannels", "first_token_times"]

NONE, MATCHED, MISMATCHED, ZERO, TEXT = CHANNELS = (
    "no message",
    "matching message",
    "another item's message",
    "zero message",
    "facts as text",
)
#: Messages are sent in this dtype.
WIRE_DTYPE = "bfloat16"


class CrossChannels:
    """LCF-X: the sharer's facts as a message of fixed size."""

    def __init__(self, adapter: LatentCacheFlow | LatentSlots, sharer: Any, receiver: Any) -> None:
        self.adapter: Any = adapter
        self.sharer, self.receiver = sharer, receiver

    @torch.no_grad()
    def answers(self, items: CrossItems, other: Tensor) -> dict[str, Tensor]:
        """``(B,)`` answers a channel; ``other (B,)`` says whose message is the mismatched one."""
        prompts = items.receiver_ids
        message = self.message(read(self.sharer, items.sharer_ids), items)
        elsewhere = items[other]
        theirs = self.message(read(self.sharer, elsewhere.sharer_ids), elsewhere)
        return {
            NONE: answers_of(self.receiver, prompts),
            MATCHED: self.answer(prompts, message),
            MISMATCHED: self.answer(prompts, theirs),
            ZERO: self.answer(prompts, self.nothing(message)),
            TEXT: answers_of(self.receiver, self.with_text(items)),
        }

    def message(self, sharer_cache: list[Pair], items: CrossItems) -> bytes:
        """What is sent."""
        sent: bytes = self.adapter.summarize(sharer_cache, items.spans).to_bytes(dtype=WIRE_DTYPE)
        return sent

    def answer(self, prompts: Tensor, sent: bytes) -> Tensor:
        """``(B,)``: the receiver's answers to ``prompts (B, N)``, given what was sent."""
        message = Message.from_bytes(sent).to(torch.float32)
        edited = self.adapter.inject(read(self.receiver, prompts[:, :-1]), message)
        return go_on(self.receiver, edited, prompts)

    def nothing(self, sent: bytes) -> bytes:
        """A message of that form which says nothing."""
        return zeros(sent)

    def with_text(self, items: CrossItems) -> Tensor:
        """The sharer's facts written before the receiver's own."""
        return torch.cat([items.sharer_ids, items.receiver_ids], 1)

    @torch.no_grad()
    def sent(self, item: CrossItems) -> dict[str, int]:
        """Bytes that each channel sends for one item."""
        size = len(self.message(read(self.sharer, item.sharer_ids), item))
        text = len(written(item.sharer_ids)[0].encode())
        return {NONE: 0, MATCHED: size, MISMATCHED: size, ZERO: size, TEXT: text}

    def ways(self, item: CrossItems, other: CrossItems) -> dict[str, Callable[[], object]]:
        """For each channel, all that happens between the question about one item and the receiver's first token."""
        prompts, mine, theirs = item.receiver_ids, *(read(self.sharer, i.sharer_ids) for i in (item, other))
        nothing = self.nothing(self.message(mine, item))
        return {
            NONE: lambda: answers_of(self.receiver, prompts),
            MATCHED: lambda: self.answer(prompts, self.message(mine, item)),
            MISMATCHED: lambda: self.answer(prompts, self.message(theirs, other)),
            ZERO: lambda: self.answer(prompts, nothing),
            TEXT: lambda: answers_of(self.receiver, self.with_text(item)),
        }


class SlotsChannels(CrossChannels):
    """Slots: the sharer's facts as k further positions of the receiver's cache, before the key that is asked.

    Where the adapter was trained so, before the prompt.
    """

    def message(self, sharer_cache: list[Pair], items: CrossItems) -> bytes:
        """What is sent; where one fact ends is told to an adapter of slots for each span alone."""
        spans = items.spans if self.adapter.per_span else None
        sent: bytes = self.adapter.summarize(sharer_cache, spans).to_bytes(dtype=WIRE_DTYPE)
        return sent

    def answer(self, prompts: Tensor, sent: bytes) -> Tensor:
        """As `CrossChannels.answer`."""
        message = Message.from_bytes(sent).to(torch.float32)
        if self.adapter.placement == "prefix":
            cache = self.adapter.prefix(self.receiver, message)
            at = torch.arange(message.slots, message.slots + prompts.shape[1])[None]
            read_behind = self.receiver(
                input_ids=prompts, position_ids=at, use_cache=True, **cache_argument(self.receiver, cache)
            )
            last: Tensor = read_behind.logits[:, -1]
            return last.argmax(-1)
        own = read(self.receiver, prompts[:, :-1])
        return go_on(self.receiver, self.adapter.append(self.receiver, own, message), prompts)


class SharedChannels:
    """LCF: the sharer's cache of the question itself, position by position."""

    def __init__(self, adapter: LatentCacheFlow, sharer: Any, receiver: Any) -> None:
        self.adapter, self.sharer, self.receiver = adapter, sharer, receiver

    @torch.no_grad()
    def answers(self, items: SharedItems, other: Tensor) -> dict[str, Tensor]:
        """``(B,)`` answers a channel; ``other (B,)`` says whose cache is the mismatched one."""
        ids = items.ids
        cache = read(self.sharer, ids[:, :-1])
        theirs = [(key[other], value[other]) for key, value in cache]
        nothing = [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in cache]
        return {
            NONE: answers_of(self.receiver, ids),
            MATCHED: self.answer(ids, cache),
            MISMATCHED: self.answer(ids, theirs),
            ZERO: self.answer(ids, nothing),
            TEXT: answers_of(self.receiver, self.with_text(items)),
        }

    def answer(self, ids: Tensor, sharer_cache: list[Pair]) -> Tensor:
        """``(B,)``: the receiver's answers to ``ids (B, N)``, given the sharer's cache of all but the last."""
        return go_on(self.receiver, self.adapter.fuse(sharer_cache, read(self.receiver, ids[:, :-1])), ids)

    def with_text(self, items: SharedItems) -> Tensor:
        """The value that the sharer says, written in the blank."""
        said = answers_of(self.sharer, items.ids)
        return torch.stack([items.names, items.keys, said, items.keys], 1)

    @torch.no_grad()
    def sent(self, item: SharedItems) -> dict[str, int]:
        """Bytes that each channel sends for one item; of the sharer's cache the layers that the adapter reads."""
        cache = read(self.sharer, item.ids[:, :-1])
        layers = set(self.adapter.sharer_layers.tolist())
        size = sum(part.nbytes for layer in layers for part in cache[layer])
        text = len(written(item.answers[:, None])[0].encode())
        return {NONE: 0, MATCHED: size, MISMATCHED: size, ZERO: size, TEXT: text}

    def ways(self, item: SharedItems, other: SharedItems) -> dict[str, Callable[[], object]]:
        """As `CrossChannels.ways`. The sharer reads the question, or for the text says the answer, meanwhile."""
        ids, theirs = item.ids, other.ids
        nothing = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in read(self.sharer, ids[:, :-1])]
        return {
            NONE: lambda: answers_of(self.receiver, ids),
            MATCHED: lambda: self.answer(ids, read(self.sharer, ids[:, :-1])),
            MISMATCHED: lambda: self.answer(ids, read(self.sharer, theirs[:, :-1])),
            ZERO: lambda: self.answer(ids, nothing),
            TEXT: lambda: answers_of(self.receiver, self.with_text(item)),
        }


def read(model: Any, ids: Tensor) -> list[Pair]:
    """The cache of a model after reading ``ids (B, N)``."""
    return prefill(model, ids, torch.ones_like(ids))


def go_on(receiver: Any, edited: Sequence[Pair], ids: Tensor) -> Tensor:
    """``(B,)``: what the receiver says after the last token of ``ids (B, N)``, with a cache of all before it."""
    cache = dynamic_cache(edited)
    at = torch.full((len(ids), 1), edited[0][0].shape[2])
    logits: Tensor = receiver(
        input_ids=ids[:, -1:], position_ids=at, use_cache=True, **cache_argument(receiver, cache)
    ).logits
    return logits[:, -1].argmax(-1)


def zeros(sent: bytes) -> bytes:
    """A message that says nothing: all of its numbers zero."""
    message = Message.from_bytes(sent)
    assert message.latent is not None
    return replace(message, latent=torch.zeros_like(message.latent)).to_bytes()


@torch.no_grad()
def first_token_times(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, which take turns; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    return {name: median(each[1:]) for name, each in times.items()}
