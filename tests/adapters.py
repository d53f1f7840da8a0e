"""A small adapter and its caches, as the adapter's tests use them; import as ``from adapters import ...``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helpers import make_cache, to_double
from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig, reference

SHARER = CacheGeometry(3, 2, 16)
RECEIVER = CacheGeometry(5, 3, 8)
Pair = tuple[Tensor, Tensor]


def make_adapter(
    cross_context: bool = False,
    *,
    keep: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> LatentCacheFlow:
    """All gates open but layer 3's, of which the key's is closed, and layer 1's, which is dead."""
    torch.manual_seed(11)
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=cross_context, **fields)
    adapter = LatentCacheFlow(config, keep_layers=keep, dtype=dtype)
    logits = torch.tensor([[0.5, 0.1], [-0.2, 0.0], [2.0, 1.0], [-1.0, 0.7], [0.3, 0.3]])
    with torch.no_grad():
        adapter.gate_logit.copy_(logits[adapter.receiver_layers])
        if cross_context:
            adapter.get_parameter("span_query").normal_()
            adapter.get_parameter("global_query").normal_()
    return adapter.to(device).requires_grad_(False).eval()


def make_caches(
    device: torch.device | str = "cpu", *, batch: int = 2, length: int = 7, sharer_length: int | None = None
) -> tuple[list[Pair], list[Pair]]:
    generator = torch.Generator().manual_seed(7)
    sharer = make_cache(
        SHARER, batch, length if sharer_length is None else sharer_length, device=device, generator=generator
    )
    return sharer, make_cache(RECEIVER, batch, length, device=device, generator=generator)


def expected_of(adapter: LatentCacheFlow, receiver: Sequence[Pair], **keywords: Any) -> list[Pair]:
    """The reference in float64, at every layer of the receiver."""
    weights = {name: p.detach().double() for name, p in adapter.named_parameters()}
    kept = adapter.receiver_layers.tolist()
    sharer = keywords.pop("sharer", None)
    if sharer is not None:
        sharer = [to_double(sharer)[s] for s in adapter.sharer_layers.tolist()]
    double = to_double(receiver)
    fused = reference.fuse_layers(
        sharer, [double[t] for t in kept], weights, norm_eps=adapter.config.norm_eps, **keywords
    )
    for t, pair in zip(kept, fused):
        double[t] = pair
    return double


def assert_close(got: Sequence[Pair], expected: Sequence[Pair], tolerance: float = 1e-5) -> None:
    for layer, (pair, wanted) in enumerate(zip(got, expected, strict=True)):
        for tensor, truth in zip(pair, wanted, strict=True):
            error = (tensor.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-9)
            assert error < tolerance, f"layer {layer}: relative error {error:.1e}"


def assert_equal(got: Sequence[Pair], expected: Sequence[Pair]) -> None:
    for pair, wanted in zip(got, expected, strict=True):
        for tensor, truth in zip(pair, wanted, strict=True):
            assert torch.equal(tensor, truth)


def cloned(cache: Sequence[Pair]) -> list[Pair]:
    return [(key.clone(), value.clone()) for key, value in cache]
