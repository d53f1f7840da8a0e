"""Gradients of pooling on both back ends against float64 autograd of the reference."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import ADVERSARIES, Adversary, Geometry, Pair, assert_within_budget, beyond_int32, make_cache, with_layout
from lcf_fast import eager_pooling, library_pooling, reference, use_backend
from lcf_fast.backends import Backend
from lcf_fast.kernels import pooling, pooling_backward
from lcf_fast.kernels.pooling_policy import PoolingConfig

#: Closed form and autograd round at other places; a gradient of a softmax is a difference of near equals.
BUDGET = 6.0
SMALL = PoolingConfig(block_tokens=16, group_spans=4, num_warps=4, merge_chunks=4, merge_warps=4)
BACK_ENDS: tuple[Backend, ...] = ("triton", "eager")


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(pooling, "pooling_config", lambda *_: SMALL)
    monkeypatch.setattr(pooling_backward, "pooling_backward_config", lambda *_: SMALL)
    monkeypatch.setattr(pooling_backward, "WALK", 16)
    name: Backend = request.param
    return name


def gradients(
    cache: list[Pair], queries: Pair, offsets: Tensor, mask: Tensor | None, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Autograd of the reference in ``dtype``: of the queries, then the caches."""
    leaves = [q.to(dtype).requires_grad_() for q in queries]
    leaves += [tensor.to(dtype).requires_grad_() for pair in cache for tensor in pair]
    pooled: list[Tensor] = []
    for i in range(len(cache)):
        key, value = leaves[2 + 2 * i : 4 + 2 * i]
        pooled += reference.attention_pool(key, value, leaves[0][i], leaves[1][i], offsets, attention_mask=mask)
    found = torch.autograd.grad(pooled, leaves, list(grad.to(dtype).flatten(0, 1)))
    return [torch.nan_to_num(x) for x in found]


def check(
    back_end: Backend,
    cache: list[Pair],
    queries: Pair,
    offsets: Tensor,
    mask: Tensor | None,
    generator: torch.Generator,
) -> list[Tensor]:
    key = cache[0][0]
    batch, heads, _, dim = key.shape
    grad = torch.randn(len(cache), 2, batch, heads, dim, generator=generator).to(key.device)
    with use_backend(back_end):
        span, other, caches = library_pooling.run_pool_backward(cache, *queries, offsets, mask, grad, True)
    got = [span, other, *(tensor for pair in caches for tensor in pair)]
    exact = [(k.double(), v.double()) for k, v in cache]
    truth = gradients(exact, queries, offsets, mask, grad, torch.float64)
    single = gradients([(k.float(), v.float()) for k, v in cache], queries, offsets, mask, grad, torch.float32)
    for ours, true, plain in zip(got, truth, single):
        assert_within_budget(ours, true, plain.to(ours.dtype), BUDGET if ours.dtype == torch.float32 else 2.0)
    return got


def inputs(
    layers: int, heads: int, batch: int, tokens: int, generator: torch.Generator, **options: object
) -> tuple[list[Pair], Pair]:
    cache = make_cache(Geometry(layers, heads, 16), batch, tokens, generator=generator, **options)  # type: ignore[arg-type]
    span_query, global_query = torch.randn(2, layers, heads, 16, generator=generator).to(cache[0][0].device)
    return cache, (span_query, global_query)


SPANS = {
    "one": [[0, 70]],
    "few_and_empty": [[0, 0, 3, 40, 40, 70]],
    "one_a_token": [[*range(71)]],
    "uncovered_ends": [[30, 30, 50, 61]],
    "overlap": [[0, 40, 70, 70], [20, 60, 70, 70], [5, 5, 5, 5]],
}


