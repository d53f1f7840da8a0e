"""Partial pools and overlapping spans, on both back ends, against the float64 reference of pooling at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import Geometry, Pair, assert_within_budget, make_cache
from lcf_fast import eager_pooling, eager_ranges, reference
from lcf_fast.kernels import pooling
from lcf_fast.kernels.pooling_policy import PoolingConfig

#: As in test_pooling: one rounding of a score moves a head's whole vector.
FLOAT32_BUDGET = 4.0
SMALL = PoolingConfig(block_tokens=16, group_spans=4, num_warps=4, merge_chunks=4, merge_warps=4)
BACK_ENDS = {"triton": pooling, "eager": eager_ranges}


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(pooling, "pooling_config", lambda *_: SMALL)
    monkeypatch.setattr(pooling, "turns", lambda *_: 3)  # to a program, the last of which has fewer
    return BACK_ENDS[request.param]


def pool_in_pieces(
    module: ModuleType,
    cache: Sequence[Pair],
    queries: Pair,
    offsets: Tensor,
    mask: Tensor | None,
    cuts: Sequence[int],
    group: Callable[[list[Pair], Tensor], Pair] | None = None,
) -> Tensor:
    """Cut at ``cuts``, pool each piece by itself, merge (all at once, or as ``group`` does), finish."""
    pieces = []
    for start, stop in zip(cuts, cuts[1:]):
        part = [(key[:, :, start:stop], value[:, :, start:stop]) for key, value in cache]
        part_mask = None if mask is None else mask[..., start:stop]
        keys, values = [key for key, _ in part], [value for _, value in part]
        if module is pooling:
            made = pooling.pool_range(keys, values, *queries, (offsets - start).int(), part_mask)
        else:
            made = eager_ranges.pool_range(part, *queries, offsets - start, part_mask)
        assert torch.isfinite(made[0]).all()  # nothing of what memory held before
        pieces.append(made)
    if group is not None:
        states, stats = group(pieces, queries[1])
    else:
        states, stats = module.merge_ranges(
            torch.stack([states for states, _ in pieces], 4), torch.stack([stats for _, stats in pieces], 4), queries[1]
        )
    summary: Tensor = module.finish_ranges(states, stats, queries[1])
    return summary


def at_once(cache: Sequence[Pair], queries: Pair, offsets: Tensor, mask: Tensor | None) -> Tensor:
    layers = []
    for i, (key, value) in enumerate(cache):
        query = (queries[0][i].to(key.dtype), queries[1][i].to(key.dtype))
        layers.append(torch.stack(reference.attention_pool(key, value, *query, offsets, attention_mask=mask)))
    return torch.stack(layers)


def hold(got: Tensor, cache: Sequence[Pair], queries: Pair, offsets: Tensor, mask: Tensor | None = None) -> None:
    """States are float32 whatever the cache's dtype, so the budget is float32's of the same values."""
    plain = at_once([(key.float(), value.float()) for key, value in cache], queries, offsets, mask)
    double = (queries[0].double(), queries[1].double())
    truth = at_once([(key.double(), value.double()) for key, value in cache], double, offsets, mask)
    assert_within_budget(got, truth, plain, FLOAT32_BUDGET)


def inputs(
    geometry: Geometry, batch: int, tokens: int, generator: torch.Generator, **options: object
) -> tuple[list[Pair], Pair]:
    cache = make_cache(geometry, batch, tokens, generator=generator, **options)  # type: ignore[arg-type]
    shape = (2, geometry.layers, geometry.kv_heads, geometry.head_dim)
    span_query, global_query = torch.randn(shape, generator=generator) * 2
    return cache, (span_query.to(cache[0][0].device), global_query.to(cache[0][0].device))


SPANS = {
    "one": [[0, 100]],
    "few": [[0, 3, 40, 41, 100]],
    "one_a_token": [[*range(101)]],
    "uncovered_ends": [[30, 30, 50, 71]],
    "halves_overlap": [[0, 40, 80, 100], [20, 60, 100, 100]],
    "three_deep": [[0, 30, 60, 90], [10, 40, 70, 100], [20, 50, 80, 80]],
    "empty_track": [[0, 50, 100], [7, 7, 7]],
}


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("cuts", [[0, 100], [0, 50, 100], [0, 1, 16, 41, 42, 99, 100]], ids=len)
def test_pieces(
    name: str, cuts: list[int], back_end: ModuleType, device: torch.device, generator: torch.Generator
) -> None:
    cache, queries = inputs(Geometry(1, 1, 16), 1, 100, generator, device=device)
    offsets = torch.tensor([SPANS[name]], device=device)
    hold(pool_in_pieces(back_end, cache, queries, offsets, None, cuts), cache, queries, offsets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_ragged_and_padded(
    dtype: torch.dtype, back_end: ModuleType, device: torch.device, generator: torch.Generator
) -> None:
    """Two layers or heads; another number of spans, other padding and other tracks' masks for each item."""
    geometry = Geometry(2, 1, 16) if dtype == torch.float16 else Geometry(1, 2, 16)
    cache, queries = inputs(geometry, 2, 70, generator, device=device, dtype=dtype)
    offsets = torch.tensor([[[0, 20, 50, 70], [10, 35, 70, 70]], [[33, 70, 70, 70], [0, 0, 0, 0]]], device=device)
    mask = torch.ones(2, 2, 70, dtype=torch.bool, device=device)
    mask[1, :, :33] = False
    mask[0, 1, 35:40] = False  # a gap in one track alone
    for key, value in cache:
        key[1, :, :33], value[1, :, :33] = torch.nan, torch.inf
    for cuts in ([0, 70], [0, 5, 34, 70]):
        hold(pool_in_pieces(back_end, cache, queries, offsets, mask, cuts), cache, queries, offsets, mask)


