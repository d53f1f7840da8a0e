"""Pooling to slots against a float64 formula: every number of slots, lengths, layouts, masks, chunks and merges."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from slot_formulas import pool_formula
from torch import Tensor

from helpers import (
    ADVERSARIES,
    LAYOUTS,
    Adversary,
    Geometry,
    Layout,
    Pair,
    assert_within_budget,
    beyond_int32,
    guarded,
    make_cache,
    rows_beyond_int32,
    with_layout,
)
from lcf_fast.kernels import slot_pooling
from lcf_fast.kernels.slot_policy import SlotPoolConfig, chunk_tokens, slot_pool_config
from lcf_fast.kernels.slot_pooling import (
    finish_slot_states,
    merge_slot_states,
    pool_slot_states,
    pool_slots,
    pool_slots_with_stats,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Results are float32, and plain torch is held to float32 too. One rounding of a score moves a whole head's vector, so
#: that one head is one sample of the error, not D; and tensor instructions add up in their own order.
BUDGET = 4.0
#: 16 slots a program, steps of 16 tokens, merged four at a time.
SMALL = SlotPoolConfig(
    block_slots=16, block_tokens=16, num_warps=4, num_stages=2, masked_stages=3, merge_parts=4, merge_warps=4
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens make many chunks of two steps, and several steps of the merge."""
    monkeypatch.setattr(slot_pooling, "slot_pool_config", lambda *_: SMALL)
    monkeypatch.setattr(slot_pooling, "chunk_tokens", lambda *_: 32)


