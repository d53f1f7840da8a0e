"""One call's worth of inputs to the public ops, for the tests of them."""

from __future__ import annotations

import torch

from helpers import Geometry, make_cache, make_weights
from lcf_fast.backends import Backend

BACKENDS: tuple[Backend, ...] = ("eager", "triton")
SHARER, RECEIVER = Geometry(2, 1, 32), Geometry(2, 2, 32)
LIVE = [(True, False), (False, True)]


class Inputs:
    """One call's worth of everything."""

    def __init__(self, device: torch.device, generator: torch.Generator, tokens: int = 12, batch: int = 2) -> None:
        weights = make_weights(SHARER, RECEIVER, 64, cross_context=True, device=device, generator=generator)
        weights["gate_logit"] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], device=device)
        self.weights = weights
        self.one = {name: tensor[0] for name, tensor in weights.items()}
        self.sharer = make_cache(SHARER, batch, tokens, device=device, generator=generator)
        self.receiver = make_cache(RECEIVER, batch, tokens, device=device, generator=generator)
        self.latent = torch.randn(batch, tokens, 64, generator=generator).to(device)
        self.offsets = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=device).repeat(batch, 1)
        self.queries = (self.one["span_query"], self.one["global_query"])
