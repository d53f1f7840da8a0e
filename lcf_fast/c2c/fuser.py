"""`C2CFuser`: all layers of a C2C fuser, on caches of transformers or plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..caches import Pair, cache_layers, check_pairs, rebuild_cache
from ..checks import check_index, check_positions
from ..config import CacheGeometry, kept_layers
from ..errors import DTypeError, GeometryError, ShapeError
from ..inputs import check_device, hide_padding, known_length, real_tokens
from .config import C2CConfig
from .projector import C2CProjector, open_gates

__all__ = ["C2CFuser", "Call", "part_of", "with_rest"]


class Call(NamedTuple):
    """A call's arguments, checked: what to edit, and with what."""

    sharer: list[Pair]
    receiver: list[Pair]
    rows: Tensor | None  # (B, stop - start) int64 in [0, M): the sharer's, on the receiver's device
    mask: Tensor | None  # (B, stop - start) bool
    start: int
    stop: int


class C2CFuser(nn.Module):
    """A Cache-to-Cache fuser (arXiv 2510.03215): a :class:`C2CProjector` a kept receiver layer.

    :meth:`fuse` takes what ``LatentCacheFlow.fuse`` takes, so either can serve a channel, and the attributes that
    training reads are here under the same names. Products run in the receiver cache's dtype; parameters of another
    dtype are cast in every call, so outside of training give the fuser the models' dtype (``fuser.to(dtype)``).

    A gate is open where its logit is above zero. What a closed gate leaves is passed through untouched and costs
    nothing. On a GPU the gates are read once, and again whenever a logit changes in place; an edit through ``.data``
    escapes this.

    Like any module a fresh fuser is in training mode (see :class:`C2CProjector`), and one from :meth:`from_pretrained`
    in eval mode. In training mode each call draws a seed of its noise from torch's default CPU generator.

    Args:
        config: geometries, widths and layer map.
        keep_layers: receiver layers that get a projector; None: all of them.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Raises:
        GeometryError, DTypeError, IndexRangeError: naming the argument.
    """

    receiver_layers: Tensor
    sharer_layers: Tensor

    def __init__(
        self,
        config: C2CConfig,
        *,
        keep_layers: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, C2CConfig):
            raise DTypeError("config", expected="a C2CConfig", got=type(config).__name__)
        every = tuple(range(config.receiver.layers))
        kept = every if keep_layers is None else kept_layers(keep_layers, every)
        self.config = config
        #: Receiver layers that have a projector, ascending, and the sharer layer that each reads.
        self.kept, self.reads = kept, tuple(config.sharer_layers[t] for t in kept)
        self.projectors = nn.ModuleList(C2CProjector(config, device=device, dtype=dtype) for _ in kept)
        # The same as tensors, as training reads them off an adapter; no part of a checkpoint's state dicts.
        for name, layers in (("receiver_layers", kept), ("sharer_layers", self.reads)):
            self.register_buffer(name, torch.tensor(layers, dtype=torch.int64), persistent=False)
        self._gate_temperature = config.initial_temperature
        self._gates: tuple[list[nn.Parameter], list[tuple[int, int]], list[tuple[bool, bool]]] | None = None

    @property
    def gate_temperature(self) -> float:
        """Of the training gates, above 0; a trainer anneals it. Each projector holds it as a buffer."""
        return self._gate_temperature

    @gate_temperature.setter
    def gate_temperature(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise GeometryError("gate_temperature", expected="a finite number above 0", got=str(value))
        self._gate_temperature = float(value)
        for projector in self._each():
            projector.gate_temperature.fill_(value)

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
        """The receiver's cache, edited with the sharer's. A new cache of the same kind.

        Args, result and errors: as :meth:`lcf_fast.LatentCacheFlow.fuse`. On a GPU the rows that ``sharer_index`` names
        are not read by the host: one beyond the sharer's cache counts as "none".
        """
        call = self.checked(
            sharer_cache, receiver_cache, sharer_index, positions, attention_mask, sharer_attention_mask
        )
        layers = list(call.receiver)
        if call.stop == call.start or call.sharer[0][0].shape[2] == 0:
            return rebuild_cache(receiver_cache, layers)
        training, generator = self.training, None
        if training:
            device = layers[0][0].device
            generator = torch.Generator(device).manual_seed(
                int(torch.randint(1 << 31, (), dtype=torch.int64, device="cpu"))
            )
        gates = [(True, True)] * len(self.kept) if training else self._live()
        for projector, t, s, live in zip(self._each(), self.kept, self.reads, gates):
            if not any(live):
                continue
            own = call.receiver[t]
            edited = projector(
                part_of(call.sharer[s], call) if call.rows is None else call.sharer[s],
                part_of(own, call),
                sharer_index=call.rows,
                edit_mask=call.mask,
                live=live,
                generator=generator,
            )
            key, value = (with_rest(old, new, call) if on else old for old, new, on in zip(own, edited, live))
            layers[t] = (key, value)
        return rebuild_cache(receiver_cache, layers)

    def checked(
        self,
        sharer_cache: Any,
        receiver_cache: Any,
        sharer_index: Tensor | None,
        positions: tuple[int, int] | None,
        attention_mask: Tensor | None,
        sharer_attention_mask: Tensor | None,
    ) -> Call:
        """What :meth:`fuse` is given, checked and brought into one form."""
        aligned = sharer_index is None  # then both have one length, and either mask tells it
        lengths = sharer_index, attention_mask, sharer_attention_mask if aligned else None
        receiver = self._layers_of("receiver_cache", receiver_cache, *lengths)
        sharer = self._layers_of(
            "sharer_cache", sharer_cache, sharer_attention_mask, attention_mask if aligned else None
        )
        key, sharer_key = receiver[0][0], sharer[0][0]
        check_device("receiver_cache", key, next(self.parameters()), "the fuser's parameters")
        check_device("sharer_cache", sharer_key, key)
        batch, _, length, _ = key.shape
        if sharer_key.shape[0] != batch:
            raise ShapeError(
                "sharer_cache", expected=f"batch size {batch} as the receiver's", got=str(sharer_key.shape[0])
            )
        if aligned and sharer_key.shape[2] != length:
            expected = f"{length} positions as the receiver's (or a sharer_index that aligns them)"
            raise ShapeError("sharer_cache", expected=expected, got=str(sharer_key.shape[2]))
        start, stop = check_positions(positions, length)
        mask = real_tokens("attention_mask", attention_mask, key)
        visible = real_tokens("sharer_attention_mask", sharer_attention_mask, sharer_key)
        index: Tensor | None = None
        if sharer_index is not None:
            check_index(sharer_index, batch, length, sharer_key.shape[2])
            if visible is not None:
                sharer_index = hide_padding(sharer_index, visible, key)
            index = sharer_index.to(key.device, torch.int64, non_blocking=True)
            visible = (index >= 0) & (index < sharer_key.shape[2])
            index = index.clamp(0, max(sharer_key.shape[2] - 1, 0))
        if visible is not None:
            mask = visible if mask is None else mask & visible
        mask, index = (None if part is None else part[:, start:stop] for part in (mask, index))
        return Call(sharer, receiver, index, mask, start, stop)

    def _layers_of(self, name: str, cache: Any, *lengths: Tensor | None) -> list[Pair]:
        """The whole model's layers, those that are read all checked."""
        geometry = self.config.receiver if name == "receiver_cache" else self.config.sharer
        pairs = cache_layers(cache, name=name, geometry=geometry, length=known_length(*lengths), every_layer=False)
        check_pairs(pairs, name, geometry)
        return pairs

    def _each(self) -> Sequence[C2CProjector]:
        return cast("Sequence[C2CProjector]", self.projectors)

    def _live(self) -> list[tuple[bool, bool]]:
        """The hard gates, on the host."""
        logits = [logit for p in self._each() for logit in (p.key_gate_logit, p.value_gate_logit)]
        if any(logit.is_inference() for logit in logits):  # such a tensor does not count its changes
            return open_gates(list(self._each()))
        versions = [(logit._version, logit.data_ptr()) for logit in logits]
        known = self._gates
        # The tensors themselves are kept, not their ids: another could come to lie where one was.
        if known is None or known[1] != versions or any(old is not new for old, new in zip(known[0], logits)):
            known = self._gates = (logits, versions, open_gates(list(self._each())))
        return known[2]

    @property
    def sharer_geometry(self) -> CacheGeometry:
        return self.config.sharer

    @property
    def receiver_geometry(self) -> CacheGeometry:
        return self.config.receiver

    def parameter_count(self) -> int:
        """Number of parameters held, over the kept layers; a projector that two layers share counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write the released layout to a folder; see :mod:`lcf_fast.c2c.checkpoint`."""
        from .checkpoint import save

        save(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        *,
        sharer: Any = None,
        receiver: Any = None,
        sharer_name: str | int | None = None,
        receiver_name: str | int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> C2CFuser:
        """Read a released fuser, or what :meth:`save_pretrained` wrote.

        Args:
            directory: the folder with ``projector_config.json``.
            sharer, receiver: the two models (or their configs, or CacheGeometry). The released layout does not say how
                many layers they have; what :meth:`save_pretrained` wrote does, and is checked against them.
            sharer_name, receiver_name: keys of the layer map, where it names several.
            device: where the parameters go; None: the CPU.
            dtype: of the parameters; None: as saved.

        Raises:
            CheckpointError: missing, damaged, of a class or form that is not C2C's. GeometryError: not for these
                models. DTypeError: ``dtype``. All before any weight is used.
        """
        from .checkpoint import load

        return load(
            cls,
            directory,
            sharer=sharer,
            receiver=receiver,
            sharer_name=sharer_name,
            receiver_name=receiver_name,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        c = self.config
        sides = " -> ".join(f"{g.layers}x{g.kv_heads}x{g.head_dim}" for g in (c.sharer, c.receiver))
        layers = f"all {len(self.kept)} layers" if len(self.kept) == c.receiver.layers else f"layers={self.kept}"
        return f"C2C, {sides}, hidden={c.hidden}, {layers}"


def part_of(pair: Pair, call: Call) -> Pair:
    """The positions to edit."""
    key, value = (tensor[:, :, call.start : call.stop] for tensor in pair)
    return key, value


def with_rest(old: Tensor, new: Tensor, call: Call) -> Tensor:
    """An edited range put back between the positions that were not to be edited."""
    if (call.start, call.stop) == (0, old.shape[2]):
        return new
    return torch.cat([old[:, :, : call.start], new, old[:, :, call.stop :]], 2)
