"""A look inside an adapter or a message: plain numbers, layer by layer, and pictures of them.

What is found comes back as dataclasses of ints, floats, texts and tuples, which ``dataclasses.asdict`` makes JSON of.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter import LatentCacheFlow
from .checkpoint import load_any
from .config import CacheGeometry
from .errors import BackendError, IndexRangeError
from .files import write_whole
from .message import MAX_BYTES, Message
from .sharer import SideOf
from .slots import LatentSlots
from .wire import Layout, decode_with_layout, read_file

__all__ = [
    "AdapterLayer",
    "AdapterReport",
    "HeatMap",
    "MessageLayer",
    "MessageReport",
    "SideLayer",
    "SideReport",
    "SlotReport",
    "SlotsLayer",
    "SlotsReport",
    "SpanReport",
    "adapter_maps",
    "adapter_report",
    "inspect",
    "message_map",
    "message_report",
    "write_png",
]

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class AdapterLayer:
    """One kept layer of an adapter. Norms are Frobenius norms; a gate is open where its logit is above zero."""

    receiver_layer: int
    sharer_layer: int
    key_gate: float
    value_gate: float
    key_open: bool
    value_open: bool
    down_sharer_norm: float
    down_receiver_norm: float
    up_key_norm: float
    up_value_norm: float


@dataclass(frozen=True)
class AdapterReport:
    """An adapter's folder. ``sharer`` and ``receiver``: layers, KV heads and head dim. ``file_bytes``: on the disk."""

    path: str
    kind: str
    sharer: Sizes
    receiver: Sizes
    bottleneck: int
    dtype: str
    parameters: int
    parameter_bytes: int
    file_bytes: int
    open_gates: int
    layers: tuple[AdapterLayer, ...]


@dataclass(frozen=True)
class SlotsLayer:
    """One layer of a slots adapter. Frobenius norms; of queries and embeddings slot by slot."""

    receiver_layer: int
    sharer_layer: int
    query_norms: tuple[float, ...]
    embedding_norms: tuple[float, ...]
    down_norm: float
    up_key_norm: float
    up_value_norm: float


@dataclass(frozen=True)
class SlotsReport:
    """A slots adapter's folder. ``message_bytes``: of one item's latents in bfloat16. Otherwise as `AdapterReport`.

    ``placement``: where its slots stood in training, None where it does not say.
    """

    path: str
    kind: str
    sharer: Sizes
    receiver: Sizes
    bottleneck: int
    slots: int
    dtype: str
    parameters: int
    parameter_bytes: int
    file_bytes: int
    message_bytes: int
    layers: tuple[SlotsLayer, ...]
    placement: str | None = None


@dataclass(frozen=True)
class SideLayer:
    """One layer of a sharer's half. Frobenius norms; of queries one by one, and of embeddings, if there are any."""

    receiver_layer: int
    sharer_layer: int
    query_norms: tuple[float, ...]
    embedding_norms: tuple[float, ...]
    down_norm: float


@dataclass(frozen=True)
class SideReport:
    """A folder of a sharer's half. ``query_names``: of the norms of queries. Otherwise as `AdapterReport`.

    ``slots``: how many, 0 for LCF-X. The digests say which adapter it writes to, and who its messages are by.
    """

    path: str
    kind: str
    sharer: Sizes
    receiver: Sizes
    bottleneck: int
    slots: int
    dtype: str
    parameters: int
    parameter_bytes: int
    file_bytes: int
    adapter_digest: str
    sharer_digest: str
    query_names: tuple[str, ...]
    layers: tuple[SideLayer, ...]


@dataclass(frozen=True)
class SlotReport:
    """What one slot of one item drew on: weights are means over heads and layers, and sum to 1 over the tokens.

    Attributes:
        slot: its number.
        tokens, weights: the sharer's tokens that weigh most, by their place in the sharer's cache (padding counts).
        effective: in how many tokens as much is spread, were all alike: the exponential of the entropy.
    """

    slot: int
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    effective: float


@dataclass(frozen=True)
class MessageLayer:
    """One layer of a message: norms, item by item, of what was sent; None of what was not."""

    receiver_layer: int
    latent_norms: tuple[float, ...] | None
    key_norms: tuple[float, ...] | None
    value_norms: tuple[float, ...] | None


@dataclass(frozen=True)
class SpanReport:
    """What one span weighs in one item's summary: mean over heads, then over layers; and where it weighs most."""

    span: int
    mean_weight: float
    strongest_layer: int
    strongest_weight: float


@dataclass(frozen=True)
class MessageReport:
    """A message's file.

    ``spans_of[b]`` are item b's spans, None for a message that carries no ``span_weights``; ``slots_of[b]`` item b's
    slots, None for one that carries no ``slot_weights``. ``slots``: how many, 0 for LCF-X.
    """

    path: str
    version: int
    keyed: bool
    header_bytes: int
    payload_bytes: int
    stored_as: dict[str, str]
    sharer: Sizes
    receiver: Sizes
    width: int | None
    batch: int
    spans: int
    adapter_digest: str
    sharer_digest: str
    metadata: dict[str, str]
    layers: tuple[MessageLayer, ...]
    spans_of: tuple[tuple[SpanReport, ...], ...] | None
    slots: int = 0
    slots_of: tuple[tuple[SlotReport, ...], ...] | None = None


