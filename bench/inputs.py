"""The operands of every case, cut from the caches that the models made, and the adapter's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, Message, PartialPool, Spans, reference
from lcf_fast.adapter import parameter_shapes
from lcf_fast.architectures import SEED
from lcf_fast.slots import slot_parameter_shapes
from lcf_fast.spans import windows

from .cases import MESSAGES, PIECES, SLOTS, Group, kept_layers
from .rope import Rope, make_rope

Pair = tuple[Tensor, Tensor]
Adapter = TypeVar("Adapter", LatentCacheFlow, LatentSlots)
#: Tokens from one overlapping window's start to the next one's: half a window.
WINDOW_STEP = 100


@dataclass(frozen=True)
class Caches:
    """What the models made, one ``(key, value)`` a layer, at the largest sizes asked for.

    Attributes:
        sharer: of the prompt, by the sharer (LCF).
        receiver: of the prompt, by the receiver.
        context: of another text, by the receiver's model (LCF-X reads one model on both sides).
        spans: offsets of the context's paragraphs.
    """

    sharer: list[Pair]
    receiver: list[Pair]
    context: list[Pair]
    spans: list[int]

    def cut(self, tokens: int, context: int, batch: int = 1) -> Caches:
        """The caches of the first positions: those of a shorter text, since the models are causal.

        Further rows of a batch are the positions that follow, as many as there are, and then the first again; the
        context's spans are the first row's in all of them.
        """
        spans = [offset for offset in self.spans if offset < context] + [context]
        return Caches(
            _rows(self.sharer, tokens, batch), _rows(self.receiver, tokens, batch), _rows(self.context, context, batch),
            spans,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Caches:
        """The same numbers in another dtype; themselves where they have it."""

        def cast(layers: list[Pair]) -> list[Pair]:
            return [(key.to(dtype), value.to(dtype)) for key, value in layers]

        return Caches(cast(self.sharer), cast(self.receiver), cast(self.context), self.spans)

    def last(self, layers: int) -> Caches:
        """Of the last layers alone."""
        return Caches(self.sharer[-layers:], self.receiver[-layers:], self.context[-layers:], self.spans)


def _rows(layers: Sequence[Pair], tokens: int, batch: int) -> list[Pair]:
    pieces = layers[0][0].shape[2] // tokens
    assert pieces, "the text is shorter than that"

    def rows(half: Tensor) -> Tensor:
        starts = [row % pieces * tokens for row in range(batch)]
        return torch.cat([half[:, :, start : start + tokens] for start in starts])

    return [(rows(key), rows(value)) for key, value in layers]


@dataclass
class Operands:
    """One set of inputs to one group of cases. Tensors of all layers; the properties give the kept ones, in order.

    Attributes:
        config: of the adapter.
        kept: receiver layers that have a projector.
        sharer_layers, receiver_layers: whole caches.
        weights: the adapter's stacked parameters over the kept layers.
        spans: ``(B, P+1)``, or ``(B, T, P+1)`` where they overlap; int32, where the caches are; ``spans_host`` the same
            on the CPU, for loops in Python.
        message: ``(L, B, d)``, LCF-X; of slots ``(L, B, k, d)``.
        summary: ``(L, 2, B, Hs, Ds)``, the ``K*, V*`` that it was folded from.
        latent: ``(B, N, d)``, for the injection of one layer.
        row: the kept layer that the one-layer cases take.
        rope: how the receiver rotates keys, and the positions that slots come to: those behind its cache.
    """

    config: LCFConfig
    kept: tuple[int, ...]
    sharer_layers: list[Pair]
    receiver_layers: list[Pair]
    weights: dict[str, Tensor]
    spans: Tensor
    spans_host: Tensor
    message: Tensor | None = None
    summary: Tensor | None = None
    latent: Tensor | None = None
    row: int = 0
    rope: Rope | None = None

    @cached_property
    def sharer(self) -> list[Pair]:
        return [self.sharer_layers[self.config.sharer_layers[t]] for t in self.kept]

    @cached_property
    def receiver(self) -> list[Pair]:
        return [self.receiver_layers[t] for t in self.kept]

    @cached_property
    def layer_weights(self) -> list[dict[str, Tensor]]:
        """A layer's slice of the weights, for each kept layer.

        The two gate logits are copied: torch.compile would copy them in every call, since their slices are not aligned.
        """
        return [
            {name: part[row].clone() if name == "gate_logit" else part[row] for name, part in self.weights.items()}
            for row in range(len(self.kept))
        ]

    @cached_property
    def adapter(self) -> LatentCacheFlow:
        """A module that holds these very weights."""
        return self._filled(LatentCacheFlow(self.config, keep_layers=self.kept, device="meta"))

    @cached_property
    def slots_adapter(self) -> LatentSlots:
        """The same of slots; it has every layer."""
        return self._filled(LatentSlots(self.config, device="meta"))

    def _filled(self, adapter: Adapter) -> Adapter:
        index = {
            "receiver_layers": torch.tensor(self.kept),
            "sharer_layers": torch.tensor([self.config.sharer_layers[t] for t in self.kept]),
        }
        device = self.spans.device
        adapter.load_state_dict({**self.weights, **{k: v.to(device) for k, v in index.items()}}, assign=True)
        return adapter.eval().requires_grad_(False)

    @cached_property
    def sharer_cache(self) -> Any:
        return dynamic_cache(self.sharer_layers)

    @cached_property
    def receiver_cache(self) -> Any:
        return dynamic_cache(self.receiver_layers)

    @cached_property
    def sent(self) -> Message:
        assert self.message is not None
        return Message(self.message, self.kept, 1 if self.config.slots else self.spans.shape[-1] - 1)

    @cached_property
    def sent_by_several(self) -> list[Message]:
        """Messages that add up to ``message``: each holds an equal share of all but the bias."""
        assert self.message is not None
        bias = self.weights["down_bias"][:, None].to(self.message.dtype)
        return [
            Message(bias + (self.message - bias) / MESSAGES, self.kept, self.spans.shape[-1] - 1)
            for _ in range(MESSAGES)
        ]

    @cached_property
    def context_spans(self) -> Spans:
        """``spans`` as users hand them over."""
        return Spans(self.spans_host if self.spans_host.dim() == 3 else self.spans_host[:, None])

    @cached_property
    def pieces(self) -> list[tuple[list[Pair], Spans]]:
        """The context in `PIECES` pieces that end within spans: views of the sharer's cache, and the spans as cut."""
        length = self.sharer_layers[0][0].shape[2]
        ends = set(self.spans_host.flatten().tolist())
        cuts = [length * i // PIECES for i in range(1, PIECES)]
        cuts = [0, *(min(cut + (cut in ends), length) for cut in cuts), length]
        return [
            (
                [(key[:, :, start:stop], value[:, :, start:stop]) for key, value in self.sharer_layers],
                self.context_spans.piece(start, stop),
            )
            for start, stop in zip(cuts, cuts[1:])
        ]

    @cached_property
    def parts(self) -> list[PartialPool]:
        """The pieces' partial pools, made when first asked for."""
        return [self.adapter.pool(cache, spans) for cache, spans in self.pieces]

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """The same with every float tensor changed; what was one tensor stays one tensor."""
        done: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = change(tensor) if tensor.is_floating_point() else tensor
            return done[id(tensor)]

        return Operands(**{field.name: _apply(once, getattr(self, field.name)) for field in fields(self)})

    def clone(self) -> Operands:
        return self.map(Tensor.clone)

    def last(self, count: int) -> Operands:
        """Of the last positions alone, in every row: of what is computed position by position, a part."""

        def cut(layers: list[Pair]) -> list[Pair]:
            return [(key[:, :, -count:], value[:, :, -count:]) for key, value in layers]

        sharer = self.sharer_layers if self.config.cross_context else cut(self.sharer_layers)
        return replace(self, sharer_layers=sharer, receiver_layers=cut(self.receiver_layers))

    def double(self) -> Operands:
        return self.map(Tensor.double)

    def rotated(self, count: int, *, one_layer: bool, reads_caches: bool = True) -> list[Operands]:
        """``count`` sets (or a few more) that share no memory, this one the first; of one layer, each has its own.

        Args:
            reads_caches: False: the caches are shared. Of what reads little, it takes many sets to pass through a GPU's
                L2, and its memory would not hold as many caches. Who reads the caches all the same passes through it
                with one of them, but on a chip whose L2 is large, where it may look too fast.
        """
        if not reads_caches:
            own = ({name: tensor.clone() for name, tensor in self.weights.items()} for _ in range(count - 1))
            return [self, *(replace(self, weights=weights) for weights in own)]
        if not one_layer:
            return [self, *(self.clone() for _ in range(count - 1))]
        rows = range(len(self.kept))
        whole = [self, *(self.clone() for _ in range(-(-count // len(rows)) - 1))]
        for one in whole:
            _ = one.layer_weights, one.sharer, one.receiver  # made once, before the copies below share them
        first = sorted(rows, key=lambda row: row != self.row)
        return [_at_row(one, row) for one in whole for row in first][: max(count, 1)]


def _at_row(operands: Operands, row: int) -> Operands:
    other = copy(operands)
    other.row = row
    return other


def _apply(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: change(tensor) for name, tensor in value.items()}
    if isinstance(value, list):
        return [(change(key), change(other)) for key, other in value]
    return value


def dynamic_cache(layers: Sequence[Pair]) -> Any:
    """A transformers DynamicCache that holds these tensors; plain pairs where transformers is missing."""
    try:
        from transformers import DynamicCache
    except ImportError:
        return list(layers)
    cache = DynamicCache()
    for i, (key, value) in enumerate(layers):
        cache.update(key[:, :, :0], value[:, :, :0], i)  # makes the layer
        cache.layers[i].keys, cache.layers[i].values = key, value
    return cache


def geometry_of(layers: Sequence[Pair]) -> CacheGeometry:
    """The geometry of a cache that lies here."""
    key = layers[0][0]
    return CacheGeometry(len(layers), key.shape[1], key.shape[3])


def random_caches(
    sharer: CacheGeometry,
    receiver: CacheGeometry,
    *,
    batch: int,
    tokens: int,
    context: int,
    spans: list[int],
    device: torch.device,
    dtype: torch.dtype,
    light: bool = False,
) -> Caches:
    """Numbers of order 1 in the place of what models made.

    Args:
        light: one layer's memory serves all of a cache, where only what is compiled matters.
    """

    def cache(geometry: CacheGeometry, length: int) -> list[Pair]:
        shape = batch, geometry.kv_heads, length, geometry.head_dim

        def pair() -> Pair:
            return torch.randn(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype)

        return [pair()] * geometry.layers if light else [pair() for _ in range(geometry.layers)]

    return Caches(cache(sharer, tokens), cache(receiver, tokens), cache(receiver, context), spans)


def make_config(group: Group, sharer: CacheGeometry, receiver: CacheGeometry, width: int) -> LCFConfig:
    """LCF from sharer to receiver; LCF-X and slots from the receiver's model to itself."""
    return LCFConfig(
        receiver if group.crossing else sharer,
        receiver,
        bottleneck=width,
        cross_context=group.crossing,
        gate_init=1.0,
        slots=SLOTS if group.slots else 0,
    )


def make_weights(config: LCFConfig, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random parameters of all layers, fixed seed, drawn on the CPU; activations come out of order 1, gates open."""
    generator = torch.Generator().manual_seed(SEED + config.bottleneck)
    weights = {}
    shapes = slot_parameter_shapes(config) if config.slots else parameter_shapes(config, config.receiver.layers)
    for name, shape in shapes.items():
        if name == "gate_logit":
            tensor = torch.full(shape, cast(float, config.gate_init))
        elif name == "norm_weight":
            tensor = torch.empty(shape).uniform_(0.8, 1.2, generator=generator)
        elif name.endswith(("_query", "_embedding")):
            # Scores of order 1: spans are not simply averaged. Embeddings: as large as what they are added to.
            tensor = torch.randn(shape, generator=generator)
        else:
            # A linear's weight: unit variance out. A bias: the scale of one input.
            fan_in = shape[-1] if name.endswith("weight") else config.in_channels
            bound = (3 / fan_in) ** 0.5
            tensor = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        weights[name] = tensor.to(device, dtype)
    return weights


def _half_overlapping(length: int) -> Tensor:
    """Offsets ``(1, T, P+1)`` of windows of 200 tokens that begin every 100; of shorter ones in a short context."""
    step = min(WINDOW_STEP, max(1, length // 4))
    spans = windows(length, 2 * step, step)
    assert spans.is_span is None  # each window ends where the next one but one begins
    return spans.offsets


def make_operands(
    group: Group,
    caches: Caches,
    config: LCFConfig,
    weights: dict[str, Tensor],
    *,
    kept: tuple[int, ...] | None = None,
) -> Operands:
    """A group's inputs from caches already cut to size and the weights of all layers.

    Args:
        kept: receiver layers; the group's own if not given.
    """
    kept = kept_layers(group, config.receiver) if kept is None else kept
    if len(kept) < config.receiver.layers:
        rows = torch.tensor(kept, device=weights["down_weight"].device)
        weights = {name: stacked.index_select(0, rows) for name, stacked in weights.items()}
    device = caches.receiver[0][0].device
    batch, _, length, _ = caches.context[0][0].shape
    host = torch.tensor([caches.spans] * batch, dtype=torch.int32)
    if group.name == "windows":
        host = _half_overlapping(length).repeat(batch, 1, 1)
    operands = Operands(
        config,
        kept,
        caches.context if group.crossing else caches.sharer,
        caches.receiver,
        weights,
        spans=host.to(device),
        spans_host=host,
        row=len(kept) // 2,
    )
    if group.name in ("slots_deliver", "slots_append", "slots"):
        operands.rope = make_rope(config.receiver, caches.receiver[0][0].shape[2], config.slots, device)
    with torch.no_grad():
        if group.name in ("slots_deliver", "slots_append"):
            operands.message = reference.summarize_slots_layers(operands.sharer, weights)
        if group.name == "inject":
            operands.message, operands.summary = reference.summarize_layers(operands.sharer, weights, host)
        if group.name == "injection":
            row = operands.row
            operands.latent = reference.joint_projection(
                *operands.sharer[row], *operands.receiver[row], operands.layer_weights[row]
            )
    return operands
