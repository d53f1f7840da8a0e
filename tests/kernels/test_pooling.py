"""The pooling kernels against the float64 reference: spans and masks of every kind, every layout, every merge depth."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from helpers import (
    ADVERSARIES,
    LAYOUTS,
    Adversary,
    Geometry,
    Layout,
    Pair,
    adversarial,
    assert_within_budget,
    beyond_int32,
    guarded,
    make_cache,
    rows_beyond_int32,
    with_layout,
)
from lcf_fast import reference
from lcf_fast.kernels import pooling
from lcf_fast.kernels.fold import fold
from lcf_fast.kernels.pooling_policy import PoolingConfig, fold_config, pooling_config, turns

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Budget of float32 results. One rounding of a score moves a whole head's vector, so that one head is one sample of the
#: error, not D; and tensor instructions add up in their own order. 16-bit results are bounded by their own rounding: 2.
FLOAT32_BUDGET = 4.0
#: Chunks of 16 tokens, merged four at a time: 200 tokens are 13 chunks and take three merges.
SMALL = PoolingConfig(block_tokens=16, group_spans=4, num_warps=4, merge_chunks=4, merge_warps=4)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens make many chunks and several levels of merges."""
    monkeypatch.setattr(pooling, "pooling_config", lambda *_: SMALL)
    monkeypatch.setattr(pooling, "turns", lambda *_: 3)  # to a program, the last of which has fewer


def queries(heads: int, head_dim: int, generator: torch.Generator, scale: float = 1.0) -> Pair:
    span_query, global_query = torch.randn(2, heads, head_dim, generator=generator).mul(scale)
    return span_query, global_query


def table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def check(key: Tensor, value: Tensor, query: Pair, offsets: Tensor, mask: Tensor | None = None) -> Pair:
    """Pool, hold both results to the error budget, return them."""
    span_query, global_query = (q.to(key.device, key.dtype) for q in query)
    got = pooling.attention_pool(key, value, span_query, global_query, offsets, mask)
    plain = reference.attention_pool(key, value, span_query, global_query, offsets, attention_mask=mask)
    key, value, span_query, global_query = (x.double() for x in (key, value, span_query, global_query))
    truth = reference.attention_pool(key, value, span_query, global_query, offsets, attention_mask=mask)
    for ours, exact, same_dtype in zip(got, truth, plain):
        assert_within_budget(ours, exact, same_dtype, FLOAT32_BUDGET if ours.dtype == torch.float32 else 2.0)
    return got


def one_layer(batch: int, heads: int, tokens: int, head_dim: int, generator: torch.Generator, **kwargs: object) -> Pair:
    return make_cache(Geometry(1, heads, head_dim), batch, tokens, generator=generator, **kwargs)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 200, 1000])
