"""Slots on the GPU: numerics of the compiled kernels at the published size, CUDA graphs, syncs, recompiles, bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_gpu import capture, compiled_variants, no_sync
from slot_formulas import (
    EPS,
    EXPANSION,
    FOLD,
    Weights,
    expand_formula,
    expand_gradients,
    fold_formula,
    fold_gradients,
    make_slot_weights,
    pool_formula,
)
from torch import Tensor

from helpers import PUBLISHED_RECEIVER, Geometry, Pair, assert_within_budget, make_cache
from lcf_fast import CacheGeometry, LatentSlots, LCFConfig, use_backend
from lcf_fast.kernels.slot_pooling import (
    finish_slot_states,
    merge_slot_states,
    pool_slot_states,
    pool_slots,
    pool_slots_with_stats,
)
from lcf_fast.kernels.slot_pooling_backward import pool_slots_backward
from lcf_fast.kernels.slot_projection import expand_slots, fold_slots
from lcf_fast.kernels.slot_projection_backward import expand_slots_backward, fold_slots_backward
from lcf_fast.noise import TrainingNoise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
LENGTHS = (1, 15, 16, 17, 63, 128, 1000, 2048)
CHANNELS = PUBLISHED_RECEIVER.kv_heads * PUBLISHED_RECEIVER.head_dim
BUDGET = 4.0
F32 = torch.float32


@pytest.fixture(autouse=True)
def compiled(device: torch.device) -> None:
    assert device.type == "cuda", "run with LCF_FAST_TEST_DEVICE=cuda: the interpreter is on"


def published(tokens: int, batch: int, slots: int, dtype: torch.dtype) -> tuple[list[Pair], Tensor, Weights]:
    """A sharer's cache, the slots' queries and weights of the published pair, Qwen3-0.6B to itself."""
    layers, heads, head_dim = PUBLISHED_RECEIVER
    sharer = make_cache(PUBLISHED_RECEIVER, batch, tokens, dtype=dtype, device="cuda")
    query = torch.randn(layers, slots, heads, head_dim).to("cuda", dtype)
    generator = torch.Generator().manual_seed(3)
    weights = make_slot_weights(layers, slots, 128, CHANNELS, CHANNELS, generator, dtype=dtype, device="cuda")
    return sharer, query, weights


def slice_of_a_cache(
    geometry: Geometry, batch: int, slots: int, dtype: torch.dtype, *, room: int = 300
) -> tuple[list[Pair], list[Pair]]:
    """Preallocated caches of NaN, and in each the k positions from the 200th on."""
    shape = (batch, geometry.kv_heads, room, geometry.head_dim)

    def empty() -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device="cuda")

    whole = [(empty(), empty()) for _ in range(geometry.layers)]
    return whole, [(key[:, :, 200 : 200 + slots], value[:, :, 200 : 200 + slots]) for key, value in whole]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("slots", "tokens"), [(1, 63), (8, 2000), (17, 1000), (64, 2048)])
def test_pool_of_the_published_sharer_keeps_the_error_budget(slots: int, tokens: int, dtype: torch.dtype) -> None:
    sharer, query, _ = published(tokens, 2, slots, dtype)
    mask = torch.ones(2, tokens, dtype=torch.bool, device="cuda")
    mask[1, : tokens // 3] = False
    for key, value in sharer:
        key[1, :, : tokens // 3], value[1, :, : tokens // 3] = torch.nan, torch.inf
    got = pool_slots(sharer, query, attention_mask=mask)
    truth, plain = (pool_formula(sharer, query, mask, kind) for kind in (torch.float64, torch.float32))
    for ours, exact, same in zip(got, truth, plain):
        assert_within_budget(ours, exact, same, BUDGET)
    cut = tokens // 2
    states = [
        pool_slot_states(
            [(key[:, :, part], value[:, :, part]) for key, value in sharer], query, attention_mask=mask[:, part]
        )
        for part in (slice(0, cut), slice(cut, None))
        if mask[:, part].numel()
    ]
    merged = merge_slot_states(torch.stack([a for a, _ in states], 3), torch.stack([b for _, b in states], 3))
    for ours, exact, same in zip(finish_slot_states(*merged), truth, plain):
        assert_within_budget(ours, exact, same, BUDGET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("slots", [1, 8, 64])
def test_groups_of_tokens_keep_the_error_budget(slots: int, dtype: torch.dtype) -> None:
    """Spans that overlap, one of a token, and NaN between them; the gradient of the queries; no wait, the same bits."""
    sharer, query, _ = published(2000, 2, slots, dtype)
    sharer, query = sharer[:4], query[:4].float()
    bounds = torch.tensor([[[0, 700], [600, 1500], [1600, 1601]], [[1999, 2000], [3, 1999], [400, 410]]])
    at = torch.arange(2000)
    mask = ((at >= bounds[..., :1]) & (at < bounds[..., 1:])).to("cuda")
    for key, value in sharer:
        key.masked_fill_(~mask.any(1)[:, None, :, None], torch.nan)
        value.masked_fill_(~mask.any(1)[:, None, :, None], torch.inf)
    rows = [(key.repeat_interleave(3, 0), value.repeat_interleave(3, 0)) for key, value in sharer]
    grad_key, grad_value = torch.randn(2, 4, 6, slots, 8, 128, device="cuda") * 1e-4

    def run() -> list[Tensor]:
        *pooled, stats = pool_slots_with_stats(sharer, query, attention_mask=mask)
        pair = pooled[0], pooled[1]
        found = pool_slots_backward(sharer, query, pair, stats, (grad_key, grad_value), attention_mask=mask)
        return [*pooled, found]

    def formula(dtype: torch.dtype) -> list[Tensor]:
        leaf = query.to(dtype).requires_grad_()
        pooled = pool_formula(rows, leaf, mask.flatten(0, 1), dtype)
        grads = grad_key.to(dtype), grad_value.to(dtype)
        return [*pooled, *torch.autograd.grad(pooled, leaf, grads)]

    got = run()
    for ours, exact, same, budget in zip(got, formula(torch.float64), formula(F32), (BUDGET, BUDGET, 6.0), strict=True):
        assert_within_budget(ours, exact.detach(), same.detach(), budget)
    with no_sync():
        again = run()
    assert all(torch.equal(a, b) for a, b in zip(got, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "slots"), [(1, 8), (3, 17), (32, 64)])
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_fold_and_expansion_keep_the_error_budget(width: int, batch: int, slots: int, dtype: torch.dtype) -> None:
    geometry = PUBLISHED_RECEIVER._replace(layers=28 if batch == 1 else 3)
    slot_key, slot_value = torch.randn(2, geometry.layers, batch, slots, 8, 128, device="cuda")
    generator = torch.Generator().manual_seed(3)
    layers = geometry.layers
    weights = make_slot_weights(layers, slots, width, CHANNELS, CHANNELS, generator, dtype=dtype, device="cuda")
    latent = fold_slots(slot_key, slot_value, weights)
    truth, plain = (fold_formula(slot_key, slot_value, weights, kind) for kind in (torch.float64, torch.float32))
    assert_within_budget(latent, truth, plain, BUDGET)
    whole, destinations = slice_of_a_cache(geometry, batch, slots, dtype)
    expand_slots(latent, weights, destinations, norm_eps=EPS)
    exact, same = (expand_formula(latent, weights, 8, kind) for kind in (torch.float64, dtype))
    for layer in zip(destinations, exact, same):
        for got in zip(*layer):
            assert_within_budget(*got)
    for tensor in (tensor for pair in whole for tensor in pair):
        tensor[:, :, 200 : 200 + slots] = torch.nan
        assert torch.isnan(tensor).all(), "written beside the slots"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("slots", "tokens"), [(8, 2000), (64, 1000)])
def test_gradient_of_the_queries_keeps_the_error_budget(slots: int, tokens: int, dtype: torch.dtype) -> None:
    sharer, query, _ = published(tokens, 2, slots, dtype)
    sharer, query = sharer[:4], query[:4].float()  # float32, as in training
    mask = (torch.arange(tokens) >= torch.tensor([[0], [333]])).to("cuda")
    _, stats = pool_slot_states(sharer, query, attention_mask=mask)
    pooled = pool_slots(sharer, query, attention_mask=mask)
    grad_key, grad_value = torch.randn(2, *pooled[0].shape, device="cuda") * 1e-4
    backward = (sharer, query, pooled, stats, (grad_key, grad_value))
    got = pool_slots_backward(*backward, attention_mask=mask)

    def autograd(dtype: torch.dtype) -> Tensor:
        leaf = query.to(dtype).requires_grad_()
        grads = grad_key.to(dtype), grad_value.to(dtype)
        return torch.autograd.grad(pool_formula(sharer, leaf, mask, dtype), leaf, grads)[0]

    assert_within_budget(got, autograd(torch.float64), autograd(torch.float32), 6.0)
    with no_sync():
        again = pool_slots_backward(*backward, attention_mask=mask)
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "slots"), [(1, 8), (3, 17), (32, 64)])
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_gradients_of_fold_and_expansion_keep_the_error_budget(
    width: int, batch: int, slots: int, dtype: torch.dtype
) -> None:
    layers, noise = 3, TrainingNoise(7, dropout=0.1)
    generator = torch.Generator().manual_seed(3)
    weights = make_slot_weights(layers, slots, width, CHANNELS, CHANNELS, generator, dtype=dtype, device="cuda")
    fold, expansion = ({name: weights[name] for name in names} for names in (FOLD, EXPANSION))
    slot_key, slot_value = torch.randn(2, layers, batch, slots, 8, 128, device="cuda")
    latent, grad_latent = torch.randn(2, layers, batch, slots, width, device="cuda")
    grad = torch.randn(layers, 2, batch, 8, slots, 128, device="cuda").to(dtype)

    def folded() -> dict[str, Tensor]:
        pooled, found = fold_slots_backward(grad_latent, slot_key, slot_value, fold, wants_slots=True)
        assert pooled is not None
        return {"slot_key": pooled[0], "slot_value": pooled[1], **found}

    def expanded() -> dict[str, Tensor]:
        dlatent, found = expand_slots_backward(grad, latent, expansion, norm_eps=EPS, noise=noise.arguments, row=5)
        return {"latent": dlatent, **found}

    truths = [
        (folded, [fold_gradients(grad_latent, slot_key, slot_value, fold, kind) for kind in (torch.float64, F32)]),
        (expanded, [expand_gradients(grad, latent, expansion, kind, noise, 5) for kind in (torch.float64, dtype)]),
    ]
    for run, (exact, plain) in truths:
        got = run()
        for name, gradient in got.items():
            assert_within_budget(gradient, exact[name], plain[name], BUDGET)
        with no_sync():
            again = run()
        assert all(torch.equal(again[name], gradient) for name, gradient in got.items())


def training_step(adapter: LatentSlots, sharer: list[Pair]) -> list[Tensor]:
    """Gradients of all parameters, the dropout of seed 1."""
    torch.manual_seed(1)
    made = torch.stack([side for pair in adapter.expand(adapter.summarize(sharer)) for side in pair])
    return list(torch.autograd.grad(made.square().mean(), list(adapter.parameters())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_training_step_is_the_eager_paths_the_same_bits_every_time_and_does_not_sync(dtype: torch.dtype) -> None:
    geometry = CacheGeometry(*PUBLISHED_RECEIVER._replace(layers=4))
    adapter = LatentSlots(LCFConfig(geometry, geometry, slots=8, dropout=0.1), device="cuda").train()
    sharer = make_cache(geometry, 2, 500, dtype=dtype, device="cuda")
    with use_backend("triton"):
        first = training_step(adapter, sharer)
        with no_sync():
            second = training_step(adapter, sharer)
    with use_backend("eager"):
        plain = training_step(adapter, sharer)
        exact = training_step(adapter.double(), [(key.double(), value.double()) for key, value in sharer])
    for ours, again, same, truth in zip(first, second, plain, exact, strict=True):
        assert torch.equal(ours, again)
        assert_within_budget(ours, truth, same, 6.0)


def pipeline(slots: int = 8) -> tuple[Callable[[], list[Tensor]], list[Pair]]:
    """Pool, fold and expand into a preallocated cache; and the sharer's cache that it reads."""
    sharer, query, weights = published(500, 1, slots, torch.bfloat16)
    mask = (torch.arange(500, device="cuda") > 17)[None]
    _, destinations = slice_of_a_cache(PUBLISHED_RECEIVER, 1, slots, torch.bfloat16)

    def run() -> list[Tensor]:
        latent = fold_slots(*pool_slots(sharer, query, attention_mask=mask), weights)
        expand_slots(latent, weights, destinations, norm_eps=EPS)
        return [tensor for pair in destinations for tensor in pair]

    return run, sharer


