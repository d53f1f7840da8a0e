"""What LCF-X sends: one small tensor a layer, whatever the length of the sharer's context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

__all__ = ["Message"]


@dataclass(frozen=True, eq=False)
class Message:
    """The sharer's context as the receiver's adapter reads it (spec, section 4).

    Attributes:
        latent: ``(L, B, d)``, float32 as made: ``c = W_down[:, :2Cs]·[K*;V*] + b_down`` for each kept layer.
            All that ``adapter.inject`` needs.
        receiver_layers: the receiver layer of each of the L latents.
        spans: number of spans P that were pooled, empty ones included.
        summary: ``(L, 2, B, Hs, Ds)``, the pooled keys (0) and values (1) themselves, ``K*`` and ``V*``; they
            do not depend on ``W_down``. May be None.
    """

    latent: Tensor
    receiver_layers: tuple[int, ...]
    spans: int
    summary: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the latent, which is all that a receiver needs (the summary is a second form of it)."""
        return int(self.latent.nbytes)

    def to(self, *args: Any, **kwargs: Any) -> Message:
        """The message on another device or in another float dtype; arguments as those of `Tensor.to`."""
        summary = None if self.summary is None else self.summary.to(*args, **kwargs)
        return replace(self, latent=self.latent.to(*args, **kwargs), summary=summary)