@pytest.mark.parametrize("name", SPANS)
def test_spans(name: str, back_end: Backend, device: torch.device, generator: torch.Generator) -> None:
    cache, queries = inputs(1, 1, 1, 70, generator, device=device)
    check(back_end, cache, queries, torch.tensor([SPANS[name]], device=device), None, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ragged_padded_layers(
    dtype: torch.dtype, back_end: Backend, device: torch.device, generator: torch.Generator
) -> None:
    """Two layers that lie differently, two heads, padding that holds NaN, a batch of other spans."""
    cache, queries = inputs(2, 2, 2, 40, generator, device=device, dtype=dtype)
    clean, cache = (
        [layers[0], (with_layout(layers[1][0], "token_major"), with_layout(layers[1][1], "offset"))]
        for layers in ([(k.clone(), v.clone()) for k, v in cache], cache)
    )
    offsets = torch.tensor([[0, 7, 30, 40], [12, 40, 40, 40]], device=device)
    mask = torch.ones(2, 40, dtype=torch.int64, device=device)
    mask[1, :15], mask[0, 9:11] = 0, 0
    expected = check(back_end, clean, queries, offsets, mask, generator)
    for key, value in cache:
        key[1, :, :15], value[1, :, :15] = torch.nan, torch.inf
    grad = torch.ones(2, 2, 2, 2, 16, device=device)
    with use_backend(back_end):
        poisoned, plain, alone = (
            library_pooling.run_pool_backward(layers, *queries, offsets, mask, grad, wants)
            for layers, wants in ((cache, True), (clean, True), (clean, False))
        )
    assert alone[2] == []
    for one, other, without in zip(poisoned[:2], plain[:2], alone[:2]):
        assert torch.equal(one, other)
        # Another kernel, in which another product and sum may be one instruction.
        torch.testing.assert_close(one, without, rtol=1e-5, atol=1e-5)
    assert all((tensor[1, :, :15] == 0).all() for pair in poisoned[2] for tensor in pair)
    assert all((tensor[1, :, :15] == 0).all() for tensor in expected[2:])


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_offsets_beyond_2_to_the_31(
    axis: int, back_end: Backend, device: torch.device, generator: torch.Generator
) -> None:
    shape = [1, 1, 3, 16]
    shape[axis] = 3
    far = beyond_int32(tuple(shape), axis, device)  # type: ignore[arg-type]
    far.copy_(torch.randn(shape, generator=generator))
    plain, queries = inputs(1, shape[1], shape[0], 3, generator, device=device, dtype=torch.float16)
    offsets = torch.tensor([[0, 1, 3]] * shape[0], device=device)
    for pair in ((far, plain[0][1]), (plain[0][0], far)):
        check(back_end, [pair], queries, offsets, None, generator)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversary(adversary: Adversary, back_end: Backend, device: torch.device, generator: torch.Generator) -> None:
    if adversary in ("all_equal", "zeros"):
        # Every gradient of the queries is exactly zero, and plain torch's rounding is no budget.
        cache, queries = inputs(1, 1, 1, 40, generator, device=device, adversary=adversary)
        grad = torch.randn(1, 2, 1, 1, 16, generator=generator).to(device)
        offsets = torch.tensor([[0, 9, 40]], device=device)
        with use_backend(back_end):
            span, other, _ = library_pooling.run_pool_backward(cache, *queries, offsets, None, grad, False)
        assert max(span.abs().max(), other.abs().max()) < 1e-5
        return
    cache, queries = inputs(1, 1, 1, 40, generator, device=device, adversary=adversary)
    check(back_end, cache, queries, torch.tensor([[0, 9, 40]], device=device), None, generator)


def test_run_to_run(back_end: Backend, device: torch.device, generator: torch.Generator) -> None:
    cache, queries = inputs(1, 2, 2, 100, generator, device=device, dtype=torch.float16)
    offsets = torch.tensor([[[0, 30, 100], [10, 50, 90]]] * 2, device=device)
    grad = torch.randn(1, 2, 2, 2, 16, generator=generator).to(device)
    with use_backend(back_end):
        first, second = (
            library_pooling.run_pool_backward(cache, *queries, offsets, None, grad, True) for _ in range(2)
        )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for x, y in zip(first[2], second[2]) for a, b in zip(x, y))


def test_gradcheck_of_the_closed_form(generator: torch.Generator) -> None:
    """Finite differences, in float64, through the op and the fold: tracks, masks and all."""
    cache = make_cache(Geometry(2, 1, 4), 2, 9, generator=generator)
    leaves = [t.double().requires_grad_() for pair in cache for t in pair]
    offsets = torch.tensor([[[0, 4, 9], [2, 6, 6]], [[0, 0, 9], [3, 3, 3]]])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    shapes = ((2, 1, 4), (2, 1, 4), (2, 6, 12), (2, 6))
    weights = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def summarize(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        latent, summary = library_pooling.summarize_layers(list(tensors[4:]), list(tensors[:4]), offsets, mask)
        return latent, summary

    assert torch.autograd.gradcheck(summarize, (*weights, *leaves))


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_caches_get_a_gradient_only_if_asked(
    back_end: Backend, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: ModuleType = eager_pooling if back_end == "eager" else pooling_backward
    asked: list[bool] = []
    original = module.pool_backward

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(module, "pool_backward", spy)
    cache, (span_query, global_query) = inputs(1, 1, 1, 20, generator, device=device)
    key, value = cache[0]
    offsets = torch.tensor([[0, 20]], dtype=torch.int32, device=device)
    query = span_query[0].requires_grad_()
    with use_backend(back_end):
        pooled, _ = library_pooling.attention_pool(key, value, query, global_query[0], offsets, None)
        pooled.sum().backward()
        key.requires_grad_()
        pooled, _ = library_pooling.attention_pool(key, value, query, global_query[0], offsets, None)
        pooled.sum().backward()
    assert asked == [False, True]
    assert key.grad is not None
    assert value.grad is None
