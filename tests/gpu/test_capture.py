"""`adapter.capture` on a GPU: replays are right on new data, edits wait for a replay, the host does next to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
import torch
from on_gpu import no_sync
from torch import Tensor

import lcf_fast
from helpers import PUBLISHED_RECEIVER, PUBLISHED_SHARER, Geometry, Pair, make_cache
from lcf_fast import BackendError, CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
SHARER, RECEIVER = Geometry(3, 2, 64), Geometry(4, 8, 128)


@pytest.fixture(autouse=True)
def on_the_kernels(device: torch.device) -> Iterator[None]:
    assert device.type == "cuda", "run with LCF_FAST_TEST_DEVICE=cuda: the interpreter is on"
    with torch.no_grad(), lcf_fast.use_backend("triton"):
        yield


def adapter_of(sharer: Geometry = SHARER, receiver: Geometry = RECEIVER, **fields: Any) -> LatentCacheFlow:
    config = LCFConfig(CacheGeometry(*sharer), CacheGeometry(*receiver), gate_init=1.0, **fields)
    return LatentCacheFlow(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)


def cache(geometry: Geometry, tokens: int, batch: int = 1) -> list[Pair]:
    return make_cache(geometry, batch, tokens, dtype=torch.bfloat16, device="cuda")


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if hasattr(result, "tensors"):
        return list(result.tensors.values())
    return [tensor for part in result for tensor in tensors(part)]


def refill(caches: list[list[Pair]]) -> None:
    for tensor in tensors(caches):
        tensor.copy_(torch.randn(tensor.shape))


def assert_same(got: Any, expected: Any) -> None:
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spans", [None, [[0, 100, 300]], torch.tensor([[5, 60, 60, 290]])], ids=["one", "list", "cpu"])
def test_replays_on_new_data(spans: Any) -> None:
    fuser, crosser = adapter_of(), adapter_of(RECEIVER, RECEIVER, cross_context=True)
    heard, own, context = cache(SHARER, 77), cache(RECEIVER, 77), cache(RECEIVER, 300)
    message = crosser.summarize(context, spans)
    calls: list[tuple[LatentCacheFlow, str, tuple[Any, ...]]] = [
        (fuser, "fuse", (heard, own)),
        (crosser, "summarize", (context, spans)),
        (crosser, "inject", (own, message)),
    ]
    for adapter, name, args in calls:
        captured = adapter.capture(name, *args)
        for _ in range(2):
            refill([heard, own, context])
            for tensor in tensors(captured.result):
                tensor.fill_(torch.nan)
            with no_sync():
                found = captured.replay()
            assert found is captured.result
            assert_same(found, getattr(adapter, name)(*args))


@pytest.mark.parametrize("name", ["fuse_", "inject_"])
def test_an_edit_in_place_waits_for_the_replay_and_is_made_once(name: str) -> None:
    crossing = name == "inject_"
    adapter = adapter_of(RECEIVER if crossing else SHARER, RECEIVER, cross_context=crossing)
    own, heard = cache(RECEIVER, 77), cache(SHARER, 77)
    first = adapter.summarize(cache(RECEIVER, 300), None) if crossing else heard
    args = (own, first) if crossing else (first, own)
    before = [(key.clone(), value.clone()) for key, value in own]
    captured = adapter.capture(name, *args)
    assert_same(own, before)
    refill([own])
    expected = getattr(adapter, name[:-1])(*args)
    assert captured.replay() is own
    assert_same(own, expected)


def test_changed_parameters_are_seen() -> None:
    adapter = adapter_of()
    heard, own = cache(SHARER, 33), cache(RECEIVER, 33)
    captured = adapter.capture("fuse", heard, own)
    adapter.get_parameter("up_weight").mul_(2)
    assert_same(captured.replay(), adapter.fuse(heard, own))


def test_slots_from_context_to_positions() -> None:
    config = LCFConfig(CacheGeometry(*RECEIVER), CacheGeometry(*RECEIVER), slots=8)
    adapter = LatentSlots(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    context = cache(RECEIVER, 300)
    summary = adapter.capture("summarize", context)
    message = adapter.summarize(context)
    expanded = adapter.capture("expand", message)
    refill([context])
    assert_same(summary.replay(), adapter.summarize(context))
    assert message.latent is not None
    message.latent.normal_()
    assert_same(expanded.replay(), adapter.expand(message))


def test_a_call_that_waits_for_the_device_is_refused() -> None:
    static = pytest.importorskip("transformers").StaticCache
    config = pytest.importorskip("transformers").Qwen3Config(
        num_hidden_layers=4, num_key_value_heads=8, num_attention_heads=8, head_dim=128, hidden_size=64
    )
    own = static(config, max_cache_len=64)
    for layer, (key, value) in enumerate(cache(RECEIVER, 33)):
        own.update(key, value, layer)
    adapter, heard = adapter_of(), cache(SHARER, 33)
    mask = torch.ones(1, 33, dtype=torch.bool, device="cuda")
    assert adapter.capture("fuse_", heard, own, attention_mask=mask).replay() is own
    length = own.layers[0].cumulative_length if hasattr(own.layers[0], "cumulative_length") else None
    if isinstance(length, Tensor) and length.is_cuda:  # else the host knows it
        with pytest.raises(BackendError, match="wait"):
            adapter.capture("fuse", heard, own)


def host_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    torch.cuda.synchronize()
    return median(times)


def test_a_replay_takes_less_of_the_host_than_a_call() -> None:
    """All 28 layers of the published pair. Others share the machine, so nothing but the order is held."""
    adapter = adapter_of(PUBLISHED_SHARER, PUBLISHED_RECEIVER)
    heard, own = cache(PUBLISHED_SHARER, 32), cache(PUBLISHED_RECEIVER, 32)
    captured = adapter.capture("fuse", heard, own)
    captured.replay()
    replayed, called = host_us(captured.replay), host_us(lambda: adapter.fuse(heard, own))
    assert replayed < called, (replayed, called)
