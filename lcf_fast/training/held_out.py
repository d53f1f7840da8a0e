"""The loss on examples that were held out of training, with the adapter and without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .step import Prefiller, TrainingStep

if TYPE_CHECKING:
    from .batches import Batch

__all__ = ["HeldOutLoss", "held_out_loss"]


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy a response token, in nats.

    Attributes:
        edited: of the receiver, its cache edited by the adapter as it is used: hard gates, no dropout.
        alone: of the receiver on its own.
    """

    examples: int
    response_tokens: int
    edited: float
    alone: float

    def summary(self) -> str:
        return (
            f"{self.examples:,} examples held out, {self.response_tokens:,} response tokens:"
            f" loss {self.edited:.4f} with the adapter, {self.alone:.4f} without it"
        )


@torch.no_grad()
def held_out_loss(step: TrainingStep, prefiller: Prefiller, batches: Iterable[Batch]) -> HeldOutLoss:
    """Over all of ``batches``; leaves the adapter in the mode that it was in, after an error as well."""
    training = step.adapter.training
    step.adapter.eval()
    edited = alone = torch.zeros((), dtype=torch.float64, device="cpu")
    examples = tokens = 0
    try:
        for batch in batches:
            caches = prefiller(batch)
            edited = edited + step.loss(batch, step.edit(batch, caches)).double().cpu()
            alone = alone + step.loss(batch, caches.receiver).double().cpu()
            examples, tokens = examples + len(batch.ids), tokens + int(batch.response_mask.sum())
    finally:
        step.adapter.train(training)
    return HeldOutLoss(examples, tokens, edited.item() / max(tokens, 1), alone.item() / max(tokens, 1))