def test_length(tokens: int, device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(1, 1, tokens, 64, generator, device=device)
    query = queries(1, 64, generator)
    check(key, value, query, table([[0, tokens]], device))
    check(key, value, query, table([[0, tokens // 3, tokens // 2, tokens]], device))


SPANS = {
    "one": [0, 200],
    "few": [0, 3, 5, 90, 200],
    "empty_first": [0, 0, 0, 70, 200],
    "empty_middle": [0, 70, 70, 70, 71, 200],
    "empty_last": [0, 30, 200, 200, 200],
    "empty_between_chunks": [0, 16, 16, 32, 32, 32, 48, 200],
    "one_a_token": [*range(100), 200],
    "one_a_chunk": [*range(0, 200, 16), 200],
    "astride_every_chunk": [0, *range(8, 200, 16), 200],
    "middle_only": [37, 37, 50, 121],
    "one_token": [99, 100],
    "whole_group_of_chunks": [0, 48, 96, 144, 200],
    "astride_groups": [0, 40, 56, 90, 104, 150, 200],
    "many_empty": [0] * 40 + [5] * 40 + [100, 200, 200],
}


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.usefixtures("small_chunks")
def test_spans(name: str, device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(1, 1, 200, 64, generator, device=device)
    check(key, value, queries(1, 64, generator, 2.0), table([SPANS[name]], device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_dim_and_dtype(
    head_dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    key, value = one_layer(1, 1, 70, head_dim, generator, device=device, dtype=dtype)
    check(key, value, queries(1, head_dim, generator), table([[0, 4, 9, 40, 70]], device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_span_a_token(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(1, 1, 200, 64, generator, device=device, dtype=dtype)
    check(key, value, queries(1, 64, generator), table([list(range(201))], device))


def test_random_spans(device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random cuts, empty spans, uncovered ends; with merges deep and flat."""
    for i in range(4):
        cuts = torch.randint(0, 151, (2 + 9 * i,), generator=generator).sort().values
        offsets = torch.stack([cuts, torch.cat([cuts[:1], cuts[-1:].expand(len(cuts) - 1)])]).int().to(device)
        key, value = one_layer(2, 1, 150, 64, generator, device=device)
        config = SMALL if i % 2 else pooling_config(64, 4, "sm_90")
        monkeypatch.setattr(pooling, "pooling_config", lambda *_, config=config: config)
        check(key, value, queries(1, 64, generator, 3.0), offsets)


@pytest.mark.parametrize("heads", [1, 3])
def test_ragged_batch(heads: int, device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(3, heads, 100, 64, generator, device=device)
    offsets = table([[0, 10, 80, 100], [20, 20, 60, 60], [0, 0, 0, 1]], device)
    check(key, value, queries(heads, 64, generator), offsets)


def test_permuted_batch(device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(3, 1, 100, 64, generator, device=device)
    offsets = table([[0, 10, 80, 100], [20, 20, 60, 60], [0, 0, 0, 1]], device)
    query = queries(1, 64, generator)
    order = torch.tensor([2, 0, 1], device=device)
    straight = check(key, value, query, offsets)
    permuted = check(key[order], value[order], query, offsets[order])
    assert all(torch.equal(a[order], b) for a, b in zip(straight, permuted))


MASKS = {
    "holes": lambda t: t % 3 != 0,
    "left_padding": lambda t: t >= 77,
    "right_padding": lambda t: t < 41,
    "a_span_masked": lambda t: (t < 60) | (t >= 121),
    "one_token": lambda t: t == 64,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("small_chunks")
def test_mask(name: str, device: torch.device, generator: torch.Generator) -> None:
    """What is masked may hold anything, and a span of masked tokens counts as empty."""
    key, value = one_layer(1, 1, 130, 64, generator, device=device)
    mask = MASKS[name](torch.arange(130)).to(device)
    key[..., ~mask, :] = torch.nan
    value[..., ~mask, :] = torch.inf
    check(key, value, queries(1, 64, generator), table([[0, 20, 60, 121, 130]], device), mask[None])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_mask_layout(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """A mask of any integer type, with strides, another for each row."""
    key, value = one_layer(2, 1, 70, 64, generator, device=device)
    mask = torch.zeros(140, 4, dtype=dtype, device=device).T[::2, ::2]
    mask.copy_(torch.stack([torch.arange(70) % 3, torch.arange(70) // 9]))
    check(key, value, queries(1, 64, generator), table([[0, 20, 60, 66, 70]] * 2, device), mask)


def test_outside_spans_may_hold_anything(device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(1, 1, 200, 64, generator, device=device)
    for outside in (slice(0, 40), slice(150, 200)):
        key[:, :, outside] = torch.nan
        value[:, :, outside] = torch.nan
    check(key, value, queries(1, 64, generator), table([[40, 40, 66, 150]], device))


def test_no_token_is_nan_and_only_there(device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(4, 1, 100, 64, generator, device=device)
    mask = torch.ones(4, 100, dtype=torch.bool, device=device)
    mask[3] = False
    offsets = table([[0, 40, 100], [5, 5, 5], [100, 100, 100], [0, 50, 100]], device)
    query = [one.to(device) for one in queries(1, 64, generator)]
    got = pooling.attention_pool(key, value, *query, offsets, mask)
    assert all(torch.isnan(x[1:]).all() for x in got)
    alone = pooling.attention_pool(key[:1], value[:1], *query, offsets[:1], mask[:1])
    assert all(torch.equal(x[:1], y) for x, y in zip(got, alone))


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversary(adversary: Adversary, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(1, 1, 130, 64, generator, device=device, dtype=dtype, adversary=adversary)
    query, offsets = queries(1, 64, generator), table([[0, 1, 40, 41, 130]], device)
    if adversary == "all_equal" and dtype == torch.float32:
        # Plain torch is exact here by luck, so there is no budget: every rounding of a sum shows.
        for got in pooling.attention_pool(key, value, *(q.to(device) for q in query), offsets):
            torch.testing.assert_close(got, torch.full_like(got, 0.37), rtol=1e-6, atol=0)
    else:
        check(key, value, query, offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_exp_would_overflow(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Scores in the hundreds, of both signs, and one token that outweighs all: no inf, no NaN, no empty span."""
    key, value = one_layer(1, 1, 100, 64, generator, device=device, dtype=dtype)
    span_query, global_query = queries(1, 64, generator, 100.0)
    key[0, 0, 33] = 10 * span_query.sign().to(key)
    scores = key[0, 0].double() @ span_query[0].double().to(device) / 8
    assert scores.max() > 2000
    assert scores.min() < -100
    check(key, value, (span_query, global_query), table([[0, 20, 30, 90, 100]], device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: Layout, device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(2, 2, 40, 80, generator, device=device, dtype=torch.float16)
    offsets = table([[0, 30, 40], [0, 20, 35]], device)
    check(with_layout(key, layout), with_layout(value, layout), queries(2, 80, generator), offsets)
    check(with_layout(key, layout), value, queries(2, 80, generator), offsets[:1].expand(2, -1))


def test_reads_and_writes_nothing_beyond(device: torch.device, generator: torch.Generator) -> None:
    """NaN lies around the inputs, guard bands around the outputs; a row of nonsense offsets must respect both."""
    shape = (2, 1, 70, 80)
    key, value = (guarded(shape, torch.float32, device) for _ in range(2))
    for tensor, _ in (key, value):
        tensor.copy_(torch.randn(shape, generator=generator))
    rows = [[0, 10, 70, 70], [60, -9, 2**31 - 1, 3]]
    offsets, _ = guarded((2, 4), torch.int32, device)
    query = [q.to(device)[None] for q in queries(1, 80, generator)]
    for second in (rows[1], [2**31 - 1, 0, -(2**31), 0], [-1, 40, 500, 900]):
        offsets.copy_(table([rows[0], second], device))
        outs = [guarded((1, 2, 1, 80), torch.float32, device) for _ in range(2)]
        pooling._pool([key[0]], [value[0]], *query, offsets, None, outs[0][0], outs[1][0])
        sensible = 1 if second[0] != -1 else 2  # offsets that do not decrease count as cut off at the ends
        k, v = (x[:sensible].double() for x in (key[0], value[0]))
        span_query, global_query = (q[0].double() for q in query)
        truth = reference.attention_pool(k, v, span_query, global_query, offsets[:sensible].clamp(0, 70))
        for (got, guards), exact in zip(outs, truth):
            guards()
            torch.testing.assert_close(got[0, :sensible].double(), exact, rtol=1e-5, atol=1e-6)
    for _, guards in (key, value):
        guards()


@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
def test_chunk_size_does_not_matter(
    block_tokens: int, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PoolingConfig(block_tokens, group_spans=16, num_warps=4, merge_chunks=8, merge_warps=4)
    monkeypatch.setattr(pooling, "pooling_config", lambda *_: config)
    key, value = one_layer(1, 1, 200, 64, generator, device=device)
    check(key, value, queries(1, 64, generator), table([[0, 16, 33, 128, 128, 190]], device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_in_turn_are_the_same_to_the_bit(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever spans do at the ends of a program's chunks: cross, begin, end, are empty; overlapping ones, too."""
    monkeypatch.setattr(pooling, "pooling_config", lambda *_: SMALL)
    key, value = one_layer(2, 1, 150, 64, generator, device=device, dtype=dtype)
    query = [q.to(device, dtype) for q in queries(1, 64, generator)]
    first = [[0, 5, 32, 32, 33, 90, 150], [7, 7, 48, 96, 97, 97, 97]]
    second = [[1, 2, 3, 4, 5, 6, 7], [0, 64, 80, 96, 112, 120, 149]]
    offsets = torch.tensor([first, second], dtype=torch.int32, device=device)
    mask = torch.rand(2, 2, 150, generator=generator).to(device) > 0.2
    results = []
    for each in (1, 2, 4, 100):
        monkeypatch.setattr(pooling, "turns", lambda *_, each=each: each)
        results.append(pooling.attention_pool(key, value, *query, offsets, mask))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_run_to_run(device: torch.device, generator: torch.Generator) -> None:
    key, value = one_layer(1, 2, 200, 64, generator, device=device, dtype=torch.float16)
    query = [q.to(device) for q in queries(2, 64, generator)]
    offsets = table([[0, 10, 90, 200]], device)
    first, second = (pooling.attention_pool(key, value, *query, offsets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def layers_of(geometry: Geometry, batch: int, tokens: int, generator: torch.Generator, **kwargs: object) -> list[Pair]:
    """A sharer that some layers read twice, and one layer that lies differently in memory."""
    cache = make_cache(geometry, batch, tokens, generator=generator, **kwargs)  # type: ignore[arg-type]
    cache.insert(1, cache[0])
    cache[-1] = (with_layout(cache[-1][0], "padded"), cache[-1][1])
    return cache


@pytest.mark.parametrize("state_bytes", [1 << 28, 1])
def test_layers_equal_layer_by_layer(
    state_bytes: int, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "STATE_BYTES", state_bytes)
    cache = layers_of(Geometry(2, 2, 64), 1, 70, generator, device=device)
    layers = len(cache)
    span_query, global_query = torch.randn(2, layers, 2, 64, generator=generator).to(device)
    weight = torch.randn(layers, 16, 512, generator=generator).to(device)
    bias = torch.randn(layers, 16, generator=generator).to(device)
    offsets = table([[0, 30, 69]], device)
    _, summary = pooling.summarize_layers(
        [key for key, _ in cache], [value for _, value in cache], span_query, global_query, weight, bias, offsets
    )
    assert not torch.equal(summary[0], summary[1])  # the same keys and values, but other queries
    for i, (key, value) in enumerate(cache):
        alone = pooling.attention_pool(key, value, span_query[i], global_query[i], offsets)
        assert torch.equal(torch.stack(alone), summary[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads", "head_dim"), [(1, 3, 80), (2, 1, 64)])
def test_summarize_layers(
    batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    cache = layers_of(Geometry(2, heads, head_dim), batch, 70, generator, device=device, dtype=dtype)
    layers, channels = len(cache), heads * head_dim
    weights = {
        "span_query": torch.randn(layers, heads, head_dim, generator=generator),
        "global_query": torch.randn(layers, heads, head_dim, generator=generator),
        "down_weight": torch.randn(layers, 10, 2 * channels + 128, generator=generator),
        "down_bias": torch.randn(layers, 10, generator=generator),
    }
    weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    offsets = table([[0, 12, 13, 70], [0, 0, 64, 70]][:batch], device)
    mask = (torch.arange(70, device=device) % 5 != 1).expand(batch, -1)
    keys, values = [key for key, _ in cache], [value for _, value in cache]
    got = pooling.summarize_layers(keys, values, *(weights[name] for name in weights), offsets, mask)
    doubled = {name: tensor.double() for name, tensor in weights.items()}
    exact = [(key.double(), value.double()) for key, value in cache]
    truth = reference.summarize_layers(exact, doubled, offsets, attention_mask=mask)
    plain = reference.summarize_layers(cache, weights, offsets, attention_mask=mask)
    for ours, true, same_dtype in zip(got, truth, plain):
        assert_within_budget(ours, true, same_dtype, FLOAT32_BUDGET)


def test_nothing_to_pool_for_no_rows(device: torch.device) -> None:
    empty = torch.empty(0, 2, 10, 64, device=device)
    query = torch.zeros(2, 64, device=device)
    offsets = torch.zeros(0, 2, dtype=torch.int32, device=device)
    assert pooling.attention_pool(empty, empty, query, query, offsets)[0].shape == (0, 2, 64)
    weight, bias = torch.zeros(1, 16, 512, device=device), torch.zeros(1, 16, device=device)
    latent, summary = pooling.summarize_layers([empty], [empty], query[None], query[None], weight, bias, offsets)
    assert latent.shape == (1, 0, 16)
    assert summary.shape == (1, 2, 0, 2, 64)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_nan_in_a_span_is_seen(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Wherever it lies in a chunk's parts; of the last item nothing is lost."""
    key, value = one_layer(4, 1, 40, 16, generator, dtype=dtype, device=device)
    for item, at in enumerate((3, 18, 35)):
        key[item, 0, at] = torch.nan
    query = [q.to(device, dtype) for q in queries(1, 16, generator)]
    for pooled in pooling.attention_pool(key, value, *query, table([[0, 5, 20, 40]] * 4, device)):
        assert torch.isnan(pooled[:3]).all() and torch.isfinite(pooled[3]).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_beyond_two_to_the_31_elements(axis: int, device: torch.device, generator: torch.Generator) -> None:
    """The third row of one axis begins 2**31 elements on: index times stride overflows 32 bits, each alone does not."""
    shape = [1, 1, 3, 64]
    shape[axis] = 3
    far = beyond_int32(tuple(shape), axis, device)  # type: ignore[arg-type]
    far.copy_(torch.randn(shape, generator=generator))
    check(far, far, queries(shape[1], 64, generator), table([[0, 1, 3]] * shape[0], device))


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_beyond_two_to_the_31_elements(device: torch.device, generator: torch.Generator) -> None:
    """The third chunk begins 2**31 elements on, where a chunk's own offsets still fit 32 bits."""
    far = rows_beyond_int32(33, device)
    far.copy_(torch.randn(far.shape, generator=generator))
    check(far, far, queries(1, 64, generator), table([[0, 20, 33]], device))


def test_adversary_in_one_span_stays_there(device: torch.device, generator: torch.Generator) -> None:
    """A span with a huge element must not cost its neighbours their digits."""
    key, value = one_layer(1, 1, 64, 64, generator, device=device)
    value[:, :, :32] = adversarial(value[:, :, :32], "large_offset") * 1e4
    span_query, global_query = queries(1, 64, generator)
    key[:, :, :32] -= 20 * global_query.sign().to(device)  # the first span then weighs next to nothing
    check(key, value, (span_query, global_query), table([[0, 32, 64]], device))


@pytest.mark.parametrize(("batch", "heads", "head_dim", "width"), [(1, 1, 64, 10), (12, 3, 80, 6), (4, 2, 256, 8)])
def test_fold(
    batch: int, heads: int, head_dim: int, width: int, device: torch.device, generator: torch.Generator
) -> None:
    """Ragged tiles of batch, width and channels; only the sharer's half of W_down is read, wherever it lies."""
    channels = heads * head_dim
    summary = torch.randn(2, 2, batch, heads, head_dim, generator=generator).to(device)
    weight = torch.full((2, width, 2 * channels + 32), torch.nan, device=device)
    weight[..., : 2 * channels] = torch.randn(2, width, 2 * channels, generator=generator)
    bias = torch.randn(2, width, generator=generator).to(device)

    def plain(summary: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        flat = summary.flatten(3).transpose(1, 2).flatten(2)
        return flat @ weight[..., : 2 * channels].mT + bias[:, None]

    arguments = (summary, weight, bias)
    truth = plain(*(x.double() for x in arguments))
    for stored in (weight, weight.mT.contiguous().mT):
        got = fold(summary, stored, bias)
        assert_within_budget(got, truth, plain(*arguments), FLOAT32_BUDGET)


def test_policy() -> None:
    """A chunk fills its registers whatever the width and dtype, and what tensor instructions need is kept."""
    tokens = {
        (head_dim, size): pooling_config(head_dim, size, "sm_90").block_tokens
        for head_dim in (64, 80, 96, 128, 256)
        for size in (2, 4)
    }
    assert tokens == {
        (64, 2): 128, (80, 2): 64, (96, 2): 64, (128, 2): 64, (256, 2): 32,
        (64, 4): 64, (80, 4): 32, (96, 4): 32, (128, 4): 32, (256, 4): 16,
    }  # fmt: skip
    assert pooling_config(8, 2, "sm_90").block_tokens == 128
    # 28 layers of 8 heads, of which 24 programs a multiprocessor should be left: 500 tokens, 2,000, 32,768, 8 x 2,000.
    chunks = [28 * 8 * n for n in (8, 32, 512, 256)]
    assert [turns(pooling_config(128, 2, "sm_90"), n, "sm_90") for n in chunks] == [1, 2, 8, 8]
    assert pooling_config(1024, 4, "gfx942").block_tokens == 16
    for batch, rows in ((1, 1), (2, 2), (3, 4), (8, 8), (100, 8)):
        config = fold_config(1024, batch)
        assert config.block_batch == rows
        assert config.block_width * config.block_batch * config.block_channels == 4096
        assert config.num_warps == 4
    assert (fold_config(128, 1).block_channels, fold_config(128, 1).num_warps) == (128, 1)