@dataclass(frozen=True)
class HeatMap:
    """A picture: ``values[row][column]``, a row being a receiver layer, or what ``row_name`` says."""

    title: str
    rows: tuple[int, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    row_name: str = "receiver layer"


Report = AdapterReport | SlotsReport | SideReport | MessageReport


def inspect(
    path: str | os.PathLike[str], *, key: bytes | None = None, max_bytes: int = MAX_BYTES, item: int = 0
) -> tuple[Report, tuple[HeatMap, ...]]:
    """What an adapter's folder or a message's file holds, and the heat maps that show it.

    Args:
        path: a folder is taken for an adapter or a sharer's half, all else for a message.
        key, max_bytes: as in `Message.load`.
        item: which item of a message the heat map of its spans is of.

    Raises:
        CheckpointError, MessageError: not readable as such. IndexRangeError: no such item.
    """
    if Path(path).is_dir():
        adapter = load_any(path)
        if isinstance(adapter, LatentSlots):
            from .inspection_slots import slots_maps, slots_report

            found_slots = slots_report(adapter, path)
            return found_slots, slots_maps(found_slots)
        if isinstance(adapter, SideOf):
            from .inspection_slots import side_maps, side_report

            found_side = side_report(adapter, path)
            return found_side, side_maps(found_side)
        report = adapter_report(path, adapter)
        return report, adapter_maps(report)
    message, layout = decode_with_layout(read_file(path, max_bytes=max_bytes), key=key, max_bytes=max_bytes)
    found = message_report(message, layout, path)
    return found, (message_map(message, item),)


# --- adapters
# ---------------------------------------------------------------------


def adapter_report(path: str | os.PathLike[str], adapter: LatentCacheFlow | None = None) -> AdapterReport:
    """Of an adapter's folder; CheckpointError where it is none. ``adapter``: what it holds, if that is read already."""
    adapter = LatentCacheFlow.from_pretrained(path) if adapter is None else adapter
    config, weights = adapter.config, dict(adapter.named_parameters())
    sharer_channels = 2 * config.sharer.channels
    gates = weights["gate_logit"].tolist()
    columns: tuple[list[Any], ...] = (
        adapter.receiver_layers.tolist(),
        adapter.sharer_layers.tolist(),
        [key for key, _ in gates],
        [value for _, value in gates],
        [key > 0 for key, _ in gates],
        [value > 0 for _, value in gates],
        norms_of(weights["down_weight"][:, :, :sharer_channels]),
        norms_of(weights["down_weight"][:, :, sharer_channels:]),
        norms_of(weights["up_weight"][:, 0]),
        norms_of(weights["up_weight"][:, 1]),
    )
    return AdapterReport(
        path=os.fspath(path),
        kind="LCF-X" if config.cross_context else "LCF",
        sharer=sizes_of(config.sharer),
        receiver=sizes_of(config.receiver),
        bottleneck=config.bottleneck,
        dtype=", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})),
        parameters=adapter.parameter_count(),
        parameter_bytes=sum(weight.nbytes for weight in weights.values()),
        file_bytes=folder_bytes(path),
        open_gates=sum(gate > 0 for pair in gates for gate in pair),
        layers=tuple(AdapterLayer(*row) for row in zip(*columns)),
    )


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """Of the files in a folder, on the disk."""
    return sum(file.stat().st_size for file in Path(path).iterdir() if file.is_file())


def adapter_maps(report: AdapterReport) -> tuple[HeatMap, HeatMap]:
    """Gate logits, and norms of the projections as shares of the largest of their kind."""
    rows = tuple(layer.receiver_layer for layer in report.layers)
    gates = tuple((layer.key_gate, layer.value_gate) for layer in report.layers)
    norms = [
        (layer.down_sharer_norm, layer.down_receiver_norm, layer.up_key_norm, layer.up_value_norm)
        for layer in report.layers
    ]
    largest = [max(column) or 1.0 for column in zip(*norms)]
    shares = tuple(tuple(norm / most for norm, most in zip(row, largest)) for row in norms)
    return (
        HeatMap("gate logits (open above 0)", rows, ("key", "value"), gates),
        HeatMap("norms over the largest", rows, ("down, sharer", "down, receiver", "up, key", "up, value"), shares),
    )


# --- messages
# ---------------------------------------------------------------------


def message_report(message: Message, layout: Layout, path: str | os.PathLike[str]) -> MessageReport:
    """Of a message as it was decoded, and of the bytes that it was decoded from."""
    assert message.sharer is not None and message.receiver is not None and message.origin is not None
    latent, summary, weights = message.latent, message.summary, message.span_weights
    batch = len(message.split())
    columns = (
        message.receiver_layers,
        _norms_of_items(latent, batch),
        _norms_of_items(None if summary is None else summary[:, 0], batch),
        _norms_of_items(None if summary is None else summary[:, 1], batch),
    )
    absent = [None] * len(message.receiver_layers)
    return MessageReport(
        path=os.fspath(path),
        version=layout.version,
        keyed=layout.keyed,
        header_bytes=layout.header,
        payload_bytes=layout.payload,
        stored_as=dict(layout.dtypes),
        sharer=sizes_of(message.sharer),
        receiver=sizes_of(message.receiver),
        width=None if latent is None else int(latent.shape[-1]),
        batch=batch,
        spans=message.spans,
        adapter_digest=message.origin.adapter,
        sharer_digest=message.origin.sharer,
        metadata=dict(message.metadata),
        layers=tuple(MessageLayer(*row) for row in zip(*(absent if c is None else c for c in columns))),
        spans_of=None if weights is None else tuple(_spans(message, item) for item in range(batch)),
        slots=message.slots,
        slots_of=_slots_of(message, batch),
    )


def _slots_of(message: Message, batch: int) -> tuple[tuple[SlotReport, ...], ...] | None:
    if message.slot_weights is None:
        return None
    from .inspection_slots import slot_reports

    return tuple(slot_reports(message, item) for item in range(batch))


def _spans(message: Message, item: int) -> tuple[SpanReport, ...]:
    assert message.span_weights is not None
    weights = message.span_weights[:, item].float().mean(1)  # (L, P)
    strongest, rows = weights.max(0)
    return tuple(
        SpanReport(span, mean, message.receiver_layers[row], most)
        for span, (mean, row, most) in enumerate(zip(weights.mean(0).tolist(), rows.tolist(), strongest.tolist()))
    )


def message_map(message: Message, item: int = 0) -> HeatMap:
    """What each span weighs in each layer, for one item, mean over heads; without weights, norms of every item.

    Of slots: what each token weighs in each slot, mean over heads and layers.
    """
    batch = len(message.split())
    if type(item) is not int or not 0 <= item < batch:
        raise IndexRangeError("item", expected=f"an item in [0, {batch})", got=repr(item))
    if message.slot_weights is not None:
        from .inspection_slots import slots_map

        return slots_map(message, item)
    if message.span_weights is not None:
        values = message.span_weights[:, item].float().mean(1)
        title, columns = f"attention weight of each span, item {item}", [str(span) for span in range(values.shape[1])]
    else:
        sent = message.latent if message.latent is not None else message.tensors["summary"].flatten(3).movedim(1, 2)
        values = sent.float().flatten(2).norm(dim=-1)
        name = "latent" if message.latent is not None else "summary"
        title, columns = f"norm of the {name} of each item", [str(one) for one in range(batch)]
    rows = tuple(tuple(row) for row in values.tolist())
    return HeatMap(title, message.receiver_layers, tuple(columns), rows)


def _norms_of_items(tensor: Tensor | None, batch: int) -> list[tuple[float, ...]] | None:
    """Of ``(L, B, ...)``, a tuple of B norms a layer."""
    if tensor is None:
        return None
    return [tuple(row) for row in tensor.float().reshape(tensor.shape[0], batch, -1).norm(dim=-1).tolist()]


def norms_of(tensor: Tensor) -> list[float]:
    """Frobenius norm of each layer."""
    norms: list[float] = tensor.detach().float().flatten(1).norm(dim=1).tolist()
    return norms


def sizes_of(geometry: CacheGeometry) -> Sizes:
    return geometry.layers, geometry.kv_heads, geometry.head_dim


# --- pictures
# ---------------------------------------------------------------------


def write_png(maps: Sequence[HeatMap], path: str | os.PathLike[str]) -> None:
    """The heat maps side by side, as a PNG file.

    Raises:
        BackendError: matplotlib is not installed. OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        expected = "matplotlib, which pip install 'lcf-fast[plot]' brings"
        raise BackendError("plot", expected=expected, got="an environment without it") from None
    # Not through pyplot, which would look for a screen and keep every figure.
    widths = [min(max(3.0, 0.3 * len(heat.columns)), 20.0) for heat in maps]
    tallest = max(len(heat.rows) for heat in maps)
    figure = Figure(figsize=(sum(widths) + 1.0, min(max(3.0, 0.22 * tallest + 1.2), 40.0)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, heat in zip(figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0], maps):
        image = axes.imshow(heat.values, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=axes)
        axes.set_title(heat.title, fontsize=9)
        axes.set_ylabel(heat.row_name)
        # Not more labels than can be read.
        for axis, labels, most in ((axes.yaxis, heat.rows, 40), (axes.xaxis, heat.columns, 40)):
            every = max(1, -(-len(labels) // most))
            axis.set_ticks(range(0, len(labels), every), [str(label) for label in labels[::every]], fontsize=7)
        if max(map(len, heat.columns)) > 4:
            axes.tick_params(axis="x", rotation=90)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(Path(path), picture.getvalue())
