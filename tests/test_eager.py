"""The eager back end's projection, injection and fusion: dtypes, shapes, masks, gates, layouts, hostile data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from against_reference import (
    DTYPES,
    EXAMPLES,
    F32,
    F64,
    RECEIVER,
    SHARER,
    as_double,
    check,
    check_fuse,
    check_pooling,
    cloned,
    flat,
    layer_of,
    same_bits,
)
from hypothesis import given
from torch import Tensor

from helpers import (
    ADVERSARIES,
    CACHE_LAYOUTS,
    GATES,
    Adversary,
    CacheLayout,
    Geometry,
    Layout,
    Pair,
    assert_within_budget,
    guarded,
    make_cache,
    make_weights,
)
from lcf_fast import eager, reference
from lcf_fast.eager_tiles import Tile, Workspace, cut_tiles, group_layers, uncovered

TOKENS = (0, 1, 15, 16, 17, 63, 300)
CPU = torch.device("cpu")


def test_the_check_in_float64_is_near_its_rounding() -> None:
    """That the budget of narrower dtypes can fail, `test_helpers` shows."""
    x = torch.randn(40, dtype=F64)
    check(lambda x: [x.exp()], [x.exp() * (1 + 1e-14)], x)
    with pytest.raises(AssertionError):
        check(lambda x: [x.exp()], [x.exp() * (1 + 1e-10)], x)
    with pytest.raises(AssertionError):
        check(lambda x: [x.exp(), x], [x.exp()], x)


# --- projection to injection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, F64])
@pytest.mark.parametrize("tokens", TOKENS)
def test_token_counts(generator: torch.Generator, dtype: torch.dtype, tokens: int) -> None:
    sharer, receiver = Geometry(3, 2, 64), Geometry(3, 3, 80)
    weights = make_weights(sharer, receiver, 64, gates="mixed", dtype=dtype, generator=generator)
    check_fuse(
        make_cache(sharer, 1, tokens, dtype=dtype, generator=generator),
        make_cache(receiver, 1, tokens, dtype=dtype, generator=generator),
        weights,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "sharer", "receiver"),
    [
        (64, Geometry(2, 1, 64), Geometry(2, 3, 96)),
        (128, Geometry(2, 2, 80), Geometry(2, 1, 128)),
        (256, Geometry(2, 5, 64), Geometry(2, 2, 256)),
        (512, Geometry(2, 1, 256), Geometry(2, 7, 64)),
    ],
)
def test_widths_heads_and_head_dims(
    generator: torch.Generator, dtype: torch.dtype, width: int, sharer: Geometry, receiver: Geometry
) -> None:
    weights = make_weights(sharer, receiver, width, dtype=dtype, generator=generator)
    keys = [make_cache(geometry, 2, 21, dtype=dtype, generator=generator) for geometry in (sharer, receiver)]
    check_fuse(keys[0], keys[1], weights)
    message = torch.randn(2, 2, width, generator=generator)
    check_fuse(None, keys[1], weights, message=message)


def small(
    generator: torch.Generator, batch: int, tokens: int, sharer_tokens: int | None = None, **kw: Any
) -> tuple[list[Pair], list[Pair], dict[str, Tensor]]:
    sharer = make_cache(SHARER, batch, tokens if sharer_tokens is None else sharer_tokens, generator=generator)
    receiver = make_cache(RECEIVER, batch, tokens, generator=generator)
    return sharer, receiver, make_weights(SHARER, RECEIVER, 16, generator=generator, **kw)


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 1, 40, 600])
def test_batches(generator: torch.Generator, batch: int, tokens: int) -> None:
    check_fuse(*small(generator, batch, tokens, gates="mixed"))


@pytest.mark.parametrize("gates", list(GATES))
@pytest.mark.parametrize("tokens", [3, 700])
def test_gates(generator: torch.Generator, gates: str, tokens: int) -> None:
    sharer, receiver, weights = small(generator, 2, tokens, gates=gates)
    check_fuse(sharer, receiver, weights, positions=(1, tokens))
    for layer, pair in enumerate(receiver):
        one = layer_of(weights, layer)
        latent = torch.randn(2, tokens, 16, generator=generator)
        got = eager.gated_injection(*pair, latent, one)
        for i in (0, 1):
            assert (got[i] is pair[i]) == (not bool(one["gate_logit"][i] > 0))


def test_a_closed_gate_costs_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead layers are not computed: nothing of theirs is read, not even a NaN."""
    sharer, receiver, weights = small(generator, 1, 5, gates="mixed")
    dead = 1  # the second of "mixed"
    for pair in (sharer[dead], receiver[dead]):
        for tensor in pair:
            tensor.fill_(torch.nan)
    for tensor in weights.values():
        if tensor is not weights["gate_logit"]:
            tensor[dead] = torch.nan
    computed = []
    project = eager._project

    def counted(space: Any, sources: Any, *rest: Any) -> Tensor:
        computed.append(len(sources[0]))
        return project(space, sources, *rest)

    monkeypatch.setattr(eager, "_project", counted)
    got = eager.fuse_layers(sharer, receiver, weights)
    assert got[dead][0] is receiver[dead][0]
    assert sum(computed) == 3
    assert all(bool(torch.isfinite(x).all()) for layer, pair in enumerate(got) if layer != dead for x in pair)


