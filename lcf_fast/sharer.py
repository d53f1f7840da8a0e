"""The sharer's half of LCF-X: it reads the sharer's cache and makes messages (spec, section 4).

`Summarizes` is what an adapter and a `SharerSide` have in common: pool at once, or piece by piece, or on several
devices. A `SharerSide` is that half alone, for the process of the sharer, or for one more sharer of a receiver.

**Several sharers, one receiver.** The latent is ``c = b + Σ_i W_i s_i``: the sharers' parts add up. Each sharer model
has its own `SharerSide` (queries and ``W_i``); the receiver keeps one adapter. To add a sharer to a trained adapter,
make ``side = SharerSide.for_receiver(adapter, geometry)``, freeze the adapter, and train ``side`` with the usual loss
through ``adapter.inject(cache, side.summarize(...))``: gradients reach it through the message. Then save it, and let
the receiver take its messages with ``adapter.accept_sharer(side)``, which is saved with the adapter. Sides may be
trained together as well, alone or in sums. A side is stored as a folder of its own: it names the receiver's half that
it was trained for by its digest, and holds a copy of that half's ``b``, so that each message is a complete ``c``.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import ops_pooling as ops
from .caches import Pair, cache_layers, check_pairs
from .checks import check_has_memory, plain_parameters
from .config import CacheGeometry, check_geometry, check_layer_list, check_positive_int, check_routing, layer_map
from .eager_pooling import span_weights as weights_of_spans
from .errors import DTypeError, LCFError
from .fingerprint import Origin, sharer_digest
from .growing import GrowingMessage, PartialPool, merged
from .identity import HasOrigin, Pending, State, seeing
from .inputs import check_device, host_spans, known_length, real_tokens, span_offsets, without_gaps
from .message import Message
from .spans import Spans

if TYPE_CHECKING:
    from .adapter import LatentCacheFlow

    Side = TypeVar("Side", bound="SideOf")

__all__ = ["Pending", "ReadsSharer", "SharerSide", "SideOf", "Summarizes"]


class ReadsSharer(HasOrigin):
    """What reads a sharer's cache, to spans or to slots: the layers that it reads, checked."""

    _kept: tuple[int, ...]
    _reads: tuple[int, ...]

    @property
    def sharer_geometry(self) -> CacheGeometry:
        raise AttributeError("sharer_geometry")

    @property
    def receiver_geometry(self) -> CacheGeometry:
        raise AttributeError("receiver_geometry")

    def _read(
        self, sharer_cache: Any, attention_mask: Tensor | None, name: str = "sharer_cache"
    ) -> tuple[list[Pair], Tensor | None]:
        """The cache's layers, and the mask as bool. All layers are looked at by the ops, or when something is wrong."""
        sharer = self._sharer_layers(sharer_cache, attention_mask, name=name)
        self._check_device(name, sharer[0][0])
        return sharer, real_tokens("attention_mask", attention_mask, sharer[0][0])

    def _sharer_layers(self, cache: Any, *lengths: Tensor | None, name: str = "sharer_cache") -> list[Pair]:
        return cache_layers(
            cache,
            name=name,
            geometry=self.sharer_geometry,
            length=known_length(*lengths),
            every_layer=False,
        )

    def _check_device(self, name: str, key: Tensor) -> None:
        check_device(name, key, next(iter(self._weights().values())), "the adapter")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Which layer reads which is there twice, in buffers and on the host; a state dict may bring another routing.
        def brought(name: str, held: tuple[int, ...]) -> tuple[int, ...]:
            found = state_dict.get(prefix + name)
            if not isinstance(found, Tensor) or found.shape != (len(held),):
                return held  # for torch to find missing, or of another size
            check_has_memory(f"{prefix}{name}", found)
            if found.is_complex() or not all(float(layer).is_integer() for layer in found.tolist()):
                raise DTypeError(f"{prefix}{name}", expected="layers' numbers", got=str(found.tolist()))
            return tuple(int(layer) for layer in found.tolist())

        kept, reads = brought("receiver_layers", self._kept), brought("sharer_layers", self._reads)
        self._check_routing(kept, reads, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._kept, self._reads = kept, reads

    @torch.no_grad()
    def _reset_routing(self) -> None:
        """Buffers as the host has them: ``to_empty`` leaves them as memory was found."""
        for name, layers in (("receiver_layers", self._kept), ("sharer_layers", self._reads)):
            self.get_buffer(name).copy_(torch.tensor(layers, device="cpu"))

    def _check_routing(self, kept: tuple[int, ...], reads: tuple[int, ...], prefix: str) -> None:
        check_routing(kept, reads, self.receiver_geometry, self.sharer_geometry, prefix)


class Summarizes(ReadsSharer):
    """What pools a sharer's cache by its spans: mixed into `LatentCacheFlow` and `SharerSide`."""

    # --- at once

    def summarize(
        self,
        sharer_cache: Any,
        spans: Spans | Tensor | Sequence[Sequence[int]] | None = None,
        *,
        attention_mask: Tensor | None = None,
        span_weights: bool = False,
    ) -> Message:
        """Pool the sharer's cache to a message of fixed size (LCF-X; spec, section 4).

        Args:
            sharer_cache: a cache of the sharer, ``(B, Hs, M, Ds)`` a layer.
            spans: :class:`~lcf_fast.spans.Spans`, which may overlap; or ``(B, P+1)`` int offsets, non-decreasing,
                span ``p`` being tokens ``[spans[b, p], spans[b, p+1])``; an empty span weighs nothing. Or a list of
                such lists, whose rows may differ in length. None: one span over each row's valid tokens.
            attention_mask: ``(B, M)`` as transformers has it; padding is not pooled.
            span_weights: whether the message tells what each span weighs in it, for inspection; that costs another
                pass over the keys. Of `Spans`, not with ``torch.compile(fullgraph=True)``.

        Returns:
            A :class:`Message` with ``latent (L, B, d)`` and ``summary (L, 2, B, Hs, Ds)``. Made by ``torch.compile`` it
            has no origin, since no weights are looked at: any adapter of its shape takes it, and it can be sent only
            after ``dataclasses.replace(message, made_by=adapter.origin)``.

        Raises:
            SpanError: offsets that decrease or leave the sequence, or a row without a token to pool.
            GeometryError, ShapeError, DTypeError, DeviceError: naming the argument, before anything is computed.
        """
        self._check_cross_context("summarize")
        sharer, mask = self._read(sharer_cache, attention_mask)
        key = sharer[0][0]
        offsets, pooled = span_offsets(spans, key, mask)
        layers = [sharer[s] for s in self._reads]
        try:
            latent, summary = ops.summarize_layers(layers, self._weights(), offsets, attention_mask=pooled)
        except LCFError:
            check_pairs(sharer, "sharer_cache", self.sharer_geometry)
            raise
        count = offsets.shape[-1] - 1
        if isinstance(spans, Spans):  # whose ranges may be gaps; a compiled graph does not look
            count = spans.tracks * count if torch.compiler.is_compiling() else max([0, *spans.counts])
        message = self._message(latent, summary, count)
        if span_weights:
            queries = self._weights()["span_query"], self._weights()["global_query"]
            found = weights_of_spans(layers, *queries, offsets, pooled)
            shares = _in_order(found, spans) if isinstance(spans, Spans) else found
            object.__setattr__(message, "span_weights", shares)
        return message

    def _message(self, latent: Tensor, summary: Tensor, spans: int) -> Message:
        return Message(
            latent=latent,
            receiver_layers=self._kept,
            spans=spans,
            summary=summary,
            sharer=self.sharer_geometry,
            receiver=self.receiver_geometry,
            made_by=self._pending(),
        )

    # --- in pieces

    def begin(self) -> GrowingMessage:
        """A message whose context comes in pieces: ``begin()``, ``extend(cache_piece)`` ..., ``finish()``."""
        self._check_cross_context("begin a message")
        return GrowingMessage(self)

    def pool(
        self,
        cache_piece: Any,
        spans: Spans | Tensor | Sequence[Sequence[int]] | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> PartialPool:
        """Pool a piece of a context to a state of fixed size, that merges with its neighbours'. For inference.

        Args:
            cache_piece: as in :meth:`summarize`: the cache of the piece's tokens alone. A piece may be empty.
            spans: as in :meth:`summarize`, counted from the piece's first token. ``Spans.piece`` cuts a whole
                context's spans so that those which cross the piece's ends are known as such; given otherwise, spans
                begin and end within the piece.
            attention_mask: ``(B, M)``, of the piece.

        Raises: as :meth:`summarize`, but a row may have no token.
        """
        self._check_cross_context("pool")
        sharer, mask = self._read(cache_piece, attention_mask, "cache_piece")
        key = sharer[0][0]
        given = host_spans(spans, key)
        return self._pool(sharer, given, without_gaps(given, key, mask))

    def _pool(self, sharer: list[Pair], spans: Spans, mask: Tensor | None) -> PartialPool:
        """``mask``: of tokens to pool, ``(B, M)`` or ``(B, T, M)``."""
        key = sharer[0][0]
        offsets = spans.offsets if spans.tracks > 1 else spans.offsets[:, 0]
        if mask is not None and mask.dim() == 3 and spans.tracks == 1:
            mask = mask[:, 0]
        try:
            states, stats = ops.pool_range(
                [sharer[s] for s in self._reads], self._weights(), offsets.to(key.device), attention_mask=mask
            )
        except LCFError:
            check_pairs(sharer, "cache_piece", self.sharer_geometry)
            raise
        begun = [sum(0 <= start < key.shape[2] for start, _ in row) for row in spans.bounds()]
        return PartialPool(states, stats, tuple(begun), key.shape[2], self._pending())

    def merge(self, parts: Sequence[PartialPool]) -> PartialPool:
        """Partial pools of neighbouring pieces as one, exactly and in any grouping.

        Args:
            parts: in the order of the tokens, on one device (`PartialPool.to` moves them).

        Raises:
            ShapeError, DTypeError, DeviceError, SpanError: parts that do not fit each other, or none. MessageError: as
            :meth:`finish`.
        """
        self._check_cross_context("merge")
        made = merged(parts, self._weights()["global_query"], self._check_pooled_by)
        return replace(made, made_by=self._pending())

    def finish(self, pool: PartialPool) -> Message:
        """The message of a whole context; spans that are still open end here. The pool stays as it is.

        Raises:
            SpanError: a row that never had a token to pool. MessageError: a pool of another sharer's half, or of
            weights that have changed since.
        """
        self._check_cross_context("finish")
        if not isinstance(pool, PartialPool):
            raise DTypeError("pool", expected="a PartialPool", got=type(pool).__name__)
        self._check_device("pool", pool.states)
        self._check_pooled_by("pool", pool.made_by)
        pool.check_rows()
        summary = ops.finish_ranges(pool.states, pool.stats, self._weights()["global_query"])
        with torch.no_grad():
            latent = ops.fold_summary(summary, self._weights())
        return self._message(latent, summary, max((1, *pool.spans)))


class SideOf(ReadsSharer, nn.Module):
    """A sharer's half by itself: whose it is, and its folder. Parameters are its subclasses'."""

    receiver_layers: Tensor
    sharer_layers: Tensor
    #: The adapter's weights when they were last looked at.
    _followed: State | None = None

    def __init__(
        self,
        sharer: CacheGeometry,
        receiver: CacheGeometry,
        receiver_layers: Sequence[int],
        sharer_layers: Sequence[int],
        adapter_digest: str,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self._sharer, self._to = check_geometry("sharer", sharer), check_geometry("receiver", receiver)
        self._kept = check_layer_list("receiver_layers", receiver_layers)
        self._reads = check_layer_list("sharer_layers", sharer_layers)
        check_routing(self._kept, self._reads, receiver, sharer)
        self._digest = adapter_digest
        self._adapter: weakref.ref[nn.Module] | None = None
        for name, listed in (("receiver_layers", self._kept), ("sharer_layers", self._reads)):
            self.register_buffer(name, torch.tensor(listed, dtype=torch.int64, device=device))

    @property
    def sharer_geometry(self) -> CacheGeometry:
        return self._sharer

    @property
    def receiver_geometry(self) -> CacheGeometry:
        return self._to

    @property
    def adapter_digest(self) -> str:
        self._catch_up()
        adapter = self._receiver()
        if adapter is not None:  # asked of itself as long as it is there: it may be in training, too
            self._digest = cast(str, adapter.origin.adapter)
        elif not self._digest and self._followed is not None and self._followed.origin is not None:
            self._digest = self._followed.origin.adapter
        return self._digest

    def _receiver(self) -> Any:
        adapter: Any = None if self._adapter is None else self._adapter()
        is_same = adapter is not None and adapter._kept == self._kept  # what was pruned is another
        return adapter if is_same else None

    def _follow(self, adapter: nn.Module) -> None:
        """Write to this adapter, as it is and as it will be."""
        self._adapter = weakref.ref(adapter)
        self._catch_up()
        self._digest = cast(str, self._receiver().origin.adapter)  # for when the adapter is gone

    def _catch_up(self) -> None:
        """Where the adapter has changed: take its part over, and make messages of another origin from here on."""
        adapter = self._receiver()
        if adapter is None:
            return
        state = adapter._state()
        if state is self._followed and not adapter._goes_uncounted():
            return
        with seeing:
            self._take_over(adapter, state is not self._followed)
            if state is not self._followed:
                # Its digest reads all its weights; it is "", which no adapter takes, if nobody asks in time.
                self._followed, self._seen, self._digest = state, None, ""

    def _take_over(self, adapter: Any, has_changed: bool) -> None:
        """Take what this half holds of the adapter's own; ``has_changed`` False: it may have, uncounted."""

    def _state(self) -> State:
        self._catch_up()
        return super()._state()

    def _goes_uncounted(self) -> bool:
        adapter = self._receiver()
        return super()._goes_uncounted() or (adapter is not None and adapter._goes_uncounted())

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._catch_up()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._followed = None  # it may have brought another adapter's part

    def __getstate__(self) -> dict[str, Any]:
        # Elsewhere it knows the adapter that it writes to by the digest alone.
        digest = self.adapter_digest
        return {**super().__getstate__(), "_adapter": None, "_followed": None, "_digest": digest}

    def __deepcopy__(self, memo: dict[int, Any]) -> SideOf:
        made = memo[id(self)] = type(self).__new__(type(self))
        state = copy.deepcopy(self.__getstate__(), memo)
        made.__setstate__({**state, "_adapter": self._adapter, "_followed": self._followed})
        return made

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write ``config.json`` and ``sharer.safetensors`` to a folder, each whole or not at all."""
        from .checkpoint import save_side

        save_side(self, directory)

    @classmethod
    def from_pretrained(
        cls: type[Side],
        directory: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sharer: Any = None,
    ) -> Side:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            directory: the folder.
            device, dtype: of the parameters; None: the CPU, as saved.
            sharer: the model it is meant for (or its config, or a CacheGeometry), to be checked.

        Raises:
            CheckpointError: missing, damaged, of an unknown version, or of the other kind (spans or slots).
            GeometryError: not for this model.
        """
        from .checkpoint import load_side

        return load_side(cls, directory, device=device, dtype=dtype, sharer=sharer)

    def _described(self) -> str:
        sides = (f"{g.layers}x{g.kv_heads}x{g.head_dim}" for g in (self._sharer, self._to))
        return f"{' -> '.join(sides)}, bottleneck={self.get_parameter('down_weight').shape[1]}"


class SharerSide(Summarizes, SideOf):
    """The sharer's half of an LCF-X adapter by itself: it summarizes, and somebody else's adapter injects.

    Make one :meth:`of` an adapter (its own half, a copy: bitwise the same messages), or one :meth:`for_receiver`, with
    fresh weights, for another sharer model of the same receiver.

    Attributes:
        span_query, global_query: ``(L, Hs, Ds)``, parameters. down_weight: ``(L, d, 2Cs)``, parameter: ``W_i``.
        down_bias: ``(L, d)``, a buffer: the receiver's ``b``, which follows the adapter that it was made for as long
            as that is in memory. receiver_layers, sharer_layers: ``(L,)`` buffers.
        adapter_digest: digest of the receiver's half that it writes to.
    """

    span_query: nn.Parameter
    global_query: nn.Parameter
    down_weight: nn.Parameter
    down_bias: Tensor

    def __init__(
        self,
        sharer: CacheGeometry,
        receiver: CacheGeometry,
        *,
        bottleneck: int,
        receiver_layers: Sequence[int],
        sharer_layers: Sequence[int],
        adapter_digest: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(sharer, receiver, receiver_layers, sharer_layers, adapter_digest, device)
        check_positive_int("bottleneck", bottleneck)
        layers = len(self._kept)
        query = (layers, sharer.kv_heads, sharer.head_dim)
        for name, shape in (
            ("span_query", query),
            ("global_query", query),
            ("down_weight", (layers, bottleneck, 2 * sharer.channels)),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.register_buffer("down_bias", torch.zeros(layers, bottleneck, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh queries and ``W_i``, drawn as an adapter's are; ``b`` stays, or follows an adapter that is there."""
        self._reset_routing()
        self._followed = None
        self.span_query.normal_(std=0.02)
        self.global_query.normal_(std=0.02)
        bound = 1 / math.sqrt(2 * self._sharer.channels + 2 * self._to.channels)
        self.down_weight.uniform_(-bound, bound)

    @classmethod
    def of(cls, adapter: LatentCacheFlow) -> SharerSide:
        """An adapter's own half, on its device and in its dtype. A copy: training one leaves the other."""
        _check_adapter(adapter, "take the half of")
        config = adapter.config
        side = cls._empty(adapter, config.sharer, adapter._reads)
        weights = adapter._weights()
        with torch.no_grad():
            side.span_query.copy_(weights["span_query"])
            side.global_query.copy_(weights["global_query"])
            side.down_weight.copy_(weights["down_weight"][:, :, : 2 * config.sharer.channels])
        side._set_origin(adapter.origin)
        return side

    @classmethod
    def for_receiver(
        cls,
        adapter: LatentCacheFlow,
        sharer: CacheGeometry,
        *,
        layers: str | Iterable[int] = "last_aligned",
    ) -> SharerSide:
        """A fresh half for one more sharer of a receiver.

        Args:
            adapter: the receiver's, LCF-X.
            sharer: geometry of the new sharer's cache.
            layers: the layer map, receiver layer to sharer layer, as ``LCFConfig.layer_map``.

        Raises:
            GeometryError, DTypeError, IndexRangeError: an LCF adapter, or a map that does not fit.
        """
        _check_adapter(adapter, "add a sharer to")
        check_geometry("sharer", sharer)
        mapped = layer_map(layers, sharer.layers, adapter.config.receiver.layers)
        return cls._empty(adapter, sharer, [mapped[t] for t in adapter._kept])

    @classmethod
    def _empty(cls, adapter: LatentCacheFlow, sharer: CacheGeometry, reads: Sequence[int]) -> SharerSide:
        bias = adapter.get_parameter("down_bias")
        side = cls(
            sharer,
            adapter.config.receiver,
            bottleneck=adapter.config.bottleneck,
            receiver_layers=adapter._kept,
            sharer_layers=reads,
            device=bias.device,
            dtype=bias.dtype,
        )
        side._follow(adapter)
        return side

    def _weights(self) -> Mapping[str, Tensor]:
        named = dict(plain_parameters(self))
        if torch.compiler.is_dynamo_compiling():  # not in what is called for a constant
            adapter = self._receiver()
            named["down_bias"] = self.down_bias if adapter is None else self._bias_of(adapter)
        else:
            self._catch_up()
            named["down_bias"] = self.down_bias
        return named

    def _bias_of(self, adapter: LatentCacheFlow) -> Tensor:
        bias = adapter.get_parameter("down_bias").detach()
        return bias.to(self.down_bias.device, self.down_bias.dtype)

    def _take_over(self, adapter: LatentCacheFlow, has_changed: bool) -> None:
        # A new tensor: a graph may still want the one of before.
        if has_changed or not torch.equal(self._bias_of(adapter), self.down_bias):
            self.down_bias = self._bias_of(adapter).clone()

    def _make_origin(self) -> Origin:
        digest = sharer_digest(self._sharer, self._kept, self._reads, self._weights())
        return Origin(self.adapter_digest, digest)

    def extra_repr(self) -> str:
        return f"{self._described()}, layers={self._kept}"


def _check_adapter(adapter: Any, method: str) -> None:
    from .adapter import LatentCacheFlow

    if not isinstance(adapter, LatentCacheFlow):
        raise DTypeError("adapter", expected="a LatentCacheFlow", got=type(adapter).__name__)
    adapter._check_cross_context(method)


def _in_order(shares: Tensor, spans: Spans) -> Tensor:
    """Shares ``(L, B, H, T·P)`` of all ranges as ``(L, B, H, P')`` in the order of ``spans.bounds()``, zeros after."""
    ranges = spans.offsets.shape[2] - 1
    places = spans.places()
    width = max((1, *map(len, places)))
    index = torch.zeros(len(places), width, dtype=torch.int64, device="cpu")
    there = torch.zeros(len(places), width, dtype=torch.bool, device="cpu")
    for b, row in enumerate(places):
        index[b, : len(row)] = torch.tensor([track * ranges + p for track, p in row], dtype=torch.int64, device="cpu")
        there[b, : len(row)] = True
    index, there = index.to(shares.device), there.to(shares.device)
    wide = (*shares.shape[:3], width)
    found = shares.gather(3, index[None, :, None].expand(wide))
    return found.masked_fill(~there[None, :, None], 0.0)
