"""A message as bytes, version 1.

All numbers are little-endian, and so must the host be. A fixed preamble of 56 bytes, then a safetensors file::

    offset  size
         0     8  magic: 89 4C 43 46 0D 0A 1A 0A ("\\x89LCF\\r\\n\\x1a\\n", which no transfer as text survives)
         8     4  version: 1
        12     4  flags: bit 0, a key was used; all others 0
        16     8  length: of all of it, these 56 bytes included
        24    32  digest: BLAKE2b of 32 bytes, with the key if one was used, over bytes 0 to 23 and 56 to the end
        56     8  length of the safetensors header, a multiple of 8, at most 65,536
        64     .  that header: JSON, padded with spaces
         .     .  the tensors' data, back to back to the end

The tensors, each at a multiple of its item size, and nothing else:

- ``latent (L, B, width)``, ``summary (L, 2, B, Hs, Ds)``, ``span_weights (L, B, Hs, P)``: any of them, and one of the
  first two. Stored as F64, F32, BF16, F16, or, the first two, as I8 or F8_E4M3.
- ``latent_scale (L, B)``, ``summary_scale (L, 2, B)``: F32, there if and only if the tensor is I8 or F8_E4M3, whose
  numbers they multiply.
- of slots ``latent (L, B, k, width)``, its scale ``(L, B, k)``, and with it ``slot_weights (L, B, Hs, k, N)`` or not;
  neither of the other two.

The ``__metadata__`` of the safetensors header holds one entry, ``lcf_fast``, whose text is JSON again (of several
entries the order in the file would not be fixed, and equal messages are equal bytes)::

    {"batch": B, "dtype": {"latent": "bfloat16"}, "format": "lcf_fast.message", "layers": "0-20,22,24-27",
     "metadata": {}, "origin": ["<32 hex digits>", "<32 hex digits>"], "receiver": [layers, KV heads, head dim],
     "sharer": [layers, KV heads, head dim], "spans": P, "width": d}

``layers`` are the receiver's, in the shortest form; ``dtype`` names every tensor but the scales; ``origin`` is the
digest of the receiver's half of the adapter and that of the sharer's half; ``metadata`` is the user's, at most 16,384
bytes as JSON; ``width`` is null where there is no latent. All keys are there and no others, but for ``"slots": k`` of
slots and ``"tokens": N`` of ``slot_weights``, which are there only with them. This description implies the name, dtype
and shape of every tensor, and a reader holds the safetensors header to that.

A reader checks in this order, and makes nothing before the checks that come before it hold: magic, version, flags,
length (as stated, as given, as allowed), digest, header, description, tensors' places, tensors' numbers.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .checks import check_has_memory, check_tensor
from .config import CacheGeometry
from .description import SCALE_AXES, Description, check_metadata_size, parsed, refuse, strict_json
from .errors import DTypeError, MessageError, ShapeError
from .fingerprint import Origin
from .message import BATCH_AXIS, Message
from .quantization import STORAGES, restore, storage_of, store

__all__ = [
    "PREAMBLE",
    "VERSION",
    "Layout",
    "check_preamble",
    "decode",
    "decode_with_layout",
    "encode",
    "read_file",
    "stated_length",
]

MAGIC = b"\x89LCF\r\n\x1a\n"
VERSION = 1
#: Bytes before the safetensors file.
PREAMBLE = 56

_DIGEST = slice(24, PREAMBLE)
_KEYED = 1
_MAX_HEADER = 1 << 16
#: Tensors of softmax weights.
_SHARES = {"span_weights", "slot_weights"}
#: What a message's tensors are before they are quantised.
_FLOATS = tuple(storage.dtype for storage in STORAGES.values() if not storage.top)


# --- writing
# ---------------------------------------------------------------------


def encode(message: Message, *, dtype: Any, contents: Sequence[str], key: bytes | None) -> bytes:
    """See `Message.to_bytes`."""
    from safetensors.torch import save

    _check_key(key)
    wanted = None if dtype is None else storage_of(dtype)
    held = _asked_for(message, contents)
    storages = {name: storage_of(tensor.dtype) if wanted is None else wanted for name, tensor in held.items()}
    for name in storages.keys() & _SHARES:
        if storages[name].top:
            storages[name] = STORAGES["float16"]  # weights in [0, 1], only to be looked at: they need no scale
    description = _describe(message, held, {name: storage.name for name, storage in storages.items()})
    stored: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if tuple(tensor.shape) != description.shape(name):
            expected = f"{description.shape(name)}, as the other fields say"
            raise ShapeError(f"message.{name}", expected=expected, got=str(tuple(tensor.shape)))
        check_has_memory(f"message.{name}", check_tensor(f"message.{name}", tensor))
        stored[name], scale = store(f"message.{name}", tensor, storages[name], description.scale_axes(name))
        if name in _SHARES:
            _check_weights(name, stored[name])
        if scale is not None:
            stored[f"{name}_scale"] = scale
    inside = save(stored, metadata={"lcf_fast": description.to_json()})
    flags = 0 if key is None else _KEYED
    numbers = ((VERSION, 4), (flags, 4), (PREAMBLE + len(inside), 8))
    preamble = MAGIC + b"".join(number.to_bytes(size, "little") for number, size in numbers)
    return b"".join((preamble, _digest(preamble, inside, key), inside))


def _asked_for(message: Message, contents: Any) -> dict[str, Tensor]:
    """The tensors to be sent, by name."""
    names = ", ".join(BATCH_AXIS)
    if not isinstance(contents, (tuple, list)) or not all(isinstance(name, str) for name in contents):
        raise DTypeError("contents", expected=f"a tuple of names among {names}", got=repr(contents)[:80])
    if not set(contents) <= BATCH_AXIS.keys() or not set(contents) & SCALE_AXES.keys():
        raise MessageError("contents", expected=f"names among {names}, one of the first two", got=f"{contents}"[:80])
    held = {}
    for name in BATCH_AXIS:
        tensor = getattr(message, name)
        if name not in contents:
            continue
        if tensor is None:
            raise MessageError(f"message.{name}", expected=f"a tensor, since contents={tuple(contents)}", got="None")
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
            got = str(getattr(tensor, "dtype", type(tensor).__name__))
            raise DTypeError(f"message.{name}", expected=f"a tensor of {', '.join(map(str, _FLOATS))}", got=got)
        if tensor.dim() <= BATCH_AXIS[name] or tensor.numel() == 0:
            expected = "at least one layer and item"
            raise ShapeError(f"message.{name}", expected=expected, got=str(tuple(tensor.shape)))
        held[name] = tensor
    return held


def _describe(message: Message, held: Mapping[str, Tensor], dtype: dict[str, str]) -> Description:
    for side in ("sharer", "receiver"):
        if not isinstance(getattr(message, side), CacheGeometry):
            got = repr(getattr(message, side))
            raise MessageError(f"message.{side}", expected="a CacheGeometry, as an adapter's messages have", got=got)
    origin = message.origin
    if not isinstance(origin, Origin):
        expected = "an Origin, as an adapter's messages have (compiled ones: replace(message, made_by=adapter.origin))"
        raise MessageError("message.made_by", expected=expected, got=repr(origin))
    layers = message.receiver_layers
    if not isinstance(layers, (tuple, list)) or any(type(layer) is not int or layer < 0 for layer in layers):
        raise DTypeError("message.receiver_layers", expected="a tuple of ints of at least 0", got=f"{layers}"[:80])
    if type(message.spans) is not int:
        raise DTypeError("message.spans", expected="an int", got=repr(message.spans))
    metadata = dict(message.metadata) if isinstance(message.metadata, Mapping) else {"": None}
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise DTypeError("message.metadata", expected="text by name", got=ascii(message.metadata)[:80])
    assert message.sharer is not None and message.receiver is not None
    name, tensor = next(iter(held.items()))
    made = Description(
        batch=tensor.shape[BATCH_AXIS[name]],
        dtype=dtype,
        layers=tuple(layers),
        metadata=metadata,
        origin=origin,
        receiver=message.receiver,
        sharer=message.sharer,
        spans=message.spans,
        width=tensor.shape[-1] if name == "latent" else None,
        slots=message.slots,
        tokens=held["slot_weights"].shape[-1] if "slot_weights" in held else 0,
    )
    check_metadata_size(metadata)  # first: what UTF-8 cannot hold has no JSON that could be read back
    return parsed(made.to_json())


def _check_weights(name: str, weights: Tensor) -> None:
    """Softmax weights, but for rounding."""
    smallest, largest = (float(end) for end in weights.aminmax())
    if smallest < 0 or largest > 1.001:
        refuse(name, "weights in [0, 1]", (smallest, largest))


# --- reading
# ---------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a message lies in its bytes.

    Attributes:
        version: of the form.
        keyed: whether it was written with a key.
        header: bytes of everything but the tensors' data.
        payload: bytes of the tensors' data, scales included.
        dtypes: what each tensor's numbers are stored in, scales not included.
    """

    version: int
    keyed: bool
    header: int
    payload: int
    dtypes: Mapping[str, str]


