"""Latent Cache Flow as channels: LCF, where the models read one prompt, and LCF-X, where they read different things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

from torch import Tensor

from ..adapter import LatentCacheFlow
from ..config import CacheGeometry
from ..errors import GeometryError
from ..message import Message
from ..quantization import storage_of
from ..reading.alignment import aligned_chat
from ..reading.chat import window_size
from ..reading.padding import shifted_index, shifted_spans
from ..span_text import Bounds
from .agent import Agent, padded_left
from .base import Channel, Clock, Prepared
from .controls import Noise, check_control, controlled_cache, controlled_message, sent_for
from .request import Request
from .routing import collected, replace_rows, rows_of, rows_told, take_rows

__all__ = ["Fuser", "LCFChannel", "LCFXChannel", "Sharer", "sharers_by_name"]


class Fuser(Protocol):
    """What edits a cache with another of the same prompt: `LatentCacheFlow`, or another method's.

    ``sharer_layers (L,)``: which of the sharer's layers each of its projectors reads.
    """

    sharer_layers: Tensor

    def fuse(
        self,
        sharer_cache: Any,
        receiver_cache: Any,
        *,
        sharer_index: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sharer_attention_mask: Tensor | None = None,
    ) -> Any: ...


@dataclass(frozen=True)
class Sharer:
    """A sharer and what turns its cache into an edit of the receiver's.

    Attributes:
        agent: who reads.
        adapter: LCF: a `Fuser`. LCF-X: the adapter, or the sharer's half of one that the channel's adapter accepts.
            Slots: a `LatentSlots` or a `SlotsSharerSide`, likewise.
    """

    agent: Agent
    adapter: Any


class LCFChannel(Channel):
    """Shared context: sharers read the receiver's chat, in their own template and tokens, and edit its cache.

    Where a sharer's tokenizer gives the receiver's rendering the same ids, both read the same; else positions align by
    the characters of the messages' contents, and what a template adds is left as it is. Of several sharers for one
    request each edits what the one before has left.

    Args:
        sharers: with `Fuser` adapters, in eval mode.
        name: as reports call it.
        control: what is sent (`lcf_fast.channels.controls`). A mismatched sharer has read its decoy's chat, whose rows
            go in turn to the positions that the matching ones would edit: a control that edited others would tell
            where, not what.
        seed: of the random control.

    Raises:
        GeometryError: an adapter for other models.
    """

    def __init__(
        self,
        receiver: Agent,
        sharers: Sequence[Sharer],
        *,
        name: str = "lcf",
        control: str = "matched",
        seed: int = 0,
    ) -> None:
        super().__init__(receiver, [sharer.agent for sharer in sharers])
        self.name, self.control, self.seed = name, check_control(control), seed
        self.sharers = sharers_by_name(receiver, sharers)

    def check(self, requests: Sequence[Request], room: int) -> None:
        """As `Channel.check`."""
        told = sent_for(requests, self.control)
        super().check(requests, room)
        for name, sharer in self.sharers.items():
            for row in rows_of(requests, name, self.sharers):
                self._read(sharer.agent, requests[row], told[row])

    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        receiver, batch = self.receiver, len(requests)
        told = sent_for(requests, self.control)
        prompts = receiver.prompts([request.asked() for request in requests], room)
        ids, mask = padded_left(prompts, receiver.padding(), receiver.device)
        with clock.of("receiver"):
            cache = receiver.read(ids[:, :-1], mask[:, :-1])
        sent = [0] * batch
        for name, sharer in self.sharers.items():
            rows = rows_of(requests, name, self.sharers)
            if not rows:
                continue
            read = [self._read(sharer.agent, requests[row], told[row]) for row in rows]
            agent = sharer.agent
            their_ids, their_mask = padded_left([tokens for tokens, _ in read], agent.padding(), agent.device)
            starts = [their_ids.shape[1] - len(tokens) for tokens, _ in read]
            index = shifted_index([aligned for _, aligned in read], starts, ids.shape[1] - 1).to(receiver.device)
            with clock.of("sharer"):
                theirs = agent.read(their_ids, their_mask)
            with clock.of("communication"):
                theirs = [(key.to(receiver.device), value.to(receiver.device)) for key, value in theirs]
                noise = Noise([requests[row] for row in rows], name, self.seed)
                theirs = controlled_cache(theirs, their_mask.to(receiver.device), self.control, noise)
                part = sharer.adapter.fuse(
                    theirs,
                    take_rows(cache, rows, batch),
                    sharer_index=index,
                    attention_mask=mask[rows, :-1],
                    sharer_attention_mask=their_mask.to(receiver.device),
                )
                cache = replace_rows(cache, rows, part, batch)
            layers = [theirs[layer] for layer in set(sharer.adapter.sharer_layers.tolist())]  # that are read at all
            a_token = sum(t.element_size() * t.shape[1] * t.shape[3] for pair in layers for t in pair)
            for row, (tokens, _) in zip(rows, read):
                sent[row] += a_token * len(tokens)
        return Prepared(ids, mask, cache, sent)

    def _read(self, sharer: Agent, request: Request, told: Request) -> tuple[list[int], list[int]]:
        """What the sharer reads, and for each token of the prompt but its last its row there, -1: none."""
        tokens, rows = self._aligned(sharer, request)
        if self.control == "mismatched":
            tokens, others = self._aligned(sharer, told)
            turn = cycle(row for row in others if row >= 0)
            rows = [next(turn) if row >= 0 else -1 for row in rows]
        sharer.check_length(max(2, len(tokens)))  # what it reads; that may be one token
        return tokens, rows

    def _aligned(self, sharer: Agent, request: Request) -> tuple[list[int], list[int]]:
        """As `_read`, of one request's chat alone."""
        prompt, tokens, found = aligned_chat(self.receiver.reader, sharer.reader, request.asked())
        if found is None:
            return prompt[:-1], list(range(len(prompt) - 1))  # the last is not edited
        if max(found[:-1], default=-1) < 0:
            expected = "a chat of which some token aligns with one of the sharer's"
            raise GeometryError(sharer.name, expected=expected, got=f"none of {len(prompt)} tokens")
        return tokens, found[:-1]


