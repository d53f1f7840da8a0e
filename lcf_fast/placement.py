"""Where slots stand among a receiver's tokens: what its prompt and mask are, and at which positions slots lie.

``append`` puts them behind the prompt but its last token, ``prefix`` before the prompt. Positions count what is real:
neither padding nor a slot that a row has not. An adapter is trained for one of the two, and says which.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from .checks import check_has_memory, check_mask, check_tensor, reads_values
from .errors import DTypeError, GeometryError, ShapeError

if TYPE_CHECKING:
    from .slots import LatentSlots

__all__ = ["PLACEMENTS", "Placement", "check_placement", "placement_of", "slot_positions", "with_slots"]

Placement = Literal["append", "prefix"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


def check_placement(placement: Any) -> Placement:
    if placement not in PLACEMENTS:
        raise GeometryError("placement", expected=" or ".join(PLACEMENTS), got=repr(placement))
    found: Placement = placement
    return found


def placement_of(adapter: LatentSlots, told: str | None) -> Placement:
    """Where an adapter's slots are to stand: as told; None: as it was trained, and ``append`` where it does not say.

    Warns where it is told otherwise than it was trained.

    Raises:
        GeometryError: an unknown placement.
    """
    if told is None:
        return adapter.placement
    wanted, trained = check_placement(told), adapter.trained_placement
    if trained not in (None, wanted):
        text = f"placement {wanted!r} of slots whose adapter was trained with {trained!r}"
        warnings.warn(text, UserWarning, stacklevel=3)
    return wanted


def with_slots(
    ids: Tensor,
    attention_mask: Tensor | None,
    slots: int | Tensor,
    *,
    placement: Placement = "append",
) -> tuple[Tensor, Tensor]:
    """A prompt with stand-ins where its cache has slots: what ``generate()`` is to be given beside that cache.

    A stand-in repeats its row's last token and is never read, since the cache has that position already.

    Args:
        ids: ``(B, N)`` prompts, padded on the left where ``attention_mask (B, N)`` is zero; None: no padding.
        slots: how many, or ``(B, k)``, zero where a row has none.
        placement: before the last token, or before the prompt.

    Returns:
        Ids and int64 mask, ``(B, N + k)``.

    Raises:
        ShapeError, DTypeError, GeometryError: naming the argument; also rows that end in padding, which is looked for
            on the CPU.
    """
    check_placement(placement)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1]:
        raise ShapeError("ids", expected="(B, N), N of 1 or more", got=str(tuple(getattr(ids, "shape", ()))))
    check_has_memory("ids", check_tensor("ids", ids))
    batch, length = ids.shape
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    check_mask("attention_mask", mask, batch, length)
    if reads_values(mask) and not bool((mask[:, -1] != 0).all()):
        got = f"rows that end in it: {(mask[:, -1] == 0).nonzero().flatten().tolist()}"
        raise ShapeError("attention_mask", expected="padding on the left alone", got=got[:200])
    if isinstance(slots, int) and not isinstance(slots, bool):
        if slots < 0:
            raise ShapeError("slots", expected="0 or more", got=str(slots))
        there = torch.ones(batch, slots, dtype=torch.int64, device=ids.device)
    elif isinstance(slots, Tensor):
        check_mask("slots", slots, batch, slots.shape[-1] if slots.dim() else 0)
        there = (slots != 0).to(ids.device, torch.int64)
    else:
        raise DTypeError("slots", expected="an int, or a (B, k) tensor", got=type(slots).__name__)
    at = length - 1 if placement == "append" else 0
    mask = (mask != 0).long()
    stand_ins = ids[:, -1:].expand(-1, there.shape[1])
    return (
        torch.cat([ids[:, :at], stand_ins, ids[:, at:]], 1),
        torch.cat([mask[:, :at], there, mask[:, at:]], 1),
    )


def slot_positions(before: Tensor | int, slots: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """``(B, k)`` int64: positions of slots behind ``before`` real tokens, one number or one a row ``(B,)``.

    ``slots``: how many, or ``(B, k)``, zero where a row has none; the position of such a one means nothing.
    """
    if isinstance(slots, int):
        there = torch.ones(batch, slots, dtype=torch.int64, device=device)
    else:
        there = (slots != 0).to(device, torch.int64)
    start = before[:, None].to(device) if isinstance(before, Tensor) else before
    return (start + there.cumsum(1) - 1).clamp_(min=0)
