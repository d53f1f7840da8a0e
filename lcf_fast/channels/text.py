"""Text: each sharer writes a note of at most k tokens, which is put into the receiver's prompt (T2T)."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import GeometryError
from .agent import Agent, padded_left
from .base import Channel, Clock, Prepared
from .controls import check_text_control, sent_for
from .request import Request
from .routing import rows_of

__all__ = ["TextChannel"]

#: What a sharer is asked; it reads its own context before it and the question behind it.
INSTRUCTION = "Write down what in the text above helps to answer the following question. Be brief."
#: How a note stands in the receiver's prompt.
TEMPLATE = "{note}"
#: For a note that is not written yet: what joins notes to the rest takes tokens, too.
_STAND_IN = "x"


class TextChannel(Channel):
    """Sharers write, the receiver reads: before its own context, one note after the other.

    Args:
        sharers: by name.
        most_tokens: k: the longest note, in the sharer's tokens.
        instruction: what sharers are asked to do.
        template: how a note stands in the receiver's prompt: a text with ``{note}``, and if wanted ``{question}``.
        control: "matched"; "mismatched": sharers write about each request's decoy; "self": they have read what the
            receiver has.

    Raises:
        GeometryError: no token, or a template without ``{note}`` or with a name that it does not know.
    """

    edits = False

    def __init__(
        self,
        receiver: Agent,
        sharers: Sequence[Agent],
        *,
        most_tokens: int = 200,
        instruction: str = INSTRUCTION,
        template: str = TEMPLATE,
        control: str = "matched",
    ) -> None:
        super().__init__(receiver, sharers)
        self.control = check_text_control(control)
        if most_tokens < 1:
            raise GeometryError("most_tokens", expected="1 or more", got=str(most_tokens))
        self.sharers = {sharer.name: sharer for sharer in sharers}
        self.most_tokens, self.instruction, self.template = most_tokens, instruction, template
        _check_template(template)
        self.name = f"text_{most_tokens}"

    def check(self, requests: Sequence[Request], room: int) -> None:
        """As `Channel.check`, with the longest notes in the prompt, were their tokens the receiver's."""
        told = sent_for(requests, self.control)
        notes: list[list[str]] = [[] for _ in requests]
        for sharer in self.sharers.values():
            rows = rows_of(told, sharer.name, self.sharers)
            sharer.prompts(self._asked(sharer, [told[row] for row in rows]), self.most_tokens)
            for row in rows:
                notes[row].append(_STAND_IN)
        for request, some in zip(requests, notes):
            self.receiver.prompts([self._chat(request, some)], room + len(some) * self.most_tokens)

    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        notes: list[list[str]] = [[] for _ in requests]
        told = sent_for(requests, self.control)
        for sharer in self.sharers.values():
            rows = rows_of(told, sharer.name, self.sharers)
            if rows:
                with clock.of("sharer"):
                    written = self._write(sharer, [told[row] for row in rows])
                for row, note in zip(rows, written):
                    notes[row].append(note)
        receiver = self.receiver
        prompts = [self._prompt(request, written, room) for request, written in zip(requests, notes)]
        ids, mask = padded_left(prompts, receiver.padding(), receiver.device)
        with clock.of("receiver"):
            cache = receiver.read(ids[:, :-1], mask[:, :-1])
        return Prepared(ids, mask, cache, [sum(len(part.encode()) for part in note) for note in notes])

    def _chat(self, request: Request, notes: Sequence[str]) -> list[tuple[str, str]]:
        """What the receiver is asked."""
        return request.asked(*(self.template.format(note=note, question=request.question) for note in notes))

    def _prompt(self, request: Request, notes: Sequence[str], room: int) -> list[int]:
        """Its tokens, with the longest note cut at its end as long as they are too many.

        A note of k tokens of the sharer's can be more of the receiver's, which nobody knows before it is written.
        """
        receiver, some = self.receiver, list(notes)
        while True:
            prompt = receiver.reader.prompt(receiver.reader.render(self._chat(request, some)))[0]
            over = 0 if receiver.limit is None else len(prompt) + room - receiver.limit
            if over <= 0 or not any(some):
                receiver.check_length(len(prompt), room)
                return prompt
            longest = max(range(len(some)), key=lambda i: len(some[i]))
            some[longest] = some[longest][:-over]

    def _write(self, sharer: Agent, requests: Sequence[Request]) -> list[str]:
        """Greedy: what is compared with it does not draw either."""
        rows = sharer.prompts(self._asked(sharer, requests), self.most_tokens)
        ids, mask = padded_left(rows, sharer.padding(), sharer.device)
        out = sharer.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self.most_tokens,
            **{**sharer.greedy(), "pad_token_id": sharer.padding()},
        )
        notes = sharer.until_the_end(out[:, ids.shape[1] :])
        found: list[str] = sharer.tokenizer.batch_decode(notes, skip_special_tokens=True)
        return [text.strip() for text in found]

    def _asked(self, sharer: Agent, requests: Sequence[Request]) -> list[list[tuple[str, str]]]:
        """What a sharer is asked for each request."""
        chats = []
        for request in requests:
            read = "\n\n".join(request.sharer_contexts.get(sharer.name, ())) or request.context
            parts = [part for part in (read, self.instruction, request.question) if part.strip()]
            chats.append([("user", "\n\n".join(parts))])
        return chats


def _check_template(template: str) -> None:
    try:
        shown = template.format(note="\ue000", question="\ue001")
    except (KeyError, IndexError, ValueError) as error:
        expected = "a text with {note}, and {question} if wanted"
        raise GeometryError("template", expected=expected, got=f"{template!r} ({error})") from None
    if "\ue000" not in shown:
        raise GeometryError("template", expected="a text with {note}", got=repr(template))
