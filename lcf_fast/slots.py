"""`LatentSlots`: a message that holds more than one thing, as positions of the receiver's cache. Beyond the paper.

LCF-X gives every receiver position the same pooled vector. Here k learned slots a layer each pool the sharer's cache
by a query of their own, go through the same kind of bottleneck, and become k positions of the receiver's cache, beside
its own. Nothing of that cache is edited, and it is not needed to make them: only the receiver's attention decides
what it reads of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from . import ops_slots as ops
from .caches import Pair, cache_layers, check_growth, count_filled, extend_cache, free_room
from .capture import Captures
from .checks import FLOATS, describe, plain_parameters
from .config import CacheGeometry, LCFConfig
from .errors import DTypeError, GeometryError, LCFError, MessageError, ShapeError
from .fingerprint import SHARER_OF_SLOTS, Origin, is_digest, slots_receiver_digest, slots_sharer_digest
from .inputs import check_device, known_length, real_tokens
from .message import Message
from .noise import TrainingNoise, draw_seed
from .placement import Placement, slot_positions
from .receiving import check_origin
from .rotary import Rotary
from .slots_sharer import SlotsSharerSide, SummarizesSlots, fill_fresh, side_parameter_shapes

__all__ = ["LatentSlots", "slot_parameter_shapes"]


def slot_parameter_shapes(config: LCFConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a slots adapter's parameters, in their order; axis 0 runs over all receiver layers."""
    layers, d, blocks = config.receiver.layers, config.bottleneck, config.ffn_blocks
    wide, channels = config.ffn_expansion * d, config.receiver.channels
    return {
        **side_parameter_shapes(config.sharer, layers, config.slots, d),
        "norm_weight": (layers, blocks, d),
        "ffn_in_weight": (layers, blocks, wide, d),
        "ffn_out_weight": (layers, blocks, d, wide),
        "up_weight": (layers, 2, channels, d),
        "up_bias": (layers, 2, channels),
    }


