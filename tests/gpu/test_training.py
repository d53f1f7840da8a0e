"""Training on the GPU: gradients of the compiled kernels, their memory, their bits, and no syncs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import lcf_fast
from helpers import PUBLISHED_RECEIVER, PUBLISHED_SHARER, Geometry, Pair, assert_within_budget, make_cache, make_weights
from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig, ops, reference
from lcf_fast.noise import TrainingNoise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
DEVICE = "cuda"
NOISE = TrainingNoise(7, temperature=0.5, dropout=0.1)
#: Of float32 parameters with the caches' dtype in every product, as in training.
BUDGET = 3.0


@pytest.fixture(autouse=True)
def on_the_kernels(device: torch.device) -> Iterator[None]:
    assert device.type == DEVICE, "run with LCF_FAST_TEST_DEVICE=cuda: the interpreter is on"
    with lcf_fast.use_backend("triton"):
        yield


Fuse = Callable[..., Sequence[Pair]]


def gradients(
    fuse: Fuse, sharer: list[Pair], receiver: list[Pair], weights: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of a fixed linear function of the edited cache, whose coefficients are the receiver's own numbers."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in weights.items()}
    fused = [tensor for pair in fuse(sharer, receiver, leaves, noise=NOISE) for tensor in pair]
    given = [tensor for pair in receiver for tensor in pair]
    return dict(zip(leaves, torch.autograd.grad(fused, list(leaves.values()), given)))


def double(cache: list[Pair]) -> list[Pair]:
    return [(key.double(), value.double()) for key, value in cache]


def published(layers: int, batch: int, tokens: int, dtype: torch.dtype) -> tuple[list[Pair], list[Pair]]:
    sharer, receiver = PUBLISHED_SHARER._replace(layers=layers), PUBLISHED_RECEIVER._replace(layers=layers)
    return (
        make_cache(sharer, batch, tokens, dtype=dtype, device=DEVICE),
        make_cache(receiver, batch, tokens, dtype=dtype, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_gradients_of_the_published_pair_keep_the_error_budget(width: int, dtype: torch.dtype) -> None:
    sharer, receiver = published(4, 2, 131, dtype)
    weights = make_weights(PUBLISHED_SHARER, PUBLISHED_RECEIVER, width, layers=4, device=DEVICE)
    got = gradients(ops.fuse_layers, sharer, receiver, weights, torch.float32)
    plain = gradients(reference.fuse_layers, sharer, receiver, weights, torch.float32)
    exact = gradients(reference.fuse_layers, double(sharer), double(receiver), weights, torch.float64)
    for name, gradient in got.items():
        if gradient.numel() > 64:  # of a few numbers the median error is one number's luck
            assert_within_budget(gradient, exact[name], plain[name], BUDGET)


def test_peak_memory_is_a_tenth_of_autograds() -> None:
    sharer, receiver = published(28, 8, 1024, torch.bfloat16)
    weights = make_weights(PUBLISHED_SHARER, PUBLISHED_RECEIVER, 128, device=DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    peaks = {}
    for name, fuse in (("ours", ops.fuse_layers), ("eager", reference.fuse_layers)):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused = [tensor for pair in fuse(sharer, receiver, leaves, noise=NOISE) for tensor in pair]
        kept = torch.cuda.memory_allocated() - before - sum(tensor.nbytes for tensor in fused)
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        torch.autograd.grad(fused, list(leaves.values()), [t for pair in receiver for t in pair])
        working = torch.cuda.max_memory_allocated() - start - sum(tensor.nbytes for tensor in leaves.values())
        # The result's stacked gradient is as large as the result, and no activation of ours or of autograd's.
        peaks[name] = max(kept, 0) + max(working - sum(tensor.nbytes for tensor in fused), 0)
        del fused
    assert peaks["ours"] <= peaks["eager"] / 10, peaks


def training_adapter(cross_context: bool) -> tuple[LatentCacheFlow, list[Pair], list[Pair]]:
    sharer, receiver = Geometry(3, 2, 64), Geometry(4, 8, 128)
    config = LCFConfig(CacheGeometry(*sharer), CacheGeometry(*receiver), cross_context=cross_context)
    caches = (make_cache(g, 2, 70, dtype=torch.bfloat16, device=DEVICE) for g in (sharer, receiver))
    return LatentCacheFlow(config).to(DEVICE).train(), *caches  # type: ignore[return-value]


def step(adapter: LatentCacheFlow, sharer: list[Pair], receiver: list[Pair]) -> list[Tensor]:
    """Gradients of a training call with the noise of seed 1."""
    torch.manual_seed(1)
    if adapter.config.cross_context:
        edited = adapter.inject(receiver, adapter.summarize(sharer, None))
    else:
        edited = adapter.fuse(sharer, receiver)
    flat = [tensor for pair in edited for tensor in pair]
    parameters = list(adapter.parameters())
    return list(torch.autograd.grad(flat, parameters, [torch.ones_like(t) for t in flat]))


@pytest.mark.parametrize("cross_context", [False, True])
def test_gradients_are_the_same_bits_every_time(cross_context: bool) -> None:
    operands = training_adapter(cross_context)
    first = step(*operands)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(*operands), first))


@pytest.mark.parametrize("cross_context", [False, True])
def test_a_training_call_and_its_backward_do_not_sync(cross_context: bool) -> None:
    operands = training_adapter(cross_context)
    step(*operands)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*operands)
    finally:
        torch.cuda.set_sync_debug_mode("default")
