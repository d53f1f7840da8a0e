"""A look inside a slots adapter or a sharer's half, and at what each slot of a message drew on."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from .inspection import (
    HeatMap,
    SideLayer,
    SideReport,
    SlotReport,
    SlotsLayer,
    SlotsReport,
    folder_bytes,
    norms_of,
    sizes_of,
)
from .message import Message
from .sharer import SideOf
from .slots import LatentSlots

__all__ = ["side_maps", "side_report", "slot_reports", "slots_map", "slots_maps", "slots_report"]

#: Tokens that are named of a slot.
MOST_TOKENS = 5


def slots_report(adapter: LatentSlots, path: str | os.PathLike[str]) -> SlotsReport:
    """Of the adapter that a folder holds."""
    config, weights = adapter.config, dict(adapter.named_parameters())
    columns: tuple[list[Any], ...] = (
        adapter.receiver_layers.tolist(),
        adapter.sharer_layers.tolist(),
        _of_slots(weights["slot_query"]),
        _of_slots(weights["slot_embedding"]),
        norms_of(weights["down_weight"]),
        norms_of(weights["up_weight"][:, 0]),
        norms_of(weights["up_weight"][:, 1]),
    )
    return SlotsReport(
        path=os.fspath(path),
        kind="slots",
        sharer=sizes_of(config.sharer),
        receiver=sizes_of(config.receiver),
        bottleneck=config.bottleneck,
        slots=config.slots,
        dtype=", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})),
        parameters=adapter.parameter_count(),
        parameter_bytes=sum(weight.nbytes for weight in weights.values()),
        file_bytes=folder_bytes(path),
        message_bytes=2 * config.receiver.layers * config.slots * config.bottleneck,
        layers=tuple(SlotsLayer(*row) for row in zip(*columns)),
        placement=adapter.trained_placement,
    )


def side_report(side: SideOf, path: str | os.PathLike[str]) -> SideReport:
    """Of the sharer's half that a folder holds, of slots or of LCF-X."""
    weights = dict(side.named_parameters())
    if "slot_query" in weights:
        queries, embeddings = _of_slots(weights["slot_query"]), _of_slots(weights["slot_embedding"])
        slots, names = len(queries[0]), tuple(map(str, range(len(queries[0]))))
    else:
        queries = list(zip(norms_of(weights["span_query"]), norms_of(weights["global_query"])))
        slots, names, embeddings = 0, ("span", "global"), [()] * len(queries)
    columns: tuple[list[Any], ...] = (
        side.receiver_layers.tolist(),
        side.sharer_layers.tolist(),
        queries,
        embeddings,
        norms_of(weights["down_weight"]),
    )
    return SideReport(
        path=os.fspath(path),
        kind="slots" if slots else "LCF-X",
        sharer=sizes_of(side.sharer_geometry),
        receiver=sizes_of(side.receiver_geometry),
        bottleneck=weights["down_weight"].shape[1],
        slots=slots,
        dtype=", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})),
        parameters=sum(weight.numel() for weight in weights.values()),
        parameter_bytes=sum(weight.nbytes for weight in weights.values()),
        file_bytes=folder_bytes(path),
        adapter_digest=side.origin.adapter,
        sharer_digest=side.origin.sharer,
        query_names=names,
        layers=tuple(SideLayer(*row) for row in zip(*columns)),
    )


def side_maps(report: SideReport) -> tuple[HeatMap, ...]:
    """Norms of each query, and of each slot's embedding, layer by layer."""
    rows = tuple(layer.receiver_layer for layer in report.layers)
    of_queries = tuple(layer.query_norms for layer in report.layers)
    maps = (HeatMap("norm of each query", rows, report.query_names, of_queries),)
    if not report.slots:
        return maps
    of_embeddings = tuple(layer.embedding_norms for layer in report.layers)
    return *maps, HeatMap("norm of each slot's embedding", rows, report.query_names, of_embeddings)


def _of_slots(tensor: Tensor) -> list[tuple[float, ...]]:
    """Norms ``(L, k)`` of ``(L, k, ...)``."""
    return [tuple(row) for row in tensor.detach().float().flatten(2).norm(dim=2).tolist()]


def slots_maps(report: SlotsReport) -> tuple[HeatMap, HeatMap]:
    """Norms of each slot's query and embedding, layer by layer."""
    rows = tuple(layer.receiver_layer for layer in report.layers)
    slots = tuple(map(str, range(report.slots)))
    return (
        HeatMap("norm of each slot's query", rows, slots, tuple(layer.query_norms for layer in report.layers)),
        HeatMap("norm of each slot's embedding", rows, slots, tuple(layer.embedding_norms for layer in report.layers)),
    )


def slot_reports(message: Message, item: int) -> tuple[SlotReport, ...]:
    """What each slot of an item drew on; the message carries ``slot_weights``."""
    shares = _shares(message, item)
    top, tokens = shares.topk(min(MOST_TOKENS, shares.shape[1]), -1)
    effective = (-shares.xlogy(shares).sum(-1)).exp()
    return tuple(
        SlotReport(slot, tuple(which), tuple(weights), spread)
        for slot, (which, weights, spread) in enumerate(zip(tokens.tolist(), top.tolist(), effective.tolist()))
    )


def slots_map(message: Message, item: int) -> HeatMap:
    """Slots by tokens: the weights that `slot_reports` names the largest of."""
    shares = _shares(message, item)
    columns, rows = tuple(map(str, range(shares.shape[1]))), tuple(range(shares.shape[0]))
    title = f"attention weight of each token in each slot, item {item}"
    return HeatMap(title, rows, columns, tuple(map(tuple, shares.tolist())), "slot")


def _shares(message: Message, item: int) -> Tensor:
    """``(k, N)``: means over layers and heads."""
    assert message.slot_weights is not None
    return message.slot_weights[:, item].float().mean((0, 1))
