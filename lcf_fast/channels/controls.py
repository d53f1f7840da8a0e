"""Content controls: what is sent in place of the matching message, to see whether its content matters.

``matched`` sends what the channel sends. ``mismatched`` sends what belongs to another request, its ``decoy``. ``zero``
sends zeros; ``random`` numbers without content that have the mean and the deviation of the matching ones: of each head
over tokens and channels (a cache; those of each channel would tell a short context), of each layer (a message). They
are drawn for each request by itself, so that questions are independent and no row depends on its batch.
``self`` sends what the receiver makes of what it has read itself: the channel is given the receiver in the sharer's
place. A gain that survives these is no content (peers.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..caches import Pair
from ..errors import GeometryError
from ..message import Message
from ..span_text import paragraphs_of
from .request import Request

__all__ = ["CONTROLS", "Control", "Noise", "check_control", "check_text_control"]
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


@dataclass(frozen=True)
class Noise:
    """Where the random control's numbers come from: of a request by itself, in whatever batch, process or place.

    Attributes:
        requests: of the rows.
        sharer: the name of who is said to send.
        seed: of all of them.
    """

    requests: Sequence[Request]
    sharer: str
    seed: int

    def generator(self, row: int) -> torch.Generator:
        """Of the row's numbers, anew."""
        request = self.requests[row]
        contexts = sorted((name, list(paragraphs)) for name, paragraphs in request.sharer_contexts.items())
        told = json.dumps([self.seed, self.sharer, request.question, request.context, contexts])
        digest = hashlib.blake2b(told.encode(), digest_size=4).digest()  # torch's generator takes 32 bits
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def controlled_cache(cache: Sequence[Pair], mask: Tensor, control: Control, noise: Noise) -> list[Pair]:
    """The sharer's cache under a control; ``mask (B, M)`` is zero at padding. ``noise``: of its rows."""
    if control == "zero":
        return [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in cache]
    if control != "random":
        return list(cache)
    real = mask.bool()
    where = real.cpu()
    generators = [noise.generator(row) for row in range(len(where))]

    def like(x: Tensor) -> Tensor:
        drawn = torch.zeros(x.shape, device="cpu")
        for row, generator in enumerate(generators):
            size = (x.shape[1], int(where[row].sum()), x.shape[3])
            drawn[row][:, where[row]] = torch.randn(size, generator=generator, device="cpu")
        return _noise_like(x, (2, 3), real[:, None, :, None], drawn)

    return [(like(key), like(value)) for key, value in cache]


def controlled_message(message: Message, control: Control, noise: Noise, row: int) -> Message:
    """The message of one row under a control: its latent, which is all that a receiver needs."""
    if control not in ("zero", "random"):
        return message
    latent = message.latent
    if latent is None:
        raise GeometryError("message", expected="a message with a latent", got="a summary alone")
    if control == "zero":
        return replace(message, latent=torch.zeros_like(latent))
    drawn = torch.randn(latent.shape, generator=noise.generator(row), device="cpu")
    return replace(message, latent=_noise_like(latent, (-1,), None, drawn))


def _noise_like(x: Tensor, dim: tuple[int, ...], real: Tensor | None, drawn: Tensor) -> Tensor:
    """Numbers ``drawn`` from a normal distribution, with the mean and deviation of ``x`` along ``dim``, where ``real``.

    They are drawn on the CPU: the same on every device.
    """
    wide = x.float()
    weight = torch.ones_like(wide) if real is None else real.to(wide.dtype).expand_as(wide)
    count = weight.sum(dim, keepdim=True).clamp_min(1)
    mean = (wide * weight).sum(dim, keepdim=True) / count
    deviation = (((wide - mean) * weight).square().sum(dim, keepdim=True) / count).sqrt()
    return (mean + deviation * drawn.to(x.device)).to(x.dtype)
