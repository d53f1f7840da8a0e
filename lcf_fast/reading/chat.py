"""A tokenizer as training reads with it: prompts in its own chat template, and where their contents lie in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SpanError
from ..span_text import Bounds, sentence_bounds, turn_bounds
from ..spans import from_characters, windows
from .data_errors import DataError, TokenizerError

__all__ = ["SPAN_SCHEMES", "ChatReader", "Messages", "window_size"]

#: ``(role, content)`` each.
Messages = Sequence[tuple[str, str]]
Offsets = list[tuple[int, int]]

#: How a context can be cut into spans; N is a number of tokens.
SPAN_SCHEMES = ("paragraphs", "sentences", "one", "windows:N")

# What stands for a content to see what a template puts around it: private-use characters, which no template looks for.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


class ChatReader:
    """Renders and tokenizes what one model reads.

    Without a chat template messages are rendered plainly: each role on a line of its own, then the content and a blank
    line, and ``assistant`` on a line at the end; with the token that the tokenizer begins a text with, if it has one.

    Args:
        name: of the tokenizer, as the caller knows it.
        tokenizer: a transformers tokenizer.
        options: for its chat template, such as ``{"enable_thinking": False}``.

    Raises:
        TokenizerError: no tokenizer at all.
    """

    def __init__(self, name: str, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        if not callable(tokenizer) or not hasattr(tokenizer, "apply_chat_template"):
            got = type(tokenizer).__name__
            raise TokenizerError(name, expected="a transformers tokenizer, as AutoTokenizer gives", got=got)
        self.name, self.tokenizer = name, tokenizer
        self._options = dict(options or {})
        self._around: dict[tuple[str, ...], list[str] | None] = {}
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos] else []

    def render(self, messages: Messages) -> str:
        """The prompt that the model answers to.

        Raises:
            DataError: the template refuses the messages, as some do a system's turn or two users' in a row.
        """
        if not self.tokenizer.chat_template:
            return "".join(f"{role}\n{content}\n\n" for role, content in messages) + "assistant\n"
        import jinja2

        listed = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                listed, tokenize=False, add_generation_prompt=True, **self._options
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            expected = f"messages that the template of {self.name} renders"
            raise DataError("messages", expected=expected, got=f"{type(error).__name__}: {error}"[:200]) from error
        return text

    def prompt(self, text: str) -> tuple[list[int], Offsets | None]:
        """Token ids of a rendered prompt, and the characters of each, ``(0, 0)`` for one that has none.

        No characters (None) from a slow tokenizer, which does not tell.
        """
        # A chat template writes the token itself that a text begins with.
        return self._read(text, [] if self.tokenizer.chat_template else self._bos)

    def text(self, text: str) -> tuple[list[int], Offsets | None]:
        """As `prompt`, of a text that is no chat."""
        return self._read(text, self._bos)

    def paragraphs(self, paragraphs: Sequence[str], *, spans: str = "paragraphs") -> tuple[list[int], Bounds]:
        """Token ids of paragraphs, a blank line between two of them and no template, and each span's ``(start, stop)``.

        Args:
            spans: one of `SPAN_SCHEMES`: "paragraphs", as given, a blank line counting to the paragraph before it;
                "sentences" of their text; "one" of all of it; "windows:200", or of another number of tokens. No span
                where there is no text.

        Raises:
            SpanError: another scheme. TokenizerError: a slow tokenizer.
        """
        size = window_size(spans)
        text, bounds = "", []
        for paragraph in paragraphs:
            bounds.append((len(text), len(text) + len(paragraph) + 2))
            text += paragraph + "\n\n"
        text = text[:-2]
        bounds[-1:] = [(start, len(text)) for start, _ in bounds[-1:]]
        ids, offsets = self.text(text)
        if size is not None:
            return ids, windows(len(ids), size).bounds()[0]
        if offsets is None:
            raise self.slow()
        if spans != "paragraphs":
            bounds = [(0, len(text))] if spans == "one" else sentence_bounds(text)
        (found,) = from_characters([bounds], [offsets], texts=[text]).bounds()
        return ids, found

    def ids(self, text: str) -> list[int]:
        """Token ids of a text that goes on after others."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def slow(self) -> TokenizerError:
        """The error of a tokenizer that does not tell characters where they are needed."""
        expected = "a fast tokenizer, which tells the characters of each token"
        return TokenizerError(self.name, expected=expected, got=f"a slow one ({type(self.tokenizer).__name__})")

    def content_bounds(self, messages: Messages, text: str) -> Bounds:
        """Where each content lies in the rendered ``text``, ``(start, stop)`` in characters, ascending.

        A template may have trimmed a content. Empty where it has none or the template has changed or dropped it.
        """
        around = self._around_contents(tuple(role for role, _ in messages))
        found = None if around is None else _between(around, [content for _, content in messages], text)
        return _searched(messages, text) if found is None else found

    def _read(self, text: str, bos: list[int]) -> tuple[list[int], Offsets | None]:
        if not self.tokenizer.is_fast:
            return [*bos, *self.ids(text)], None
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [*bos, *read["input_ids"]], [*[(0, 0)] * len(bos), *read["offset_mapping"]]

    def _around_contents(self, roles: tuple[str, ...]) -> list[str] | None:
        """What the template puts before, between and behind contents of these roles; None: it cannot be seen."""
        if roles not in self._around:
            self._around[roles] = self._see_around(roles)
        return self._around[roles]

    def _see_around(self, roles: tuple[str, ...]) -> list[str] | None:
        marks = [f"{_OPEN}{i}{_CLOSE}" for i in range(len(roles))]
        try:
            rest = self.render(list(zip(roles, marks)))
        except DataError:
            return None
        around = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            around.append(before)
        around.append(rest)
        return None if any(_OPEN in part for part in around) else around  # a mark that came twice


def window_size(spans: str) -> int | None:
    """Tokens of a window in the scheme "windows:N"; None: a scheme without windows.

    Raises:
        SpanError: none of `SPAN_SCHEMES`.
    """
    name, colon, size = spans.partition(":")
    if name == "windows" and size.isascii() and size.isdecimal() and int(size) > 0:
        return int(size)
    if colon or spans not in SPAN_SCHEMES:
        raise SpanError("spans", expected=" or ".join(SPAN_SCHEMES), got=repr(spans))
    return None


def _between(around: Sequence[str], contents: Sequence[str], text: str) -> Bounds | None:
    """Bounds of the contents in ``text``, if that is just them, whole or trimmed, with ``around`` around them."""
    if not text.startswith(around[0]):
        return None
    at = len(around[0])
    bounds = []
    for content, behind in zip(contents, around[1:]):
        for kept in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(kept, at) and text.startswith(behind, at + len(kept)):
                break
        else:
            return None
        bounds.append((at, at + len(kept)))
        at += len(kept) + len(behind)
    return bounds if at == len(text) else None


def _searched(messages: Messages, text: str) -> Bounds:
    """Bounds of the contents, each searched behind the one before."""
    bounds, at = [], 0
    for role, content in messages:
        try:
            ((start, stop),) = turn_bounds(text[at:], [{"role": role, "content": content}])
        except SpanError:
            start = stop = 0
        bounds.append((at + start, at + stop))
        at += stop
    return bounds
