"""Long contexts on many devices: each pools its share of the sharer's cache, and small states are exchanged.

Sequence parallelism over `torch.distributed`: rank ``r`` holds a contiguous piece of the context, in the order of the
ranks. What is sent is the state of a piece, whose size does not depend on the context's length, so a context need never
lie on one device.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .caches import check_pairs
from .errors import DTypeError, LCFError, ShapeError, SpanError
from .growing import PartialPool
from .inputs import given_spans, without_gaps
from .message import Message
from .slot_states import SlotStates
from .slots_sharer import SummarizesSlots
from .spans import Spans

if TYPE_CHECKING:
    from .sharer import Summarizes

__all__ = ["summarize_parallel"]


@torch.no_grad()
def summarize_parallel(
    half: Summarizes | SummarizesSlots,
    cache_piece: Any,
    spans: Spans | Tensor | Sequence[Sequence[int]] | None = None,
    *,
    attention_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Message:
    """``half.summarize`` of a context that lies on the ranks of a process group, piece by piece. All ranks call it.

    Args:
        half: an LCF-X adapter or a `SharerSide`, a slots adapter or a `SlotsSharerSide`, with the same weights on every
            rank.
        cache_piece: the sharer's cache of this rank's tokens alone, ``(B, Hs, M, Ds)`` a layer; M may differ from rank
            to rank and be 0. The pieces follow each other in the order of the ranks.
        spans: of the WHOLE context, in its positions, the same on every rank, in the forms that ``summarize`` takes.
            None: one span over all of it. Of slots, which know no spans, None.
        attention_mask: ``(B, M)``, of this rank's piece.
        group: the process group; None: the default one.

    Returns:
        The message, bitwise the same on every rank: `half.summarize` of the whole, to rounding.

    Raises:
        SpanError: spans that leave the context, or a row without a token. ShapeError, DTypeError, DeviceError,
        GeometryError: as ``summarize``. A rank that finds its own input wrong says so to the others, so that none of
        them waits: they raise ShapeError.
    """
    if not dist.is_initialized():
        raise DTypeError("group", expected="an initialised torch.distributed (torchrun does that)", got="none")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    device = next(iter(half._weights().values())).device
    error: LCFError | None = None
    described = [-1, -1, -1, -1]
    try:
        half._check_cross_context("summarize")
        sharer, mask = half._read(cache_piece, attention_mask, "cache_piece")
        check_pairs(sharer, "cache_piece", half.sharer_geometry)  # all layers: whoever fails later is waited for
        key = sharer[0][0]
        given = None if spans is None else _given(spans, key.shape[0], isinstance(half, SummarizesSlots))
        described = [key.shape[0], key.shape[2], _checksum(given), key.dtype == torch.float64]
    except LCFError as found:
        error = found
    rows = _exchange(torch.tensor(described, device=device), ranks, group).tolist()
    if error is not None:
        raise error
    batches, lengths, checksums, doubles = zip(*rows)
    if -1 in batches:
        raise ShapeError("cache_piece", expected="right input on all ranks", got=f"wrong on {batches.index(-1)}")
    if len(set(batches)) > 1:
        raise ShapeError("cache_piece", expected="one batch size on all ranks", got=f"{list(batches)}")
    if len(set(doubles)) > 1:
        raise DTypeError("cache_piece", expected="float64 on all ranks or none", got=f"on {doubles.index(1)}")
    if len(set(checksums)) > 1:
        raise SpanError("spans", expected="the whole context's, the same on all ranks", got="different ones")

    if isinstance(half, SummarizesSlots):
        state = half._pool(sharer, mask)
        exchanged = _exchange_states(state.states, state.stats, ranks, group)
        return half.finish(half.merge([SlotStates(states, stats) for states, stats in exchanged]))

    start, total = sum(lengths[:rank]), sum(lengths)
    if given is None:
        given = Spans(torch.tensor([0, total], dtype=torch.int32, device="cpu").repeat(batches[0], 1, 1))
    if given.offsets.numel() and int(given.offsets.max()) > total:
        raise SpanError("spans", expected=f"offsets up to {total}", got=f"up to {int(given.offsets.max())}")
    piece = given.piece(start, start + key.shape[2])
    pool = half._pool(sharer, piece, without_gaps(piece, key, mask))
    nothing = (0,) * batches[0]
    parts = [
        PartialPool(states, stats, nothing, length)
        for (states, stats), length in zip(_exchange_states(pool.states, pool.stats, ranks, group), lengths)
    ]
    merged = half.merge(parts)
    return half.finish(PartialPool(merged.states, merged.stats, tuple(given.counts), total))


def _exchange_states(
    states: Tensor, stats: Tensor, ranks: int, group: dist.ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """Every rank's state, in the order of the ranks. One tensor a rank, so that one collective does it."""
    rows = _exchange(torch.cat([states.flatten(), stats.flatten()]), ranks, group)
    found = [row.split([states.numel(), stats.numel()]) for row in rows]
    return [(one.view_as(states), other.view_as(stats)) for one, other in found]


def _given(spans: Any, batch: int, has_slots: bool) -> Spans:
    if has_slots:
        raise SpanError("spans", expected="None, since slots know no spans", got=type(spans).__name__)
    given = spans if isinstance(spans, Spans) else given_spans(spans)
    if given.batch != batch:
        raise ShapeError("spans", expected=f"spans of {batch} items", got=f"of {given.batch}")
    return given


def _checksum(spans: Spans | None) -> int:
    """Equal for equal spans, so that ranks can tell that theirs are."""
    if spans is None:
        return 0
    flags = b"" if spans.is_span is None else spans.is_span.numpy().tobytes()
    return 1 + zlib.crc32(spans.offsets.contiguous().numpy().tobytes() + flags)


def _exchange(tensor: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's ``tensor``, stacked in the order of the ranks; they have one shape."""
    received = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(received, tensor.contiguous(), group=group)
    return torch.stack(received)
