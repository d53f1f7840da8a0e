"""What a message says of itself: the JSON in the header of its bytes, and the rules that it is held to.

The same rules hold on writing and on reading (:func:`parsed`), so that nothing is written that would not be read.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .config import MAX_LAYERS, CacheGeometry
from .errors import MessageError
from .fingerprint import Origin, is_digest
from .message import BATCH_AXIS
from .quantization import STORAGES

__all__ = ["SCALE_AXES", "Description", "check_metadata_size", "parsed", "refuse", "strict_json"]

FORMAT = "lcf_fast.message"

#: Of the tensors that may be quantised, the leading axes that a scale has; of a latent of slots one more: slots of
#: several sharers lie side by side, and need not be alike in size.
SCALE_AXES = {"latent": 2, "summary": 3}

_MAX_METADATA = 1 << 14
#: Far above what any model has, far below where a product of them could hurt.
_MAX_SIZE, _MAX_COUNT = 1 << 20, 1 << 31
_RANGES = r"[0-9]{1,5}(?:[,-][0-9]{1,5})*"
_FIELDS = {"batch", "dtype", "format", "layers", "metadata", "origin", "receiver", "sharer", "spans", "width"}
#: There only where they say something: messages without are what they were before there were slots.
_SLOT_FIELDS = {"slots", "tokens"}


@dataclass(frozen=True)
class Description:
    """Everything that implies the tensors of a message; fields as those of `Message`.

    Attributes:
        slots: k, 0 without slots. tokens: N of ``slot_weights``, 0 without them.
    """

    batch: int
    dtype: dict[str, str]
    layers: tuple[int, ...]
    metadata: dict[str, str]
    origin: Origin
    receiver: CacheGeometry
    sharer: CacheGeometry
    spans: int
    width: int | None
    slots: int = 0
    tokens: int = 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of the tensors."""
        layers, batch, heads, dim = len(self.layers), self.batch, self.sharer.kv_heads, self.sharer.head_dim
        if name == "latent":
            assert self.width is not None
            return (layers, batch, self.slots, self.width) if self.slots else (layers, batch, self.width)
        if name == "slot_weights":
            return layers, batch, heads, self.slots, self.tokens
        return (layers, 2, batch, heads, dim) if name == "summary" else (layers, batch, heads, self.spans)

    def scale_axes(self, name: str) -> int:
        """Leading axes that the scale of a quantised tensor has; 0 for one that has none."""
        return SCALE_AXES.get(name, 0) + (name == "latent" and self.slots > 0)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Of every tensor in the file, scales too: safetensors' name for the dtype, shape, bytes an element."""
        found = {}
        for name, dtype in self.dtype.items():
            storage, shape = STORAGES[dtype], self.shape(name)
            found[name] = (storage.code, shape, storage.dtype.itemsize)
            if storage.top:
                found[f"{name}_scale"] = ("F32", shape[: self.scale_axes(name)], 4)
        return found

    def to_json(self) -> str:
        """Compact, keys sorted: the same text for the same description."""
        fields: dict[str, Any] = {
            "batch": self.batch,
            "dtype": self.dtype,
            "format": FORMAT,
            "layers": _ranges(self.layers),
            "metadata": self.metadata,
            "origin": [self.origin.adapter, self.origin.sharer],
            "receiver": [self.receiver.layers, self.receiver.kv_heads, self.receiver.head_dim],
            "sharer": [self.sharer.layers, self.sharer.kv_heads, self.sharer.head_dim],
            "spans": self.spans,
            "width": self.width,
        }
        fields |= {name: count for name in _SLOT_FIELDS if (count := getattr(self, name))}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def refuse(field: str, expected: str, got: Any) -> NoReturn:
    """A MessageError that shows of ``got``, which may be anything, what fits into a line, in ASCII."""
    text = reprlib.repr(got).encode("ascii", "backslashreplace").decode()
    raise MessageError(f"message.{field}", expected=expected, got=text if len(text) <= 100 else f"{text[:97]}...")


