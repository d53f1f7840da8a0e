"""What the demo's agents read: facts, questions about them, and which other item serves as a control.

The language has no tokenizer: a token is an int and is written as one character. There are 16 keys, ``A`` to ``P``, 16
values, ``b`` to ``q`` (no "a", an article, which measures of answers drop), 32 names and the blank ``?``. A *fact* is a
key and its value, ``Cf``; a context ends on a key, and the answer is its value.

- *Cross context* (LCF-X): the sharer reads some facts, the receiver two others and then a key of which only the sharer
  knows the value.
- *Shared context* (LCF): both read ``<name><key>?<key>``. The sharer has learned a secret table by heart, one random
  value for each pair of a name and a key; the receiver has not. A quarter of the pairs is held out: the adapter never
  trains on them, so on them it can have the answer from the sharer's cache alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..spans import Spans
from ..training.batches import Batch

__all__ = [
    "BLANK",
    "CHANCE",
    "KEYS",
    "NAMES",
    "VALUES",
    "VOCABULARY",
    "CrossItems",
    "SecretTable",
    "SharedItems",
    "characters",
    "cross_items",
    "echo_lines",
    "others",
    "recall_lines",
    "written",
]

KEYS, VALUES, NAMES = 16, 16, 32
#: Token ids: keys, values, names, the blank, in this order.
FIRST_VALUE, FIRST_NAME, BLANK = KEYS, KEYS + VALUES, KEYS + VALUES + NAMES
VOCABULARY = BLANK + 1
#: Accuracy of a guess.
CHANCE = 1 / VALUES
#: Facts that the receiver holds itself, of other keys than the one it is asked.
OWN_FACTS = 2
#: Labels where a token is not to be predicted, as transformers has it.
NOTHING = -100
HELD_OUT = 0.25

_CHARACTERS = "ABCDEFGHIJKLMNOP" + "bcdefghijklmnopq" + "αβγδεζηθικλμνξοπρστυφχψωάέήίόύώϊ" + "?"


def characters() -> str:
    """Of each token, by its id."""
    return _CHARACTERS


def written(ids: Tensor) -> list[str]:
    """Token ids ``(B, N)`` as text, a character a token."""
    return ["".join(_CHARACTERS[i] for i in row) for row in ids.tolist()]


def _facts(items: int, facts: int, keys: int, generator: torch.Generator) -> Tensor:
    """``(items, facts, 2)``: keys, different ones within an item, of the first ``keys``; and their values."""
    chosen = torch.rand(items, keys, generator=generator).argsort(1)[:, :facts]
    values = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUES, (items, facts), generator=generator)
    return torch.stack([chosen, values], 2)


# --- what the agents learn their language from
# ---------------------------------------------------------------------


def recall_lines(
    lines: int, facts: int, questions: int, generator: torch.Generator, *, keys: int = KEYS
) -> tuple[Tensor, Tensor]:
    """``CfAbPd`` ``AbCf...``: facts, then some of them again, in which each value can be known.

    Returns ids ``(lines, 2 * (facts + questions))`` and labels of that shape, `NOTHING` but for the later values.
    """
    stated = _facts(lines, facts, keys, generator)
    asked = torch.randint(facts, (lines, questions, 1), generator=generator).expand(-1, -1, 2)
    ids = torch.cat([stated, stated.gather(1, asked)], 1).flatten(1)
    labels = torch.full_like(ids, NOTHING)
    labels[:, 2 * facts + 1 :: 2] = ids[:, 2 * facts + 1 :: 2]
    return ids, labels


def echo_lines(lines: int, facts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``CfCAbA``: a value, then its key once more, which can be known. Returns as `recall_lines`.

    Reading what came one token earlier is half of recall, and much easier to learn than both halves at once.
    """
    stated = _facts(lines, facts, KEYS, generator)
    ids = torch.cat([stated, stated[..., :1]], 2).flatten(1)
    labels = torch.full_like(ids, NOTHING)
    labels[:, 2::3] = ids[:, 2::3]
    return ids, labels


# --- cross context
# ---------------------------------------------------------------------


@dataclass(frozen=True)
class CrossItems:
    """Items of one number of facts n.

    Attributes:
        sharer_facts: ``(B, n, 2)`` keys and values that the sharer alone holds.
        receiver_facts: ``(B, 2, 2)`` the receiver's own, of other keys.
        asked: ``(B,)`` which of the sharer's facts the question is about.
    """

    sharer_facts: Tensor
    receiver_facts: Tensor
    asked: Tensor

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, rows: slice | Tensor) -> CrossItems:
        return CrossItems(self.sharer_facts[rows], self.receiver_facts[rows], self.asked[rows])

    @cached_property
    def _fact(self) -> Tensor:
        return self.sharer_facts[torch.arange(len(self)), self.asked]

    @property
    def keys(self) -> Tensor:
        """``(B,)`` the keys asked."""
        return self._fact[:, 0]

    @property
    def answers(self) -> Tensor:
        """``(B,)`` the right values."""
        return self._fact[:, 1]

    @property
    def sharer_ids(self) -> Tensor:
        """``(B, 2n)`` what the sharer reads; also the text that it could send."""
        return self.sharer_facts.flatten(1)

    @property
    def receiver_ids(self) -> Tensor:
        """``(B, 5)`` the receiver's facts and the key."""
        return torch.cat([self.receiver_facts.flatten(1), self.keys[:, None]], 1)

    @property
    def spans(self) -> Spans:
        """One span a fact."""
        n = self.sharer_facts.shape[1]
        return Spans.given([list(range(0, 2 * n + 1, 2))] * len(self))

    def tells(self) -> Tensor:
        """``(B, B)`` bool: whether what item j's sharer holds tells item i's answer."""
        same = (self._fact[:, None, None] == self.sharer_facts[None]).all(-1)
        return same.any(-1)

    def batch(self) -> Batch:
        """As the training loop reads them."""
        return _batch(self.receiver_ids, self.answers, self.sharer_ids, self.spans)

    def own_batch(self) -> Batch:
        """The same questions where the receiver is its own sharer: it summarizes its own facts, as one span."""
        own = self.receiver_facts.flatten(1)
        return _batch(self.receiver_ids, self.answers, own, Spans.given([[0, own.shape[1]]] * len(self)))


