"""Who made a message: digests of an adapter's two halves, looked up when first asked for.

`HasOrigin` is what an adapter, of whichever kind, and a half of one have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MessageError
from .fingerprint import Origin

__all__ = ["HasOrigin", "Pending", "State", "TakesOrigin", "found_origin", "seeing"]

#: Held by who changes what a module was last seen as; a half looks at its adapter meanwhile.
seeing = RLock()

#: Weights with their numbers of changes: equal stamps, equal weights.
Stamp = tuple[tuple[int, int], ...]


class State:
    """The weights of a module as they are until one of them changes, which casting or moving them does not.

    Attributes:
        origin: None until it is first asked for.
    """

    def __init__(self, origin: Origin | None = None) -> None:
        self.origin = origin


@dataclass(frozen=True)
class Pending:
    """The origin of a message or a pool, not looked up yet: a digest reads all weights, which most never need."""

    maker: HasOrigin
    state: State

    def __call__(self) -> Origin:
        if self.maker._state() is not self.state:
            raise MessageError(
                "message.origin",
                expected="the weights that made it (read `message.origin` before they change)",
                got="weights that have changed since",
            )
        return self.maker.origin

    def writes_to(self, adapter: Any) -> bool:
        """Whether the message was made in this process by that adapter, or by a side made of it."""
        return self.maker is adapter or self.maker._receiver() is adapter


def found_origin(made_by: Pending | Origin | None) -> Origin | None:
    """The origin, looked up now where it has not been."""
    return made_by() if isinstance(made_by, Pending) else made_by


class TakesOrigin:
    """What is pickled takes the origin along and not its maker: in another process there is no adapter to ask."""

    made_by: Pending | Origin | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made_by": found_origin(self.made_by)}


class HasOrigin(nn.Module):
    """A module whose weights make messages, or read them."""

    #: The weights as they were last seen, held so that no other tensors can be taken for them.
    _seen: tuple[Stamp, list[Tensor], State] | None = None

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
        """Digests of both halves, of the weights as loaded, or as they were when it was first asked for.

        Casting or moving them after that does not change it. Computed again when a weight has changed in place; reads
        all weights then.
        """
        self._check_cross_context("tell the origin of messages")
        return self._found_origin()

    def _found_origin(self) -> Origin:
        if self._goes_uncounted():
            return self._make_origin()
        state = self._state()
        if state.origin is None:
            state.origin = self._make_origin()
        return state.origin

    # A graph takes it as a constant, found while tracing; set by hand as for `LatentCacheFlow._live_when_traced`.
    _found_origin._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _check_pooled_by(self, name: str, made_by: Pending | Origin | None) -> None:
        """Refuse what the weights of another sharer's half have pooled, or these before they changed; None: not known.

        A copy's, and a side's of this adapter, are the same half: their digests are asked for, which reads all weights.
        """
        if made_by is None:
            return
        if isinstance(made_by, Pending) and made_by.maker is self and made_by.state is self._state():
            return
        own, origin = self.origin.sharer, found_origin(made_by)
        if origin is not None and origin.sharer != own:
            expected = f"what the sharer's half {own} has pooled"
            raise MessageError(name, expected=expected, got=f"what {origin.sharer} has")

    def _goes_uncounted(self) -> bool:
        """Whether a weight was made in inference mode: its changes are not counted."""
        return any(weight.is_inference() for weight in self._weights().values())

    def _stamp(self) -> Stamp:
        weights = self._weights().values()
        return tuple((id(weight), -1 if weight.is_inference() else weight._version) for weight in weights)

    def _state(self) -> State:
        """The same object as long as no weight changes."""
        stamp, seen = self._stamp(), self._seen
        if seen is not None and seen[0] == stamp:
            return seen[2]
        with seeing:  # of two threads that come first, both must get the one that stays
            seen = self._seen
            if seen is None or seen[0] != stamp:
                seen = self._seen = (stamp, list(self._weights().values()), State())
            return seen[2]

    def _see(self, state: State) -> None:
        """The weights now held are those of ``state``, in whatever dtype and wherever they lie."""
        self._seen = (self._stamp(), list(self._weights().values()), state)

    def _set_origin(self, origin: Origin) -> None:
        """The weights now held are those of ``origin``, in whatever dtype."""
        self._see(State(origin))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # What casts and moves a module: its buffers are new tensors afterwards.
        state = self._state()
        super()._apply(*args, **kwargs)
        self._see(state)
        return self

    def __getstate__(self) -> dict[str, Any]:
        origin = None if self._goes_uncounted() else self._state().origin
        return {**self.__dict__, "_seen": ((), [], State(origin))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._see(state["_seen"][2])  # a copy has tensors of its own

    def _pending(self) -> Pending | None:
        return None if torch.compiler.is_compiling() else Pending(self, self._state())
