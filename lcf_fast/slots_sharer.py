"""The sharer's half of slots: k learned queries a layer pool the sharer's cache, and fold it to a message.

`SummarizesSlots` is what an adapter and a `SlotsSharerSide` have in common: pool at once, or piece by piece, or on
several devices. A `SlotsSharerSide` is that half alone, for the process of the sharer, or for one more sharer of a
receiver.

**Several sharers, one receiver.** Their slots stand side by side (`LatentSlots.join`), so that each sharer model has a
half of its own, bias and number of slots included, and the receiver keeps one adapter. To add a sharer to a trained
adapter, make ``side = SlotsSharerSide.for_receiver(adapter, geometry)``, freeze the adapter, and train ``side`` with
the usual loss through ``adapter.append(receiver, cache, side.summarize(...))``: gradients reach it through the message.
Then save it, and let the receiver take its messages with ``adapter.accept_sharer(side)``, which is saved with the
adapter. `LatentSlots.for_sharer` makes the same half within an adapter, as `lcf_fast.training.Trainer` takes it; the
``sharer_side()`` of that one is what the sharer's process needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import eager_slots
from . import ops_slots as ops
from .caches import Pair, check_pairs
from .checks import plain_parameters
from .config import CacheGeometry, check_geometry, check_positive_int, layer_map
from .errors import DTypeError, GeometryError, IndexRangeError, LCFError, ShapeError
from .fingerprint import SHARER_OF_SLOTS, Origin, slots_sharer_digest
from .growing import GrowingSlots
from .message import Message
from .sharer import ReadsSharer, SideOf
from .slot_spans import span_groups
from .slot_states import SlotStates, finish_states, merge_states
from .spans import Spans

if TYPE_CHECKING:
    from .slots import LatentSlots

__all__ = ["SlotsSharerSide", "SummarizesSlots", "fill_fresh", "side_parameter_shapes"]


def side_parameter_shapes(sharer: CacheGeometry, layers: int, slots: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the sharer's half, in their order; axis 0 runs over all receiver layers."""
    return {
        "slot_query": (layers, slots, sharer.kv_heads, sharer.head_dim),
        "slot_embedding": (layers, slots, width),
        "down_weight": (layers, width, 2 * sharer.channels),
        "down_bias": (layers, width),
    }


@torch.no_grad()
def fill_fresh(module: nn.Module) -> None:
    """Fresh parameters: linears like ``nn.Linear``, norms 1; queries and embeddings that tell the slots apart."""
    for name, parameter in module.named_parameters():
        if name == "norm_weight":
            parameter.fill_(1.0)
        elif name in ("slot_query", "slot_embedding"):
            parameter.normal_()
        else:
            # A bias takes the bound of its weight; the weight's last axis is the fan-in.
            weight = module.get_parameter(name.replace("_bias", "_weight"))
            bound = 1 / math.sqrt(weight.shape[-1])
            parameter.uniform_(-bound, bound)


