"""Messages and their bytes, as several tests need them; import as ``from messages import ...``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lcf_fast import CacheGeometry, Message
from lcf_fast.fingerprint import Origin

ORIGIN = Origin(adapter="0123456789abcdef" * 2, sharer="f" * 32)
SHARER, RECEIVER = CacheGeometry(3, 2, 4), CacheGeometry(5, 3, 8)
QWEN3 = CacheGeometry(28, 8, 128)
#: The published LCF-X pair: Qwen3-0.6B informs Qwen3-0.6B, width 128.
PUBLISHED: dict[str, Any] = {"sharer": QWEN3, "receiver": QWEN3, "width": 128}
EVERYTHING = ("latent", "summary", "span_weights")
SLOT_CONTENTS = ("latent", "slot_weights")
PREAMBLE = 56


def make_message(
    *,
    layers: Sequence[int] | None = None,
    batch: int = 1,
    width: int = 8,
    spans: int = 3,
    sharer: CacheGeometry = SHARER,
    receiver: CacheGeometry = RECEIVER,
    dtype: torch.dtype = torch.float32,
    contents: Sequence[str] = EVERYTHING,
    metadata: Mapping[str, str] | None = None,
    made_by: Any = ORIGIN,
    slots: int = 0,
    tokens: int = 6,
    generator: torch.Generator | None = None,
) -> Message:
    """A random message, with those of its tensors that ``contents`` names; of so many ``slots``, if any."""
    kept = tuple(range(receiver.layers)) if layers is None else tuple(layers)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(len(kept), *shape, generator=generator)

    if slots:
        shares = draw(batch, sharer.kv_heads, slots, tokens).softmax(-1).to(dtype)
        return Message(
            latent=draw(batch, slots, width).to(dtype),
            receiver_layers=kept,
            spans=1,
            slot_weights=shares if "slot_weights" in contents else None,
            sharer=sharer,
            receiver=receiver,
            metadata={} if metadata is None else metadata,
            made_by=made_by,
        )
    latent = draw(batch, width).to(dtype)
    summary = draw(2, batch, sharer.kv_heads, sharer.head_dim).to(dtype)
    weights = draw(batch, sharer.kv_heads, spans).softmax(-1).to(dtype)
    return Message(
        latent=latent if "latent" in contents else None,
        receiver_layers=kept,
        spans=spans,
        summary=summary if "summary" in contents else None,
        span_weights=weights if "span_weights" in contents else None,
        sharer=sharer,
        receiver=receiver,
        metadata={} if metadata is None else metadata,
        made_by=made_by,
    )


def assert_same(
    got: Message, expected: Message, contents: Sequence[str] = (*EVERYTHING, "slot_weights")
) -> None:
    """Equal in all that ``contents`` sends, the tensors bit for bit."""
    for field in ("receiver_layers", "spans", "sharer", "receiver", "metadata", "origin"):
        assert getattr(got, field) == getattr(expected, field), field
    for name in (*EVERYTHING, "slot_weights"):
        tensor, truth = getattr(got, name), getattr(expected, name) if name in contents else None
        if truth is None:
            assert tensor is None, name
            continue
        assert (tensor.dtype, tensor.shape) == (truth.dtype, truth.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), truth.contiguous().view(torch.uint8)), name


# --- bytes, taken apart without the package's own code
# ---------------------------------------------------------------------


def resigned(data: bytes | bytearray, key: bytes = b"") -> bytes:
    """``data`` with the length and digest that a writer would have given it."""
    head = bytes(data[:16]) + len(data).to_bytes(8, "little")
    rest = bytes(data[PREAMBLE:])
    return head + hashlib.blake2b(head + rest, digest_size=32, key=key).digest() + rest


def header_of(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The safetensors header, the description in it, and the tensors' data."""
    size = int.from_bytes(data[PREAMBLE : PREAMBLE + 8], "little")
    header = json.loads(data[PREAMBLE + 8 : PREAMBLE + 8 + size])
    return header, json.loads(header["__metadata__"]["lcf_fast"]), data[PREAMBLE + 8 + size :]


def with_header(data: bytes, header: str | bytes, payload: bytes | None = None, *, padded: bool = True) -> bytes:
    """``data`` with another safetensors header (and other data, if given), signed again."""
    text = header.encode() if isinstance(header, str) else header
    if padded:
        text += b" " * (-len(text) % 8)
    rest = header_of(data)[2] if payload is None else payload
    return resigned(data[:PREAMBLE] + len(text).to_bytes(8, "little") + text + rest)


def edited(
    data: bytes,
    *,
    entry: Callable[[dict[str, Any]], Any] | None = None,
    field: Callable[[dict[str, Any]], Any] | None = None,
    payload: bytes | None = None,
) -> bytes:
    """``data`` with its safetensors header changed by ``entry`` and its description by ``field``, signed again."""
    header, description, _ = header_of(data)
    if field is not None:
        field(description)
        header["__metadata__"]["lcf_fast"] = json.dumps(description, separators=(",", ":"))
    if entry is not None:
        entry(header)
    return with_header(data, json.dumps(header, separators=(",", ":")), payload)
