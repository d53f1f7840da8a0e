"""What only a GPU shows: numerics of the compiled kernels, CUDA graphs, syncs, recompiles, 64-bit offsets.

Run by ``make gpu``, which runs the kernels' other tests on the GPU too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from on_gpu import capture, compiled_variants, no_sync
from torch import Tensor

import lcf_fast
from helpers import (
    PUBLISHED_RECEIVER,
    PUBLISHED_SHARER,
    Geometry,
    Pair,
    assert_within_budget,
    make_cache,
    make_weights,
    to_double,
)
from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig, reference
from lcf_fast.kernels import fusion, fusion_plan
from lcf_fast.kernels.fusion_split import launch_split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
LENGTHS = (1, 15, 16, 17, 63, 128, 1000, 2048)
SMALL_SHARER, SMALL_RECEIVER = Geometry(3, 2, 64), Geometry(4, 8, 128)


@pytest.fixture(autouse=True)
def on_the_kernels(device: torch.device) -> Iterator[None]:
    assert device.type == "cuda", "run with LCF_FAST_TEST_DEVICE=cuda: the interpreter is on"
    # Not inference_mode: parameters made in it do not count their changes, so that the adapter would read its
    # gates, and sync, in every call.
    with torch.no_grad(), lcf_fast.use_backend("triton"):
        yield


def make_adapter(
    sharer: Geometry = SMALL_SHARER,
    receiver: Geometry = SMALL_RECEIVER,
    width: int = 128,
    *,
    cross_context: bool = False,
    gates: str = "open",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> tuple[LatentCacheFlow, dict[str, Tensor]]:
    """An adapter with random weights that do something, and those weights."""
    config = LCFConfig(CacheGeometry(*sharer), CacheGeometry(*receiver), bottleneck=width, cross_context=cross_context)
    weights = make_weights(sharer, receiver, width, cross_context=cross_context, gates=gates, dtype=dtype)
    adapter = LatentCacheFlow(config).to(device, dtype).eval().requires_grad_(False)
    adapter.load_state_dict({**adapter.state_dict(), **weights})
    return adapter, {name: tensor.to(device) for name, tensor in weights.items()}


def in_kept_order(adapter: LatentCacheFlow, sharer: list[Pair]) -> list[Pair]:
    return [sharer[layer] for layer in adapter.config.sharer_layers]


def double(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


def tensors_of(cache: list[Pair]) -> list[Tensor]:
    return [tensor for pair in cache for tensor in pair]


def clone(cache: list[Pair]) -> list[Pair]:
    return [(key.clone(), value.clone()) for key, value in cache]


def assert_cache_within_budget(got: list[Pair], truth: list[Pair], plain: list[Pair]) -> None:
    assert len(got) == len(truth)
    for layers in zip(tensors_of(got), tensors_of(truth), tensors_of(plain)):
        assert_within_budget(*layers)


def assert_same_cache(got: list[Pair], expected: list[Pair]) -> None:
    for layer, (one, other) in enumerate(zip(tensors_of(got), tensors_of(expected))):
        assert torch.equal(one, other), f"tensor {layer} differs"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_fuse_of_the_published_pair_keeps_the_error_budget(width: int, dtype: torch.dtype) -> None:
    adapter, weights = make_adapter(PUBLISHED_SHARER, PUBLISHED_RECEIVER, width, gates="mixed", dtype=dtype)
    sharer = make_cache(PUBLISHED_SHARER, 2, 131, dtype=dtype, device="cuda")
    receiver = make_cache(PUBLISHED_RECEIVER, 2, 131, dtype=dtype, device="cuda")
    kept = in_kept_order(adapter, sharer)
    truth = reference.fuse_layers(to_double(kept), to_double(receiver), double(weights))
    plain = reference.fuse_layers(kept, receiver, weights)
    assert_cache_within_budget(adapter.fuse(sharer, receiver), truth, plain)
    adapter.fuse_(sharer, receiver)
    assert_cache_within_budget(receiver, truth, plain)


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_message_of_the_published_pair_keeps_the_error_budget(width: int) -> None:
    geometry, dtype = PUBLISHED_RECEIVER, torch.bfloat16
    adapter, weights = make_adapter(geometry, geometry, width, cross_context=True, dtype=dtype)
    sharer = make_cache(geometry, 2, 700, dtype=dtype, device="cuda")
    receiver = make_cache(geometry, 2, 131, dtype=dtype, device="cuda")
    spans = torch.tensor([[0, 200, 200, 650, 700], [3, 10, 11, 400, 690]], dtype=torch.int32, device="cuda")
    message = adapter.summarize(sharer, spans)
    latent64, _ = reference.summarize_layers(to_double(sharer), double(weights), spans)
    plain, _ = reference.summarize_layers(sharer, weights, spans)
    assert_within_budget(message.tensors["latent"], latent64, plain.to(message.tensors["latent"].dtype))
    # From one message on both sides: the pooling's error has been judged above.
    latent = message.tensors["latent"]
    truth = reference.fuse_layers(None, to_double(receiver), double(weights), message=latent.double())
    naive = reference.fuse_layers(None, receiver, weights, message=latent)
    assert_cache_within_budget(adapter.inject(receiver, message), truth, naive)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 128])
@pytest.mark.parametrize(
    ("width", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)], ids=str
)
def test_few_tokens_of_the_published_pair(
    tokens: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split over two launches: within the budget, and the same to the bit again and in place; so is the one launch."""
    adapter, weights = make_adapter(PUBLISHED_SHARER, PUBLISHED_RECEIVER, width, gates="mixed", dtype=dtype)
    sharer = make_cache(PUBLISHED_SHARER, 1, tokens, dtype=dtype, device="cuda")
    receiver = make_cache(PUBLISHED_RECEIVER, 1, tokens, dtype=dtype, device="cuda")
    mask = torch.ones(1, tokens, dtype=torch.long, device="cuda")
    mask[:, : tokens // 3] = 0
    kept = in_kept_order(adapter, sharer)
    truth = reference.fuse_layers(to_double(kept), to_double(receiver), double(weights), edit_mask=mask)
    plain = reference.fuse_layers(kept, receiver, weights, edit_mask=mask)
    launched = []
    monkeypatch.setattr(fusion, "launch_split", lambda *given: launched.append(launch_split(*given)))
    split = adapter.fuse(sharer, receiver, attention_mask=mask)
    assert launched, "few tokens were not split"
    assert_cache_within_budget(split, truth, plain)
    for _ in range(3):
        assert_same_cache(adapter.fuse(sharer, receiver, attention_mask=mask), split)
    monkeypatch.setattr(fusion_plan, "split_config", lambda *given: None)
    fusion_plan.plan_of.cache_clear()
    whole = adapter.fuse(sharer, receiver, attention_mask=mask)
    monkeypatch.undo()
    fusion_plan.plan_of.cache_clear()
    assert_cache_within_budget(whole, truth, plain)
    adapter.fuse_(sharer, receiver, attention_mask=mask)
    assert_same_cache(receiver, split)


def poison(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan)


def refill(cache: list[Pair]) -> None:
    """New data in the tensors that a graph reads."""
    for tensor in tensors_of(cache):
        tensor.copy_(torch.randn(tensor.shape))


@pytest.mark.parametrize("tokens", [77, 177])
def test_fuse_in_a_cuda_graph(tokens: int) -> None:
    """Few tokens, whose parts of z lie in the graph's own memory, and more."""
    adapter, _ = make_adapter()
    sharer = make_cache(SMALL_SHARER, 1, tokens, dtype=torch.bfloat16, device="cuda")
    receiver = make_cache(SMALL_RECEIVER, 1, tokens, dtype=torch.bfloat16, device="cuda")
    graph, outputs = capture(lambda: tensors_of(adapter.fuse(sharer, receiver)))
    refill(sharer)
    refill(receiver)
    poison(outputs)
    graph.replay()
    expected = tensors_of(adapter.fuse(sharer, receiver))
    for got, wanted in zip(outputs, expected):
        assert torch.equal(got, wanted)


def test_inject_in_place_in_a_cuda_graph() -> None:
    adapter, _ = make_adapter(SMALL_RECEIVER, SMALL_RECEIVER, cross_context=True)
    sharer = make_cache(SMALL_RECEIVER, 1, 300, dtype=torch.bfloat16, device="cuda")
    receiver = make_cache(SMALL_RECEIVER, 1, 77, dtype=torch.bfloat16, device="cuda")
    message = adapter.summarize(sharer, None)
    graph, outputs = capture(lambda: tensors_of(adapter.inject_(receiver, message)))
    refill(receiver)
    expected = adapter.inject(clone(receiver), message)
    graph.replay()
    assert [tensor.data_ptr() for tensor in outputs] == [tensor.data_ptr() for tensor in tensors_of(receiver)]
    assert_same_cache(receiver, expected)


def test_the_guard_against_syncs_works() -> None:
    with pytest.raises(RuntimeError, match="sync"), no_sync():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("gates", ["open", "mixed"])
def test_nothing_syncs(gates: str) -> None:
    adapter, _ = make_adapter(gates=gates)
    crossing, _ = make_adapter(SMALL_RECEIVER, SMALL_RECEIVER, cross_context=True, gates=gates)
    sharer = make_cache(SMALL_SHARER, 2, 65, dtype=torch.bfloat16, device="cuda")
    context = make_cache(SMALL_RECEIVER, 2, 90, dtype=torch.bfloat16, device="cuda")
    receiver = make_cache(SMALL_RECEIVER, 2, 65, dtype=torch.bfloat16, device="cuda")
    spans = torch.tensor([[0, 40, 90], [0, 1, 80]], dtype=torch.int32)

    def everything() -> None:
        adapter.fuse(sharer, receiver)
        adapter.fuse(sharer, receiver, positions=(3, 60))
        adapter.fuse_(sharer, receiver)
        crossing.inject(receiver, crossing.summarize(context, None))
        message = crossing.summarize(context, spans)
        crossing.inject(receiver, message, positions=(0, 64))
        crossing.inject_(receiver, message)

    everything()  # compiles
    with no_sync():
        everything()


@pytest.mark.parametrize("method", ["fuse", "inject"])
def test_lengths_do_not_recompile(method: str) -> None:
    """Eight lengths, of which Triton would tell three kinds apart: 1, divisible by 16, neither."""
    sharer_geometry, receiver_geometry = Geometry(1, 2, 80), Geometry(2, 3, 96)  # of no other test
    adapter, _ = make_adapter(sharer_geometry, receiver_geometry, 64)
    crossing, _ = make_adapter(receiver_geometry, receiver_geometry, 64, cross_context=True)
    before = compiled_variants()
    assert before, "no kernel was found"
    for length in LENGTHS:
        sharer = make_cache(sharer_geometry, 1, length, dtype=torch.bfloat16, device="cuda")
        receiver = make_cache(receiver_geometry, 1, length, dtype=torch.bfloat16, device="cuda")
        if method == "fuse":
            adapter.fuse(sharer, receiver)
        else:
            crossing.inject(receiver, crossing.summarize(receiver, None))
    made = {name: count - before.get(name, 0) for name, count in compiled_variants().items()}
    assert any(made.values()), "nothing was compiled: the count sees nothing"
    # What may differ is the tile: a few sizes, from few tokens to many.
    assert max(made.values()) <= 4, made


@pytest.mark.parametrize("axis", ["head", "token"])
def test_strides_beyond_31_bits(axis: str) -> None:
    """A cache that spans more than 2^31 elements: offsets in 32 bits would wrap to others, or fault."""
    sharer_geometry, receiver_geometry = Geometry(1, 2, 64), Geometry(1, 4, 64)
    tokens, dim = 33, 64
    adapter, _ = make_adapter(sharer_geometry, receiver_geometry, 64)
    sharer = make_cache(sharer_geometry, 1, tokens, dtype=torch.bfloat16, device="cuda")
    ((small_key, small_value),) = make_cache(receiver_geometry, 1, tokens, dtype=torch.bfloat16, device="cuda")
    if axis == "head":
        strides = (1, 2**30, dim, 1)
    else:
        strides = (1, dim, 2**27, 1)
    heads = receiver_geometry.kv_heads
    span = strides[1] * (heads - 1) + strides[2] * (tokens - 1) + dim
    assert span > 2**31
    buffer = torch.empty(span + 2**16, dtype=torch.bfloat16, device="cuda")
    shape = (1, heads, tokens, dim)
    key = buffer.as_strided(shape, strides, 0).copy_(small_key)
    value = buffer.as_strided(shape, strides, 2**15).copy_(small_value)
    ((far_key, far_value),) = adapter.fuse(sharer, [(key, value)])
    ((near_key, near_value),) = adapter.fuse(sharer, [(small_key, small_value)])
    assert torch.equal(far_key, near_key)
    assert torch.equal(far_value, near_value)
    adapter.fuse_(sharer, [(key, value)])
    assert torch.equal(key, near_key)
    assert torch.equal(value, near_value)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_a_second_device_is_guarded() -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(5)
        adapter, _ = make_adapter(device=device)
        sharer = make_cache(SMALL_SHARER, 1, 50, dtype=torch.bfloat16, device=device)
        receiver = make_cache(SMALL_RECEIVER, 1, 50, dtype=torch.bfloat16, device=device)
        assert torch.cuda.current_device() == 0
        results.append(tensors_of(adapter.fuse(sharer, receiver)))
    for one, other in zip(*results):
        assert other.device == torch.device("cuda:1")
        assert torch.equal(one.cpu(), other.cpu())


def test_results_are_bitwise_the_same_every_time() -> None:
    adapter, _ = make_adapter(PUBLISHED_SHARER, PUBLISHED_RECEIVER)
    crossing, _ = make_adapter(PUBLISHED_RECEIVER, PUBLISHED_RECEIVER, cross_context=True)
    sharer = make_cache(PUBLISHED_SHARER, 2, 517, dtype=torch.bfloat16, device="cuda")
    receiver = make_cache(PUBLISHED_RECEIVER, 2, 517, dtype=torch.bfloat16, device="cuda")
    fused = adapter.fuse(sharer, receiver)
    latent = crossing.summarize(receiver, None).tensors["latent"]
    for _ in range(5):
        assert_same_cache(adapter.fuse(sharer, receiver), fused)
        assert torch.equal(crossing.summarize(receiver, None).tensors["latent"], latent)