def pairwise(module: ModuleType) -> Callable[[list[Pair], Tensor], Pair]:
    def group(pieces: list[Pair], query: Tensor) -> Pair:
        """Merge as a tree, right to left: any grouping of neighbours will do."""
        while len(pieces) > 1:
            left, right = pieces[-2], pieces[-1]
            pieces[-2:] = [module.merge_ranges(*(torch.stack(both, 4) for both in zip(left, right)), query)]
        return pieces[0]

    return group


def test_any_grouping(back_end: ModuleType, device: torch.device, generator: torch.Generator) -> None:
    cache, queries = inputs(Geometry(1, 2, 16), 1, 90, generator, device=device)
    offsets = torch.tensor([[[0, 40, 80, 90], [20, 60, 90, 90]]], device=device)
    cuts = [0, 10, 30, 31, 70, 90]
    hold(pool_in_pieces(back_end, cache, queries, offsets, None, cuts, pairwise(back_end)), cache, queries, offsets)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_spans_and_cuts(data: st.DataObject, back_end: ModuleType, device: torch.device) -> None:
    tokens = data.draw(st.integers(1, 40))
    tracks = data.draw(st.integers(1, 3))
    position = st.integers(0, tokens)
    rows = [sorted(data.draw(st.lists(position, min_size=4, max_size=4), label="offsets")) for _ in range(2 * tracks)]
    offsets = torch.tensor(rows, device=device).view(2, tracks, 4)
    offsets[:, 0, 0], offsets[:, 0, 3] = 0, tokens  # a token in every row
    cuts = sorted({0, tokens, *data.draw(st.lists(position, max_size=4), label="cuts")})
    cache, queries = inputs(Geometry(1, 1, 16), 2, tokens, torch.Generator().manual_seed(tokens), device=device)
    hold(pool_in_pieces(back_end, cache, queries, offsets, None, cuts), cache, queries, offsets)


def test_what_is_open_ends_at_the_end(back_end: ModuleType, device: torch.device, generator: torch.Generator) -> None:
    """Finished in the middle of spans, at both ends and on both tracks: no span runs on into the next track."""
    cache, queries = inputs(Geometry(1, 1, 16), 1, 60, generator, device=device)
    offsets = torch.tensor([[[-5, 20, 90], [-9, 35, 70], [-1, 61, 61]]], device=device)
    summary = pool_in_pieces(back_end, cache, queries, offsets, None, [0, 60])
    hold(summary, cache, queries, offsets.clamp(0, 60))