def cross_items(items: int, facts: int, generator: torch.Generator, *, keys: int = KEYS) -> CrossItems:
    """Random items; sharer and receiver never hold the same key. The sharer's are of the first ``keys`` keys."""
    theirs = _facts(items, facts, keys, generator)
    free = torch.rand(items, KEYS, generator=generator).scatter(1, theirs[..., 0], 2.0)  # sharer's keys come last
    own = free.argsort(1)[:, :OWN_FACTS]
    values = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUES, own.shape, generator=generator)
    asked = torch.randint(facts, (items,), generator=generator)
    return CrossItems(theirs, torch.stack([own, values], 2), asked)


# --- shared context
# ---------------------------------------------------------------------


@dataclass(frozen=True)
class SharedItems:
    """Questions about the secret table. ``names``, ``keys``, ``answers``: ``(B,)`` token ids."""

    names: Tensor
    keys: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, rows: slice | Tensor) -> SharedItems:
        return SharedItems(self.names[rows], self.keys[rows], self.answers[rows])

    @property
    def ids(self) -> Tensor:
        """``(B, 4)`` name, key, blank, key: what both read. The last token's cache is never edited: so the key
        comes twice."""
        return torch.stack([self.names, self.keys, torch.full_like(self.keys, BLANK), self.keys], 1)

    @property
    def text_ids(self) -> Tensor:
        """``(B, 4)`` the question with the value in its blank: the fact as text."""
        return torch.stack([self.names, self.keys, self.answers, self.keys], 1)

    def tells(self) -> Tensor:
        """``(B, B)`` bool: whether what item j's sharer knows of its question is item i's answer."""
        return self.answers[:, None] == self.answers[None]

    def batch(self) -> Batch:
        """As the training loop reads them."""
        return _batch(self.ids, self.answers, self.ids, None)


class SecretTable:
    """A random value for each pair of a name and a key.

    Attributes:
        everything: all pairs. known: those that an adapter may train on. held_out: the others.
    """

    def __init__(self, generator: torch.Generator) -> None:
        pairs = torch.cartesian_prod(torch.arange(FIRST_NAME, FIRST_NAME + NAMES), torch.arange(KEYS))
        values = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUES, (len(pairs),), generator=generator)
        self.everything = SharedItems(pairs[:, 0], pairs[:, 1], values)
        order = torch.randperm(len(pairs), generator=generator)
        held = int(HELD_OUT * len(pairs))
        self.held_out, self.known = self.everything[order[:held]], self.everything[order[held:]]

    def lines(self, lines: int, generator: torch.Generator, *, asked: bool) -> tuple[Tensor, Tensor]:
        """``<name><key>?<value>``, or ``<name><key>?<key><value>`` if asked; returns as `recall_lines`.

        With the second kind the sharer's own last token reads the value off its cache, as the receiver's is to.
        """
        part = self.everything[torch.randint(len(self.everything), (lines,), generator=generator)]
        ids = torch.cat([part.ids[:, : 4 if asked else 3], part.answers[:, None]], 1)
        labels = torch.full_like(ids, NOTHING)
        labels[:, -1] = ids[:, -1]
        return ids, labels

    def sample(self, items: int, generator: torch.Generator) -> SharedItems:
        """Random ones of those that an adapter may train on."""
        return self.known[torch.randint(len(self.known), (items,), generator=generator)]


# --- both
# ---------------------------------------------------------------------


def others(items: CrossItems | SharedItems, generator: torch.Generator) -> Tensor:
    """``(B,)``: for each item a random other one whose sharer does not tell its answer: the mismatched message."""
    return torch.multinomial((~items.tells()).float(), 1, generator=generator)[:, 0]


def _batch(prompt: Tensor, answers: Tensor, sharer_ids: Tensor, spans: Spans | None) -> Batch:
    response = answers[:, None]
    return Batch(
        ids=tuple(map(str, range(len(prompt)))),
        receiver_ids=prompt,
        receiver_mask=torch.ones_like(prompt),
        response_ids=response,
        response_mask=torch.ones_like(response),
        sharer_ids=sharer_ids,
        sharer_mask=torch.ones_like(sharer_ids),
        spans=spans,
    )
