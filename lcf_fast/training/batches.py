"""Tokenized micro-batches: what a training step reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..spans import Spans

__all__ = ["Batch"]


@dataclass
class Batch:
    """Examples as padded int64 tensors, on the CPU; masks are 1 at real tokens and 0 at padding.

    Attributes:
        ids: the examples' names.
        receiver_ids, receiver_mask: ``(B, N)`` prompts, padded on the left; N is 2 or more.
        response_ids, response_mask: ``(B, R)`` responses with their end token, padded on the right; none is empty.
        sharer_ids, sharer_mask: ``(B, M)`` what the sharer reads, padded on the left.
        sharer_index: ``(B, N)``, the sharer's row for each of the prompt's tokens, -1: none. None where both models
            read the very same tokens (shared context) and for cross context.
        spans: of the sharer's tokens (cross context).
    """

    ids: tuple[str, ...]
    receiver_ids: Tensor
    receiver_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    sharer_ids: Tensor
    sharer_mask: Tensor
    sharer_index: Tensor | None = None
    spans: Spans | None = None