class SummarizesSlots(ReadsSharer):
    """What pools a sharer's cache to slots: mixed into `LatentSlots` and `SlotsSharerSide`."""

    @property
    def slot_count(self) -> int:
        """Slots that a message has, of one span where they are :attr:`per_span`."""
        return int(self._weights()["slot_query"].shape[1])

    @property
    def per_span(self) -> bool:
        """Whether it is for contexts in spans, each pooled by itself to all slots."""
        raise AttributeError("per_span")

    # --- at once

    def summarize(
        self,
        sharer_cache: Any,
        spans: Spans | Tensor | Sequence[Sequence[int]] | None = None,
        *,
        attention_mask: Tensor | None = None,
        slots: int | None = None,
        slot_weights: bool = False,
    ) -> Message:
        """Pool the sharer's cache to a message of k latents a layer, whatever its length; or to k for each span.

        Args:
            sharer_cache: a cache of the sharer, ``(B, Hs, N, Ds)`` a layer.
            spans: as `LatentCacheFlow.summarize` takes them, each pooled by itself: P of them make P·k slots, span by
                span. As many in every row, none of them empty (`lcf_fast.slot_spans.summarize_spans` for others).
                None: one, of all tokens. With ``torch.compile(fullgraph=True)`` as offsets, not as `Spans`.
            attention_mask: ``(B, N)`` as transformers has it; padding is not pooled.
            slots: make the first so many alone; None: all that there are.
            slot_weights: whether the message tells what each token weighs in each slot, for inspection; that costs
                another pass over the keys.

        Returns:
            A :class:`Message` with ``latent (L, B, P·k, d)``, float32. Of ``torch.compile`` without an origin, as
            `LatentCacheFlow.summarize` has it.

        Raises:
            SpanError: a row, or a span, without a token to pool; rows of different numbers of spans. Where values are
                not looked at (compiled, or on a GPU), slots of a span without a token are NaN.
            IndexRangeError: ``slots`` out of range.
            GeometryError, ShapeError, DTypeError, DeviceError: naming the argument, before anything is computed.
        """
        most = self.slot_count
        count = most if slots is None else slots
        if type(count) is not int or not 1 <= count <= most:
            raise IndexRangeError("slots", expected=f"1 to {most}", got=repr(slots))
        sharer, mask = self._read(sharer_cache, attention_mask)
        if spans is not None:
            mask = span_groups(spans, sharer[0][0], mask)
        weights = {**self._weights()}
        weights["slot_query"] = weights["slot_query"][:, :count]
        layers = [sharer[s] for s in self._reads]
        try:
            latent = ops.summarize_slots_layers(layers, weights, attention_mask=mask)
        except LCFError:
            check_pairs(sharer, "sharer_cache", self.sharer_geometry)
            raise
        shares, groups = None, latent.shape[2] // count
        if slot_weights:
            with torch.no_grad():
                shares = eager_slots.slot_weights(layers, weights["slot_query"], mask)
                # A row a span: the slots of an item's spans side by side.
                shares = shares.unflatten(1, (latent.shape[1], groups)).transpose(2, 3).flatten(3, 4)
        return self._message(latent, shares, groups)

    def _message(self, latent: Tensor, slot_weights: Tensor | None = None, spans: int = 1) -> Message:
        return Message(
            latent=latent,
            receiver_layers=self._kept,
            spans=spans,
            sharer=self.sharer_geometry,
            receiver=self.receiver_geometry,
            made_by=self._pending(),
            slot_weights=slot_weights,
        )

    # --- in pieces

    def begin(self) -> GrowingSlots:
        """A message whose context comes in pieces: ``begin()``, ``extend(cache_piece)`` ..., ``finish()``."""
        return GrowingSlots(self)

    def pool(self, cache_piece: Any, *, attention_mask: Tensor | None = None) -> SlotStates:
        """Pool a piece of a context to a state of fixed size that merges with those of other pieces. For inference.

        Args:
            cache_piece: the cache of the piece's tokens alone, as in :meth:`summarize`; it may be empty.
            attention_mask: ``(B, M)``, of the piece; a row may have no token.

        Raises: as :meth:`summarize`, but for SpanError.
        """
        return self._pool(*self._read(cache_piece, attention_mask, "cache_piece"))

    def _pool(self, sharer: list[Pair], mask: Tensor | None) -> SlotStates:
        check_pairs(sharer, "cache_piece", self.sharer_geometry)
        states = ops.pool_slot_states([sharer[s] for s in self._reads], self._weights()["slot_query"], mask)
        return replace(states, made_by=self._pending())

    def merge(self, parts: Sequence[SlotStates]) -> SlotStates:
        """States of the pieces of a context as one, exactly and in any order.

        Raises:
            As `lcf_fast.slot_states.merge_states`. MessageError: as :meth:`finish`.
        """
        return replace(merge_states(parts, self._check_pooled_by), made_by=self._pending())

    @torch.no_grad()
    def finish(self, pool: SlotStates) -> Message:
        """The message of a whole context, as :meth:`summarize` makes it; the state stays as it is.

        Raises:
            SpanError: a row that never had a token. ShapeError, DTypeError, DeviceError: no state of this adapter's.
            MessageError: a state of another sharer's half, or of weights that have changed since.
        """
        slot_key, slot_value = finish_states(pool)
        wanted = tuple(self._weights()["slot_query"].shape)
        if (*slot_key.shape[:1], *slot_key.shape[2:]) != wanted:
            raise ShapeError("pool", expected=f"(L, B, k, Hs, Ds) of {wanted}", got=str(tuple(slot_key.shape)))
        self._check_device("pool", slot_key)
        self._check_pooled_by("pool", pool.made_by)
        return self._message(ops.fold_slots_layers(slot_key, slot_value, self._weights()))