def stated_length(preamble: bytes | bytearray | memoryview) -> int:
    """The length in bytes that a message of this version states for itself, from its first ``PREAMBLE`` bytes.

    Raises:
        MessageError: too few bytes, no message, or of an unknown version.
    """
    if len(preamble) < PREAMBLE:
        refuse("length", f"at least {PREAMBLE} bytes", len(preamble))
    if bytes(preamble[:8]) != MAGIC:
        refuse("magic", f"{MAGIC!r}", bytes(preamble[:8]))
    version = int.from_bytes(preamble[8:12], "little")
    if version != VERSION:
        refuse("version", f"{VERSION}, the only one known here", version)
    return int.from_bytes(preamble[16:24], "little")


def check_preamble(preamble: bytes | bytearray | memoryview, *, key: bytes | None, max_bytes: int) -> int:
    """:func:`stated_length` of a message that a reader takes, as far as these bytes tell.

    Raises:
        MessageError: also: keyed where ``key`` is None, or not where it is not; longer than ``max_bytes``.
    """
    _check_key(key)
    _check_max_bytes(max_bytes)
    length, flags = stated_length(preamble), int.from_bytes(preamble[12:16], "little")
    if flags not in (0, _KEYED):
        refuse("flags", f"0 or {_KEYED}", flags)
    if flags and key is None:
        refuse("key", "the key that it was written with", key)
    if key is not None and not flags:
        refuse("key", "a message written with a key", "one without")
    if not PREAMBLE + 8 <= length <= max_bytes:
        refuse("length", f"{PREAMBLE + 8} to {max_bytes} bytes (max_bytes)", length)
    return length


