"""Messages as the receiver's adapter takes them: whose they are, whether they fit, and what several come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import FLOATS, describe, reads_values
from .errors import DTypeError, GeometryError, MessageError, ShapeError
from .fingerprint import Origin, is_digest
from .identity import Pending
from .inputs import check_device
from .message import Message
from .ops_pooling import fold_summary
from .sharer import SharerSide

if TYPE_CHECKING:
    from .adapter import LatentCacheFlow
    from .slots import LatentSlots

__all__ = ["accepted_digest", "check_origin", "combine", "readable_latent"]


def accepted_digest(adapter: LatentCacheFlow, sharer: Any) -> str:
    """The digest of a sharer's half that may write to ``adapter``."""
    if isinstance(sharer, SharerSide):
        if sharer.receiver_layers.tolist() != adapter.receiver_layers.tolist():
            expected = f"one for the layers {adapter.receiver_layers.tolist()}"
            raise GeometryError("sharer", expected=expected, got=f"{sharer.receiver_layers.tolist()}")
        own, theirs = adapter.origin.adapter, sharer.adapter_digest
        if theirs != own:
            raise MessageError("sharer", expected=f"a SharerSide for the adapter {own}", got=f"for {theirs}")
        return sharer.origin.sharer
    if not is_digest(sharer):
        raise DTypeError("sharer", expected="a SharerSide, or its digest of 32 hex digits", got=repr(sharer)[:80])
    return str(sharer)


def readable_latent(adapter: LatentCacheFlow, message: Any, name: str, batch: int | None) -> Tensor:
    """The message's latent ``(L, B, d)``, checked: made for this adapter, by a sharer that it knows, and of its form.

    A message of the summary alone is folded here. ``batch``: what it must have, or 1; None: any.
    """
    if not isinstance(message, Message):
        raise DTypeError(name, expected="a Message", got=type(message).__name__)
    kept, config = adapter._kept, adapter.config
    if tuple(message.receiver_layers) != kept:
        raise GeometryError(f"{name}.receiver_layers", expected=f"{kept}", got=f"{tuple(message.receiver_layers)}")
    if message.receiver is not None and message.receiver != config.receiver:
        raise GeometryError(f"{name}.receiver", expected=f"{config.receiver}", got=f"{message.receiver}")
    check_origin(adapter, message, name)
    latent = message.latent
    logit = adapter.gate_logit
    if latent is None:
        summary = message.summary
        heads, head_dim = config.sharer.kv_heads, config.sharer.head_dim
        if summary is None:
            raise MessageError(name, expected="a latent or a summary", got="neither")
        if summary.dim() != 5 or (*summary.shape[:2], *summary.shape[3:]) != (len(kept), 2, heads, head_dim):
            expected = f"(L={len(kept)}, 2, B, Hs={heads}, Ds={head_dim})"
            raise ShapeError(f"{name}.summary", expected=expected, got=str(tuple(summary.shape)))
        if message.sharer is not None and message.sharer != config.sharer:
            raise GeometryError(f"{name}.sharer", expected=f"{config.sharer}", got=f"{message.sharer}")
        check_device(f"{name}.summary", summary, logit, "the adapter")
        latent = fold_summary(summary, adapter._weights())
    layers, d = len(kept), config.bottleneck
    if latent.dim() != 3 or latent.shape[0] != layers or latent.shape[2] != d:
        raise ShapeError(f"{name}.latent", expected=f"(L={layers}, B, d={d})", got=str(tuple(latent.shape)))
    if latent.dtype not in FLOATS or latent.layout is not torch.strided:
        raise DTypeError(f"{name}.latent", expected="a dense tensor of a float dtype", got=describe(latent))
    check_device(f"{name}.latent", latent, logit, "the adapter")
    if batch is None or latent.shape[1] == batch:
        return latent
    if latent.shape[1] != 1:
        raise ShapeError(f"{name}.latent", expected=f"batch size {batch} or 1", got=str(latent.shape[1]))
    return latent.expand(layers, batch, d)