class SlotsSharerSide(SummarizesSlots, SideOf):
    """The sharer's half of a slots adapter by itself: it summarizes, and somebody else's adapter places the slots.

    Make one :meth:`of` an adapter (its own half, a copy: bitwise the same messages), or one :meth:`for_receiver`, with
    fresh weights, for another sharer model of the same receiver.

    Attributes:
        slot_query: ``(L, k, Hs, Ds)``. slot_embedding: ``(L, k, d)``. down_weight: ``(L, d, 2Cs)``. down_bias:
            ``(L, d)``. All of them parameters. receiver_layers, sharer_layers: ``(L,)`` buffers.
        adapter_digest: digest of the receiver's half that it writes to.
    """

    slot_query: nn.Parameter
    slot_embedding: nn.Parameter
    down_weight: nn.Parameter
    down_bias: nn.Parameter

    def __init__(
        self,
        sharer: CacheGeometry,
        receiver: CacheGeometry,
        *,
        bottleneck: int,
        slots: int,
        sharer_layers: Sequence[int],
        per_span: bool = False,
        adapter_digest: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kept = range(check_geometry("receiver", receiver).layers)
        super().__init__(sharer, receiver, kept, sharer_layers, adapter_digest, device)
        self._per_span = per_span
        check_positive_int("bottleneck", bottleneck)
        if type(slots) is not int or slots < 1:
            raise GeometryError("slots", expected="an int of 1 or more", got=repr(slots))
        for name, shape in side_parameter_shapes(sharer, receiver.layers, slots, bottleneck).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh parameters, drawn as an adapter's are; routing as it was."""
        self._reset_routing()
        fill_fresh(self)

    @property
    def per_span(self) -> bool:
        return self._per_span

    @classmethod
    def of(cls, adapter: LatentSlots) -> SlotsSharerSide:
        """An adapter's own half, on its device and in its dtype. A copy: training one leaves the other."""
        _check_adapter(adapter)
        side = cls._fresh(adapter, adapter.sharer_geometry, adapter._reads, adapter.slot_count)
        with torch.no_grad():
            for name in SHARER_OF_SLOTS:
                side.get_parameter(name).copy_(adapter.get_parameter(name))
        side._set_origin(adapter.origin)
        return side

    @classmethod
    def for_receiver(
        cls,
        adapter: LatentSlots,
        sharer: CacheGeometry,
        *,
        layers: str | Iterable[int] = "last_aligned",
        slots: int | None = None,
    ) -> SlotsSharerSide:
        """A fresh half for one more sharer of a receiver.

        Args:
            adapter: the receiver's.
            sharer: geometry of the new sharer's cache.
            layers: the layer map, receiver layer to sharer layer, as ``LCFConfig.layer_map``.
            slots: of its messages; None: as many as the adapter's.

        Raises:
            GeometryError, DTypeError, IndexRangeError: a map or a number of slots that does not fit.
        """
        _check_adapter(adapter)
        check_geometry("sharer", sharer)
        mapped = layer_map(layers, sharer.layers, adapter.receiver_geometry.layers)
        return cls._fresh(adapter, sharer, mapped, adapter.slot_count if slots is None else slots)

    @classmethod
    def _fresh(cls, adapter: LatentSlots, sharer: CacheGeometry, reads: Sequence[int], slots: int) -> SlotsSharerSide:
        like = adapter.get_parameter("down_bias")
        side = cls(
            sharer,
            adapter.receiver_geometry,
            bottleneck=like.shape[1],
            slots=slots,
            sharer_layers=reads,
            per_span=adapter.per_span,
            device=like.device,
            dtype=like.dtype,
        )
        side._follow(adapter)
        return side

    def _weights(self) -> Mapping[str, Tensor]:
        return plain_parameters(self)

    def _make_origin(self) -> Origin:
        return Origin(self.adapter_digest, slots_sharer_digest(self._sharer, self._reads, self._weights()))

    def extra_repr(self) -> str:
        return f"{self._described()}, {self.slot_count} slots"


def _check_adapter(adapter: Any) -> None:
    from .slots import LatentSlots

    if not isinstance(adapter, LatentSlots):
        raise DTypeError("adapter", expected="a LatentSlots", got=type(adapter).__name__)
