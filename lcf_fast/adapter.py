"""`LatentCacheFlow`: the adapter as an `nn.Module`, on caches of transformers or plain tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import ops
from .caches import Pair, cache_layers, check_pairs, rebuild_cache
from .capture import Captures
from .checks import check_has_memory, plain_parameters
from .config import CacheGeometry, LCFConfig, kept_layers
from .errors import DTypeError, GeometryError, LCFError, ShapeError
from .fingerprint import Origin, receiver_digest, sharer_digest
from .inputs import check_device, hide_padding, known_length, real_tokens
from .message import Message
from .noise import TrainingNoise, draw_seed
from .receiving import accepted_digest, combine, readable_latent
from .sharer import SharerSide, Summarizes

__all__ = ["LatentCacheFlow", "parameter_shapes"]

#: Hard gates of one layer, read on the host: (key open, value open).
Live = tuple[tuple[bool, bool], ...]
#: What the ops call a layer.
_ROW = re.compile(r"\b(receiver|sharer)\[(\d+)\]((?:\.key|\.value)?)")


def parameter_shapes(config: LCFConfig, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, in their order, for ``layers`` kept layers."""
    d, blocks, wide = config.bottleneck, config.ffn_blocks, config.ffn_expansion * config.bottleneck
    channels, heads = config.receiver.channels, config.receiver.kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "down_weight": (layers, d, config.in_channels),
        "down_bias": (layers, d),
        "norm_weight": (layers, blocks, d),
        "ffn_in_weight": (layers, blocks, wide, d),
        "ffn_out_weight": (layers, blocks, d, wide),
        "up_weight": (layers, 2, channels, d // 2),
        "up_bias": (layers, 2, channels),
        "head_gate_weight": (layers, 2, heads, d),
        "head_gate_bias": (layers, 2, heads),
        "gate_logit": (layers, 2),
    }
    if config.cross_context:
        query = (layers, config.sharer.kv_heads, config.sharer.head_dim)
        shapes |= {"span_query": query, "global_query": query}
    return shapes