def test_in_a_cuda_graph() -> None:
    run, sharer = pipeline()
    graph, outputs = capture(run)
    for tensor in (tensor for pair in sharer for tensor in pair):
        tensor.copy_(torch.randn(tensor.shape))
    expected = [tensor.clone() for tensor in run()]
    for tensor in outputs:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(outputs, expected))


def test_nothing_syncs_and_bits_are_the_same_every_time() -> None:
    run, _ = pipeline()
    first = [tensor.clone() for tensor in run()]
    with no_sync():
        again = run()
    for _ in range(5):
        assert all(torch.equal(got, wanted) for got, wanted in zip(again, first))
        again = run()


def test_lengths_and_slots_do_not_recompile() -> None:
    """Eight lengths and eight numbers of slots, of which Triton would tell three kinds apart: 1, by 16, neither."""
    geometry = Geometry(2, 3, 96)  # of no other test
    weights = make_slot_weights(2, 16, 64, 288, 288, torch.Generator(), dtype=torch.bfloat16, device="cuda")
    before = compiled_variants()
    for tokens, slots in [*((tokens, 8) for tokens in LENGTHS), *((300, slots) for slots in (1, 2, 3, 8, 15, 16))]:
        sharer = make_cache(geometry, 1, tokens, dtype=torch.bfloat16, device="cuda")
        query = torch.randn(2, slots, 3, 96, device="cuda").bfloat16()
        slot_key, slot_value, stats = pool_slots_with_stats(sharer, query)
        latent = fold_slots(slot_key, slot_value, weights)
        _, destinations = slice_of_a_cache(geometry, 1, slots, torch.bfloat16)
        expand_slots(latent, weights, destinations, norm_eps=EPS)
        grad = torch.stack([torch.stack(pair) for pair in destinations])
        dlatent, _ = expand_slots_backward(grad, latent, {name: weights[name] for name in EXPANSION}, norm_eps=EPS)
        fold = {name: weights[name] for name in FOLD}
        pooled, _ = fold_slots_backward(dlatent, slot_key, slot_value, fold, wants_slots=True)
        assert pooled is not None
        pool_slots_backward(sharer, query, (slot_key, slot_value), stats, pooled)
    made = {name: count - before.get(name, 0) for name, count in compiled_variants().items()}
    assert any(made.values()), "nothing was compiled: the count sees nothing"
    # Whole contexts and chunks; a slot's stride of 1 and of more.
    assert max(made.values()) <= 4, made