def queries(sharer: Sequence[Pair], slots: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """``(L, k, H, D)`` in the cache's dtype."""
    key = sharer[0][0]
    drawn = torch.randn(len(sharer), slots, key.shape[1], key.shape[3], generator=generator) * scale
    return drawn.to(key.device, key.dtype)


def check(sharer: Sequence[Pair], query: Tensor, mask: Tensor | None = None) -> Pair:
    """Pool, hold both results to the error budget, return them."""
    got = pool_slots(sharer, query, attention_mask=mask)
    truth = pool_formula(sharer, query, mask, torch.float64)
    for ours, exact, plain in zip(got, truth, pool_formula(sharer, query, mask, torch.float32)):
        assert_within_budget(ours, exact, plain, BUDGET)
    return got


def cache(
    heads: int,
    tokens: int,
    head_dim: int,
    generator: torch.Generator,
    *,
    layers: int = 1,
    batch: int = 1,
    **kwargs: object,
) -> list[Pair]:
    geometry = Geometry(layers, heads, head_dim)
    return make_cache(geometry, batch, tokens, generator=generator, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_length(tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(1, tokens, 64, generator, device=device, dtype=dtype)
    check(sharer, queries(sharer, 3, generator))


@pytest.mark.parametrize("slots", [1, 3, 8, 16, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_slots(slots: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(1, 70, 64, generator, device=device, dtype=dtype)
    check(sharer, queries(sharer, slots, generator))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dim(head_dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(3, 33, head_dim, generator, device=device, dtype=dtype)
    check(sharer, queries(sharer, 5, generator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_query_keeps_its_digits(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """Parameters in training are float32; scores in the tens would show the cache's 8 or 11 bits."""
    sharer = cache(2, 40, 64, generator, device=device, dtype=dtype)
    check(sharer, queries(sharer, 8, generator, 4.0).float() * 1.01)


def ragged(kind: str, batch: int, tokens: int) -> Tensor:
    """``(B, N)`` bool, another number of tokens in each row."""
    at, row = torch.arange(tokens), torch.arange(batch)[:, None]
    return {
        "left": at >= 11 + 37 * row,
        "right": at < tokens - 11 - 37 * row,
        "holes": (at + row) % 3 != 0,
        "one": at == 64 + row,
    }[kind]


@pytest.mark.parametrize("kind", ["left", "right", "holes", "one"])
@pytest.mark.usefixtures("small_chunks")
def test_mask(kind: str, device: torch.device, generator: torch.Generator) -> None:
    """What is masked may hold anything; whole chunks of it are states of no token."""
    sharer = cache(1, 130, 64, generator, batch=3, device=device)
    mask = ragged(kind, 3, 130).to(device)
    for key, value in sharer:
        key.masked_fill_(~mask[:, None, :, None], torch.nan)
        value.masked_fill_(~mask[:, None, :, None], torch.inf)
    check(sharer, queries(sharer, 3, generator), mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_mask_layout(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """A mask of any integer type, with strides, another for each row."""
    sharer = cache(1, 70, 64, generator, batch=2, device=device, dtype=torch.float16)
    mask = torch.zeros(140, 4, dtype=dtype, device=device).T[::2, ::2]
    mask.copy_(torch.stack([torch.arange(70) % 3, torch.arange(70) // 9]))
    check(sharer, queries(sharer, 3, generator), mask)


def grouped(batch: int, groups: int, tokens: int, generator: torch.Generator) -> Tensor:
    """``(B, P, N)``: ranges that overlap and have holes, the last group of one token; a row's end is of no group."""
    start = torch.randint(0, tokens - 12, (batch, groups, 1), generator=generator)
    stop = start + torch.randint(1, tokens, (batch, groups, 1), generator=generator)
    at = torch.arange(tokens)
    mask = (at >= start) & (at < stop) & (at < tokens - 11)
    mask &= torch.rand(mask.shape, generator=generator) < 0.8
    mask |= at == start
    mask[:, -1] = at == start[:, -1]
    return mask


def spoil(sharer: Sequence[Pair], mask: Tensor) -> None:
    """NaN and infinities where no group has a token."""
    outside = ~mask.any(1)[:, None, :, None]
    for key, value in sharer:
        key.masked_fill_(outside, torch.nan)
        value.masked_fill_(outside, torch.inf)


def item_a_row(sharer: Sequence[Pair], groups: int) -> list[Pair]:
    """A copy of the cache for every group."""
    return [(key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)) for key, value in sharer]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("many", "groups", "slots"), [(True, 1, 3), (True, 2, 17), (False, 5, 1), (True, 9, 3)])
def test_groups(
    many: bool,
    groups: int,
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    request: pytest.FixtureRequest,
) -> None:
    """Each as a row of its own with the group for its mask, to the bit; chunks before, in and after it."""
    if many:
        request.getfixturevalue("small_chunks")
    batch = 1 if groups == 9 else 2
    sharer = cache(1, 100, 64, generator, batch=batch, device=device, dtype=dtype)
    query, mask = queries(sharer, slots, generator), grouped(batch, groups, 100, generator).to(device)
    spoil(sharer, mask)
    got = pool_slots_with_stats(sharer, query, attention_mask=mask)
    rows = item_a_row(sharer, groups)
    truth, plain = (pool_formula(rows, query, mask.flatten(0, 1), kind) for kind in (torch.float64, torch.float32))
    for ours, exact, same in zip(got, truth, plain):
        assert_within_budget(ours, exact, same, BUDGET)
    if many and dtype == torch.float16:
        alone = pool_slots_with_stats(rows, query, attention_mask=mask.flatten(0, 1))
        assert all(torch.equal(a, b) for a, b in zip(got, alone))


@pytest.mark.usefixtures("small_chunks")
def test_groups_of_layers_and_heads_by_any_integer(device: torch.device, generator: torch.Generator) -> None:
    """The largest of a mask's integers is not its first; layers lie differently; states are the pooled ones'."""
    sharer = cache(2, 70, 64, generator, layers=2, batch=2, device=device)
    sharer[1] = (with_layout(sharer[1][0], "token_major"), sharer[1][1])
    query, mask = queries(sharer, 3, generator), grouped(2, 2, 70, generator).to(device)
    numbers = (mask * torch.arange(1, 71, device=device)).transpose(1, 2).contiguous().transpose(1, 2)
    straight = pool_slots(sharer, query, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(straight, pool_slots(sharer, query, attention_mask=numbers)))
    truth = pool_formula(item_a_row(sharer, 2), query, mask.flatten(0, 1), torch.float64)
    for ours, exact in zip(straight, truth):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    states = finish_slot_states(*pool_slot_states(sharer, query, attention_mask=mask))
    for ours, other in zip(states, straight):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("many", [False, True])
def test_a_group_without_a_token_is_nan_and_only_there(
    many: bool, device: torch.device, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    if many:
        request.getfixturevalue("small_chunks")
    sharer = cache(1, 100, 64, generator, batch=2, device=device)
    query, mask = queries(sharer, 3, generator), grouped(2, 3, 100, generator).to(device)
    whole = pool_slots(sharer, query, attention_mask=mask)
    mask[1, 0] = False
    for ours, others in zip(pool_slots(sharer, query, attention_mask=mask), whole):
        assert torch.isnan(ours[:, 3]).all()
        rest = [0, 1, 2, 4, 5]
        assert torch.equal(ours[:, rest], others[:, rest])


@pytest.mark.usefixtures("small_chunks")
def test_steps_without_a_token_of_the_group_are_left_out(device: torch.device, generator: torch.Generator) -> None:
    """What is loaded is of the steps from a group's first token to its last: the bounds are what the loop runs by."""
    mask = grouped(2, 3, 100, generator).to(device)
    found = slot_pooling.loadable_mask(mask)
    assert found is not None
    assert found.first is not None
    assert found.after is not None
    for row, own in enumerate(mask.flatten(0, 1)):
        at = own.nonzero().flatten()
        assert (int(found.first[row]), int(found.after[row])) == (int(at[0]), 99 - int(at[-1]))
    sharer, wrong = cache(1, 100, 64, generator, batch=2, device=device), mask.clone()
    query = queries(sharer, 3, generator)
    narrow = slot_pooling.TokenMask(
        torch.ones(6, 100, dtype=torch.int32, device=device), 3, found.first * 0 + 37, found.after * 0 + 40
    )
    states = slot_pooling._launch_pool(*([side] for side in sharer[0]), query, narrow, SMALL, None)
    assert states is not None
    # The step of 16 in which token 37 lies begins at 32; token 59 is the last.
    wrong[:] = (torch.arange(100, device=device) >= 32) & (torch.arange(100, device=device) < 60)
    expected = pool_slots(sharer, query, attention_mask=wrong)
    for ours, other in zip(finish_slot_states(*merge_slot_states(*states)), expected):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("many", [False, True])
def test_no_token_is_nan_and_only_there(
    many: bool, device: torch.device, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    if many:
        request.getfixturevalue("small_chunks")
    sharer = cache(2, 100, 64, generator, batch=3, device=device)
    mask = torch.ones(3, 100, dtype=torch.bool, device=device)
    mask[1] = False
    query = queries(sharer, 3, generator)
    got = pool_slots(sharer, query, attention_mask=mask)
    alone = check([(key[::2], value[::2]) for key, value in sharer], query)
    for ours, others in zip(got, alone):
        assert torch.isnan(ours[:, 1]).all()
        assert torch.equal(ours[:, ::2], others)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_adversary(adversary: Adversary, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(1, 70, 64, generator, device=device, dtype=dtype, adversary=adversary)
    query = queries(sharer, 3, generator)
    if adversary == "all_equal":
        # Plain torch is exact here by luck, so there is no budget: every rounding of a sum shows.
        for got in pool_slots(sharer, query):
            torch.testing.assert_close(got, torch.full_like(got, float(sharer[0][0][0, 0, 0, 0])), rtol=1e-6, atol=0)
    else:
        check(sharer, query)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_exp_would_overflow(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Scores in the hundreds, of both signs, and one token that outweighs all: no inf, no NaN."""
    sharer = cache(1, 100, 64, generator, device=device, dtype=dtype)
    query = queries(sharer, 2, generator, 100.0)
    sharer[0][0][0, 0, 66] = 10 * query[0, 0, 0].sign()
    scores = sharer[0][0][0, 0].double() @ query[0, 0, 0].double() / 8
    assert scores.max() > 2000
    assert scores.min() < -100
    check(sharer, query)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_scores_in_order(descending: bool, device: torch.device, generator: torch.Generator) -> None:
    """The maximum grows with every step, chunk and merge, or never after the first."""
    sharer = cache(1, 200, 64, generator, device=device)
    ((key, value),) = sharer
    query = queries(sharer, 2, generator, 2.0)
    order = (key[0, 0] @ query[0, 0, 0]).argsort(descending=descending)
    query[0, 1] = query[0, 0] * 0.5
    check([(key[:, :, order], value)], query)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_chunks")
def test_layout(layout: Layout, device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(2, 40, 80, generator, batch=2, device=device, dtype=torch.float16)
    query = queries(sharer, 3, generator)
    check([(with_layout(key, layout), with_layout(value, layout)) for key, value in sharer], query)
    check([(with_layout(key, layout), value) for key, value in sharer], query)


def test_a_slice_of_the_slots(device: torch.device, generator: torch.Generator) -> None:
    """Fewer slots than were trained: a view of the queries, and the same numbers."""
    sharer = cache(2, 70, 64, generator, layers=2, device=device)
    query = queries(sharer, 8, generator)
    whole, few = pool_slots(sharer, query), pool_slots(sharer, query[:, :3])
    assert all(torch.equal(a[:, :, :3], b) for a, b in zip(whole, few))
    across = pool_slots(sharer, query.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(whole, across))


@pytest.mark.usefixtures("small_chunks")
def test_layers_equal_layer_by_layer(device: torch.device, generator: torch.Generator) -> None:
    """One launch for neighbours that lie alike, others for the rest; a layer of the sharer may serve two."""
    sharer = cache(2, 70, 64, generator, layers=3, device=device)
    sharer.insert(1, sharer[0])
    sharer[2] = (with_layout(sharer[2][0], "token_major"), sharer[2][1])
    query = queries(sharer, 3, generator)
    whole = check(sharer, query)
    assert not torch.equal(whole[0][0], whole[0][1])  # the same keys and values, but other queries
    for i, pair in enumerate(sharer):
        alone = pool_slots([pair], query[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone))


def test_permuted_batch(device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(1, 100, 64, generator, batch=3, device=device)
    query, mask = queries(sharer, 3, generator), ragged("left", 3, 100).to(device)
    order = torch.tensor([2, 0, 1], device=device)
    straight = check(sharer, query, mask)
    permuted = pool_slots([(key[order], value[order]) for key, value in sharer], query, attention_mask=mask[order])
    assert all(torch.equal(a[:, order], b) for a, b in zip(straight, permuted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", [[0, 1, 100], [0, 16, 33, 73, 100]], ids=str)
def test_pieces_merge_to_the_whole(
    cuts: list[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """Pieces pooled apart, one of padding alone, merged in one go or one by one: within rounding of one launch."""
    sharer = cache(1, 100, 64, generator, batch=2, device=device, dtype=dtype)
    query = queries(sharer, 2, generator)
    mask = ragged("right", 2, 100).to(device)
    truth, plain = (pool_formula(sharer, query, mask, kind) for kind in (torch.float64, torch.float32))
    states = [
        pool_slot_states(
            [(key[:, :, start:stop], value[:, :, start:stop]) for key, value in sharer],
            query,
            attention_mask=mask[:, start:stop],
        )
        for start, stop in zip(cuts, cuts[1:])
    ]

    def merged(parts: Sequence[Pair]) -> Pair:
        return merge_slot_states(torch.stack([a for a, _ in parts], 3), torch.stack([b for _, b in parts], 3))

    one_by_one = states[0]
    for part in states[1:]:
        one_by_one = merged([one_by_one, part])
    nothing = merge_slot_states(*(x[:, :, :, None][:, :, :, :0] for x in states[0]))
    for state in (merged(states), one_by_one, merged([nothing, *states, nothing])):
        for ours, exact, same in zip(finish_slot_states(*state), truth, plain):
            assert_within_budget(ours, exact, same, BUDGET)
    assert torch.isneginf(nothing[1][..., 0]).all()
    assert (nothing[1][..., 1] == 0).all()
    assert (nothing[0] == 0).all()


def test_a_state_of_padding_is_empty(device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(1, 20, 64, generator, device=device)
    mask = torch.zeros(1, 20, dtype=torch.bool, device=device)
    states, stats = pool_slot_states(sharer, queries(sharer, 3, generator), attention_mask=mask)
    assert torch.equal(states, torch.zeros_like(states))
    assert torch.isneginf(stats[..., 0]).all()
    assert (stats[..., 1] == 0).all()
    assert all(torch.isnan(x).all() for x in finish_slot_states(states, stats))


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_chunks_do_not_matter(
    chunk: int, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_pooling, "slot_pool_config", lambda *_: SMALL)
    monkeypatch.setattr(slot_pooling, "chunk_tokens", lambda *_: chunk)
    sharer = cache(1, 120, 64, generator, device=device, dtype=torch.bfloat16)
    check(sharer, queries(sharer, 3, generator))


@pytest.mark.parametrize("many", [False, True])
def test_reads_and_writes_nothing_beyond(
    many: bool, device: torch.device, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    """NaN lies around the inputs, guard bands around the outputs; head dim and slots are of no tile's width."""
    if many:
        request.getfixturevalue("small_chunks")
    shapes = [(2, 1, 37, 80)] * 2 + [(1, 3, 1, 80)]
    made = [guarded(shape, torch.float16, device) for shape in shapes]
    for tensor, _ in made:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    key, value, query = (tensor for tensor, _ in made)
    outs = [guarded(shape, torch.float32, device) for shape in [(1, 2, 3, 1, 80)] * 2 + [(1, 2, 1, 3, 2)]]
    config = SMALL if many else slot_pool_config(80, 2, 3, "sm_90")
    out = outs[0][0], outs[1][0], outs[2][0]
    launched = slot_pooling._launch_pool([key], [value], query, None, config, out)
    if many:
        assert launched is not None, "several chunks leave states to merge"
    if launched is not None:  # a chip's own policy may cut so few tokens, too
        slot_pooling._launch_merge(*launched, config, out)
    truth = pool_formula([(key, value)], query, None, torch.float64)
    for got, exact, plain in zip(out, truth, pool_formula([(key, value)], query, None, torch.float32)):
        assert_within_budget(got, exact, plain, BUDGET)
    for _, guards in (*made, *outs):
        guards()


@pytest.mark.parametrize("many", [False, True])
def test_stats_are_those_of_the_states(
    many: bool, device: torch.device, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    """What the backward starts from, in the same read of the cache; of an item without a token: -inf and 0."""
    if many:
        request.getfixturevalue("small_chunks")
    sharer = cache(2, 100, 64, generator, layers=2, batch=2, device=device)
    sharer[1] = (with_layout(sharer[1][0], "token_major"), sharer[1][1])
    query = queries(sharer, 3, generator)
    mask = torch.ones(2, 100, dtype=torch.bool, device=device)
    mask[1] = False
    _, _, stats = pool_slots_with_stats(sharer, query, attention_mask=mask)
    assert torch.equal(stats, pool_slot_states(sharer, query, attention_mask=mask)[1])
    scores = torch.einsum("khd,hnd->hkn", query[1].double(), sharer[1][0][0].double()) * 64**-0.5
    torch.testing.assert_close(stats[1, 0, ..., 0].double(), scores.amax(-1), rtol=1e-5, atol=1e-5)
    total = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(stats[1, 0, ..., 1].double(), total, rtol=1e-5, atol=1e-5)
    assert (stats[:, 1, ..., 1] == 0).all()


@pytest.mark.usefixtures("small_chunks")
def test_run_to_run(device: torch.device, generator: torch.Generator) -> None:
    sharer = cache(2, 200, 64, generator, device=device, dtype=torch.float16)
    query = queries(sharer, 8, generator)
    first, second = (pool_slots(sharer, query) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_beyond_two_to_the_31_elements(axis: int, device: torch.device, generator: torch.Generator) -> None:
    """The third row of one axis begins 2**31 elements on: index times stride overflows 32 bits, each alone does not."""
    shape = [1, 1, 3, 64]
    shape[axis] = 3
    far = beyond_int32(tuple(shape), axis, device)  # type: ignore[arg-type]
    far.copy_(torch.randn(shape, generator=generator))
    check([(far, far)], queries([(far, far)], 2, generator))


@pytest.mark.usefixtures("small_chunks")
def test_a_step_beyond_two_to_the_31_elements(device: torch.device, generator: torch.Generator) -> None:
    """The third step's first token begins 2**31 elements on, where a step's own offsets still fit 32 bits."""
    far = rows_beyond_int32(33, device)
    far.copy_(torch.randn(far.shape, generator=generator))
    check([(far, far)], queries([(far, far)], 2, generator))


def test_nothing_to_pool_for_no_rows(device: torch.device) -> None:
    empty = torch.empty(0, 2, 10, 64, device=device)
    query = torch.zeros(1, 3, 2, 64, device=device)
    assert pool_slots([(empty, empty)], query)[0].shape == (1, 0, 3, 2, 64)
    states, stats = pool_slot_states([(empty, empty)], query)
    assert (states.shape, stats.shape) == ((1, 0, 2, 3, 2, 64), (1, 0, 2, 3, 2))
    pieces = states.new_empty(1, 0, 2, 2, 3, 2, 64), stats.new_empty(1, 0, 2, 2, 3, 2)
    assert [part.shape for part in merge_slot_states(*pieces)] == [states.shape, stats.shape]
    assert finish_slot_states(states, stats)[0].shape == (1, 0, 3, 2, 64)


@pytest.mark.parametrize(
    ("tokens", "slots", "rows", "chunk"),
    [
        (2000, 8, 224, 256),  # 28 layers, 8 heads: 1,792 programs, over 8 for each of 132 multiprocessors
        (32768, 8, 224, 4096),
        (256, 8, 224, 256),  # whole: one launch
        (512, 8, 224, 256),
        (512, 64, 224, 512),  # 64 states cost more than shorter chunks save
        (2048, 8, 8, 64),  # one layer: a program for every multiprocessor
        (2048, 64, 8, 64),
        (2048, 8, 8 * 224, 2048),  # a batch fills the chip
        (1, 1, 1, 32),
    ],
)
def test_chunks_fill_the_chip(tokens: int, slots: int, rows: int, chunk: int) -> None:
    assert chunk_tokens(slot_pool_config(128, 2, slots, "sm_90"), rows, tokens, slots, 2, 132) == chunk


def test_a_step_fits_the_chip() -> None:
    """16 KB a step, or 16 tokens, whatever the width and dtype; no more slots a program than registers hold."""
    for head_dim, size, chip in ((d, s, c) for d in (8, 64, 80, 128, 256) for s in (2, 4) for c in ("sm_80", "gfx942")):
        for slots in (1, 16, 17, 33, 64):
            config = slot_pool_config(head_dim, size, slots, chip)
            assert 16 <= config.block_tokens <= 64
            assert config.block_tokens == 16 or config.block_tokens * head_dim * size * 2 <= 16 * 1024
            assert config.block_slots * head_dim <= 8192
    assert [slot_pool_config(128, 2, slots, "sm_90").block_slots for slots in (1, 16, 17, 64)] == [16, 16, 32, 64]
