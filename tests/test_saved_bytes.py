"""What is kept from the forward to the backward pass, at the published sizes: counted on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import PUBLISHED_RECEIVER, PUBLISHED_SHARER, Pair, make_cache, make_slot_weights, make_weights
from lcf_fast import ops, reference, use_backend
from lcf_fast.kernels.fusion_backward import layers_at_a_time
from lcf_fast.noise import TrainingNoise

TOKENS, WIDTH, BLOCKS = 2048, 128, 2
OPEN = [(True, True)] * PUBLISHED_RECEIVER.layers


def kept_bytes(dtype: torch.dtype, fuse: Callable[..., Sequence[Pair]], noise: TrainingNoise | None) -> int:
    """Bytes that autograd holds on to beside the operands; all of the result still takes part in the graph."""
    sharer = PUBLISHED_SHARER._replace(layers=PUBLISHED_RECEIVER.layers)
    weights = make_weights(PUBLISHED_SHARER, PUBLISHED_RECEIVER, WIDTH, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    own, other = (make_cache(geometry, 1, TOKENS, dtype=dtype) for geometry in (PUBLISHED_RECEIVER, sharer))
    operands = [*leaves.values(), *(t for pair in (*own, *other) for t in pair)]
    return kept_beside(operands, lambda: fuse(other, own, leaves, noise=noise))


def kept_beside(operands: Sequence[Tensor], run: Callable[[], Sequence[Pair]]) -> int:
    """Bytes that autograd holds on to of ``run``, beside those of its operands."""
    given = {id(t.untyped_storage()) for t in operands}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an id is free again when its owner is gone

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if id(storage) not in given:
            kept[id(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = run()
    assert all(tensor.requires_grad for pair in made for tensor in pair)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", [None, TrainingNoise(3)])
def test_the_kernels_keep_nothing_and_work_in_a_tenth_of_what_autograd_keeps(
    dtype: torch.dtype, noise: TrainingNoise | None
) -> None:
    with FakeTensorMode():
        eager = kept_bytes(dtype, reference.fuse_layers, noise)
        with use_backend("triton"):
            assert kept_bytes(dtype, partial(ops.fuse_layers, live=OPEN), noise) == 0
    layers = layers_at_a_time(PUBLISHED_RECEIVER.layers, TOKENS, BLOCKS, WIDTH, dtype.itemsize)
    latents = (4 * (BLOCKS + 2) + 2 * dtype.itemsize * BLOCKS) * layers * TOKENS * WIDTH
    scores = 2 * 4 * 2 * PUBLISHED_RECEIVER.kv_heads * layers * TOKENS
    assert latents + scores <= eager / 10, f"{latents + scores:,} of {eager:,} bytes"


@pytest.mark.parametrize(("dtype", "megabytes"), [(torch.float32, 19), (torch.bfloat16, 489)], ids=str)
def test_slots_keep_what_they_pooled_and_their_latents(dtype: torch.dtype, megabytes: int) -> None:
    """From the sharer's cache to k new positions, with dropout: nothing of a size that grows with the context.

    ``megabytes``: what the eager path keeps, which docs/slots.md says; a float32 copy of half precision caches, too.
    """
    slots, layers, channels = 8, PUBLISHED_RECEIVER.layers, PUBLISHED_RECEIVER.kv_heads * PUBLISHED_RECEIVER.head_dim
    with FakeTensorMode():
        weights = make_slot_weights(PUBLISHED_RECEIVER, PUBLISHED_RECEIVER, WIDTH, slots)
        leaves = {name: tensor.requires_grad_() for name, tensor in weights.items()}
        sharer = make_cache(PUBLISHED_RECEIVER, 1, TOKENS, dtype=dtype)

        def run() -> list[Pair]:
            latent = ops.summarize_slots_layers(sharer, leaves)
            return ops.expand_slots_layers(latent, leaves, kv_heads=8, noise=TrainingNoise(3))

        operands = [*leaves.values(), *(t for pair in sharer for t in pair)]
        eager = kept_beside(operands, run)
        with use_backend("triton"):
            ours = kept_beside(operands, run)
    rows = 4 * layers * slots
    assert ours == rows * (2 * channels + WIDTH + 2 * PUBLISHED_RECEIVER.kv_heads)  # 2 MB
    assert round(eager / 1e6) == megabytes
