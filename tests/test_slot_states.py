"""Slots of a context in pieces: merged in any grouping they are those of pooling at once."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lcf_fast import CacheGeometry, LatentSlots, LCFConfig, use_backend
from lcf_fast.errors import DeviceError, DTypeError, GeometryError, MessageError, ShapeError, SpanError
from lcf_fast.slot_states import SlotStates
from lcf_fast.slots_sharer import SlotsSharerSide

pytest.importorskip("triton")

Backend = Literal["eager", "triton"]
SHARER, RECEIVER = CacheGeometry(3, 2, 16), CacheGeometry(2, 2, 16)
BACKENDS: tuple[Backend, ...] = ("eager", "triton")


def make(slots: int = 3) -> LatentSlots:
    torch.manual_seed(1)
    return LatentSlots(LCFConfig(SHARER, RECEIVER, bottleneck=64, slots=slots)).eval()


def caches(tokens: int, *, dtype: torch.dtype = torch.float32, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, SHARER.kv_heads, tokens, SHARER.head_dim)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for _ in "kv") for _ in range(3)]  # type: ignore[misc]


def cut(whole: Any, start: int, stop: int) -> Any:
    return [(key[:, :, start:stop], value[:, :, start:stop]) for key, value in whole]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pieces", [(0, 37), (0, 1, 37), (0, 16, 16, 33, 37)])
def test_pieces_merge_to_the_whole(backend: Backend, pieces: tuple[int, ...]) -> None:
    """Ragged rows, an empty piece, a piece in which a row has no token; also pairwise, and backwards."""
    adapter, whole = make(), caches(37)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0, :17] = False
    whole[1][0][0, :, :17] = torch.nan  # padding holds anything
    with torch.no_grad(), use_backend(backend):
        expected = adapter.summarize(whole, attention_mask=mask)
        parts = [adapter.pool(cut(whole, a, b), attention_mask=mask[:, a:b]) for a, b in zip(pieces, pieces[1:])]
        ways = [adapter.merge(parts), adapter.merge(parts[::-1])]
        one = parts[0]
        for part in parts[1:]:
            one = adapter.merge([one, part])
        for pool in (*ways, one):
            assert pool.nbytes == 4 * 2 * 2 * 2 * 3 * 2 * (16 + 1)  # L, B, Hs, k, two of Ds numbers and a statistic
            message = adapter.finish(pool)
            assert message.latent is not None and expected.latent is not None
            torch.testing.assert_close(message.latent, expected.latent, rtol=1e-5, atol=1e-6)
            assert message.origin == expected.origin
    assert one.to("cpu").states.equal(one.states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_great_scores(dtype: torch.dtype) -> None:
    """One huge key in one of the pieces: the sums neither overflow nor lose the rest."""
    adapter, whole = make().to(torch.float64 if dtype == torch.float64 else torch.float32), caches(20, dtype=dtype)
    whole[0][0][:, :, 5] *= 1000.0
    whole[2][0][:, :, 15] *= -1000.0
    with torch.no_grad():
        parts = [adapter.pool(cut(whole, a, b)) for a, b in ((0, 7), (7, 20))]
        assert parts[0].states.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        made, expected = adapter.finish(adapter.merge(parts)).latent, adapter.summarize(whole).latent
    assert made is not None and expected is not None and bool(made.isfinite().all())
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_one_back_end_merge_with_the_others(backend: Backend) -> None:
    adapter, whole = make(), caches(9)
    with torch.no_grad():
        with use_backend("eager"):
            first = adapter.pool(cut(whole, 0, 4))
        with use_backend("triton"):
            second = adapter.pool(cut(whole, 4, 9))
        with use_backend(backend):
            made = adapter.finish(adapter.merge([second, first])).latent
            expected = adapter.summarize(whole).latent
    assert made is not None and expected is not None
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    adapter, whole = make(), caches(6)
    pool = adapter.pool(whole)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    nothing[1, 0] = True
    with pytest.raises(SpanError, match=r"rows \[0\]"):
        adapter.finish(adapter.pool(whole, attention_mask=nothing))
    with pytest.raises(SpanError, match="at least one"):
        adapter.merge([])
    with pytest.raises(DTypeError, match="SlotStates"):
        adapter.merge([pool, "else"])  # type: ignore[list-item]
    with pytest.raises(DTypeError, match="SlotStates"):
        adapter.finish(adapter.summarize(whole))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"parts\[1\]"):
        adapter.merge([pool, make(4).pool(whole)])
    with pytest.raises(ShapeError, match="pool"):
        adapter.finish(make(4).pool(whole))
    with pytest.raises(DTypeError, match=r"parts\[1\]"):
        adapter.merge([pool, SlotStates(pool.states.double(), pool.stats.double())])
    with pytest.raises(GeometryError, match="cache_piece"):
        adapter.pool(whole[:2])


def test_states_that_are_none() -> None:
    pool = make().pool(caches(5))
    for states, stats, error in (
        (None, pool.stats, DTypeError),
        (pool.states[0], pool.stats, ShapeError),
        (pool.states, pool.stats[..., :1], ShapeError),
        (pool.states.half(), pool.stats.half(), DTypeError),
        (pool.states, pool.stats.double(), DTypeError),
        (pool.states, pool.stats.to("meta"), DeviceError),
    ):
        with pytest.raises(error):
            SlotStates(states, stats)  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="adapter: expected a LatentSlots"):
        SlotsSharerSide.of(None)  # type: ignore[arg-type]


def test_only_the_half_that_pooled_takes_a_state() -> None:
    adapter, whole = make(), caches(9)
    parts = [adapter.pool(cut(whole, 0, 4)), adapter.pool(cut(whole, 4, 9))]
    sent: list[SlotStates] = pickle.loads(pickle.dumps(parts))  # as another process has them
    other = copy.deepcopy(adapter)
    with torch.no_grad():
        other.slot_query.mul_(2.0)  # type: ignore[operator]
    for given in (parts, sent):
        with pytest.raises(MessageError, match=r"parts\[0\]: expected what the sharer's half"):
            other.merge(given)
        with pytest.raises(MessageError, match=r"parts\[1\]"):
            other.merge([other.pool(cut(whole, 0, 4)), given[1]])
        with pytest.raises(MessageError, match="pool"):
            other.finish(given[0])
    expected = adapter.finish(adapter.merge(parts)).tensors["latent"]
    for half in (adapter, copy.deepcopy(adapter), adapter.sharer_side()):
        for given in (parts, sent, [SlotStates(part.states, part.stats) for part in parts]):
            assert torch.equal(half.finish(half.merge(given)).tensors["latent"], expected)
    with torch.no_grad():
        adapter.slot_query.mul_(2.0)  # type: ignore[operator]
    for attempt in (lambda: adapter.finish(parts[0]), lambda: adapter.merge(parts), lambda: pickle.dumps(parts)):
        with pytest.raises(MessageError, match="changed since"):
            attempt()