def _whole(field: str, value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        refuse(field, f"an int from 1 to {most}", value)
    return value


def parsed(text: str) -> Description:
    """The description that ``text`` holds; a MessageError that names the field unless it is one throughout."""
    fields = strict_json("description", text)
    if not isinstance(fields, dict) or fields.keys() - _SLOT_FIELDS != _FIELDS:
        refuse("description", f"the fields {', '.join(sorted(_FIELDS))}", fields)
    if fields["format"] != FORMAT:
        refuse("format", FORMAT, fields["format"])
    dtype = fields["dtype"]
    if not isinstance(dtype, dict) or not dtype.keys() <= BATCH_AXIS.keys() or not dtype.keys() & SCALE_AXES.keys():
        refuse("dtype", "those of latent or summary, and of span_weights or not", dtype)
    allowed = {"latent", "slot_weights"} if "slots" in fields else BATCH_AXIS.keys() - {"slot_weights"}
    if not dtype.keys() <= allowed or ("slot_weights" in dtype) != ("tokens" in fields):
        refuse("dtype", f"those of {', '.join(sorted(allowed))}, and tokens with slot_weights alone", dtype)
    for name, storage in dtype.items():
        known = [s.name for s in STORAGES.values() if name in SCALE_AXES or not s.top]
        if not isinstance(storage, str) or storage not in known:
            refuse(f"dtype.{name}", f"one of {', '.join(known)}", storage)
    geometries = {}
    for side in ("sharer", "receiver"):
        sizes = fields[side]
        if not isinstance(sizes, list) or len(sizes) != 3:
            refuse(side, "layers, KV heads and head dim", sizes)
        most = (MAX_LAYERS, _MAX_SIZE, _MAX_SIZE)
        geometries[side] = CacheGeometry(*(_whole(side, size, limit) for size, limit in zip(sizes, most)))
    origin = fields["origin"]
    if not isinstance(origin, list) or len(origin) != 2 or not all(map(is_digest, origin)):
        refuse("origin", "two digests of 32 hex digits", origin)
    metadata = fields["metadata"]
    if not isinstance(metadata, dict) or not all(isinstance(note, str) for note in metadata.values()):
        refuse("metadata", "text by name", metadata)
    check_metadata_size(metadata)
    if ("latent" in dtype) != (fields["width"] is not None):
        refuse("width", "the latent's last size, null without a latent", fields["width"])
    limits = {"slots": _MAX_SIZE, "tokens": _MAX_COUNT}
    return Description(
        batch=_whole("batch", fields["batch"], _MAX_COUNT),
        dtype={name: dtype[name] for name in BATCH_AXIS if name in dtype},
        layers=_layers(fields["layers"], geometries["receiver"].layers),
        metadata=metadata,
        origin=Origin(*origin),
        receiver=geometries["receiver"],
        sharer=geometries["sharer"],
        spans=_whole("spans", fields["spans"], _MAX_COUNT),
        width=None if fields["width"] is None else _whole("width", fields["width"], _MAX_SIZE),
        **{name: _whole(name, fields[name], most) for name, most in limits.items() if name in fields},
    )


def check_metadata_size(metadata: dict[str, str]) -> None:
    """Short enough, and text that UTF-8 can hold, which a Python string need not be."""
    try:
        size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode())
    except UnicodeEncodeError:  # half a surrogate pair
        refuse("metadata", "text that UTF-8 can hold", metadata)
    if size > _MAX_METADATA:
        refuse("metadata", f"at most {_MAX_METADATA} bytes as JSON", size)


def _ranges(layers: Sequence[int]) -> str:
    """Ascending ints in short: ``6,8-10``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _layers(text: Any, count: int) -> tuple[int, ...]:
    """The layers that :func:`_ranges` wrote as ``text``, in ``[0, count)``."""
    expected = f"ascending layers in [0, {count}), as 6,8-10"
    # No text that could be right is longer, and matching a long one would take memory.
    if not isinstance(text, str) or len(text) > 4 * MAX_LAYERS or not re.fullmatch(_RANGES, text):
        refuse("layers", expected, text)
    layers: list[int] = []
    for run in text.split(","):
        first, *rest = (int(bound) for bound in run.split("-"))
        last = rest[-1] if rest else first
        if last >= count or (layers and first <= layers[-1]):  # at once: many long runs would make a longer list
            refuse("layers", expected, text)
        layers.extend(range(first, last + 1))
    if _ranges(layers) != text:  # a run that is empty, or not the shortest text for these layers
        refuse("layers", expected, text)
    return tuple(layers)


def strict_json(field: str, text: str) -> Any:
    """JSON as the standard has it: no key twice in an object, no NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(f"the constant {name}")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise MessageError(f"message.{field}", expected="JSON", got="nesting without end") from None
    except ValueError as error:
        raise MessageError(f"message.{field}", expected="JSON", got=ascii(str(error))[:80]) from None