class LCFXChannel(Channel):
    """Different contexts: each sharer reads its own and sends a message, as bytes; the receiver reads its prompt.

    Messages of several sharers add up in the latent. A request that a sharer has no context for is not helped by it.

    Args:
        adapter: the receiver's, LCF-X, in eval mode; it must accept every sharer's half (`accept_sharer`).
        sharers: with the adapter itself, or a `SharerSide`.
        dtype: that messages are stored in, as `Message.to_bytes` takes it.
        control, seed: as `LCFChannel`'s.
        spans: how a sharer's context is cut, one of `lcf_fast.reading.chat.SPAN_SCHEMES`.
        name: as reports call it.

    Raises:
        SpanError: another way to cut. DTypeError: another dtype. GeometryError: an adapter for other models.
    """

    def __init__(
        self,
        receiver: Agent,
        adapter: LatentCacheFlow,
        sharers: Sequence[Sharer],
        *,
        dtype: str = "bfloat16",
        spans: str = "paragraphs",
        name: str = "lcf_x",
        control: str = "matched",
        seed: int = 0,
    ) -> None:
        super().__init__(receiver, [sharer.agent for sharer in sharers])
        window_size(spans)
        storage_of(dtype)
        self.name, self.adapter, self.dtype, self.spans = name, adapter, dtype, spans
        self.control, self.seed = check_control(control), seed
        self.sharers = sharers_by_name(receiver, sharers)

    def check(self, requests: Sequence[Request], room: int) -> None:
        """As `Channel.check`."""
        told = sent_for(requests, self.control)
        for name, sharer in self.sharers.items():
            for row in rows_told(told, name, self.sharers):
                self._read(sharer.agent, told[row].sharer_contexts[name])
        super().check(requests, room)

    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        receiver, batch = self.receiver, len(requests)
        told = sent_for(requests, self.control)
        sent = collected(told, self.sharers, lambda sharer, some: self._messages(sharer, some, clock))
        prompts = receiver.prompts([request.asked() for request in requests], room)
        ids, mask = padded_left(prompts, receiver.padding(), receiver.device)
        with clock.of("receiver"):
            cache = receiver.read(ids[:, :-1], mask[:, :-1])
        rows = [row for row, messages in enumerate(sent) if messages]
        if rows:
            with clock.of("communication"):
                message = Message.stack([self._received(sent[row]) for row in rows])
                own = take_rows(cache, rows, batch)
                part = self.adapter.inject(own, message, attention_mask=mask[rows, :-1])
                cache = replace_rows(cache, rows, part, batch)
        return Prepared(ids, mask, cache, [sum(map(len, messages)) for messages in sent])

    def _received(self, messages: Sequence[bytes]) -> Message:
        """What came over the wire for one request, as one message."""
        read = [Message.from_bytes(data).to(self.receiver.device) for data in messages]
        # Also one alone: then messages of different sharers are of one origin, and can be stacked.
        return self.adapter.combine(read) if len(self.sharers) > 1 else read[0]

    def _messages(self, sharer: Sharer, told: Sequence[Request], clock: Clock) -> list[bytes]:
        agent, noise = sharer.agent, Noise(told, sharer.agent.name, self.seed)
        read = [self._read(agent, request.sharer_contexts[agent.name]) for request in told]
        ids, mask = padded_left([tokens for tokens, _ in read], agent.padding(), agent.device)
        starts = [ids.shape[1] - len(tokens) for tokens, _ in read]
        spans = shifted_spans([bounds for _, bounds in read], starts)
        with clock.of("sharer"):
            cache = agent.read(ids, mask)
        with clock.of("communication"):
            made = sharer.adapter.summarize(cache, spans, attention_mask=mask)
            rows = [controlled_message(one, self.control, noise, row) for row, one in enumerate(made.split())]
            return [one.to_bytes(dtype=self.dtype) for one in rows]

    def _read(self, agent: Agent, paragraphs: Sequence[str]) -> tuple[list[int], Bounds]:
        """Tokens of a sharer's context, without a template as it is asked nothing, and its spans."""
        tokens, spans = agent.reader.paragraphs(paragraphs, spans=self.spans)
        agent.check_length(max(2, len(tokens)))
        return tokens, spans


def sharers_by_name(receiver: Agent, sharers: Sequence[Sharer]) -> dict[str, Sharer]:
    """Sharers by name, each checked against its adapter."""
    found: dict[str, Sharer] = {}
    for sharer in sharers:
        name = sharer.agent.name
        if name in found:
            raise GeometryError("sharers", expected="names of their own", got=f"{name!r} twice")
        adapter = sharer.adapter
        pairs = [("sharer", sharer.agent, adapter.sharer_geometry), ("receiver", receiver, adapter.receiver_geometry)]
        for role, agent, wanted in pairs:
            if (is_geometry := CacheGeometry.of(agent.model)) != wanted:
                expected = f"an adapter for the {role} {agent.name!r}, {is_geometry}"
                raise GeometryError(f"adapter of {name!r}", expected=expected, got=f"one for {wanted}")
        found[name] = sharer
    return found
