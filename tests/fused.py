"""The fused kernels held against the reference: what their tests share; import as ``from fused import ...``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from helpers import Pair, assert_within_budget, to_double
from lcf_fast import ops, reference, use_backend
from lcf_fast.kernels import fusion_plan, tuned
from lcf_fast.kernels.policy import TileConfig

Weights = dict[str, Tensor]


def double(weights: Weights) -> Weights:
    return {name: tensor.double() for name, tensor in weights.items()}


@contextmanager
def tiles_of(config: TileConfig) -> Iterator[None]:
    """Launches within, few tokens' too but not those in training, take this row instead of the policy's."""
    with tuned.trying({"tile": config, "split": None}):
        fusion_plan.plan_of.cache_clear()
        try:
            yield
        finally:
            fusion_plan.plan_of.cache_clear()


def gates_of(weights: Weights) -> list[tuple[bool, bool]]:
    return [(bool(k), bool(v)) for k, v in (weights["gate_logit"] > 0).tolist()]


def check_fuse(
    sharer: list[Pair] | None, receiver: list[Pair], weights: Weights, k: float = 2.0, **keywords: object
) -> list[Pair]:
    """Fuse with the kernel, hold every edited tensor to the error budget, return the result."""
    with use_backend("triton"):
        fused = ops.fuse_layers(sharer, receiver, weights, **keywords)  # type: ignore[arg-type]
    sharer64 = None if sharer is None else to_double(sharer)
    truth = reference.fuse_layers(sharer64, to_double(receiver), double(weights), **keywords)  # type: ignore[arg-type]
    plain = reference.fuse_layers(sharer, receiver, weights, **keywords)  # type: ignore[arg-type]
    for got, exact, same, old, is_open in zip(fused, truth, plain, receiver, gates_of(weights)):
        for i in range(2):
            if is_open[i]:
                assert_within_budget(got[i], exact[i], same[i], k)
            else:
                assert got[i] is old[i], "a closed gate must cost nothing"
    return fused
