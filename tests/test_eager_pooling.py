"""The eager back end's pooling: any spans, masks, sizes and scores."""

from __future__ import annotations

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
    check,
    check_pooling,
    cloned,
    flat,
    same_bits,
)
from hypothesis import given
from torch import Tensor

from helpers import Geometry, Pair, make_cache, make_weights
from lcf_fast import eager, eager_pooling, reference


@pytest.mark.parametrize("dtype", [*DTYPES, F64])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 300, 1000])
@pytest.mark.parametrize("spans", ["one", "halves", "a token", "empty ones", "many"])
def test_spans(generator: torch.Generator, dtype: torch.dtype, tokens: int, spans: str) -> None:
    sharer = Geometry(2, 3, 80)
    offsets = {
        "one": [0, tokens],
        "halves": [0, tokens // 2, tokens],
        "a token": list(range(tokens + 1)),
        "empty ones": [0, 0, tokens // 3, tokens // 3, tokens, tokens],
        "many": [0, *sorted(torch.randint(0, tokens + 1, (9,), generator=generator).tolist()), tokens],
    }[spans]
    weights = make_weights(sharer, sharer, 64, cross_context=True, dtype=dtype, generator=generator)
    caches = make_cache(sharer, 2, tokens, dtype=dtype, generator=generator)
    check_pooling(caches, weights, torch.tensor([offsets, offsets], dtype=torch.int32))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims_of_the_pool(generator: torch.Generator, head_dim: int) -> None:
    sharer = Geometry(2, 3, head_dim)
    weights = make_weights(sharer, sharer, 64, cross_context=True, generator=generator)
    check_pooling(make_cache(sharer, 1, 70, generator=generator), weights, torch.tensor([[0, 9, 70]]))


@pytest.mark.parametrize("heads_at_once", [1, 3])
def test_long_caches_are_pooled_some_heads_at_a_time(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, heads_at_once: int
) -> None:
    monkeypatch.setattr(eager_pooling, "_POOL_ELEMENTS", heads_at_once * 600 * 8)
    sharer = Geometry(2, 5, 8)
    weights = make_weights(sharer, sharer, 16, cross_context=True, generator=generator)
    offsets = torch.tensor([[0, 9, 600], [5, 5, 400]])
    check_pooling(make_cache(sharer, 2, 600, generator=generator), weights, offsets)
    check_pooling(make_cache(sharer, 2, 600, dtype=torch.bfloat16, generator=generator), weights, offsets)


@pytest.mark.parametrize("dtype", [*DTYPES, F64])
@pytest.mark.parametrize("tokens", [63, 64, 127, 128, 4133])
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_large_sums_are_taken_in_blocks(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, layout: str
) -> None:
    """Of all spans and masks, to the same bounds, whatever the strides."""
    if tokens < 4133:
        monkeypatch.setattr(eager_pooling, "_BLOCKED_ELEMENTS", 0)
    sharer = Geometry(2, 4, 80)
    weights = make_weights(sharer, sharer, 16, cross_context=True, dtype=dtype, generator=generator)
    caches = make_cache(sharer, 2, tokens, dtype=dtype, generator=generator)
    assert caches[0][0].numel() > eager_pooling._BLOCKED_ELEMENTS
    if layout == "tokens first":
        caches = [(key.mT.contiguous().mT, value.transpose(1, 2).contiguous().transpose(1, 2)) for key, value in caches]
    offsets = torch.tensor([[0, 9, tokens // 2, tokens], [5, 5, 40, tokens - 3]])
    check_pooling(caches, weights, offsets)
    mask = torch.rand(2, tokens, generator=generator) < 0.7
    for tensor in flat(caches):
        tensor.transpose(1, 2)[~mask] = torch.nan
    mask[:, 20] = True
    for tensor in flat(caches):
        tensor[:, :, 20] = 1.0
    check_pooling(caches, weights, offsets, mask)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_padding_is_not_pooled(generator: torch.Generator, dtype: torch.dtype) -> None:
    """Left and right padding and holes, all NaN; tokens outside the spans too."""
    tokens = 40
    weights = make_weights(SHARER, RECEIVER, 16, cross_context=True, dtype=dtype, generator=generator)
    caches = make_cache(SHARER, 4, tokens, dtype=dtype, generator=generator)
    mask = torch.ones(4, tokens, dtype=torch.int64)
    mask[0, :15] = 0
    mask[1, 22:] = 0
    mask[2] = torch.rand(tokens, generator=generator) < 0.5
    mask[2, 20] = 1
    for offsets in (
        torch.tensor([[0, 16, 18, 40], [0, 5, 22, 40], [0, 20, 21, 40], [3, 9, 9, 30]]),
        torch.tensor([[2, 40], [0, 38], [0, 30], [9, 30]]),
    ):
        check_pooling(caches, weights, offsets, mask)
        clean = eager.summarize_layers(caches, weights, offsets, attention_mask=mask)
        hostile = cloned(caches)
        token = torch.arange(tokens)
        unread = (mask == 0) | (token < offsets[:, :1]) | (token >= offsets[:, -1:])
        for tensor in flat(hostile):
            tensor.transpose(1, 2)[unread] = torch.nan
        dirty = eager.summarize_layers(hostile, weights, offsets, attention_mask=mask)
        assert all(same_bits(a, b) for a, b in zip(clean, dirty))


def test_padding_between_the_spans_of_tracks_is_not_pooled(generator: torch.Generator) -> None:
    """A token that one track leaves out, as it does the padding, counts in the other track."""
    sharer = make_cache(SHARER, 2, 16, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 8, cross_context=True, generator=generator)
    offsets = torch.tensor([[[1, 3, 4], [8, 9, 15]], [[0, 2, 6], [4, 9, 16]]])
    check_pooling(sharer, weights, offsets)
    clean = eager.summarize_layers(sharer, weights, offsets)
    for pair in sharer:
        for side, spoil in zip(pair, (torch.nan, torch.inf)):
            side[0, :, 4:8] = side[0, :, 15] = side[0, :, 0] = spoil
    assert all(map(torch.equal, eager.summarize_layers(sharer, weights, offsets), clean))


def test_far_scores_do_not_overflow_and_far_spans_do_not_vanish(generator: torch.Generator) -> None:
    """Span scores a thousand apart: each span has its own maximum, so none underflows before the second softmax."""
    key = torch.zeros(1, 1, 6, 4)
    key[0, 0, :, 0] = torch.tensor([900.0, 899.0, -900.0, -901.0, 0.0, 2.0])
    value = torch.randn(1, 1, 6, 4, generator=generator)
    span_query = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    global_query = torch.tensor([[1e-3, 0.5, 0.0, 0.0]])
    offsets = torch.tensor([[0, 2, 4, 6]])

    def pool(key: Tensor, value: Tensor, span_query: Tensor, global_query: Tensor) -> Pair:
        return reference.attention_pool(key, value, span_query, global_query, offsets)

    got = eager.attention_pool(key, value, span_query, global_query, offsets)
    check(pool, got, key, value, span_query, global_query)
    assert all(bool(torch.isfinite(x).all()) for x in got)


def test_rows_without_tokens_are_nan_and_others_are_not(generator: torch.Generator) -> None:
    caches = make_cache(SHARER, 3, 5, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 16, cross_context=True, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for offsets in (torch.tensor([[0, 1, 5], [0, 1, 2], [2, 2, 2]]), torch.tensor([[0, 5], [0, 2], [3, 3]])):
        latent, summary = eager.summarize_layers(caches, weights, offsets, attention_mask=mask)
        assert torch.isfinite(latent[:, 0]).all()
        assert torch.isfinite(summary[:, :, 0]).all()
        assert torch.isnan(latent[:, 1:]).all()
        assert torch.isnan(summary[:, :, 1:]).all()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (0, 0), (2, 0)])
def test_nothing_to_pool(generator: torch.Generator, batch: int, tokens: int) -> None:
    caches = make_cache(SHARER, batch, tokens, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 16, cross_context=True, generator=generator)
    offsets = torch.zeros(batch, 3, dtype=torch.int32)
    latent, summary = eager.summarize_layers(caches, weights, offsets)
    assert latent.shape == (4, batch, 16)
    assert summary.shape == (4, 2, batch, 2, 8)
    assert torch.isnan(summary).all()


@st.composite
def ragged(draw: st.DrawFn) -> tuple[int, list[list[int]], list[list[bool]]]:
    """Tokens, any non-decreasing offsets, any mask, at least one pooled token a row."""
    tokens = draw(st.integers(1, 24))
    batch, spans = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    offsets, masks = [], []
    for _ in range(batch):
        row = sorted(draw(st.lists(st.integers(0, tokens), min_size=spans + 1, max_size=spans + 1)))
        if row[0] == row[-1]:
            row[0], row[-1] = 0, tokens
        mask = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
        mask[draw(st.integers(row[0], row[-1] - 1))] = True
        offsets.append(row)
        masks.append(mask)
    return tokens, offsets, masks


@EXAMPLES
@given(case=ragged(), seed=st.integers(0, 2**16))
def test_any_spans_and_masks(case: tuple[int, list[list[int]], list[list[bool]]], seed: int) -> None:
    tokens, offsets, masks = case
    generator = torch.Generator().manual_seed(seed)
    caches = make_cache(SHARER, len(offsets), tokens, dtype=F64, generator=generator)
    weights = make_weights(SHARER, RECEIVER, 16, cross_context=True, dtype=F64, generator=generator)
    check_pooling(caches, weights, torch.tensor(offsets), torch.tensor(masks))
