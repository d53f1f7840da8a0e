"""What is asked through a channel, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import GeometryError

__all__ = ["Answer", "Request", "Timings"]


@dataclass(frozen=True)
class Request:
    """One question, and who has read what.

    Attributes:
        question: to the receiver.
        context: what the receiver has read; in the shared-context channels the sharer reads it, too.
        sharer_contexts: by the sharer's name the paragraphs that it alone has read, each one span.
        sharers: who may help with this one; None: all that the channel has. ``()``: nobody.
        decoy: another request, whose message is sent in this one's place under the mismatched control.

    Raises:
        GeometryError: an empty question, or a sharer's context without text.
    """

    question: str
    context: str = ""
    sharer_contexts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sharers: tuple[str, ...] | None = None
    decoy: Request | None = None

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise GeometryError("question", expected="a question", got="an empty one")
        for name, paragraphs in self.sharer_contexts.items():
            if isinstance(paragraphs, str) or not paragraphs or not all(part.strip() for part in paragraphs):
                expected = "a tuple of one paragraph or more, none of them empty"
                raise GeometryError(f"sharer_contexts[{name!r}]", expected=expected, got=repr(paragraphs)[:80])

    def asked(self, *before: str) -> list[tuple[str, str]]:
        """The chat that the receiver answers: ``before``, its context and the question, in one user's turn."""
        parts = [part for part in (*before, self.context, self.question) if part.strip()]
        return [("user", "\n\n".join(parts))]


@dataclass(frozen=True)
class Timings:
    """Seconds of one call, for its whole batch. A part that a channel has not is 0.

    Attributes:
        sharer: the sharers' reading, and in the text channel their writing.
        communication: from the sharer's cache or text to what the receiver goes on from.
        receiver: the receiver's reading of the prompt but its last token.
        first_token, end: since the call began, to the receiver's first token and to its last.
    """

    sharer: float
    communication: float
    receiver: float
    first_token: float
    end: float


@dataclass(frozen=True)
class Answer:
    """What the receiver said to one request.

    Attributes:
        text: without special tokens.
        ids: ``(T,)`` new tokens, on the CPU, up to and with the one that ended it.
        sent: bytes that crossed from the sharers to the receiver for this request.
        timings: of the batch that it was in.
    """

    text: str
    ids: Tensor
    sent: int
    timings: Timings
