"""The two ends of the scale: the receiver alone, and the receiver with everything to read itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .agent import Agent, padded_left
from .base import Channel, Clock, Prepared
from .controls import check_text_control, sent_for
from .request import Request

__all__ = ["FullContextChannel", "NoneChannel"]


class NoneChannel(Channel):
    """The receiver answers from what it has read itself."""

    name = "none"
    edits = False

    def chat(self, request: Request) -> list[tuple[str, str]]:
        """What the receiver reads."""
        return request.asked()

    def crossed(self, request: Request) -> int:
        """Bytes that cross for it."""
        return 0

    def check(self, requests: Sequence[Request], room: int) -> None:
        """As `Channel.check`."""
        self.receiver.prompts([self.chat(request) for request in requests], room)

    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        receiver = self.receiver
        rows = receiver.prompts([self.chat(request) for request in requests], room)
        ids, mask = padded_left(rows, receiver.padding(), receiver.device)
        with clock.of("receiver"):
            cache = receiver.read(ids[:, :-1], mask[:, :-1])
        return Prepared(ids, mask, cache, [self.crossed(request) for request in requests])


class FullContextChannel(NoneChannel):
    """The receiver reads the sharers' contexts itself, before its own: the ceiling, and the cost to be saved.

    ``control``: "matched", or "mismatched": the contexts of each request's decoy.
    """

    name = "full_context"

    def __init__(self, receiver: Agent, *, control: str = "matched") -> None:
        super().__init__(receiver)
        self.control = check_text_control(control)

    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        return super().prepare(self._told(requests), clock, room)

    def check(self, requests: Sequence[Request], room: int) -> None:
        """As `Channel.check`."""
        super().check(self._told(requests), room)

    def _told(self, requests: Sequence[Request]) -> list[Request]:
        told = sent_for(requests, self.control)
        return [replace(one, sharer_contexts=other.sharer_contexts) for one, other in zip(requests, told)]

    def chat(self, request: Request) -> list[tuple[str, str]]:
        return request.asked(*self._texts(request))

    def crossed(self, request: Request) -> int:
        return len("\n\n".join(self._texts(request)).encode())

    def _texts(self, request: Request) -> list[str]:
        chosen = request.sharer_contexts if request.sharers is None else request.sharers
        return ["\n\n".join(request.sharer_contexts[name]) for name in chosen if name in request.sharer_contexts]
