"""The methods that `slot_study` compares: LCF, LCF-X, slots, and slots with one thing changed.

A method is named by a key: ``lcf``, ``lcf_x``, ``slots_8``, or ``slots_8_prefix`` for a variant. What a variant
changes is changed here, at training, and needs nothing of the package beside what it has.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..adapter import LatentCacheFlow
from ..caches import Pair, cache_argument
from ..errors import GeometryError
from ..message import Message
from ..reading.prefill import positions_of
from ..slots import LatentSlots
from ..training.batches import Batch
from .channels import CrossChannels, SlotsChannels, go_on, read
from .jobs import Watch
from .lessons import Stage, make_adapter, make_slots_adapter, train_adapter
from .tasks import OWN_FACTS, CrossItems, cross_items

__all__ = ["METHODS", "VARIANTS", "Method", "method_of"]

#: Of the study's table.
METHODS = ("lcf", "lcf_x", "slots_1", "slots_2", "slots_4", "slots_8", "slots_16", "slots_1_per_span")
#: What they change, as tables say it.
VARIANTS = {
    "per_span": "for each fact by itself",
    "dropout": "any number sent",
    "shared": "one query for all heads",
    "one_block": "one FFN block",
    "prefix": "as a prefix",
    "guard": "guard loss",
}
#: Of those that are another configuration, what it has changed.
_CONFIG_OF: dict[str, dict[str, Any]] = {"one_block": {"ffn_blocks": 1}, "per_span": {"per_span": True}}
GUARD_WEIGHT = 0.5
#: Tokens of a fact: a key and its value.
FACT = 2
#: Positions of the receiver's own facts, the only ones that LCF can edit.
OWN = FACT * OWN_FACTS


@dataclass(frozen=True)
class Method:
    """One of `METHODS`, or a variant.

    Attributes:
        key: as the command and the folder have it.
        slots: k; of LCF and LCF-X 0.
        variant: a key of `VARIANTS`, or nothing.
    """

    key: str
    slots: int = 0
    variant: str = ""

    @property
    def name(self) -> str:
        """As tables call it."""
        if not self.slots:
            return {"lcf": "LCF, position by position", "lcf_x": "LCF-X"}[self.key]
        changed = f", {VARIANTS[self.variant]}" if self.variant else ""
        return f"{self.slots} slot{'s' if self.slots > 1 else ''}{changed}"

    def make(self, model: Any, seed: int) -> LatentCacheFlow | LatentSlots:
        """A fresh adapter between a model and itself."""
        if not self.slots:
            return make_adapter(model, model, cross_context=self.key == "lcf_x", seed=seed)
        changes = _CONFIG_OF.get(self.variant, {})
        adapter = make_slots_adapter(model, model, slots=self.slots, seed=seed, **changes)
        if self.variant == "shared":
            _share_queries(adapter)
        return adapter

    def train(self, adapter: Any, model: Any, steps: int, most_facts: int, *, seed: int, watch: Watch) -> None:
        """In place, on one to ``most_facts`` facts at a time."""

        def sample(items: int, generator: torch.Generator) -> Batch:
            facts = int(torch.randint(1, most_facts + 1, (), generator=generator))
            drawn = cross_items(items, facts, generator)
            return side_by_side(drawn) if self.key == "lcf" else drawn.batch()

        train_adapter(
            adapter,
            model,
            model,
            [(Stage(steps), sample)],
            seed=seed,
            watch=watch,
            slot_dropout=self.variant == "dropout",
            placement="prefix" if self.variant == "prefix" else "append",
            guard_weight=GUARD_WEIGHT if self.variant == "guard" else 0.0,
        )

    def parameters(self, adapter: LatentCacheFlow | LatentSlots) -> int:
        """That the method has: what is tied counts once."""
        count = adapter.parameter_count()
        if self.variant == "shared":
            query = adapter.get_parameter("slot_query")
            count -= query.numel() - query[:, :, 0].numel()
        return count

    def channels(self, adapter: Any, model: Any) -> CrossChannels:
        """What passes between the model and itself."""
        kind = CrossChannels if self.key == "lcf_x" else SlotsChannels
        if self.key == "lcf":
            kind = SideBySide
        elif self.variant == "prefix":
            kind = PrefixChannels
        return kind(adapter, model, model)


def method_of(key: str) -> Method:
    """The method of a key.

    Raises:
        GeometryError: no such method.
    """
    if key in ("lcf", "lcf_x"):
        return Method(key)
    found = re.fullmatch(r"slots_([1-9]\d?)(?:_(\w+))?", key)
    slots, variant = (int(found[1]), found[2] or "") if found else (0, "")
    fits = not variant or variant in VARIANTS
    if not 1 <= slots <= 64 or not fits:
        expected = f"lcf, lcf_x or slots_K, K from 1 to 64, or slots_K_ and one of {', '.join(VARIANTS)}"
        raise GeometryError("--methods", expected=expected, got=repr(key))
    return Method(key, slots, variant)


# --- LCF, where it does not belong
# ---------------------------------------------------------------------


def _index(items: int, facts: int) -> Tensor:
    """``(B, OWN + 1)``: the sharer's position for each of the receiver's: the same one, as far as there is one."""
    at = torch.arange(OWN + 1)
    return at.masked_fill(at >= min(FACT * facts, OWN), -1).expand(items, -1)


def side_by_side(items: CrossItems) -> Batch:
    """As the training loop reads them: what the sharer read lies beside what the receiver read, token by token."""
    batch = items.batch()
    index = _index(len(items), items.sharer_facts.shape[1])
    return replace(batch, spans=None, sharer_index=index)


class SideBySide(CrossChannels):
    """LCF on two texts that differ: position i of the receiver's facts is edited by position i of the sharer's.

    It is not made for that. Of a longer text than the receiver's own, the rest cannot be said.
    """

    def message(self, sharer_cache: list[Pair], items: CrossItems) -> bytes:
        """The positions of the cache that are read, in bfloat16."""
        told = torch.stack([torch.stack([part[:, :, :OWN] for part in pair]) for pair in sharer_cache])
        return save({"cache": told.to(torch.bfloat16)})

    def answer(self, prompts: Tensor, sent: bytes) -> Tensor:
        """As `CrossChannels.answer`."""
        told = load(sent)["cache"].float()
        index = _index(len(prompts), told.shape[-2] // FACT)[:, :-1]
        own = read(self.receiver, prompts[:, :-1])
        edited = self.adapter.fuse([(key, value) for key, value in told], own, sharer_index=index)
        return go_on(self.receiver, edited, prompts)

    def nothing(self, sent: bytes) -> bytes:
        """As `CrossChannels.nothing`."""
        return save({name: torch.zeros_like(part) for name, part in load(sent).items()})


# --- variants of slots
# ---------------------------------------------------------------------


def _share_queries(adapter: LatentSlots) -> None:
    """From here on all heads have the same queries: they begin alike, and get the same gradients."""
    query = adapter.get_parameter("slot_query")
    heads = query.shape[2]
    with torch.no_grad():
        query.copy_(query[:, :, :1].expand_as(query).clone())
    # Of the norm that one gradient for all of them has.
    query.register_hook(lambda grad: grad.sum(2, keepdim=True).expand_as(grad) / math.sqrt(heads))


class PrefixChannels(SlotsChannels):
    """Slots before the receiver's prompt, all of which is read behind them."""

    def answer(self, prompts: Tensor, sent: bytes) -> Tensor:
        """As `CrossChannels.answer`."""
        message = Message.from_bytes(sent).to(torch.float32)
        cache = self.adapter.prefix(self.receiver, message)
        mask = torch.ones(len(prompts), message.slots + prompts.shape[1], dtype=torch.long)
        logits: Tensor = self.receiver(
            input_ids=prompts,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, message.slots :],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(self.receiver, cache),
        ).logits
        return logits[:, -1].argmax(-1)
