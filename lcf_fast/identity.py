"""Who made a message: digests of an adapter's two halves, looked up when first asked for.

`HasOrigin` is what an adapter, of whichever kind, and a half of one have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import MessageError
from .fingerprint import Origin

__all__ = ["HasOrigin", "Pending"]

#: Parameters with their numbers of changes: equal stamps, equal weights.
Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pending:
    """The origin of a message, not looked up yet: a digest reads all weights, which most messages never need."""

    maker: HasOrigin
    stamp: Stamp

    def __call__(self) -> Origin:
        if self.maker._stamp() != self.stamp:
            raise MessageError(
                "message.origin",
                expected="the weights that made the message (read `message.origin` before they change)",
                got="weights that have changed since",
            )
        return self.maker.origin

    def writes_to(self, adapter: Any) -> bool:
        """Whether the message was made in this process by that adapter, or by a side made of it."""
        return self.maker is adapter or self.maker._receiver() is adapter


class HasOrigin:
    """A module whose weights make messages, or read them."""

    _known_origin: tuple[Stamp, list[Tensor], Origin] | None = None

    def _weights(self) -> Mapping[str, Tensor]:
        raise AttributeError("_weights")

    def _make_origin(self) -> Origin:
        raise AttributeError("_make_origin")

    def _check_cross_context(self, method: str) -> None:
        """Refuse where there is no sharer's half."""

    def _receiver(self) -> Any:
        """The adapter in this process that this is a half of, if any."""
        return None

    @property
    def origin(self) -> Origin:
        """Digests of both halves, of the weights as made or loaded: casting or moving them does not change it.

        Computed when first asked, and again when a weight changes in place; reads all weights then.
        """
        self._check_cross_context("tell the origin of messages")
        stamp, known = self._stamp(), self._known_origin
        if known is None or known[0] != stamp or _is_inference(known[1]):
            known = (stamp, list(self._weights().values()), self._make_origin())
            self._known_origin = known
        return known[2]

    def _stamp(self) -> Stamp:
        weights = self._weights().values()
        return tuple((id(weight), -1 if weight.is_inference() else weight._version) for weight in weights)

    def _set_origin(self, origin: Origin) -> None:
        """The weights now held are those of ``origin``, in whatever dtype."""
        self._known_origin = (self._stamp(), list(self._weights().values()), origin)

    def _pending(self) -> Pending | None:
        return None if torch.compiler.is_compiling() else Pending(self, self._stamp())


def _is_inference(weights: Iterable[Tensor]) -> bool:
    """Whether changes of some weight go uncounted."""
    return any(weight.is_inference() for weight in weights)
