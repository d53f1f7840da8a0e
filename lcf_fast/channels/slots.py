"""Slots as a channel: what the sharers alone have read, as positions of the receiver's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..caches import Pair, extend_cache
from ..errors import ShapeError
from ..message import Message
from ..placement import placement_of, slot_positions, with_slots
from ..quantization import storage_of
from ..reading.chat import window_size
from ..reading.padding import padding_first, shifted_spans
from ..reading.prefill import read_behind, turns_at
from ..slot_spans import summarize_spans
from ..slots import LatentSlots
from ..span_text import Bounds
from .agent import Agent, padded_left
from .base import Channel, Clock, Prepared
from .controls import Noise, check_control, controlled_message, sent_for
from .lcf import Sharer, sharers_by_name
from .request import Request
from .routing import collected, rows_told

__all__ = ["SlotsChannel"]


class SlotsChannel(Channel):
    """Cross context: each sharer reads its own paragraphs and sends a message of k slots, through its bytes.

    A request that a sharer has no context for, or does not choose it, has no slots of it; slots of several sharers lie
    side by side. Rows of a batch may have different ones, or none: what a row has not is masked out, and stands with
    its padding before all that it has, since a sliding window counts columns.

    Args:
        adapter: the receiver's.
        sharers: with that adapter, or with sharers' halves that it accepts (`SlotsSharerSide`, or an adapter made by
            `LatentSlots.for_sharer`), in eval mode.
        dtype: of the messages on the wire.
        placement: ``"append"``, behind the prompt but its last token; or ``"prefix"``, before the prompt, which then
            reads them as it is prefilled; None: as the adapter was trained. Another than that is warned about.
        slots: send the first so many of each message, or of each span; None: all.
        spans: how a sharer's context is cut, one of `lcf_fast.reading.chat.SPAN_SCHEMES`, where its adapter makes slots
            for each span (``LCFConfig.per_span``).
        control: what is sent (`lcf_fast.channels.controls`).
        seed: of the random control.

    Raises:
        SpanError: another way to cut. DTypeError: another dtype. GeometryError: an adapter for other models, an unknown
            placement or control.
    """

    name = "slots"

    def __init__(
        self,
        receiver: Agent,
        adapter: LatentSlots,
        sharers: Sequence[Sharer],
        *,
        dtype: str = "bfloat16",
        placement: str | None = None,
        slots: int | None = None,
        spans: str = "paragraphs",
        control: str = "matched",
        seed: int = 0,
    ) -> None:
        super().__init__(receiver, [sharer.agent for sharer in sharers])
        window_size(spans)
        storage_of(dtype)
        self.adapter, self.dtype, self.slots, self.spans = adapter, dtype, slots, spans
        self.placement = placement_of(adapter, placement)
        self.control, self.seed = check_control(control), seed
        self.sharers = sharers_by_name(receiver, sharers)

    def check(self, requests: Sequence[Request], room: int) -> None:
        """As `Channel.check`."""
        told = sent_for(requests, self.control)
        prompts = self.receiver.prompts([request.asked() for request in requests], room)
        slots = [0] * len(requests)
        for name, sharer in self.sharers.items():
            for row in rows_told(told, name, self.sharers):
                _, bounds = self._read(sharer, told[row].sharer_contexts[name])
                slots[row] += len(bounds) * (sharer.adapter.slot_count if self.slots is None else self.slots)
        for prompt, own in zip(prompts, slots):
            self.receiver.check_length(len(prompt) + own, room)
            self._check_turn([len(prompt)], [own])
            self._check_asked(len(prompt) + own, room)

    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        receiver, batch = self.receiver, len(requests)
        told = sent_for(requests, self.control)
        sent = collected(told, self.sharers, lambda sharer, some: self._messages(sharer, some, clock))
        prompts = receiver.prompts([request.asked() for request in requests], room)
        ids, mask = padded_left(prompts, receiver.padding(), receiver.device)
        sizes = [sum(map(len, messages)) for messages in sent]
        if not any(sent):
            with clock.of("receiver"):
                cache = receiver.read(ids[:, :-1], mask[:, :-1])
            return Prepared(ids, mask, cache, sizes)
        with clock.of("communication"):
            message, there = self._received(sent)
        counts = there.sum(1).tolist()
        for prompt, count in zip(prompts, counts):
            receiver.check_length(len(prompt) + count, room)
        self._check_turn([len(prompt) for prompt in prompts], counts)
        if self.placement == "append":
            with clock.of("receiver"):
                own = receiver.read(ids[:, :-1], mask[:, :-1])
            with clock.of("communication"):
                placed = self._place(message, there, mask[:, :-1].sum(1), batch)
                cache = list(extend_cache(own, own, placed))
                if len({*counts}) > 1:
                    cache = padding_first(cache, torch.cat([mask[:, :-1], there], 1))
        else:
            with clock.of("communication"):
                length = max(len(prompt) - 1 + count for prompt, count in zip(prompts, counts))
                placed = self._place(message, there, 0, batch, length)
            with clock.of("receiver"):
                cache = read_behind(receiver.model, placed, there, ids[:, :-1], mask[:, :-1])
        long_ids, long_mask = with_slots(ids, mask, there, placement=self.placement)
        long_mask, order = long_mask.sort(dim=1, stable=True)
        return Prepared(long_ids.gather(1, order), long_mask, cache, sizes)

    def _read(self, sharer: Sharer, paragraphs: Sequence[str]) -> tuple[list[int], Bounds]:
        """Tokens of a sharer's context, without a template as it is asked nothing, and what is pooled by itself."""
        reader = sharer.agent.reader
        tokens: list[int]
        if sharer.adapter.per_span:
            tokens, bounds = reader.paragraphs(paragraphs, spans=self.spans)
        else:
            tokens = reader.text("\n\n".join(paragraphs))[0]
            bounds = [(0, len(tokens))]
        sharer.agent.check_length(max(2, len(tokens)))
        return tokens, bounds

    def _messages(self, sharer: Sharer, told: Sequence[Request], clock: Clock) -> list[bytes]:
        agent, noise = sharer.agent, Noise(told, sharer.agent.name, self.seed)
        read = [self._read(sharer, request.sharer_contexts[agent.name]) for request in told]
        ids, mask = padded_left([tokens for tokens, _ in read], agent.padding(), agent.device)
        with clock.of("sharer"):
            cache = agent.read(ids, mask)
        with clock.of("communication"):
            if sharer.adapter.per_span:
                starts = [ids.shape[1] - len(tokens) for tokens, _ in read]
                spans = shifted_spans([bounds for _, bounds in read], starts)
                made, there = summarize_spans(sharer.adapter, cache, spans, attention_mask=mask, slots=self.slots)
                counts = there.sum(1).tolist()
            else:
                made = sharer.adapter.summarize(cache, attention_mask=mask, slots=self.slots)
                counts = [made.slots] * len(read)
            rows = [one.take_slots(n) for one, n in zip(made.split(), counts)]
            rows = [controlled_message(one, self.control, noise, row) for row, one in enumerate(rows)]
            return [one.to_bytes(dtype=self.dtype) for one in rows]

    def _received(self, sent: Sequence[Sequence[bytes]]) -> tuple[Message, Tensor]:
        """What came over the wire, as one message of the rows that have any, and which slots ``(B, k)`` a row has."""
        joined: dict[int, Message] = {}
        for row, messages in enumerate(sent):
            if messages:
                read = [Message.from_bytes(data).to(self.receiver.device) for data in messages]
                joined[row] = self.adapter.join(read)
        width = max(message.slots for message in joined.values())
        there = torch.zeros(len(sent), width, dtype=torch.int64, device=self.receiver.device)
        filled = []
        for row, message in joined.items():
            there[row, : message.slots] = 1
            assert message.latent is not None
            # A row of fewer sharers is filled up with zeros, which are masked out.
            latent = torch.nn.functional.pad(message.latent, (0, 0, 0, width - message.slots))
            filled.append(replace(message, latent=latent))
        return Message.stack(filled), there

    def _check_turn(self, prompts: Sequence[int], counts: Sequence[int]) -> None:
        """Refuse appended slots that reach beyond where a model's keys turn otherwise, behind a prompt that does not:
        what has read them would look for the prompt's keys where they are not."""
        most = turns_at(self.receiver.model) if self.placement == "append" else None
        longest = max(map(sum, zip(prompts, counts)))
        if most is not None and max(prompts) - 1 <= most < longest - 1:
            expected = f"all within {most} tokens, or prompts beyond (longrope turns keys otherwise there)"
            raise ShapeError(self.receiver.name, expected=expected, got=f"{max(prompts)}, with slots {longest}")

    def _place(
        self, message: Message, there: Tensor, before: Tensor | int, batch: int, length: int | None = None
    ) -> list[Pair]:
        """Keys and values ``(B, Hr, k, Dr)`` a layer, zeros in rows without a message."""
        rows = there.any(1).nonzero().flatten()
        positions = slot_positions(before, there, batch, there.device)[rows]
        placed = self.adapter.place(self.receiver.model, message, positions, length=length)
        if len(rows) == batch:
            return placed
        return [(_spread(key, rows, batch), _spread(value, rows, batch)) for key, value in placed]


def _spread(part: Tensor, rows: Tensor, batch: int) -> Tensor:
    whole = part.new_zeros(batch, *part.shape[1:])
    whole[rows] = part
    return whole
