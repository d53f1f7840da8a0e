"""The fused kernels held against the reference: what their tests share; import as ``from fused import ...``."""

from __future__ import annotations

from torch import Tensor

from helpers import Pair, assert_within_budget, to_double
from lcf_fast import ops, reference, use_backend

Weights = dict[str, Tensor]


def double(weights: Weights) -> Weights:
    return {name: tensor.double() for name, tensor in weights.items()}


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