class LatentCacheFlow(Summarizes, Captures, nn.Module):
    """An LCF or LCF-X adapter (arXiv 2605.22863; spec, sections 2 to 4): one projector a kept receiver layer.

    LCF (``cross_context=False``): :meth:`fuse` edits the receiver's cache with the sharer's, position by
    position. LCF-X: :meth:`summarize` pools the sharer's cache to a :class:`Message` (:meth:`begin` does so
    piece by piece), :meth:`inject` edits the receiver's cache with one, or with those of several sharers. What
    ends in ``_`` edits in place, the rest leaves its inputs as they are. Edit the cache of the prompt but its
    last token, then let the receiver go on from there.

    A *cache* is a transformers ``DynamicCache`` or ``StaticCache`` or a sequence of ``(key, value)``, one
    pair a layer of the whole model (not only the kept ones), each ``(B, H, N, D)``; see
    :mod:`lcf_fast.caches`. Adapter and cache may differ in dtype: products run in the receiver cache's dtype.

    Parameters are stacked over the kept layers on axis 0; where an axis has two entries, 0 is the key's and 1
    the value's; input channels in the order S_K, S_V, R_K, R_V. Buffers ``receiver_layers (L,)`` and
    ``sharer_layers (L,)`` say which layer reads from which.

    A gate is open where its logit is above zero; a layer whose two gates are closed, like one that is not
    kept, is passed through untouched and costs nothing. On a GPU the gates are read once and again whenever
    ``gate_logit`` changes in place; an edit through ``gate_logit.data`` escapes this, use ``with
    torch.no_grad()`` instead. ``torch.compile`` takes them as constants, and the adapter's origin with them: compile
    anew (``torch.compiler.reset()``) when they change. With ``fullgraph=True`` it takes messages of the adapter's own
    and those whose origin was looked up, such as those from bytes.

    Like any module a fresh adapter is in training mode, and one from :meth:`from_pretrained` in eval mode. In
    training mode :meth:`fuse` and :meth:`inject` have dropout (``config.dropout``) and soft, noisy gates, none of
    them closed, of temperature ``gate_temperature`` (:class:`lcf_fast.noise.TrainingNoise`); each call draws a seed
    from torch's default CPU generator. :meth:`fuse_` and :meth:`inject_` are inference in either mode.

    :meth:`capture` records a call as a CUDA graph, for loops whose sizes do not change.

    Attributes:
        gate_temperature: of the training gates, above 0; a trainer anneals it. Not saved.

    Args:
        config: geometries, widths and layer map.
        keep_layers: receiver layers that get a projector; None: all of them.
        device, dtype: of the parameters, as in ``nn.Linear``.
    """

    _captured = ("fuse", "fuse_", "inject", "inject_", "summarize")
    receiver_layers: Tensor
    sharer_layers: Tensor
    gate_temperature: float
    gate_logit: nn.Parameter
    down_weight: nn.Parameter

    def __init__(
        self,
        config: LCFConfig,
        *,
        keep_layers: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, LCFConfig):
            raise DTypeError("config", expected="an LCFConfig", got=type(config).__name__)
        if config.slots:
            expected = "a configuration without slots (with them it is lcf_fast.LatentSlots)"
            raise GeometryError("config.slots", expected=expected, got=str(config.slots))
        self.config = config
        everything = tuple(range(config.receiver.layers))
        kept = everything if keep_layers is None else kept_layers(keep_layers, everything)
        for name, shape in parameter_shapes(config, len(kept)).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        reads = tuple(config.sharer_layers[t] for t in kept)
        self.register_buffer("receiver_layers", torch.tensor(kept, dtype=torch.int64, device=device))
        self.register_buffer("sharer_layers", torch.tensor(reads, dtype=torch.int64, device=device))
        # The same on the host: routing must not wait for a device.
        self._kept, self._reads = kept, reads
        self._gates: tuple[Tensor, int, int, Live] | None = None
        self.gate_temperature = 1.0
        #: Of "sharer" and "receiver", where known, which models it was trained between (`weights_sample`).
        self.trained_between: dict[str, str] = {}
        #: Of the chat templates that it was trained with, ``{}`` for none; None: not known. Saved with the adapter.
        self.trained_template_options: dict[str, Any] | None = None
        #: Digests of other sharers' halves whose messages are taken.
        self.accepted_sharers: frozenset[str] = frozenset()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh parameters: linears like ``nn.Linear``, norms 1, gates ``config.gate_init``, small queries.

        What reads from what is as it was, after ``to_empty`` too.
        """
        self._reset_routing()
        for name, parameter in self.named_parameters():
            if name == "norm_weight":
                parameter.fill_(1.0)
            elif name == "gate_logit":
                parameter.fill_(cast(float, self.config.gate_init))
            elif name in ("span_query", "global_query"):
                parameter.normal_(std=0.02)  # nearly even weights over a span to begin with
            else:
                # A bias takes the bound of its weight; the weight's last axis is the fan-in.
                weight = self.get_parameter(name.replace("_bias", "_weight"))
                bound = 1 / math.sqrt(weight.shape[-1])
                parameter.uniform_(-bound, bound)

    # --- LCF
    # -----------------------------------------------------------------------------------------------------

    def fuse(
        self,
        sharer_cache: Any,
        receiver_cache: Any,
        *,
        sharer_index: Tensor | None = None,
        positions: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        sharer_attention_mask: Tensor | None = None,
    ) -> Any:
        """The receiver's cache, edited with the sharer's (LCF). A new cache of the same kind.

        Args:
            sharer_cache, receiver_cache: caches of ``config.sharer`` and ``config.receiver``, of one batch
                size, and of one length unless ``sharer_index`` is given.
            sharer_index: ``(B, N)`` int, the sharer's row for each receiver position; -1: none, left
                untouched.
            positions: half-open ``(start, stop)`` of receiver positions to edit; None: all.
            attention_mask: ``(B, N)`` as transformers has it, zero where the receiver's position is padding,
                which is left untouched. N is the length of the cache.
            sharer_attention_mask: ``(B, M)``, the sharer's; a receiver position that aligns with padding is
                left untouched.

        Returns:
            What :func:`lcf_fast.caches.rebuild_cache` makes of the edited layers: a layer (of a DynamicCache
            or a sequence) that was not edited may share its tensors with ``receiver_cache``. A StaticCache on
            a GPU knows its length only there; give a mask or an index and the host need not wait for it.

        Raises:
            GeometryError, ShapeError, DTypeError, DeviceError, IndexRangeError: naming the argument, before
                anything is computed.
        """
        return self._fuse(
            False,
            sharer_cache,
            receiver_cache,
            sharer_index,
            positions,
            attention_mask,
            sharer_attention_mask,
        )

    def fuse_(
        self,
        sharer_cache: Any,
        receiver_cache: Any,
        *,
        sharer_index: Tensor | None = None,
        positions: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        sharer_attention_mask: Tensor | None = None,
    ) -> Any:
        """:meth:`fuse` in place: edits ``receiver_cache`` and returns it. On an error it is as it was.

        ``sharer_cache`` must not lie in the memory that is edited, as a view of the same cache or an earlier part of
        it: such a call is refused with a GeometryError. Caches that merely interleave in one buffer are served.
        """
        return self._fuse(
            True, sharer_cache, receiver_cache, sharer_index, positions, attention_mask, sharer_attention_mask
        )

    def _fuse(
        self,
        in_place: bool,
        sharer_cache: Any,
        receiver_cache: Any,
        sharer_index: Tensor | None,
        positions: tuple[int, int] | None,
        attention_mask: Tensor | None,
        sharer_attention_mask: Tensor | None,
    ) -> Any:
        if self.config.cross_context:
            raise GeometryError(
                "adapter",
                expected="an LCF adapter (cross_context=False) to fuse with",
                got="LCF-X: use summarize and inject",
            )
        aligned = sharer_index is None  # then both have one length, and either mask tells it
        receiver = self._receiver_layers(
            receiver_cache, sharer_index, attention_mask, sharer_attention_mask if aligned else None
        )
        sharer = self._sharer_layers(sharer_cache, sharer_attention_mask, attention_mask if aligned else None)
        key = receiver[0][0]
        batch, _, length, _ = key.shape
        sharer_key = sharer[0][0]
        self._check_device("receiver_cache", key)
        check_device("sharer_cache", sharer_key, key)
        if sharer_key.shape[0] != batch:
            raise ShapeError(
                "sharer_cache", expected=f"batch size {batch} as the receiver's", got=str(sharer_key.shape[0])
            )
        if aligned and sharer_key.shape[2] != length:
            raise ShapeError(
                "sharer_cache",
                expected=f"{length} positions as the receiver's (or a sharer_index that aligns them)",
                got=str(sharer_key.shape[2]),
            )
        edit_mask = real_tokens("attention_mask", attention_mask, key)
        visible = real_tokens("sharer_attention_mask", sharer_attention_mask, sharer_key)
        if visible is not None:
            if aligned:
                edit_mask = visible if edit_mask is None else edit_mask & visible
            else:
                sharer_index = hide_padding(sharer_index, visible, key)
        try:
            fused = self._edit(
                in_place,
                [sharer[s] for s in self._reads],
                [receiver[t] for t in self._kept],
                sharer_index=sharer_index,
                edit_mask=edit_mask,
                positions=positions,
            )
        except LCFError as error:
            raise self._as_callers_know_it(error, receiver, sharer) from error
        return receiver_cache if in_place else self._rebuilt(receiver_cache, receiver, fused)

    # --- LCF-X: `summarize`, `begin` and their kind are the sharer's half, in lcf_fast.sharer
    # ---------------------------------------------------------------------------------------------------

    def inject(
        self,
        receiver_cache: Any,
        message: Message | Sequence[Message],
        *,
        weights: Any = None,
        positions: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """The receiver's cache, edited with a message, or with those of several sharers (LCF-X). A new cache.

        Args:
            receiver_cache: a cache of ``config.receiver``.
            message: made for this adapter, by its own sharer's half or one that it accepts; a message of batch size
                1 serves every row. Several add up in the latent, see :meth:`combine`: the edit then costs what one
                message's does.
            weights: of several messages, see :meth:`combine`; 0 switches one off.
            positions, attention_mask: as in :meth:`fuse`.

        Returns: as :meth:`fuse`.

        Raises:
            MessageError: a message for another adapter, or of a sharer that this one does not know. And as
                :meth:`fuse`.
        """
        return self._inject(False, receiver_cache, message, weights, positions, attention_mask)

    def inject_(
        self,
        receiver_cache: Any,
        message: Message | Sequence[Message],
        *,
        weights: Any = None,
        positions: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """:meth:`inject` in place: edits ``receiver_cache`` and returns it. On an error it is as it was."""
        return self._inject(True, receiver_cache, message, weights, positions, attention_mask)

    def _inject(
        self,
        in_place: bool,
        receiver_cache: Any,
        message: Message | Sequence[Message],
        weights: Any,
        positions: tuple[int, int] | None,
        attention_mask: Tensor | None,
    ) -> Any:
        self._check_cross_context("inject")
        receiver = self._receiver_layers(receiver_cache, attention_mask)
        key = receiver[0][0]
        self._check_device("receiver_cache", key)
        if weights is not None or not isinstance(message, Message):
            message = combine(self, message, weights, "message", key.shape[0])
        latent = readable_latent(self, message, "message", key.shape[0])
        edit_mask = real_tokens("attention_mask", attention_mask, key)
        try:
            injected = self._edit(
                in_place,
                None,
                [receiver[t] for t in self._kept],
                message=latent,
                edit_mask=edit_mask,
                positions=positions,
            )
        except LCFError as error:
            raise self._as_callers_know_it(error, receiver, None) from error
        return receiver_cache if in_place else self._rebuilt(receiver_cache, receiver, injected)

    def combine(self, messages: Message | Sequence[Message], weights: Any = None) -> Message:
        """Several sharers' messages as one: ``c = b_down + Σ w_i (c_i - b_down)``, ``Σ w_i W_i s_i`` but for the bias.

        Args:
            messages: for this adapter, each of the batch size of the widest, or of batch size 1.
            weights: a number a message, ``(n,)``, or one a message and item, ``(n, B)``; None: all 1. A message that
                weighs 0 is switched off, whatever it holds: rows of one batch may have different sharers, or none.
                Where all messages are of batch size 1, B is what the weights say.

        Returns:
            A message with the latent alone.

        Raises:
            MessageError, GeometryError, ShapeError, DTypeError, DeviceError: naming the message.
        """
        self._check_cross_context("combine")
        return combine(self, messages, weights)

    def accept_sharer(self, sharer: SharerSide | str) -> LatentCacheFlow:
        """Take messages of another sharer's half, too: a :class:`~lcf_fast.sharer.SharerSide` or its digest.

        Saved with the adapter. Returns self.
        """
        self._check_cross_context("accept_sharer")
        self.accepted_sharers |= {accepted_digest(self, sharer)}
        return self

    def sharer_side(self) -> SharerSide:
        """The sharer's half by itself, a copy: all that the sharer's process needs (see `lcf_fast.sharer`)."""
        self._check_cross_context("sharer_side")
        return SharerSide.of(self)

    def _make_origin(self) -> Origin:
        weights = self._weights()
        adapter = receiver_digest(self.config.receiver, self._kept, self.config.norm_eps, weights)
        return Origin(adapter, sharer_digest(self.config.sharer, self._kept, self._reads, weights))

    # --- what both share
    # -----------------------------------------------------------------------------------------

    # The ops check the layers that they get, and on the hot path each look at 28 of them costs host time: here only
    # the first is looked at, and all of them when the ops have found something, to say it in the caller's terms.

    def _receiver_layers(self, cache: Any, *lengths: Tensor | None) -> list[Pair]:
        return cache_layers(
            cache,
            name="receiver_cache",
            geometry=self.config.receiver,
            length=known_length(*lengths),
            every_layer=False,
        )

    def _as_callers_know_it(self, error: LCFError, receiver: list[Pair], sharer: list[Pair] | None) -> LCFError:
        """An error of the ops, which call the kept layers by their rows."""
        check_pairs(receiver, "receiver_cache", self.config.receiver)
        if sharer is not None:
            check_pairs(sharer, "sharer_cache", self.config.sharer)

        def name(found: re.Match[str]) -> str:
            side, row, part = found.groups()
            layers = self._kept if side == "receiver" else self._reads
            return f"{side}_cache layer {layers[int(row)]}{part.replace('.', ' ')}"

        argument, expected, got = (_ROW.sub(name, text) for text in (error.argument, error.expected, error.got))
        argument = f"{argument}_cache" if argument in ("receiver", "sharer") else argument
        return type(error)(argument, expected=expected, got=got)

    def _rebuilt(self, cache: Any, layers: list[Pair], edited: Sequence[Pair]) -> Any:
        layers = list(layers)
        for t, pair in zip(self._kept, edited):
            layers[t] = pair
        return rebuild_cache(cache, layers)

    @property
    def sharer_geometry(self) -> CacheGeometry:
        return self.config.sharer

    @property
    def receiver_geometry(self) -> CacheGeometry:
        return self.config.receiver

    def _check_cross_context(self, method: str) -> None:
        if not self.config.cross_context:
            raise GeometryError(
                "adapter",
                expected=f"an LCF-X adapter (cross_context=True) to {method} with",
                got="LCF: use fuse",
            )

    def _edit(self, in_place: bool, sharer: list[Pair] | None, receiver: list[Pair], **options: Any) -> Sequence[Pair]:
        weights, norm_eps = self._weights(), self.config.norm_eps
        if in_place:
            return ops.fuse_layers_(sharer, receiver, weights, live=self._live(), norm_eps=norm_eps, **options)
        if not self.training:
            return ops.fuse_layers(sharer, receiver, weights, live=self._live(), norm_eps=norm_eps, **options)
        noise = TrainingNoise(draw_seed(), self.gate_temperature, self.config.dropout)
        return ops.fuse_layers(sharer, receiver, weights, norm_eps=norm_eps, noise=noise, **options)

    def _weights(self) -> Mapping[str, Tensor]:
        return plain_parameters(self)

    def _live(self) -> Live:
        """The hard gates, on the host."""
        if torch.compiler.is_compiling():
            return self._live_when_traced()
        logit = self._weights()["gate_logit"]
        # A tensor made in inference mode does not count its changes.
        if logit.device.type == "cpu" or logit.is_inference():
            return _open(logit)
        return self._live_of(logit)

    def _live_of(self, logit: Tensor) -> Live:
        """The gates as they were last read, unless ``logit`` has changed since."""
        known = self._gates
        if known is None or known[0] is not logit or known[1:3] != (logit._version, logit.data_ptr()):
            check_has_memory("adapter", logit)
            known = self._gates = (logit, logit._version, logit.data_ptr(), _open(logit))
        return known[3]

    def _live_when_traced(self) -> Live:
        return _open(self._weights()["gate_logit"])

    # What torch.compiler.assume_constant_result sets: dynamo calls the function once, while tracing. Set by
    # hand since that helper imports the whole compiler.
    _live_when_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # --- pruning, saving
    # -----------------------------------------------------------------------------------------

    def prune(self, keep_layers: Iterable[int]) -> LatentCacheFlow:
        """Drop all projectors but those of these receiver layers, in place like ``nn.Module.half``; returns
        self.

        The parameters are new tensors, so make optimizers anew. Kept layers stay in ascending order.

        Args:
            keep_layers: receiver layers (not rows of the stacked parameters), each kept so far.

        Raises:
            IndexRangeError: a layer that the adapter does not hold. GeometryError: none, or one named twice.
        """
        kept = kept_layers(keep_layers, self._kept)
        rows = [self._kept.index(t) for t in kept]
        index = torch.tensor(rows, device=self.receiver_layers.device)
        for name, old in list(self._parameters.items()):
            assert old is not None
            new = nn.Parameter(old.detach().index_select(0, index), requires_grad=old.requires_grad)
            self._parameters[name] = new
        self.receiver_layers = self.receiver_layers.index_select(0, index)
        self.sharer_layers = self.sharer_layers.index_select(0, index)
        self._kept, self._reads = kept, tuple(self._reads[row] for row in rows)
        self._gates = None
        self.accepted_sharers = frozenset()  # their messages are for other layers
        return self

    def parameter_count(self) -> int:
        """Number of parameters held, over the kept layers."""
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
    ) -> LatentCacheFlow:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            directory: the folder.
            device: where the parameters go; None: the CPU.
            dtype: of the parameters; None: as saved.
            sharer, receiver: the models it is meant for, to be checked: that it was trained between them, where it
                says so. Of their configs, or CacheGeometry, the geometry alone is checked.

        Raises:
            CheckpointError: missing, damaged, or of an unknown version. GeometryError: not for these models.
                Both before any weight is used.
        """
        from .checkpoint import load

        return load(cls, directory, device=device, dtype=dtype, sharer=sharer, receiver=receiver)

    def extra_repr(self) -> str:
        c, kept = self.config, self._kept
        sides = (f"{g.layers}x{g.kv_heads}x{g.head_dim}" for g in (c.sharer, c.receiver))
        layers = f"all {len(kept)} layers" if len(kept) == c.receiver.layers else f"layers={kept}"
        kind = "LCF-X" if c.cross_context else "LCF"
        return f"{kind}, {' -> '.join(sides)}, bottleneck={c.bottleneck}, {layers}"


def _open(logit: Tensor) -> Live:
    return tuple((key > 0, value > 0) for key, value in logit.detach().tolist())
