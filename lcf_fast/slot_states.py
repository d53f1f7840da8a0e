"""Slots of a context that comes in pieces, or lies on several devices: states of fixed size that merge exactly.

Softmax pooling is associative: of each slot and head a piece leaves the greatest score, the sum of
``exp(score - max)``, and the keys and values weighed by that. States of disjoint tokens merge in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import eager_slots
from .backends import resolve
from .checks import check_state_numbers, check_tensor, describe, reads_values
from .errors import DeviceError, DTypeError, ShapeError, SpanError
from .fingerprint import Origin
from .identity import Pending, TakesOrigin

__all__ = ["SlotStates", "finish_states", "merge_states"]


@dataclass(frozen=True, eq=False)
class SlotStates(TakesOrigin):
    """What a piece of a context comes to, of a size that does not depend on its length.

    Attributes:
        states: ``(L, B, Hs, k, 2, Ds)``, float32 (float64 for float64 caches): weighed sums of keys and of values.
        stats: ``(L, B, Hs, k, 2)``: the greatest score, in nats, and the sum of weights; ``-inf`` and 0 of no token.
        made_by: whose it is, as a message's ``made_by``; None: not known. Other sharers' halves do not take it.

    Raises:
        ShapeError, DTypeError, DeviceError: naming the field.
    """

    states: Tensor
    stats: Tensor
    made_by: Pending | Origin | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        states, stats = check_tensor("states", self.states), check_tensor("stats", self.stats)
        if states.dim() != 6 or states.shape[4] != 2:
            raise ShapeError("states", expected="(L, B, Hs, k, 2, Ds)", got=describe(states))
        if tuple(stats.shape) != (*states.shape[:4], 2):
            raise ShapeError("stats", expected=f"{(*states.shape[:4], 2)}", got=describe(stats))
        check_state_numbers(states, stats)

    @property
    def nbytes(self) -> int:
        """Bytes of the state: what a device sends to another to merge."""
        return int(self.states.nbytes + self.stats.nbytes)

    def to(self, device: torch.device | str) -> SlotStates:
        """The same on another device."""
        return replace(self, states=self.states.to(device), stats=self.stats.to(device))


def merge_states(
    parts: Sequence[SlotStates], check_made_by: Callable[[str, Any], None] | None = None
) -> SlotStates:
    """States of disjoint tokens as one. ``check_made_by`` refuses what others have pooled.

    Raises:
        SpanError: no part. DTypeError, ShapeError, DeviceError: parts that do not fit each other.
    """
    if not isinstance(parts, Sequence) or not all(isinstance(part, SlotStates) for part in parts):
        raise DTypeError("parts", expected="a sequence of SlotStates", got=type(parts).__name__)
    if not parts:
        raise SpanError("parts", expected="at least one SlotStates", got="none")
    first = parts[0].states
    for i, part in enumerate(parts):
        name, got = f"parts[{i}]", part.states
        if got.shape != first.shape or part.stats.shape != first.shape[:-1]:
            shapes = f"{tuple(got.shape)} and {tuple(part.stats.shape)}"
            raise ShapeError(name, expected=f"{tuple(first.shape)} as the first", got=shapes)
        if got.dtype != first.dtype:
            raise DTypeError(name, expected=f"{first.dtype} as the first", got=str(got.dtype))
        if got.device != first.device or part.stats.device != first.device:
            raise DeviceError(name, expected=f"{first.device} as the first", got=str(got.device))
        if check_made_by is not None:
            check_made_by(name, part.made_by)
    states = torch.stack([part.states for part in parts], 3)
    stats = torch.stack([part.stats for part in parts], 3)
    if resolve(states.device, states.dtype, None, None) == "triton":
        from .kernels import slot_pooling

        return SlotStates(*slot_pooling.merge_slot_states(states, stats))
    return SlotStates(*eager_slots.merge_states(states, stats))


def finish_states(pool: SlotStates) -> tuple[Tensor, Tensor]:
    """``K~, V~``, each ``(L, B, k, Hs, Ds)``, of a whole context.

    Raises:
        DTypeError: no SlotStates. SpanError: a row without a token; looked for where it costs no wait.
    """
    if not isinstance(pool, SlotStates):
        raise DTypeError("pool", expected="a SlotStates", got=type(pool).__name__)
    if reads_values(pool.stats) and pool.stats.numel():
        empty = (pool.stats[0, :, 0, 0, 1] == 0).nonzero().flatten().tolist()  # the same for all layers, heads, slots
        if empty:
            raise SpanError("pool", expected="a token to pool in every row", got=f"none in rows {empty}"[:200])
    return eager_slots.finish_states(pool.states, pool.stats)
