"""Content controls: what is sent in place of the matching message, to see whether its content matters.

``matched`` sends what the channel sends. ``mismatched`` sends what belongs to another request, its ``decoy``. ``zero``
sends zeros; ``random`` numbers without content that have the mean and the deviation of the matching ones: of each head
over tokens and channels (a cache; those of each channel would tell a short context), of each layer (a message).
``self`` sends what the receiver makes of what it has read itself: the channel is given the receiver in the sharer's
place. A gain that survives these is no content (peers.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..caches import Pair
from ..errors import GeometryError
from ..message import Message
from ..span_text import paragraphs_of
from .request import Request

__all__ = ["CONTROLS", "Control", "check_control", "check_text_control"]
__all__ += ["controlled_cache", "controlled_message", "sent_for"]

Control = Literal["matched", "mismatched", "zero", "random", "self"]
CONTROLS: tuple[Control, ...] = get_args(Control)


def check_control(control: str) -> Control:
    if control not in CONTROLS:
        raise GeometryError("control", expected=" or ".join(CONTROLS), got=repr(control))
    return control


def check_text_control(control: str) -> Control:
    """Of a channel that sends text: there are no zeros and no noise of it."""
    if check_control(control) in ("zero", "random"):
        raise GeometryError("control", expected="matched, mismatched or self, of text", got=repr(control))
    return check_control(control)


def sent_for(requests: Sequence[Request], control: Control) -> list[Request]:
    """The requests whose messages are sent; under ``self`` the sharers of each have read what the receiver has.

    Raises:
        GeometryError: mismatched, and one has no decoy, or a decoy that says the same.
    """
    if control == "self":
        return [_read_by_itself(request) for request in requests]
    if control != "mismatched":
        return list(requests)
    found = []
    for i, request in enumerate(requests):
        other = request.decoy
        if other is None:
            raise GeometryError(f"requests[{i}].decoy", expected="another request, whose message is sent", got="none")
        if (other.sharer_contexts, other.asked()) == (request.sharer_contexts, request.asked()):
            raise GeometryError(f"requests[{i}].decoy", expected="another request", got="the same")
        found.append(replace(other, sharers=request.sharers))
    return found


def _read_by_itself(request: Request) -> Request:
    own = paragraphs_of(request.context) or (request.question,)
    return replace(request, sharer_contexts=dict.fromkeys(request.sharer_contexts, own))


def controlled_cache(cache: Sequence[Pair], mask: Tensor, control: Control, generator: torch.Generator) -> list[Pair]:
    """The sharer's cache under a control; ``mask (B, M)`` is zero at padding."""
    if control == "zero":
        return [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in cache]
    if control != "random":
        return list(cache)
    real = mask.bool()[:, None, :, None]
    over = (2, 3)
    return [(_noise_like(k, over, real, generator), _noise_like(v, over, real, generator)) for k, v in cache]


def controlled_message(message: Message, control: Control, generator: torch.Generator) -> Message:
    """A message under a control: its latent, which is all that a receiver needs."""
    if control not in ("zero", "random"):
        return message
    latent = message.latent
    if latent is None:
        raise GeometryError("message", expected="a message with a latent", got="a summary alone")
    made = torch.zeros_like(latent) if control == "zero" else _noise_like(latent, (-1,), None, generator)
    return replace(message, latent=made)


def _noise_like(x: Tensor, dim: tuple[int, ...], real: Tensor | None, generator: torch.Generator) -> Tensor:
    """Gaussian numbers with the mean and deviation of ``x`` along ``dim``, where ``real``."""
    wide = x.float()
    weight = torch.ones_like(wide) if real is None else real.to(wide.dtype).expand_as(wide)
    count = weight.sum(dim, keepdim=True).clamp_min(1)
    mean = (wide * weight).sum(dim, keepdim=True) / count
    deviation = (((wide - mean) * weight).square().sum(dim, keepdim=True) / count).sqrt()
    # Drawn on the CPU: the same on every device.
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (mean + deviation * noise).to(x.dtype)
