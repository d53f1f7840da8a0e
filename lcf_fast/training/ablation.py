"""Ranking an adapter's layers by the receiver's loss on the response (spec, section 6)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapter import LatentCacheFlow
from ..errors import GeometryError
from ..pruning import PruningReport, audit_gates, judged, live_layers
from ..reading.data_errors import DataError
from .step import Prefiller, TrainingStep

if TYPE_CHECKING:
    from .batches import Batch

__all__ = ["rank_layers_by_loss"]


@torch.no_grad()
def rank_layers_by_loss(step: TrainingStep, prefiller: Prefiller, batches: Iterable[Batch]) -> PruningReport:
    """As `lcf_fast.pruning.rank_layers` with the mean cross-entropy a response token, in nats, as its metric.

    Batch by batch: one prefill of both models and one edit serve all ablations of a batch, since a projector reads the
    frozen caches alone, so the edit without a layer is the whole edit with the receiver's own cache in that layer. An
    ablation costs one pass of the receiver over the response; at any time one batch's caches are held, twice where
    they are edited.

    Args:
        step: of the adapter, which is in eval mode while this runs.
        prefiller: where caches come from.
        batches: examples that the adapter was not trained on.

    Raises:
        PruningError: no layer has an open gate; a loss that is not finite. DataError: no batch. GeometryError: slots,
            of which each layer has as many.
    """
    adapter = step.adapter
    if not isinstance(adapter, LatentCacheFlow):
        raise GeometryError("step", expected="an adapter whose layers can be left out", got="slots")
    report = audit_gates(adapter)
    live = live_layers(report)
    sums = torch.zeros(2 + len(live), dtype=torch.float64, device="cpu")
    examples = tokens = 0
    training = adapter.training
    adapter.eval()
    try:
        for batch in batches:
            caches = prefiller(batch)
            edited = list(step.edit(batch, caches))
            losses: list[Tensor] = [step.loss(batch, edited), step.loss(batch, caches.receiver)]
            for layer in live:
                without = [*edited[:layer], caches.receiver[layer], *edited[layer + 1 :]]
                losses.append(step.loss(batch, without))
            sums += torch.stack(losses).double().cpu()
            examples, tokens = examples + len(batch.ids), tokens + int(batch.response_mask.sum())
    finally:
        adapter.train(training)
    if not examples:
        raise DataError("batches", expected="one or more", got="none")
    whole, alone, *without_each = (sums / tokens).tolist()
    report = judged(report, "loss", whole, alone, dict(zip(live, without_each)), higher_is_better=False)
    return replace(report, examples=examples, response_tokens=tokens)
