"""From an example to the tokens that the two models read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SpanError
from ..reading.alignment import aligned_chat
from ..reading.chat import ChatReader, Messages
from ..reading.data_errors import AlignmentError, DataError, TokenizerError, TooLongError
from ..span_text import Bounds
from .data import CrossExample, Example

__all__ = ["ExampleTokenizer", "TokenizedExample"]


@dataclass(frozen=True)
class TokenizedExample:
    """One example's tokens, without padding.

    Attributes:
        prompt: the receiver's, two tokens or more.
        response: with the token that ends it.
        sharer: what the sharer reads; the prompt itself where both models read the same tokens.
        aligned: of each token of the prompt the sharer's that it aligns with, -1: none. None: the same tokens, or cross
            context.
        spans: ``(start, stop)`` tokens of the sharer's, of cross context; else None.
    """

    id: str
    prompt: list[int]
    response: list[int]
    sharer: list[int]
    aligned: list[int] | None = None
    spans: Bounds | None = None


class ExampleTokenizer:
    """Turns examples into tokens, for two models.

    *Shared context*: the prompt is all messages but the last, in the receiver's chat template. Where the sharer's
    tokenizer gives that very text the same ids, the sharer reads it too. Otherwise it reads the same messages in its
    own template, and positions align by the characters of the messages' contents (`lcf_fast.reading.alignment`).

    *Cross context*: the sharer reads its paragraphs, a blank line between two of them, without a template: it is not
    asked anything. Each is a span. The receiver reads a user's turn of its own context, a blank line and the question.

    The response is the last message's text as it stands, and one token that ends it.

    Args:
        sharer_tokenizer, receiver_tokenizer: transformers tokenizers. What needs offsets, spans and alignment, needs
            fast ones.
        max_tokens: longest sequence: prompt and response of the receiver, and what the sharer reads.
        end_id: the token that ends a response; None: the receiver tokenizer's ``eos_token_id``. `generate` should stop
            at it.
        template_options: for both chat templates, such as ``{"enable_thinking": False}``. A template that writes the
            day's date (Llama 3's) makes other prompts every day, unless the date is fixed here (``date_string``).

    Raises:
        TokenizerError: no tokenizer; no token that ends a response.
    """

    def __init__(
        self,
        sharer_tokenizer: Any,
        receiver_tokenizer: Any,
        *,
        max_tokens: int = 2048,
        end_id: int | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.receiver = ChatReader("receiver_tokenizer", receiver_tokenizer, template_options)
        self.sharer = ChatReader("sharer_tokenizer", sharer_tokenizer, template_options)
        self.max_tokens = max_tokens
        self.end_id = receiver_tokenizer.eos_token_id if end_id is None else end_id
        if self.end_id is None:
            expected = "one with an eos token, or end_id: the id of the token that ends a response"
            raise TokenizerError("receiver_tokenizer", expected=expected, got="a tokenizer without one")

    def __call__(self, example: Example) -> TokenizedExample:
        """Tokens of an example.

        Raises:
            DataError, naming the example: a prompt of fewer than two tokens; messages that a template refuses; a
                sharer's context without a token. TooLongError: more tokens than ``max_tokens``. AlignmentError: no
                token of the prompt aligns with any of the sharer's.
            TokenizerError: a slow tokenizer, where offsets are needed.
        """
        try:
            made = self._cross(example) if isinstance(example, CrossExample) else self._shared(example)
            self._check_lengths(made)
        except (DataError, SpanError) as error:  # name the example, whatever in it was wrong
            kind = type(error) if isinstance(error, DataError) else DataError
            raise kind(f"example {example.id!r}", expected=error.expected, got=error.got) from error
        return made

    def _shared(self, example: Any) -> TokenizedExample:
        messages: Messages = example.messages[:-1]
        response = self._response(example.messages[-1][1])
        prompt, sharer, aligned = aligned_chat(self.receiver, self.sharer, messages)
        if aligned is None:
            return TokenizedExample(example.id, prompt, response, prompt)
        if max(aligned[:-1], default=-1) < 0:  # the last token is not edited
            expected = "a prompt of which some token aligns with one of the sharer's"
            raise AlignmentError("messages", expected=expected, got=f"none of {len(prompt)} tokens")
        return TokenizedExample(example.id, prompt, response, sharer, aligned)

    def _cross(self, example: CrossExample) -> TokenizedExample:
        context, question = example.receiver_context, example.question
        asked = f"{context}\n\n{question}" if context.strip() else question
        prompt, _ = self.receiver.prompt(self.receiver.render([("user", asked)]))
        sharer, spans = self.sharer.paragraphs(example.sharer_context)
        if not spans:
            raise DataError("sharer_context", expected="a sharer's context of one token or more", got="none")
        return TokenizedExample(example.id, prompt, self._response(example.answer), sharer, spans=spans)

    def _response(self, text: str) -> list[int]:
        return [*self.receiver.ids(text), self.end_id]

    def _check_lengths(self, made: TokenizedExample) -> None:
        prompt, response, sharer = len(made.prompt), len(made.response), len(made.sharer)
        if prompt < 2:
            raise DataError("prompt", expected="a prompt of two tokens or more", got=str(prompt))
        if response < 2:
            raise DataError("response", expected="a response of one token or more", got="none")
        most = f"{self.max_tokens} tokens at most (max_tokens)"
        if prompt + response > self.max_tokens:
            got = f"{prompt + response}: prompt {prompt}, response {response}"
            raise TooLongError("prompt", expected=most, got=got)
        if sharer > self.max_tokens:
            raise TooLongError("sharer", expected=most, got=f"{sharer}, which the sharer reads")