def check_origin(adapter: LatentCacheFlow | LatentSlots, message: Message, name: str) -> None:
    """The message is for this adapter's receiver half, of a sharer's half that it knows; else a MessageError."""
    made_by = message.made_by
    if made_by is None:
        return  # put together in this process, by whoever calls
    if isinstance(made_by, Pending) and made_by.writes_to(adapter):
        return
    origin = message.origin
    if not isinstance(origin, Origin):
        expected = "an Origin, or a function that finds it"
        raise DTypeError(f"{name}.made_by", expected=expected, got=describe(made_by))
    own = adapter.origin
    if origin.adapter != own.adapter:
        expected = f"{own.adapter}, this adapter"
        raise MessageError(f"{name}.origin.adapter", expected=expected, got=origin.adapter)
    # A summary is not in the latent's terms: only this adapter's own columns of W_down read it.
    known = {own.sharer} if message.latent is None else {own.sharer} | adapter.accepted_sharers
    if origin.sharer not in known:
        expected = f"{' or '.join(sorted(known))} (accept_sharer adds one; a summary must be of the adapter's own)"
        raise MessageError(f"{name}.origin.sharer", expected=expected, got=origin.sharer)


def combine(
    adapter: LatentCacheFlow, messages: Any, weights: Any, name: str = "messages", rows: int | None = None
) -> Message:
    """See `LatentCacheFlow.combine`. ``name``: what the caller calls the messages; ``rows``: its batch, where known."""
    listed = [messages] if isinstance(messages, Message) else messages
    is_list = isinstance(listed, Sequence) and all(isinstance(message, Message) for message in listed)
    if not is_list or not listed:
        got = "none" if is_list else type(messages).__name__
        raise DTypeError(name, expected="a Message or a sequence of them", got=got)
    latents = [readable_latent(adapter, message, f"{name}[{i}]", None) for i, message in enumerate(listed)]
    batch = max(latent.shape[1] for latent in latents)
    for i, latent in enumerate(latents):
        if latent.shape[1] not in (1, batch):
            got = str(latent.shape[1])
            raise ShapeError(f"{name}[{i}].latent", expected=f"batch size {batch} or 1", got=got)
    bias = adapter.get_parameter("down_bias")[:, None]
    dtype = torch.float64 if any(latent.dtype == torch.float64 for latent in latents) else torch.float32
    bias = bias.to(dtype)
    total = bias.expand(-1, batch, -1)
    factors = _factors(weights, len(latents), rows if batch == 1 else batch, bias)
    for i, latent in enumerate(latents):
        part = latent.to(dtype) - bias
        if factors is not None:
            factor = factors[i][..., None]
            # Switched off is off, even where the message holds what is not finite.
            part = torch.where(factor == 0, 0.0, factor * part)
        total = total + part
    return Message(
        latent=total,
        receiver_layers=adapter._kept,
        spans=max(message.spans for message in listed),
        sharer=adapter.config.sharer,
        receiver=adapter.config.receiver,
        made_by=adapter._pending(),
    )


def _factors(weights: Any, count: int, batch: int | None, like: Tensor) -> Tensor | None:
    """``(n, 1 or B)`` on the device of ``like``. ``batch``: B; None: what the weights say."""
    if weights is None:
        return None
    try:
        factors = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DTypeError("weights", expected="numbers, (n,) or (n, B)", got=repr(weights)[:80]) from error
    given = tuple(factors.shape)
    factors = factors[:, None] if factors.dim() == 1 else factors
    if factors.dim() != 2 or factors.shape[0] != count or (batch is not None and factors.shape[1] not in (1, batch)):
        expected = f"({count},) or ({count}, {'B' if batch is None else batch}), one a message (and item)"
        raise ShapeError("weights", expected=expected, got=str(given))
    if reads_values(factors) and not bool(torch.isfinite(factors).all()):
        raise MessageError("weights", expected="finite numbers", got=repr(weights)[:80])
    return factors