@pytest.mark.parametrize("tokens", [7, 530])
def test_masks_indices_and_positions(generator: torch.Generator, tokens: int) -> None:
    """Left and right padding, holes, an item that is all padding; what is not edited, NaN and -0.0, keeps its bits."""
    batch = 4
    sharer, receiver, weights = small(generator, batch, tokens, sharer_tokens=tokens + 2)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, : tokens // 2] = 0
    mask[1, tokens // 3 :] = 0
    mask[2] = torch.rand(tokens, generator=generator) < 0.5
    mask[3] = 0
    index = torch.randint(-1, tokens + 2, (batch, tokens), generator=generator, dtype=torch.int32)
    for edit_mask, (first, last) in (
        (mask, (0, tokens)),
        (mask.bool(), (2, tokens - 1)),
        (None, (0, 3)),
        (None, (3, 3)),
    ):
        kw: dict[str, Any] = {"edit_mask": edit_mask, "sharer_index": index, "positions": (first, last)}
        edited = index >= 0
        if edit_mask is not None:
            edited &= mask != 0
        edited[:, :first] = False
        edited[:, last:] = False
        hostile = cloned(receiver)
        for tensor in flat(hostile):
            tensor.transpose(1, 2)[~edited] = torch.tensor([torch.nan, -0.0] * 5)
        got = eager.fuse_layers(sharer, hostile, weights, **kw)
        in_place = eager.fuse_layers_(sharer, cloned(hostile), weights, **kw)
        truth = reference.fuse_layers(as_double(sharer), as_double(receiver), as_double(weights), **kw)
        plain = reference.fuse_layers(sharer, receiver, weights, **kw)
        for new, same, old, wide, narrow in zip(*map(flat, (got, in_place, hostile, truth, plain))):
            rows = [x.transpose(1, 2) for x in (new, old, wide, narrow)]
            assert same_bits(rows[0][~edited], rows[1][~edited])
            assert_within_budget(rows[0][edited], rows[2][edited], rows[3][edited])
            assert same_bits(new, same)


def test_an_index_that_only_shifts_reads_the_same_rows(generator: torch.Generator) -> None:
    sharer, receiver, weights = small(generator, 2, 9, sharer_tokens=20)
    for start in (0, 4, 11):
        index = torch.arange(start, start + 9).expand(2, 9).clone()
        index[0, :3] = -1  # left padding: still a range
        index[1, 4] = -1
        check_fuse(sharer, receiver, weights, sharer_index=index)
        tile = Tile(slice(0, 2), slice(0, 9), index >= 0)
        assert eager._sharer_rows(tile, index, 20) == slice(start, start + 9)  # nothing is gathered


def test_a_range_may_not_run_over_an_end_of_the_sharer(generator: torch.Generator) -> None:
    """Tiles of long rows begin and end anywhere: there, one edited row says nothing of its neighbours'."""
    sharer, receiver, weights = small(generator, 1, 1100, sharer_tokens=500)
    index = torch.full((1, 1100), -1)
    index[0, 0], index[0, 400], index[0, 1099] = 3, 499, 0  # one in each of three tiles
    check_fuse(sharer, receiver, weights, sharer_index=index)


def test_padding_of_the_sharer_that_no_position_reads_may_hold_nan(generator: torch.Generator) -> None:
    sharer, receiver, weights = small(generator, 1, 6, sharer_tokens=8)
    index = torch.tensor([[-1, 3, 2, -1, 6, 7]])
    check_fuse(sharer, receiver, weights, sharer_index=index)
    for tensor in flat(sharer):
        tensor[:, :, :2] = torch.nan
        tensor[:, :, 4:6] = torch.inf
    for tensor in flat(eager.fuse_layers(sharer, receiver, weights, sharer_index=index)):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", [*DTYPES, F64])
@pytest.mark.parametrize("indexed", [False, True])
def test_projection_and_injection_alone(generator: torch.Generator, dtype: torch.dtype, indexed: bool) -> None:
    batch, tokens = 2, 33
    sharer = make_cache(SHARER, batch, 40 if indexed else tokens, dtype=dtype, generator=generator)[0]
    receiver = make_cache(RECEIVER, batch, tokens, dtype=dtype, generator=generator)[0]
    weights = layer_of(make_weights(SHARER, RECEIVER, 64, dtype=dtype, generator=generator), 0)
    index = torch.randint(-1, 40, (batch, tokens), generator=generator) if indexed else None
    latent = eager.joint_projection(*sharer, *receiver, weights, sharer_index=index)
    assert latent.dtype == reference.accumulation_dtype(dtype)

    def project(sharer: Pair, receiver: Pair, weights: Any) -> list[Tensor]:
        return [reference.joint_projection(*sharer, *receiver, weights, sharer_index=index)]

    check(project, [latent], sharer, receiver, weights)
    if index is not None:
        assert not latent[index < 0].any()

    mask = torch.rand(batch, tokens, generator=generator) < 0.6
    got = eager.gated_injection(*receiver, latent, weights, edit_mask=mask)

    def inject(receiver: Pair, latent: Tensor, weights: Any) -> Pair:
        return reference.gated_injection(*receiver, latent, weights, edit_mask=mask)

    check(inject, got, receiver, latent, weights)
    edited = cloned([receiver])[0]
    back = eager.gated_injection_(*edited, latent, weights, edit_mask=mask)
    assert back[0] is edited[0]
    assert back[1] is edited[1]
    assert all(same_bits(a, b) for a, b in zip(edited, got))


@pytest.mark.parametrize("dtype", DTYPES)
def test_message_alone(generator: torch.Generator, dtype: torch.dtype) -> None:
    receiver = make_cache(RECEIVER, 2, 20, dtype=dtype, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 64, dtype=dtype, generator=generator)
    message = torch.randn(4, 2, 64, generator=generator)
    mask = torch.rand(2, 20, generator=generator) < 0.6
    check_fuse(None, receiver, weights, message=message, edit_mask=mask, positions=(0, 19))
    long = make_cache(RECEIVER, 2, 520, dtype=dtype, generator=generator)  # a tile an item and more
    check_fuse(None, long, weights, message=message)
    latent = eager.joint_projection(None, None, *receiver[1], layer_of(weights, 1), message=message[1])

    def project(receiver: Pair, weights: Any, message: Tensor) -> list[Tensor]:
        return [reference.joint_projection(None, None, *receiver, weights, message=message)]

    check(project, [latent], receiver[1], layer_of(weights, 1), message[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_another_dtype_are_cast(generator: torch.Generator, dtype: torch.dtype) -> None:
    sharer, receiver, weights = small(generator, 1, 12)
    caches = [[(key.to(dtype), value.to(dtype)) for key, value in pairs] for pairs in (sharer, receiver)]
    check_fuse(caches[0], caches[1], weights)
    check_fuse(sharer, caches[1], weights)
    check_fuse(sharer, receiver, {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()})


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_layouts(generator: torch.Generator, layout: CacheLayout, dtype: torch.dtype) -> None:
    sharer = make_cache(SHARER, 2, 11, dtype=dtype, layout=layout, generator=generator)
    receiver = make_cache(RECEIVER, 2, 11, dtype=dtype, layout=layout, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 16, dtype=dtype, cross_context=True, generator=generator)
    check_fuse(sharer, receiver, weights, positions=(0, 10))
    check_pooling(sharer, weights, torch.tensor([[0, 4, 11], [1, 1, 9]]))
    assert all(tensor.is_contiguous() for tensor in flat(eager.fuse_layers(sharer, receiver, weights)))


@pytest.mark.parametrize("layout", ["token_major", "padded", "offset"])
def test_in_place_writes_through_views_and_nowhere_else(generator: torch.Generator, layout: Layout) -> None:
    sharer, dense, weights = small(generator, 2, 11)
    expected = eager.fuse_layers(sharer, dense, weights, positions=(1, 9))
    pairs, checks = [], []
    for pair in dense:
        views = []
        for tensor in pair:
            shape = {"token_major": (2, 11, 3, 10), "padded": (2, 3, 16, 10), "offset": (2 * 3 * 11 * 10 + 1,)}[layout]
            buffer, check = guarded(shape, F32, band=64)
            view = {
                "token_major": lambda b: b.transpose(1, 2),
                "padded": lambda b: b[:, :, 2:13],
                "offset": lambda b: b[1:].view(2, 3, 11, 10),
            }[layout](buffer)
            view.copy_(tensor)
            views.append(view)
            checks.append((check, buffer, view))
        pairs.append((views[0], views[1]))
    eager.fuse_layers_(sharer, pairs, weights, positions=(1, 9))
    assert all(same_bits(a, b) for a, b in zip(flat(pairs), flat(expected)))
    for check, buffer, view in checks:
        check()
        assert int(torch.isnan(buffer).sum()) == buffer.numel() - view.numel(), "written beside the view"


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_data(generator: torch.Generator, adversary: Adversary, dtype: torch.dtype) -> None:
    sharer = make_cache(SHARER, 2, 19, dtype=dtype, adversary=adversary, generator=generator)
    receiver = make_cache(RECEIVER, 2, 19, dtype=dtype, adversary=adversary, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 64, dtype=dtype, cross_context=True, generator=generator)
    check_fuse(sharer, receiver, weights)
    check_pooling(sharer, weights, torch.tensor([[0, 4, 4, 19], [1, 2, 9, 17]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_head_gates(generator: torch.Generator, dtype: torch.dtype) -> None:
    sharer = make_cache(SHARER, 1, 19, dtype=dtype, generator=generator)
    receiver = make_cache(RECEIVER, 1, 19, dtype=dtype, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 64, saturated=True, dtype=dtype, generator=generator)
    check_fuse(sharer, receiver, weights)


def test_a_permuted_batch_gives_the_permuted_result(generator: torch.Generator) -> None:
    sharer, receiver, weights = small(generator, 3, 25, cross_context=True)
    mask = torch.rand(3, 25, generator=generator) < 0.7
    order = torch.tensor([2, 0, 1])

    def shuffled(pairs: Sequence[Pair]) -> list[Pair]:
        return [(key[order], value[order]) for key, value in pairs]

    straight = eager.fuse_layers(sharer, receiver, weights, edit_mask=mask)
    permuted = eager.fuse_layers(shuffled(sharer), shuffled(receiver), weights, edit_mask=mask[order])
    torch.testing.assert_close(flat(shuffled(straight)), flat(permuted), rtol=1e-5, atol=1e-6)
    offsets = torch.tensor([[0, 5, 25], [0, 0, 9], [3, 20, 25]])
    latent, summary = eager.summarize_layers(sharer, weights, offsets, attention_mask=mask)
    other = eager.summarize_layers(shuffled(sharer), weights, offsets[order], attention_mask=mask[order])
    torch.testing.assert_close((latent[:, order], summary[:, :, order]), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("middle", [0, 1, 300, 699, 700])
def test_two_ranges_are_one(generator: torch.Generator, middle: int) -> None:
    sharer, receiver, weights = small(generator, 1, 700)
    whole = eager.fuse_layers(sharer, receiver, weights)
    first = eager.fuse_layers(sharer, receiver, weights, positions=(0, middle))
    both = eager.fuse_layers(sharer, first, weights, positions=(middle, 700))
    torch.testing.assert_close(flat(both), flat(whole), rtol=1e-5, atol=1e-6)
    for tensor, old in zip(flat(first), flat(receiver)):
        assert same_bits(tensor[:, :, middle:], old[:, :, middle:])


def test_it_is_deterministic_and_needs_no_grad_mode(generator: torch.Generator) -> None:
    sharer, receiver, weights = small(generator, 2, 50, cross_context=True)
    needing = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    offsets = torch.tensor([[0, 7, 50], [0, 1, 2]])
    with torch.no_grad():
        expected = [
            *flat(eager.fuse_layers(sharer, receiver, weights)),
            *eager.summarize_layers(sharer, weights, offsets),
        ]
    with torch.enable_grad():
        got = [*flat(eager.fuse_layers(sharer, receiver, needing)), *eager.summarize_layers(sharer, needing, offsets)]
        in_place = flat(eager.fuse_layers_(sharer, cloned(receiver), needing))
    assert all(same_bits(a, b) and not b.requires_grad for a, b in zip(expected, got))
    assert all(same_bits(a, b) for a, b in zip(expected, in_place))


def test_no_layers() -> None:
    assert eager.fuse_layers([], [], {"gate_logit": torch.zeros(0, 2)}) == []


def test_every_result_has_memory_of_its_own(generator: torch.Generator) -> None:
    """What torch.library asks of an op: no output aliases an input or another output."""
    sharer, receiver, weights = small(generator, 1, 4, cross_context=True)
    offsets = torch.tensor([[0, 1, 4]])
    one = layer_of(weights, 0)
    results = [
        *flat(eager.fuse_layers(sharer, receiver, weights)),
        *eager.gated_injection(*receiver[0], torch.randn(1, 4, 16), one),
        eager.joint_projection(*sharer[0], *receiver[0], one),
        *eager.attention_pool(*sharer[0], one["span_query"], one["global_query"], offsets),
        *eager.summarize_layers(sharer, weights, offsets),
    ]
    given = [*flat(sharer), *flat(receiver), *weights.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in [*results, *given]}) == len(results) + len(given)


@EXAMPLES
@given(
    tokens=st.integers(1, 12),
    masks=st.lists(st.lists(st.integers(-1, 14), min_size=12, max_size=12), min_size=1, max_size=4),
    positions=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    seed=st.integers(0, 2**16),
)
def test_any_alignment(tokens: int, masks: list[list[int]], positions: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(masks)[:, :tokens]
    start, stop = sorted(min(p, tokens) for p in positions)
    sharer = make_cache(SHARER, len(index), 15, dtype=F64, generator=generator)
    receiver = make_cache(RECEIVER, len(index), tokens, dtype=F64, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 16, gates="mixed", dtype=F64, generator=generator)
    check_fuse(sharer, receiver, weights, sharer_index=index, positions=(start, stop))


# --- tiles --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(
    batch=st.integers(0, 5),
    length=st.integers(0, 20),
    ends=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    rows=st.integers(1, 40),
    seed=st.none() | st.integers(0, 2**16),
)
def test_tiles_hold_each_row_that_counts_once(
    batch: int, length: int, ends: tuple[int, int], rows: int, seed: int | None
) -> None:
    start, stop = sorted(min(end, length) for end in ends)
    mask = None
    if seed is not None:
        mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    tiles = cut_tiles(mask, batch, (start, stop), rows, CPU)
    count = torch.zeros(batch, length, dtype=torch.int64)
    for tile in tiles:
        count[tile.items, tile.tokens] += 1
        items, tokens = tile.shape
        assert items * tokens <= rows or items == 1
        assert tokens <= rows
        if tile.keep is not None:
            assert tile.keep.any()
            assert not tile.keep.all()
    wanted = torch.zeros(batch, length, dtype=torch.bool)
    wanted[:, start:stop] = True if mask is None else mask[:, start:stop]
    assert bool((count <= 1).all())
    assert bool((count[wanted] == 1).all())
    for gap in uncovered(tiles, batch, length):
        count[gap] += 1
    assert bool((count == 1).all())


def test_layers_are_grouped_by_their_gates() -> None:
    both, none, key = (True, True), (False, False), (True, False)
    tile = [Tile(slice(0, 1), slice(0, 512), None)]
    groups = list(group_layers([both, both, both, none, key, both, none], tile, CPU))
    covered = [layer for group in groups for layer in range(group.start, group.stop)]
    assert covered == [0, 1, 2, 4, 5]
    few = [Tile(slice(0, 1), slice(0, 4), None)]
    assert list(group_layers([both] * 28, few, CPU)) == [slice(0, 28)]
    # The largest tile bounds the buffers.
    assert list(group_layers([both] * 28, few + tile, CPU)) == list(group_layers([both] * 28, tile, CPU))


def test_a_buffer_is_used_again_where_it_fits() -> None:
    space = Workspace(CPU)
    buffer = space("x", (4, 5), F32)
    assert space("x", (2, 7), F32).data_ptr() == buffer.data_ptr()
    assert space("y", (4, 5), F32).data_ptr() != buffer.data_ptr()
    assert space("x", (2, 5), F64).dtype == F64
    assert space("x", (5, 5), F64).shape == (5, 5)
