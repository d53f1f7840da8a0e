"""Every kernel, small, for compute-sanitizer. Odd sizes, so that every mask is at work.

``python tests/gpu/sanitize.py half`` runs those of one of `KINDS` alone. `main` takes a device, for `tests/launching`,
which has none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import lcf_fast
from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, ops
from lcf_fast.kernels.slot_pooling import (
    finish_slot_states,
    merge_slot_states,
    pool_slot_states,
    pool_slots,
    pool_slots_with_stats,
)
from lcf_fast.kernels.slot_pooling_backward import pool_slots_backward
from lcf_fast.kernels.slot_projection import expand_slots, fold_slots
from lcf_fast.kernels.slot_projection_backward import expand_slots_backward

sys.path.append(str(Path(__file__).resolve().parents[1]))

from slot_formulas import EPS, EXPANSION, make_slot_weights

Pair = tuple[torch.Tensor, torch.Tensor]
_device = "cuda"


def device() -> torch.device:
    return torch.device(_device)


def make_cache(geometry: CacheGeometry, batch: int, tokens: int, dtype: torch.dtype) -> list[Pair]:
    shape = (batch, geometry.kv_heads, tokens, geometry.head_dim)
    return [
        (torch.randn(shape, dtype=dtype, device=device()), torch.randn(shape, dtype=dtype, device=device()))
        for _ in range(geometry.layers)
    ]


def make_adapter(
    sharer: CacheGeometry, receiver: CacheGeometry, width: int, dtype: torch.dtype, *, crossing: bool
) -> LatentCacheFlow:
    config = LCFConfig(sharer, receiver, bottleneck=width, cross_context=crossing, gate_init=1.0)
    return LatentCacheFlow(config).to(device(), dtype).eval().requires_grad_(False)


@torch.enable_grad()
def train(adapter: LatentCacheFlow, sharer: list[Pair], receiver: list[Pair]) -> None:
    """Forward and backward with noise, of some positions; the caches' gradients too."""
    adapter.train().requires_grad_(True)
    leaves = [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in receiver]
    edited = adapter.fuse(sharer, leaves, positions=(1, 66))
    torch.stack([tensor.float().square().sum() for pair in edited for tensor in pair]).sum().backward()


def slots(sharer: list[Pair], receiver: CacheGeometry, width: int, dtype: torch.dtype) -> None:
    """Pool in chunks and in pieces, forward and backward, fold, write into a slice of a cache, and back from there."""
    layers, count, (batch, heads, tokens, head_dim) = len(sharer), 5, sharer[0][0].shape
    query = torch.randn(layers, count, heads, head_dim, dtype=dtype, device=device())
    mask = torch.rand(batch, tokens, device=device()) < 0.9
    states, stats = pool_slot_states(sharer, query, attention_mask=mask)
    finish_slot_states(*merge_slot_states(states.unsqueeze(3), stats.unsqueeze(3)))
    pooled = pool_slots(sharer, query, attention_mask=mask)
    pool_slots_backward(sharer, query, pooled, stats, pooled, attention_mask=mask)
    groups = torch.stack([mask, torch.arange(tokens, device=device()).expand(batch, -1) < 40], 1)
    of_groups = pool_slots_with_stats(sharer, query, attention_mask=groups)
    pool_slots_backward(sharer, query, of_groups[:2], of_groups[2], of_groups[:2], attention_mask=groups)
    generator = torch.Generator().manual_seed(0)
    channels = heads * head_dim, receiver.channels
    weights = make_slot_weights(layers, count, width, *channels, generator, dtype=dtype, device=device())
    destinations = [
        (key[:, :, 3 : 3 + count], value[:, :, 3 : 3 + count])
        for key, value in make_cache(receiver, batch, 3 + count, dtype)
    ]
    latent = fold_slots(*pooled, weights)
    expand_slots(latent, weights, destinations, norm_eps=EPS)
    grad = torch.stack([torch.stack(pair) for pair in destinations])
    expand_slots_backward(grad, latent, {name: weights[name] for name in EXPANSION}, norm_eps=EPS)


@torch.enable_grad()
def train_crossing(adapter: LatentCacheFlow, sharer: list[Pair], receiver: list[Pair], spans: torch.Tensor) -> None:
    """LCF-X forward and backward, the gradients of both caches with it."""
    adapter.train().requires_grad_(True)
    leaves = [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in sharer]
    edited = adapter.inject(receiver, adapter.summarize(leaves, spans))
    torch.stack([tensor.float().square().sum() for pair in edited for tensor in pair]).sum().backward()


def single_ops(sharer: list[Pair], receiver: list[Pair], adapter: LatentCacheFlow) -> None:
    """Projection and injection of one layer, as ops of their own."""
    weights = {name: parameter[0] for name, parameter in adapter.named_parameters()}
    latent = ops.joint_projection(*sharer[0], *receiver[0], weights)
    ops.gated_injection(*receiver[0], latent, weights)


@torch.enable_grad()
def train_slots(cache: list[Pair], sharer: CacheGeometry, receiver: CacheGeometry, width: int) -> None:
    """Forward and backward with dropout and padding; parameters in float32."""
    adapter = LatentSlots(LCFConfig(sharer, receiver, bottleneck=width, slots=5), device=device()).train()
    mask = torch.arange(cache[0][0].shape[2], device=device()) >= torch.tensor([[3], [40]], device=device())
    made = adapter.expand(adapter.summarize(cache, attention_mask=mask))
    torch.stack([side.square().sum() for pair in made for side in pair]).sum().backward()


#: Width and dtype.
KINDS = {"half": (64, torch.bfloat16), "single": (128, torch.float32)}


def main(on: str = "cuda", kinds: Sequence[str] = ()) -> None:
    global _device
    _device = on
    sharer, receiver = CacheGeometry(2, 2, 64), CacheGeometry(2, 3, 80)
    for width, dtype in (KINDS[kind] for kind in kinds or KINDS):
        fuser = make_adapter(sharer, receiver, width, dtype, crossing=False)
        crosser = make_adapter(sharer, receiver, width, dtype, crossing=True)
        for tokens in (131, 67):  # one launch, and the two of few tokens
            prompt = make_cache(receiver, 2, tokens, dtype)
            fuser.fuse(make_cache(sharer, 2, tokens, dtype), prompt, positions=(1, tokens - 1))
            fuser.fuse_(make_cache(sharer, 2, tokens, dtype), prompt)
        spans = torch.tensor([[0, 100, 100, 333], [5, 6, 300, 330]], dtype=torch.int32)
        message = crosser.summarize(make_cache(sharer, 2, 333, dtype), spans)
        crosser.inject_(prompt, message)
        single_ops(make_cache(sharer, 2, 67, dtype), prompt, fuser)
        slots(make_cache(sharer, 2, 333, dtype), receiver, width, dtype)
        train_slots(make_cache(sharer, 2, 333, dtype), sharer, receiver, width)
        train(fuser, make_cache(sharer, 2, 67, dtype), prompt)
        train_crossing(crosser, make_cache(sharer, 2, 333, dtype), prompt, spans)
    print("every kernel ran")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("a CUDA GPU is needed")
    with torch.no_grad(), lcf_fast.use_backend("triton"):
        main(kinds=sys.argv[1:])
        torch.cuda.synchronize()