def test_back_ends_agree_on_the_state(device: torch.device, generator: torch.Generator) -> None:
    """A state made by one back end can be merged and finished by the other."""
    cache, queries = inputs(Geometry(2, 2, 16), 2, 60, generator, device=device)
    offsets = torch.tensor([[[-9, 5, 30, 80], [20, 60, 61, 90]], [[-1, 70, 70, 70], [3, 3, 3, 3]]], device=device)
    keys, values = [key for key, _ in cache], [value for _, value in cache]
    triton = pooling.pool_range(keys, values, *queries, offsets.int())
    eager = eager_ranges.pool_range(cache, *queries, offsets)
    parts = [2 * part + i for part in range(3) for i in range(2)]
    for ours, theirs in zip(triton, eager):
        assert ours.shape == theirs.shape
    present = eager[1][..., [1, 3, 5]] != 0
    assert torch.equal(present, triton[1][..., [1, 3, 5]] != 0)
    assert torch.equal(eager[1][..., 6], triton[1][..., 6])
    torch.testing.assert_close(triton[1][..., parts][..., 1::2], eager[1][..., parts][..., 1::2])
    torch.testing.assert_close(triton[0] * present[..., None, None], eager[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        pooling.finish_ranges(eager[0], eager[1], queries[1]),
        eager_ranges.finish_ranges(triton[0], triton[1], queries[1]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overlap_at_once(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Tracks in the whole pool: a token counts in each of its spans, on both back ends."""
    cache, (span_query, global_query) = inputs(Geometry(1, 2, 64), 2, 150, generator, device=device, dtype=dtype)
    key, value = cache[0]
    offsets = torch.tensor([[[0, 60, 120, 150], [30, 90, 150, 150]], [[0, 10, 10, 150], [0, 150, 150, 150]]])
    offsets = offsets.int().to(device)
    mask = torch.ones(2, 2, 150, dtype=torch.bool, device=device)
    mask[0, 1, 90:100] = False
    mask[1, :, 140:] = False
    query = span_query[0].to(dtype), global_query[0].to(dtype)
    plain = reference.attention_pool(key, value, *query, offsets, attention_mask=mask)
    double = query[0].double(), query[1].double()
    truth = reference.attention_pool(key.double(), value.double(), *double, offsets, attention_mask=mask)
    for got in (
        pooling.attention_pool(key, value, query[0], query[1], offsets, mask),
        eager_pooling.attention_pool(key, value, query[0], query[1], offsets, attention_mask=mask),
    ):
        for ours, exact, same_dtype in zip(got, truth, plain):
            assert_within_budget(ours, exact, same_dtype, FLOAT32_BUDGET if dtype == torch.float32 else 2.0)


def test_a_track_is_worth_what_a_span_is(generator: torch.Generator, device: torch.device) -> None:
    """Two tracks of the same spans weigh each span twice, which leaves the result as it is."""
    cache, (span_query, global_query) = inputs(Geometry(1, 1, 16), 1, 50, generator, device=device)
    once = torch.tensor([[0, 20, 50]], dtype=torch.int32, device=device)
    twice = torch.stack([once, once], 1)
    for module in (pooling, eager_pooling):
        single = module.attention_pool(*cache[0], span_query[0], global_query[0], once)
        double = module.attention_pool(*cache[0], span_query[0], global_query[0], twice)
        for a, b in zip(single, double):
            torch.testing.assert_close(a, b)


def test_sums_over_a_long_span_of_even_weights(generator: torch.Generator) -> None:
    """On the eager path they run token by token: in float32 that is ten times as far off."""
    cache, queries = inputs(Geometry(1, 2, 16), 1, 20_000, generator)
    queries = queries[0] * 0.1, queries[1] * 0.1
    offsets = torch.tensor([[0, 20_000]])
    hold(pool_in_pieces(eager_ranges, cache, queries, offsets, None, [0, 20_000]), cache, queries, offsets)


def test_a_hundred_thousand_tokens(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and in ragged pieces. Long chunks: the interpreter takes its time by the program."""
    if device.type == "cpu":
        monkeypatch.setattr(pooling, "pooling_config", lambda *_: PoolingConfig(2048, 16, 4, 8, 4))
    tokens = 100_000
    cache, queries = inputs(Geometry(1, 1, 16), 1, tokens, generator, device=device)
    offsets = torch.tensor([[0, 1, 37_000, 37_001, 90_000, tokens]], device=device)
    cuts = [0, 33_333, 37_000, 37_001, 80_000, tokens]
    for module in (pooling, eager_ranges):
        hold(pool_in_pieces(module, cache, queries, offsets, None, cuts), cache, queries, offsets)
    at_once = pooling.attention_pool(*cache[0], queries[0][0], queries[1][0], offsets.int())
    hold(torch.stack(at_once)[None], cache, queries, offsets)
