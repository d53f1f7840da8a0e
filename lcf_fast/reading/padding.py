"""Ragged rows as one batch, and where what belongs to a row lies once it is padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..caches import Pair
from ..span_text import Bounds
from ..spans import Spans

__all__ = ["padded", "padding_first", "shifted_index", "shifted_spans"]


def padded(rows: Sequence[Sequence[int]], *, left: bool, fill: int = 0) -> tuple[Tensor, Tensor]:
    """``(B, N)`` int64 ids and mask of ragged rows; ``fill`` where there is none."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.int64, device="cpu")
        mask[i, where] = 1
    return ids, mask


def padding_first(layers: Sequence[Pair], mask: Tensor) -> list[Pair]:
    """A cache ``(B, H, N, D)`` a layer with each row's real columns, of a mask ``(B, N)``, at its end, in their order.

    Keys keep their positions. A sliding window counts columns, and what a row has must have none between.
    """
    order = (mask != 0).long().argsort(dim=1, stable=True)
    if bool((order == torch.arange(mask.shape[1], device=mask.device)).all()):
        return list(layers)
    at = order.to(layers[0][0].device)[:, None, :, None]
    return [(_columns(key, at), _columns(value, at)) for key, value in layers]


def _columns(part: Tensor, at: Tensor) -> Tensor:
    return part.gather(2, at.expand(-1, part.shape[1], -1, part.shape[3]))


def shifted_index(aligned: Sequence[Sequence[int]], starts: Sequence[int], width: int) -> Tensor:
    """``(B, width)``: what each token of prompts aligns with, counted with the padding on the left of both models.

    ``starts``: where each item's tokens begin in the sharer's; -1 stays -1.
    """
    index = torch.full((len(aligned), width), -1, device="cpu")
    for i, (listed, start) in enumerate(zip(aligned, starts)):
        rows = torch.tensor(listed, dtype=torch.int64, device="cpu")
        index[i, width - len(rows) :] = torch.where(rows < 0, rows, rows + start)
    return index


def shifted_spans(spans: Sequence[Bounds], starts: Sequence[int]) -> Spans:
    """Spans of unpadded items as they lie in the padded batch."""
    return Spans.given(
        [[(first + start, last + start) for first, last in bounds] for bounds, start in zip(spans, starts)]
    )
