"""A step of training, for the bench: gradients of the adapter's parameters, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import Operands

Pair = tuple[Tensor, Tensor]
#: The parameters whose gradients are long vectors; the others' are judged as one.
MATRICES = ("down_weight", "ffn_in_weight", "ffn_out_weight", "up_weight")
VECTORS = ("down_bias", "norm_weight", "up_bias", "head_gate_weight", "head_gate_bias")


@dataclass(frozen=True)
class Training:
    """Called with operands: the gradients; the result's own gradient is the receiver's cache, numbers of order 1.

    Attributes:
        fuse: of operands: what makes the edited cache from sharer, receiver and stacked weights.
    """

    fuse: Callable[[Operands], Callable[..., Sequence[Pair]]]

    def __call__(self, o: Operands) -> list[Tensor]:
        with torch.enable_grad():
            weights = _leaves(o)
            found = _gradients(self._fused(o, weights), weights, o)
        matrices, vectors = found[: len(MATRICES)], found[len(MATRICES) :]
        return [*matrices, torch.cat([vector.flatten() for vector in vectors])]

    def activation_mb(self, o: Operands) -> float:
        """MB of 1e6 bytes on a GPU that a step takes at its highest, beside operands, results and gradients.

        What lies there between the passes, and what the backward pass takes on top. The result's own gradient, which
        autograd may hand over in a copy, is not counted.
        """
        with torch.enable_grad():
            weights = _leaves(o)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            fused = self._fused(o, weights)
            result = sum(tensor.nbytes for tensor in fused)
            start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found = _gradients(fused, weights, o)
            torch.cuda.synchronize()
        gradients = sum(tensor.nbytes for tensor in found)
        working = torch.cuda.max_memory_allocated() - start - gradients - result
        return (max(start - before - result, 0) + max(working, 0)) / 1e6

    def _fused(self, o: Operands, weights: dict[str, Tensor]) -> list[Tensor]:
        return [tensor for pair in self.fuse(o)(o.sharer, o.receiver, weights) for tensor in pair]


def _leaves(o: Operands) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_(name != "gate_logit") for name, tensor in o.weights.items()}


def _gradients(fused: list[Tensor], weights: dict[str, Tensor], o: Operands) -> tuple[Tensor, ...]:
    given = [tensor for pair in o.receiver for tensor in pair]
    return torch.autograd.grad(fused, [weights[name] for name in MATRICES + VECTORS], given)


def saved_mb(run: Callable[[Operands], Any], o: Operands) -> float:
    """What autograd keeps from the forward to the backward pass, beside the operands, in MB of 1e6 bytes."""
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(o)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(o)
    return sum(kept.values()) / 1e6


def _tensors(o: Operands) -> list[Tensor]:
    caches = [tensor for pair in (*o.sharer_layers, *o.receiver_layers) for tensor in pair]
    return [*caches, *o.weights.values()]
