"""Every kernel once, small, for compute-sanitizer. Odd sizes, so that every mask is at work."""

from __future__ import annotations

import torch

import lcf_fast
from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig

Pair = tuple[torch.Tensor, torch.Tensor]


def make_cache(geometry: CacheGeometry, batch: int, tokens: int, dtype: torch.dtype) -> list[Pair]:
    shape = (batch, geometry.kv_heads, tokens, geometry.head_dim)
    return [
        (torch.randn(shape, dtype=dtype, device="cuda"), torch.randn(shape, dtype=dtype, device="cuda"))
        for _ in range(geometry.layers)
    ]


def make_adapter(
    sharer: CacheGeometry, receiver: CacheGeometry, width: int, dtype: torch.dtype, *, crossing: bool
) -> LatentCacheFlow:
    config = LCFConfig(sharer, receiver, bottleneck=width, cross_context=crossing, gate_init=1.0)
    return LatentCacheFlow(config).to("cuda", dtype).eval().requires_grad_(False)


@torch.enable_grad()
def train(adapter: LatentCacheFlow, sharer: list[Pair], receiver: list[Pair]) -> None:
    """Forward and backward with noise, of some positions; the caches' gradients too."""
    adapter.train().requires_grad_(True)
    leaves = [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in receiver]
    edited = adapter.fuse(sharer, leaves, positions=(1, 66))
    torch.stack([tensor.float().square().sum() for pair in edited for tensor in pair]).sum().backward()


def main() -> None:
    sharer, receiver = CacheGeometry(2, 2, 64), CacheGeometry(2, 3, 80)
    for width, dtype in ((64, torch.bfloat16), (128, torch.float32)):
        prompt = make_cache(receiver, 2, 67, dtype)
        fuser = make_adapter(sharer, receiver, width, dtype, crossing=False)
        fuser.fuse(make_cache(sharer, 2, 67, dtype), prompt, positions=(1, 66))
        fuser.fuse_(make_cache(sharer, 2, 67, dtype), prompt)
        crosser = make_adapter(sharer, receiver, width, dtype, crossing=True)
        spans = torch.tensor([[0, 100, 100, 333], [5, 6, 300, 330]], dtype=torch.int32)
        message = crosser.summarize(make_cache(sharer, 2, 333, dtype), spans)
        crosser.inject_(prompt, message)
        train(fuser, make_cache(sharer, 2, 67, dtype), prompt)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    with torch.no_grad(), lcf_fast.use_backend("triton"):
        main()
