"""Tokenized micro-batches, what a training step reads, and the order in which examples come up."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..counting import counted
from ..errors import IndexRangeError
from ..reading.data_errors import DataError
from ..reading.padding import padded, shifted_index, shifted_spans
from ..spans import Spans
from .data import Example, ExampleSet, OnError, check_choice, name_broken
from .settings import TrainingSettings
from .tokenizing import ExampleTokenizer, TokenizedExample

__all__ = ["Batch", "ExampleData", "collate"]


@dataclass
class Batch:
    """Examples as padded int64 tensors, on the CPU; masks are 1 at real tokens and 0 at padding.

    Attributes:
        ids: the examples' names.
        receiver_ids, receiver_mask: ``(B, N)`` prompts, padded on the left; N is 2 or more.
        response_ids, response_mask: ``(B, R)`` responses with their end token, padded on the right; none is empty.
        sharer_ids, sharer_mask: ``(B, M)`` what the sharer reads, padded on the left.
        sharer_index: ``(B, N)``, the sharer's row for each of the prompt's tokens, -1: none. None where both models
            read the very same tokens (shared context) and for cross context.
        spans: of the sharer's tokens (cross context).
    """

    ids: tuple[str, ...]
    receiver_ids: Tensor
    receiver_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    sharer_ids: Tensor
    sharer_mask: Tensor
    sharer_index: Tensor | None = None
    spans: Spans | None = None


def collate(examples: Sequence[TokenizedExample]) -> Batch:
    """Examples of one kind as a batch; padding has the id 0.

    Raises:
        DataError: none at all, or some of shared and some of cross context.
    """
    crossing = {example.spans is not None for example in examples}
    if len(crossing) != 1:
        got = "none" if not crossing else "shared and cross context"
        raise DataError("examples", expected="one example or more, all of one kind", got=got)
    receiver_ids, receiver_mask = padded([example.prompt for example in examples], left=True)
    response_ids, response_mask = padded([example.response for example in examples], left=False)
    index, spans = None, None
    if all(example.aligned is None and example.spans is None for example in examples):
        sharer_ids, sharer_mask = receiver_ids, receiver_mask
    else:
        sharer_ids, sharer_mask = padded([example.sharer for example in examples], left=True)
        starts = [sharer_ids.shape[1] - len(example.sharer) for example in examples]
        if crossing == {True}:
            spans = shifted_spans([example.spans or [] for example in examples], starts)
        else:
            # None: this one's tokens are the same for both, only others' in the batch are not.
            aligned = [range(len(e.prompt)) if e.aligned is None else e.aligned for e in examples]
            index = shifted_index(aligned, starts, receiver_ids.shape[1])
    return Batch(
        ids=tuple(example.id for example in examples),
        receiver_ids=receiver_ids,
        receiver_mask=receiver_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        sharer_ids=sharer_ids,
        sharer_mask=sharer_mask,
        sharer_index=index,
        spans=spans,
    )


class ExampleData:
    """A data set as a trainer reads it (`lcf_fast.training.trainer.Data`): which examples a step has, and its batches.

    Examples come in an endless sequence, epoch after epoch; an epoch's order follows from the seed, its number and the
    examples' ids alone, and step ``s`` reads positions ``[s * batch_size, (s + 1) * batch_size)``. So any step can be
    asked for at any time, no state is kept, and no step is short.

    All examples that ``settings.steps`` steps read are tokenized once when this is made, and what is of no use (too
    long, a prompt that a template refuses or that cannot be aligned) is found before the training begins. Tokens are
    not kept: a step's are made anew when it is asked for.

    Args:
        examples: with unique ids.
        sharer_tokenizer, receiver_tokenizer: transformers tokenizers; what needs offsets, spans and alignment, needs
            fast ones.
        settings: of it ``steps``, ``batch_size``, ``micro_batch_size``, ``max_tokens`` and ``seed``.
        on_error: "skip" leaves out examples of no use and names them in `left_out`; "refuse" stops at the first.
        end_id, template_options: as `ExampleTokenizer` has them.
        progress: whether a bar, and what was left out, is shown on standard error.

    Attributes:
        kind: "shared" or "cross".
        left_out: ``(id, reason)`` of the examples that were found to be of no use.

    Raises:
        DataError: fewer examples of use than a step reads; ids that are not unique; an example of no use, if refused.
        TokenizerError: a tokenizer that lacks what is needed.
    """

    def __init__(
        self,
        examples: ExampleSet,
        sharer_tokenizer: Any,
        receiver_tokenizer: Any,
        settings: TrainingSettings | None = None,
        *,
        on_error: OnError = "skip",
        end_id: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> None:
        check_choice("on_error", on_error, ("skip", "refuse"))
        self.settings = TrainingSettings() if settings is None else settings
        self.kind = examples.kind
        self.tokenize = ExampleTokenizer(
            sharer_tokenizer,
            receiver_tokenizer,
            max_tokens=self.settings.max_tokens,
            end_id=end_id,
            template_options=template_options,
        )
        self.left_out: list[tuple[str, str]] = []
        self._examples: dict[str, Example] = {example.id: example for example in examples.examples}
        if len(self._examples) != len(examples):
            raise DataError("examples", expected="unique ids", got=f"{len(self._examples)} ids of {len(examples)}")
        self._on_error = on_error
        self._usable: list[str] = []  # as far as the first epoch has been gone through, in its order
        self._hashed = hashlib.sha256()  # of the tokens of those of use, in that order
        self._unseen = iter(_shuffled(list(self._examples), self.settings.seed, 0))
        self._later = lru_cache(maxsize=2)(self._later_epoch)
        if len(examples) < self.settings.batch_size:
            raise self._too_few(f"{len(examples)}")
        needed = min(len(self._examples), self.settings.steps * self.settings.batch_size)
        self._look(needed, progress)
        if len(self._usable) < self.settings.batch_size:
            raise self._too_few(f"{len(self._usable)} of {len(examples)}; {self._named_left_out()}")
        self._digest = self._hashed.hexdigest()
        if progress and self.left_out:
            print(self.summary(), file=sys.stderr)

    def ids(self, step: int) -> list[str]:
        """The examples that step (0-based) reads, in order."""
        if step < 0:
            raise IndexRangeError("step", expected="0 or more", got=str(step))
        size = self.settings.batch_size
        return [self._at(position) for position in range(step * size, (step + 1) * size)]

    def batch(self, step: int, index: int) -> Batch:
        """Micro-batch ``index`` of a step; the last of them may be smaller."""
        if not 0 <= index < self.settings.micro_batches:
            raise IndexRangeError("index", expected=f"[0, {self.settings.micro_batches})", got=str(index))
        size = self.settings.micro_batch_size
        return self.of(self.ids(step)[index * size : (index + 1) * size])

    def digest(self) -> str:
        """Of the ids and the tokens of all that the steps read: another text, template or tokenizer gives another."""
        return self._digest

    def of(self, ids: Sequence[str]) -> Batch:
        """A batch of the examples of these ids.

        Raises:
            DataError: no such example, or one of no use.
        """
        unknown = [id for id in ids if id not in self._examples]
        if unknown:
            raise DataError("ids", expected="examples of the set", got=repr(unknown[0]))
        return collate([self.tokenize(self._examples[id]) for id in ids])

    def summary(self) -> str:
        """One line: how many examples were looked at, and which of them were left out."""
        looked = len(self._usable) + len(self.left_out)
        text = f"{looked:,} of {len(self._examples):,} examples tokenized, {len(self._usable):,} of use"
        return f"{text}; {self._named_left_out()}" if self.left_out else text

    def _at(self, position: int) -> str:
        """The example at a position of the endless sequence."""
        if position >= len(self._usable):
            self._look(position + 1, False)
        epoch, place = divmod(position, len(self._usable)) if position >= len(self._usable) else (0, position)
        return self._usable[place] if epoch == 0 else self._later(epoch)[place]

    def _later_epoch(self, epoch: int) -> list[str]:
        return _shuffled(self._usable, self.settings.seed, epoch)

    def _look(self, needed: int, progress: bool) -> None:
        """Go on through the first epoch until ``needed`` examples of use are known, or to its end."""

        def found() -> Iterator[str]:
            while len(self._usable) < needed and (id := next(self._unseen, None)) is not None:
                try:
                    made = self.tokenize(self._examples[id])
                except DataError as error:
                    if self._on_error == "refuse":
                        raise
                    self.left_out.append((id, f"{error.got} instead of {error.expected}"))
                else:
                    self._usable.append(id)
                    self._hashed.update(json.dumps(vars(made)).encode() + b"\n")
                    yield id

        for _ in counted(found(), "checking examples", total=needed, shown=progress, more=self._figures):
            pass

    def _figures(self) -> str:
        return f"{len(self.left_out):,} left out" if self.left_out else ""

    def _named_left_out(self) -> str:
        return f"left out: {name_broken(self.left_out, what='example')}" if self.left_out else "none left out"

    def _too_few(self, got: str) -> DataError:
        size = self.settings.batch_size
        expected = f"{size} of use or more, as a step reads (bring more examples, or lower batch_size)"
        return DataError("examples", expected=expected, got=got)


def _shuffled(ids: Sequence[str], seed: int, epoch: int) -> list[str]:
    """An order by the hash of each id: it is the same however the data are ordered, and whatever is left out."""
    prefix = hashlib.blake2b(f"{seed}\n{epoch}\n".encode(), digest_size=8)

    def key(id: str) -> tuple[bytes, str]:
        hashed = prefix.copy()
        hashed.update(id.encode())
        return hashed.digest(), id

    return sorted(ids, key=key)