def decode(data: Any, *, key: bytes | None, max_bytes: int) -> Message:
    """See `Message.from_bytes`."""
    return decode_with_layout(data, key=key, max_bytes=max_bytes)[0]


def decode_with_layout(data: Any, *, key: bytes | None, max_bytes: int) -> tuple[Message, Layout]:
    """The message, as :func:`decode`, and how it lies in ``data``."""
    view = _view(data)
    length = check_preamble(view[:PREAMBLE], key=key, max_bytes=max_bytes)
    if length != view.nbytes:
        refuse("length", f"{length} bytes as it states", view.nbytes)
    if not hmac.compare_digest(_digest(view[: _DIGEST.start], view[PREAMBLE:], key), view[_DIGEST]):
        expected = "bytes as they were written" if key is None else "bytes as they were written, with this key"
        raise MessageError("message.digest", expected=expected, got="others")
    size = int.from_bytes(view[PREAMBLE : PREAMBLE + 8], "little")
    start = PREAMBLE + 8 + size
    if size > _MAX_HEADER or size % 8 or start >= length:
        most = min(_MAX_HEADER, length - PREAMBLE - 9)
        refuse("header", f"a multiple of 8 bytes, at most {most}", size)
    description, places = _header(view[PREAMBLE + 8 : start], length - start)
    tensors = _tensors(view, start, description, places)
    message = Message(
        latent=tensors.get("latent"),
        receiver_layers=description.layers,
        spans=description.spans,
        summary=tensors.get("summary"),
        span_weights=tensors.get("span_weights"),
        slot_weights=tensors.get("slot_weights"),
        sharer=description.sharer,
        receiver=description.receiver,
        metadata=description.metadata,
        made_by=description.origin,
    )
    return message, Layout(VERSION, key is not None, start, length - start, description.dtype)


def _view(data: Any) -> memoryview:
    try:
        view = memoryview(data)
        # An empty view cannot be cast, and is no message either way.
        return view.cast("B") if view.nbytes else memoryview(b"")
    except (TypeError, ValueError) as error:  # no buffer, one with gaps or of structures, a closed one
        got = f"{type(data).__name__}: {error}"
        raise DTypeError("data", expected="bytes, or what has a contiguous buffer", got=got) from None


