"""What LCF-X and slots send: one small tensor a layer, whatever the length of the sharer's context."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .checks import describe
from .config import CacheGeometry
from .errors import DeviceError, DTypeError, GeometryError, IndexRangeError, MessageError, ShapeError
from .files import write_whole
from .fingerprint import Origin

__all__ = ["BATCH_AXIS", "MAX_BYTES", "Message"]

#: The tensors of a message, and which of their axes runs over the items.
BATCH_AXIS = {"latent": 1, "summary": 2, "span_weights": 1, "slot_weights": 1}

#: Of what is sent to be looked at, the axis whose length may differ from item to item.
_RAGGED = {"span_weights": 3, "slot_weights": 4}

#: What a reader takes at the most unless it is told otherwise: 64 MiB, some 500 summaries of the published pair.
MAX_BYTES = 1 << 26


#: The types of the fields, and how they are called.
_FIELDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(BATCH_AXIS, ((Tensor, NoneType), "a tensor or None")),
    "receiver_layers": (Sequence, "ints"),
    "spans": (int, "an int"),
    "sharer": ((CacheGeometry, NoneType), "a CacheGeometry or None"),
    "receiver": ((CacheGeometry, NoneType), "a CacheGeometry or None"),
    "metadata": (Mapping, "text by name"),
    "made_by": ((Origin, Callable, NoneType), "an Origin, or a function that finds it"),
}
#: Types of all fields of messages that were right.
_seen: set[tuple[type, ...]] = set()


@dataclass(frozen=True, eq=False)
class Message:
    """The sharer's context as the receiver's adapter reads it (spec, section 4).

    It is of a fixed size, can be cut and stacked along the batch, and goes over a wire or to a file as bytes that
    say what they are and are checked whole before any of them is used (:mod:`lcf_fast.wire`).

    Raises:
        DTypeError: a field of another type.

    Attributes:
        latent: ``(L, B, d)``, float32 as made: ``c = W_down[:, :2Cs]·[K*;V*] + b_down`` for each kept layer.
            All that ``adapter.inject`` needs. None where only the summary was sent. Of slots ``(L, B, k, d)``, one
            latent a slot, all that ``LatentSlots.append`` and ``prefix`` need.
        receiver_layers: the receiver layer of each of the L latents, strictly ascending.
        spans: number of spans P that were pooled, empty ones included; of the item that has most. Of slots: spans that
            were pooled to slots each; 1 where the whole context was.
        summary: ``(L, 2, B, Hs, Ds)``, the pooled keys (0) and values (1) themselves, ``K*`` and ``V*``; they
            do not depend on ``W_down``. May be None.
        span_weights: ``(L, B, Hs, P)``, what each span weighs in the summary; sums to 1 over P. For inspection,
            None where it was not asked for.
        sharer, receiver: geometries of the two models' caches.
        metadata: the user's own notes, text by name.
        made_by: digests of the two halves of the adapter, or a function that finds them when first asked, since
            they cost a pass over the weights; read it as :attr:`origin`. None: not known, as of a compiled
            ``summarize``; then any adapter of its shape takes it.
        slot_weights: ``(L, B, Hs, k, N)``, what each of the sharer's N tokens weighs in each slot; sums to 1 over N.
            For inspection, None where it was not asked for.
    """

    latent: Tensor | None
    receiver_layers: tuple[int, ...]
    spans: int
    summary: Tensor | None = None
    span_weights: Tensor | None = None
    sharer: CacheGeometry | None = None
    receiver: CacheGeometry | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    made_by: Origin | Callable[[], Origin] | None = None
    slot_weights: Tensor | None = None

    def __post_init__(self) -> None:
        # Types alone: whether the fields fit each other, and an adapter, is for whoever uses them to say.
        if torch.compiler.is_compiling():
            return
        types = tuple(map(type, self.__dict__.values()))
        if types in _seen:  # most messages are alike, and made on the hot path
            return
        for name, (kinds, form) in _FIELDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds):
                raise DTypeError(f"message.{name}", expected=form, got=describe(value)[:80])
        _seen.add(types)

    @property
    def origin(self) -> Origin | None:
        """Which adapter made it and which it is for; None where that is not known."""
        made_by = self.made_by
        if made_by is not None and not isinstance(made_by, Origin):
            made_by = made_by()
            object.__setattr__(self, "made_by", made_by)  # frozen to its users: the answer does not change
        return made_by

    def __copy__(self) -> Message:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Message:
        # A function that finds the origin holds on to a whole adapter, of which no copy is wanted.
        memo[id(self.made_by)] = self.made_by
        return replace(self, **{name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})

    def __getstate__(self) -> dict[str, Any]:
        # In another process there is no adapter to ask.
        return {**self.__dict__, "made_by": self.origin}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of ``latent``, ``summary``, ``span_weights`` and ``slot_weights`` that are there, by name."""
        return {name: tensor for name in BATCH_AXIS if (tensor := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the latent, which is all that a receiver needs; of the summary where that alone was sent."""
        needed = self.summary if self.latent is None else self.latent
        return 0 if needed is None else int(needed.nbytes)

    @property
    def slots(self) -> int:
        """How many slots it holds; 0 for a message of LCF-X."""
        return 0 if self.latent is None or self.latent.dim() != 4 else int(self.latent.shape[2])

    def take_slots(self, count: int) -> Message:
        """The message of its first ``count`` slots alone, whose tensors are views of this one's.

        An adapter trained with slot dropout is trained for any number of them.

        Raises:
            IndexRangeError: ``count`` is not 1 to :attr:`slots`.
        """
        if type(count) is not int or not 1 <= count <= self.slots:
            expected = f"1 to {self.slots} slots" if self.slots else "a message of slots"
            raise IndexRangeError("count", expected=expected, got=repr(count))
        assert self.latent is not None
        weights = None if self.slot_weights is None else self.slot_weights.narrow(3, 0, count)
        return replace(self, latent=self.latent.narrow(2, 0, count), slot_weights=weights)

    def to(self, *args: Any, **kwargs: Any) -> Message:
        """The message on another device or in another float dtype; arguments as those of `Tensor.to`."""
        moved: dict[str, Any] = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()}
        return replace(self, **moved)

    # --- items

    def split(self) -> list[Message]:
        """One message an item of the batch, whose tensors are views of this one's; ``spans`` stays the batch's."""
        sizes = {
            tuple(tensor.shape[axis : axis + 1]) for name, tensor in self.tensors.items() for axis in [BATCH_AXIS[name]]
        }
        if len(sizes) != 1 or () in sizes:
            got = str({name: tuple(tensor.shape) for name, tensor in self.tensors.items()})
            raise ShapeError("message", expected="tensors of one batch size", got=got)
        ((batch,),) = sizes
        items: list[dict[str, Any]] = [
            {name: tensor.narrow(BATCH_AXIS[name], item, 1) for name, tensor in self.tensors.items()}
            for item in range(batch)
        ]
        return [replace(self, **item) for item in items]

    @classmethod
    def stack(cls, messages: Iterable[Message]) -> Message:
        """Messages to one receiver as one, along the batch.

        ``span_weights`` of fewer spans and ``slot_weights`` of fewer tokens are padded with zeros; of ``metadata``,
        what all of them say alike is kept.

        Raises:
            MessageError: no message, not all with the same tensors, or of different origins.
            GeometryError: different kept layers or geometries. ShapeError, DTypeError, DeviceError: tensors that
                differ in more than the batch.
        """
        parts = list(messages) if isinstance(messages, Iterable) else [messages]
        if not parts or not all(isinstance(part, Message) for part in parts):
            raise MessageError("messages", expected="at least one Message", got=f"{parts}"[:80])
        first = parts[0]
        for index, part in enumerate(parts):
            _check_alike(f"messages[{index}]", part, first)
        rows = [part.tensors for part in parts]
        for name in first.tensors.keys() & _RAGGED.keys():
            widest = max(row[name].shape[-1] for row in rows)
            for row in rows:
                row[name] = torch.nn.functional.pad(row[name], (0, widest - row[name].shape[-1]))
        stacked: dict[str, Any] = {
            name: torch.cat([row[name] for row in rows], axis) for name, axis in BATCH_AXIS.items() if name in rows[0]
        }
        metadata = {
            name: text
            for name, text in first.metadata.items()
            if all(part.metadata.get(name) == text for part in parts)
        }
        return replace(first, **stacked, spans=max(part.spans for part in parts), metadata=metadata)

    # --- bytes

    def to_bytes(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        contents: Sequence[str] = ("latent",),
        key: bytes | None = None,
    ) -> bytes:
        """The message as bytes, the same for the same message and arguments (:mod:`lcf_fast.wire`).

        Args:
            dtype: what numbers are stored in: a float dtype, ``"int8"`` or ``"fp8"`` (torch dtypes or names).
                None: each tensor as it is, so that :meth:`from_bytes` gives back the same bits.
            contents: any of ``"latent"``, ``"summary"`` and ``"span_weights"``, and one of the first two; of slots
                ``"latent"``, and ``"slot_weights"`` or not.
            key: 1 to 64 secret bytes; only who has them can make bytes that :meth:`from_bytes` takes with them.
                None: a checksum, which finds damage but no forger.

        Raises:
            MessageError: the message lacks a tensor that is asked for, its geometries or its origin; holds NaN,
                infinity, or numbers that ``dtype`` cannot hold; fields that contradict each other.
            ShapeError, DTypeError: tensors or arguments of another shape or type than described.
        """
        from .wire import encode

        return encode(self, dtype=dtype, contents=contents, key=key)

    @classmethod
    def from_bytes(cls, data: Any, *, key: bytes | None = None, max_bytes: int = MAX_BYTES) -> Message:
        """The message that :meth:`to_bytes` wrote. Nothing in ``data`` is trusted; nothing is unpickled.

        Args:
            data: bytes, bytearray, memoryview, mmap or what else has a buffer. Where it is writable the tensors
                are views of it: leave it alone as long as they are in use. Where it is not, they are of a copy.
            key: the key it was written with. With a key, a message without one is refused, and the reverse.
            max_bytes: what is longer is refused.

        Returns:
            A message on the CPU; what was quantised comes back as float32.

        Raises:
            MessageError: damaged, cut off, too long, of another version, with another key, or with contents that
                contradict each other or are not finite. DTypeError: ``data`` has no buffer.
        """
        from .wire import decode

        return decode(data, key=key, max_bytes=max_bytes)

    def save(
        self,
        path: str | PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        contents: Sequence[str] = ("latent",),
        key: bytes | None = None,
    ) -> None:
        """Write :meth:`to_bytes` to a file, whole or not at all. Arguments and errors as there, and OSError."""
        write_whole(Path(path), self.to_bytes(dtype=dtype, contents=contents, key=key))

    @classmethod
    def load(cls, path: str | PathLike[str], *, key: bytes | None = None, max_bytes: int = MAX_BYTES) -> Message:
        """Read what :meth:`save` wrote, as :meth:`from_bytes`. A file of another size is not read at all.

        Raises:
            MessageError: as :meth:`from_bytes`; no file that can be read.
        """
        from .wire import decode, read_file

        return decode(read_file(path, max_bytes=max_bytes), key=key, max_bytes=max_bytes)


def _check_alike(name: str, part: Message, first: Message) -> None:
    """``part`` can be stacked onto ``first``."""
    for field_name in ("receiver_layers", "sharer", "receiver"):
        got, expected = getattr(part, field_name), getattr(first, field_name)
        if got != expected:
            raise GeometryError(f"{name}.{field_name}", expected=f"{expected} as the first's", got=f"{got}")
    if part.tensors.keys() != first.tensors.keys():
        raise MessageError(name, expected=f"{list(first.tensors)} as the first", got=f"{list(part.tensors)}")
    # Equal functions find equal origins, without asking either.
    if part.made_by != first.made_by and part.origin != first.origin:
        raise MessageError(f"{name}.origin", expected=f"{first.origin} as the first's", got=f"{part.origin}")
    for tensor_name, tensor in part.tensors.items():
        other, where = first.tensors[tensor_name], f"{name}.{tensor_name}"
        free = {BATCH_AXIS[tensor_name], _RAGGED.get(tensor_name)}
        if tensor.dim() <= max(axis for axis in free if axis is not None):
            expected = f"an axis {BATCH_AXIS[tensor_name]}, of items"
            raise ShapeError(where, expected=expected, got=f"{tuple(tensor.shape)}")
        shapes = [[size for axis, size in enumerate(t.shape) if axis not in free] for t in (tensor, other)]
        if tensor.dim() != other.dim() or shapes[0] != shapes[1]:
            expected = f"{tuple(other.shape)} but for the batch"
            raise ShapeError(where, expected=expected, got=f"{tuple(tensor.shape)}")
        if tensor.dtype != other.dtype:
            raise DTypeError(where, expected=f"{other.dtype} as the first's", got=f"{tensor.dtype}")
        if tensor.device != other.device:
            raise DeviceError(where, expected=f"{other.device} as the first's", got=f"{tensor.device}")