def test_strides_beyond_31_bits() -> None:
    """Keys and values 2^31 elements apart, read and written: offsets in 32 bits would wrap to others, or fault."""
    batch, heads, tokens, dim = shape = (3, 2, 40, 64)
    buffer = torch.empty(2**31 + heads * tokens * dim + 8, dtype=torch.bfloat16, device="cuda")
    far = buffer.as_strided(shape, (2**30, tokens * dim, dim, 1))
    near = torch.randn(shape, device="cuda").bfloat16()
    far.copy_(near)
    query = torch.randn(1, 8, heads, dim, device="cuda").bfloat16()
    for one, other in zip(pool_slots([(far, far)], query), pool_slots([(near, near)], query)):
        assert torch.equal(one, other)
    generator = torch.Generator().manual_seed(3)
    weights = make_slot_weights(1, tokens, 64, 16, heads * dim, generator, dtype=torch.bfloat16, device="cuda")
    latent = torch.randn(1, batch, tokens, 64, device="cuda")
    value, other = (torch.empty_like(near) for _ in range(2))
    expand_slots(latent, weights, [(far, value)], norm_eps=EPS)
    expand_slots(latent, weights, [(near, other)], norm_eps=EPS)
    assert torch.equal(far, near)
    assert torch.equal(value, other)