def _header(text: memoryview, payload: int) -> tuple[Description, dict[str, int]]:
    """The description, and where in the payload each tensor begins."""
    try:
        entries = strict_json("header", str(text, "utf-8"))
    except UnicodeDecodeError as error:
        raise MessageError("message.header", expected="UTF-8", got=error.reason) from None
    if bytes(text[:1]) != b"{":  # safetensors allows no white space before it
        refuse("header", "a JSON object", bytes(text[:8]))
    notes = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(notes, dict) or notes.keys() != {"lcf_fast"} or not isinstance(notes["lcf_fast"], str):
        refuse("header", "a safetensors header with one text, lcf_fast, as its metadata", notes)
    description = parsed(notes["lcf_fast"])
    wanted = description.tensors()
    if entries.keys() != wanted.keys():
        refuse("header", f"the tensors {', '.join(wanted)}", list(entries))
    places = {}
    for name, (code, shape, itemsize) in wanted.items():
        size = prod(shape) * itemsize
        begin = _entry(name, entries[name], code, shape, size)
        if begin % itemsize:
            refuse(f"header.{name}", f"data at a multiple of {itemsize}", begin)
        places[name] = begin
    end = 0
    for name, begin in sorted(places.items(), key=lambda place: place[1]):
        if begin != end:
            refuse(f"header.{name}", f"data from byte {end}", begin)
        code, shape, itemsize = wanted[name]
        end += prod(shape) * itemsize
    if end != payload:
        refuse("header", f"tensors of {payload} bytes in all", end)
    return description, places


def _entry(name: str, entry: Any, code: str, shape: tuple[int, ...], size: int) -> int:
    """Where a tensor begins, of the safetensors entry that must say ``code``, ``shape`` and ``size`` bytes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"header.{name}", "dtype, shape and data_offsets", entry)
    if entry["dtype"] != code:
        refuse(f"header.{name}.dtype", code, entry["dtype"])
    if not _ints(entry["shape"]) or entry["shape"] != list(shape):
        refuse(f"header.{name}.shape", str(list(shape)), entry["shape"])
    offsets = entry["data_offsets"]
    if not _ints(offsets) or len(offsets) != 2 or offsets[0] < 0 or offsets[1] - offsets[0] != size:
        refuse(f"header.{name}.data_offsets", f"begin and end of {size} bytes", offsets)
    begin: int = offsets[0]
    return begin


def _ints(value: Any) -> bool:
    # By type: to Python, true and 1.0 equal 1.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _tensors(view: memoryview, start: int, description: Description, places: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors, on ``view``'s own memory where that can be written and is aligned, else on one copy of it."""
    memory = torch.frombuffer(view, dtype=torch.uint8, offset=start) if not view.readonly else None
    if memory is None or memory.data_ptr() % 8:
        memory = torch.frombuffer(bytearray(view[start:]), dtype=torch.uint8)
    parts = {}
    for name, (code, shape, itemsize) in description.tensors().items():
        dtype = next(storage.dtype for storage in STORAGES.values() if storage.code == code)
        parts[name] = memory.narrow(0, places[name], prod(shape) * itemsize).view(dtype).view(shape)
    tensors = {name: restore(f"message.{name}", parts[name], parts.get(f"{name}_scale")) for name in description.dtype}
    for name in tensors.keys() & _SHARES:
        _check_weights(name, tensors[name])
    return tensors


# --- keys, digests, files
# ---------------------------------------------------------------------


def _check_max_bytes(max_bytes: Any) -> None:
    if type(max_bytes) is not int:
        raise DTypeError("max_bytes", expected="an int", got=repr(max_bytes)[:80])


def _check_key(key: Any) -> None:
    if key is None:
        return
    if not isinstance(key, bytes):
        raise DTypeError("key", expected="bytes or None", got=type(key).__name__)
    if not 1 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise MessageError("key", expected=f"1 to {hashlib.blake2b.MAX_KEY_SIZE} bytes", got=str(len(key)))


def _digest(preamble: bytes | memoryview, inside: bytes | memoryview, key: bytes | None) -> bytes:
    digest = hashlib.blake2b(preamble, digest_size=32, key=key or b"")
    digest.update(inside)
    return digest.digest()


def read_file(path: str | os.PathLike[str], *, max_bytes: int) -> bytearray:
    """The bytes of a file that can be a message by its size; else a MessageError, before any are read."""
    if not isinstance(path, (str, os.PathLike)):
        raise DTypeError("path", expected="a str or a path", got=type(path).__name__)
    _check_max_bytes(max_bytes)
    try:
        # Looked at before it is opened: opening a pipe would wait for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise MessageError(str(path), expected="a file", got="something else")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not PREAMBLE <= size <= max_bytes:
                raise MessageError(str(path), expected=f"{PREAMBLE} to {max_bytes} bytes (max_bytes)", got=str(size))
            data = bytearray(size)
            if file.readinto(data) != size:
                raise MessageError(str(path), expected=f"{size} bytes", got="fewer: it was cut while it was read")
    except OSError as error:
        raise MessageError(str(path), expected="a readable file", got=error.strerror or str(error)) from error
    return data