class LatentSlots(SummarizesSlots, Captures, nn.Module):
    """A slots adapter: :meth:`summarize` on the sharer's side, :meth:`append` or :meth:`prefix` on the receiver's.

    Parameters are stacked over all receiver layers on axis 0 (a cache has as many positions in each layer, so none can
    be pruned); where an axis has two entries, 0 is the key's and 1 the value's. There are no gates.

    Like any module a fresh adapter is in training mode, and one from :meth:`from_pretrained` in eval mode. In training
    mode there is dropout (``config.dropout``), from a seed that each call draws from torch's default CPU generator.

    Args:
        config: with ``slots`` above 0.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Attributes:
        accepted_sharers: digests of other sharers' halves whose messages are taken.
        trained_between: of "sharer" and "receiver", where known, which models it was trained between.
        trained_placement: ``"append"`` or ``"prefix"``, where its slots stood in training; None: not known. Saved with
            the adapter.
        trained_template_options: of the chat templates in training, ``{}`` for none; None: not known. Saved as well.
    """

    _captured = ("summarize", "expand", "place")
    receiver_layers: Tensor
    sharer_layers: Tensor
    #: What a trainer anneals in other adapters; there are no gates here.
    gate_temperature: float = 1.0

    def __init__(
        self,
        config: LCFConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, LCFConfig):
            raise DTypeError("config", expected="an LCFConfig", got=type(config).__name__)
        if not config.slots:
            expected = "a configuration with slots (others are LatentCacheFlow's)"
            raise GeometryError("config.slots", expected=expected, got="0")
        self.config = config
        for name, shape in slot_parameter_shapes(config).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._kept, self._reads = tuple(range(config.receiver.layers)), config.sharer_layers
        for name, layers in (("receiver_layers", self._kept), ("sharer_layers", self._reads)):
            self.register_buffer(name, torch.tensor(layers, dtype=torch.int64, device=device))
        self.accepted_sharers: frozenset[str] = frozenset()
        self.trained_between: dict[str, str] = {}
        self.trained_placement: Placement | None = None
        self.trained_template_options: dict[str, Any] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh parameters, as `lcf_fast.slots_sharer.fill_fresh` draws them; routing as it was."""
        self._reset_routing()
        fill_fresh(self)

    # `summarize`, `begin` and their kind are the sharer's half, in lcf_fast.slots_sharer

    # --- the receiver's half
    # -----------------------------------------------------------------------------------------

    def expand(self, message: Message) -> list[Pair]:
        """The message's slots as keys and values, ``(B, Hr, k, Dr)`` a layer in float32, the keys at no position yet.

        Raises:
            MessageError: a message for another adapter, of a sharer that this one does not know, or without slots.
            GeometryError, ShapeError, DTypeError, DeviceError: naming the argument.
        """
        latent = self._latent(message, "message")
        noise = None
        if self.training and self.config.dropout:
            noise = TrainingNoise(draw_seed(), 1.0, self.config.dropout)
        return ops.expand_slots_layers(
            latent,
            self._weights(),
            kv_heads=self.config.receiver.kv_heads,
            norm_eps=self.config.norm_eps,
            noise=noise,
        )

    def place(
        self,
        receiver: Any,
        message: Message,
        positions: Tensor,
        *,
        into: Sequence[Pair] | None = None,
        length: int | None = None,
    ) -> list[Pair]:
        """:meth:`expand`, the keys rotated to positions by the receiver's own rotary embedding.

        Args:
            receiver: the receiver's model, of transformers, or its `lcf_fast.rotary.Rotary`.
            positions: ``(B, k)`` int, counted as the model counts them, or ``(1, k)`` for all rows.
            into: where they are to lie, one ``(key, value)`` a layer, ``(B, Hr, k, Dr)`` of one dtype: views of a
                preallocated cache or of a page of one, with any strides but the last one's, which is 1. Values are
                written straight there, keys by way of as many numbers more; for inference, as :meth:`append_`.
            length: as in :meth:`prefix`.

        Returns:
            New tensors in float32; or those of ``into``.

        Raises:
            As :meth:`expand` and `Rotary.of`; GeometryError for a model of another geometry; ShapeError, DTypeError,
            IndexRangeError for positions; ShapeError, GeometryError, DTypeError, DeviceError for ``into``. All of it
            before anything is written.
        """
        rotary = Rotary.of(receiver)
        if into is None:
            expanded = self.expand(message)
            keys = rotary.rotate([key for key, _ in expanded], positions, length=length)
            return [(key, value) for key, (_, value) in zip(keys, expanded)]
        latent, geometry = self._latent(message, "message"), self.config.receiver
        made = (latent.shape[1], geometry.kv_heads, latent.shape[2], geometry.head_dim)
        rotary.check(geometry.layers, made, positions, length)
        return ops.expand_slots_layers_(
            latent,
            self._weights(),
            into,
            kv_heads=geometry.kv_heads,
            norm_eps=self.config.norm_eps,
            turn=lambda keys: rotary.rotate(keys, positions, length=length),
        )

    def append(
        self, receiver: Any, receiver_cache: Any, message: Message, *, attention_mask: Tensor | None = None
    ) -> Any:
        """The receiver's cache with the slots behind it: of the prompt but its last token, which then sees them.

        `lcf_fast.placement.with_slots` makes the ids and the mask that ``generate()`` takes beside it.

        Args:
            receiver: as in :meth:`place`.
            receiver_cache: a ``DynamicCache`` or a sequence of ``(key, value)``, ``(B, Hr, N, Dr)`` a layer.
            message: of batch size B, or 1 for every row.
            attention_mask: ``(B, N)`` as transformers has it, of the cache's positions: the slots' positions go on
                from a row's real tokens.

        Returns:
            A new cache of the same kind and dtype with k more positions; the given one stays as it is.

        Raises:
            As :meth:`place`; GeometryError for a cache that cannot grow (a StaticCache: :meth:`append_` fills it).
        """
        layers, sent, positions = self._behind(receiver_cache, message, attention_mask)
        check_growth(receiver_cache, layers[0][0].shape[2] + sent.slots, "receiver_cache")
        return extend_cache(receiver_cache, layers, self.place(receiver, sent, positions), "receiver_cache")

    def append_(
        self, receiver: Any, receiver_cache: Any, message: Message, *, attention_mask: Tensor | None = None
    ) -> Any:
        """:meth:`append` into the free room of a ``StaticCache``, behind its filled positions; nothing is copied.

        The filled length goes on by k, so that ``generate()`` goes on from the cache as from that of :meth:`append`.
        For inference: without a graph of autograd, or (``fullgraph=True``) of ``torch.compile``.

        Args:
            receiver, message: as in :meth:`append`.
            receiver_cache: a ``StaticCache`` with room for k positions, and for those that will be generated. One that
                is allocated and empty gets the slots as :meth:`prefix` has them.
            attention_mask: ``(B, N)``, of the filled positions.

        Returns:
            The cache given.

        Raises:
            As :meth:`place`; GeometryError for another kind of cache, or one of too little room. The cache is then as
            it was.
        """
        layers, sent, positions = self._behind(receiver_cache, message, attention_mask)
        room = free_room(receiver_cache, layers[0][0].shape[2], sent.slots, "receiver_cache")
        try:
            self.place(receiver, sent, positions, into=room)
        except LCFError as error:
            name, got = (text.replace("into", "receiver_cache", 1) for text in (error.argument, error.got))
            raise type(error)(name, expected=error.expected, got=got) from None
        count_filled(receiver_cache, sent.slots)
        return receiver_cache

    def _behind(
        self, receiver_cache: Any, message: Message, attention_mask: Tensor | None
    ) -> tuple[list[Pair], Message, Tensor]:
        """Of :meth:`append`: the cache's layers, the message for all of its rows, the slots' positions ``(B, k)``."""
        layers = cache_layers(
            receiver_cache, name="receiver_cache", geometry=self.config.receiver, length=known_length(attention_mask)
        )
        key = layers[0][0]
        check_device("receiver_cache", key, self.receiver_layers, "the adapter")
        mask = real_tokens("attention_mask", attention_mask, key)
        latent = self._latent(message, "message", key.shape[0])
        before = key.shape[2] if mask is None else mask.sum(1)
        positions = slot_positions(before, latent.shape[2], key.shape[0], key.device)
        return layers, replace(message, latent=latent), positions

    def prefix(
        self, receiver: Any, message: Message, *, dtype: torch.dtype | None = None, length: int | None = None
    ) -> Any:
        """A cache of the slots alone, at positions 0 to k - 1: the receiver then reads its whole prompt behind them.

        Args:
            receiver, message: as in :meth:`place`.
            dtype: of the cache; None: the receiver model's own, float32 where that is not known.
            length: of slots and prompt together, as far as one call reads it, in the longest row: needed for rope types
                that go by it ("longrope", "dynamic"); None: the slots' own.

        Returns:
            A ``DynamicCache`` of k positions.

        Raises: as :meth:`place`; DTypeError for ``dtype``, DTypeError or ShapeError for ``length``.
        """
        from .reading.prefill import dynamic_cache

        wanted = getattr(receiver, "dtype", torch.float32) if dtype is None else dtype
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise DTypeError("dtype", expected="a float dtype of torch, or None", got=repr(wanted))
        latent = self._latent(message, "message")
        positions = torch.arange(latent.shape[2], device=latent.device)[None]
        placed = self.place(receiver, message, positions, length=length)
        return dynamic_cache((key.to(wanted), value.to(wanted)) for key, value in placed)

    # --- messages

    def join(self, messages: Sequence[Message]) -> Message:
        """Several sharers' messages as one, their slots side by side in the order given; any subset of them will do.

        Args:
            messages: for this adapter, each of the batch size of the widest, or of batch size 1. Their numbers of
                slots add up, and may differ.

        Returns:
            A message with the latent alone, of this adapter's own origin.

        Raises:
            MessageError, GeometryError, ShapeError, DTypeError, DeviceError: naming the message.
        """
        listed = [messages] if isinstance(messages, Message) else messages
        if not isinstance(listed, Sequence) or not listed:
            raise DTypeError("messages", expected="a sequence of one Message or more", got=repr(messages)[:80])
        latents = [self._latent(message, f"messages[{i}]") for i, message in enumerate(listed)]
        batch = max(latent.shape[1] for latent in latents)
        latents = [self._latent(message, f"messages[{i}]", batch) for i, message in enumerate(listed)]
        return self._message(torch.cat(latents, 2))

    def _latent(self, message: Any, name: str, batch: int | None = None) -> Tensor:
        """The message's latent ``(L, B, k, d)``, checked: for this adapter, by a sharer that it knows, of its form."""
        if not isinstance(message, Message):
            raise DTypeError(name, expected="a Message", got=type(message).__name__)
        latent, layers, d = message.latent, len(self._kept), self.config.bottleneck
        if latent is None or latent.dim() != 4:
            raise MessageError(name, expected="slots, a latent (L, B, k, d)", got="a message without")
        if tuple(message.receiver_layers) != self._kept:
            got = f"{tuple(message.receiver_layers)}"
            raise GeometryError(f"{name}.receiver_layers", expected=f"all {layers} layers", got=got)
        if message.receiver is not None and message.receiver != self.config.receiver:
            expected = f"{self.config.receiver}"
            raise GeometryError(f"{name}.receiver", expected=expected, got=f"{message.receiver}")
        check_origin(self, message, name)
        if latent.shape[0] != layers or latent.shape[3] != d or not latent.shape[2]:
            raise ShapeError(f"{name}.latent", expected=f"(L={layers}, B, k, d={d})", got=str(tuple(latent.shape)))
        if latent.dtype not in FLOATS or latent.layout is not torch.strided:
            raise DTypeError(f"{name}.latent", expected="a dense tensor of a float dtype", got=describe(latent))
        check_device(f"{name}.latent", latent, self.receiver_layers, "the adapter")
        if batch is None or latent.shape[1] == batch:
            return latent
        if latent.shape[1] != 1:
            raise ShapeError(f"{name}.latent", expected=f"batch size {batch} or 1", got=str(latent.shape[1]))
        return latent.expand(-1, batch, -1, -1)

    # --- several sharers

    def for_sharer(
        self, sharer: CacheGeometry, *, layer_map: str | Sequence[int] = "last_aligned", slots: int | None = None
    ) -> LatentSlots:
        """An adapter for one more sharer of the same receiver: a fresh sharer's half, and a frozen copy of the other.

        Train it with the usual loss, then let this adapter take its messages with :meth:`accept_sharer`.

        Args:
            sharer: geometry of the new sharer's cache.
            layer_map: as ``LCFConfig.layer_map``.
            slots: of the new sharer's messages; None: as many as this one's.
        """
        count = self.config.slots if slots is None else slots
        config = replace(self.config, sharer=sharer, layer_map=layer_map, slots=count)
        like = self.get_parameter("up_weight")
        made = LatentSlots(config, device=like.device, dtype=like.dtype)
        made.trained_placement = self.trained_placement
        made.trained_template_options = self.trained_template_options
        for name, parameter in made.named_parameters():
            if name not in SHARER_OF_SLOTS:
                parameter.requires_grad_(False).copy_(self.get_parameter(name).detach())
        return made

    def sharer_side(self) -> SlotsSharerSide:
        """The sharer's half by itself, a copy: all that the sharer's process needs (see `lcf_fast.slots_sharer`)."""
        return SlotsSharerSide.of(self)

    def accept_sharer(self, sharer: SlotsSharerSide | LatentSlots | str) -> LatentSlots:
        """Take messages of another sharer's half, too: a side, an adapter made by :meth:`for_sharer`, or the digest.

        Saved with the adapter. Returns self.

        Raises:
            MessageError: for another receiver's half. GeometryError: for another receiver. DTypeError: neither.
        """
        if isinstance(sharer, (SlotsSharerSide, LatentSlots)):
            if sharer.receiver_geometry != self.receiver_geometry:
                expected, got = f"one for {self.receiver_geometry}", f"for {sharer.receiver_geometry}"
                raise GeometryError("sharer", expected=expected, got=got)
            theirs = sharer.adapter_digest if isinstance(sharer, SlotsSharerSide) else sharer.origin.adapter
            if theirs != self.origin.adapter:
                expected = f"one for the receiver's half {self.origin.adapter}"
                raise MessageError("sharer", expected=expected, got=f"for {theirs}")
            sharer = sharer.origin.sharer
        if not is_digest(sharer):
            expected = "a SlotsSharerSide, a LatentSlots, or a digest of 32 hex digits"
            raise DTypeError("sharer", expected=expected, got=repr(sharer)[:80])
        self.accepted_sharers |= {sharer}
        return self

    # --- what is asked of any adapter

    @property
    def placement(self) -> Placement:
        """Where its slots belong: as they were trained; ``"append"`` where that is not known."""
        return self.trained_placement or "append"

    @property
    def sharer_geometry(self) -> CacheGeometry:
        return self.config.sharer

    @property
    def per_span(self) -> bool:
        return self.config.per_span

    @property
    def receiver_geometry(self) -> CacheGeometry:
        return self.config.receiver

    def _weights(self) -> Mapping[str, Tensor]:
        return plain_parameters(self)

    def _make_origin(self) -> Origin:
        config, weights = self.config, self._weights()
        return Origin(
            adapter=slots_receiver_digest(config.receiver, config.norm_eps, weights),
            sharer=slots_sharer_digest(config.sharer, self._reads, weights),
        )

    def _check_routing(self, kept: tuple[int, ...], reads: tuple[int, ...], prefix: str) -> None:
        super()._check_routing(kept, reads, prefix)
        wanted = self.config.sharer_layers
        if reads != wanted:
            expected = f"{wanted}, by the configuration's layer map"
            raise GeometryError(f"{prefix}sharer_layers", expected=expected, got=str(reads))

    def parameter_count(self) -> int:
        """Number of parameters held."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write ``config.json`` and ``adapter.safetensors`` to a folder; see :mod:`lcf_fast.checkpoint`."""
        from .checkpoint import save

        save(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sharer: Any = None,
        receiver: Any = None,
    ) -> LatentSlots:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            directory: the folder.
            device, dtype: of the parameters; None: the CPU, as saved.
            sharer, receiver: the models it is meant for (or their configs, or CacheGeometry), to be checked.

        Raises:
            CheckpointError: missing, damaged, of an unknown version, or without slots (then it is LatentCacheFlow's).
            GeometryError: not for these models. Both before any weight is used.
        """
        from .checkpoint import load

        return load(cls, directory, device=device, dtype=dtype, sharer=sharer, receiver=receiver)

    def extra_repr(self) -> str:
        c = self.config
        sides = (f"{g.layers}x{g.kv_heads}x{g.head_dim}" for g in (c.sharer, c.receiver))
        return f"slots, {' -> '.join(sides)}, bottleneck={c.bottleneck}, {c.slots} slots"
