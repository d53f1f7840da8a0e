"""C2C's fuser (Fu et al., "Cache-to-Cache", arXiv 2510.03215), one receiver layer, for comparison at the same shapes.

Written from the paper's description, for inference: no analysis copies, no promotion to float32, no clones. So it
shows the method's cost, not that of its released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcf_fast import CacheGeometry

Pair = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Residual, pre-norm, two bias-free linears around an exact GELU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.w2(F.gelu(self.w1(self.norm(h))))


class Half(nn.Module):
    """The network of the keys, or that of the values."""

    def __init__(self, sharer: CacheGeometry, receiver: CacheGeometry, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.receiver = receiver
        self.project = nn.Linear(sharer.channels + receiver.channels, hidden)
        self.shared = Block(hidden, intermediate)
        self.weight_block, self.weight_head = Block(hidden, hidden), nn.Linear(hidden, receiver.kv_heads)
        self.update_block, self.update_out = Block(hidden, intermediate), nn.Linear(hidden, receiver.channels)
        self.gate_logit = nn.Parameter(torch.ones(()))

    def forward(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        """``(B, Hs, N, Ds)`` and ``(B, Hr, N, Dr)`` to the edited receiver's ``(B, Hr, N, Dr)``."""
        joined = torch.cat([sharer.transpose(1, 2).flatten(2), receiver.transpose(1, 2).flatten(2)], -1)
        h = self.shared(self.project(joined))
        weight = self.weight_head(self.weight_block(h)).sigmoid().transpose(1, 2)[..., None]
        update = self.update_out(self.update_block(h))
        update = update.unflatten(-1, (self.receiver.kv_heads, self.receiver.head_dim)).transpose(1, 2)
        return receiver + (self.gate_logit > 0) * weight * update


class C2CFuser(nn.Module):
    """One receiver layer: 17,066,002 parameters for Qwen2.5-0.5B -> Qwen3-0.6B."""

    def __init__(
        self, sharer: CacheGeometry, receiver: CacheGeometry, *, hidden: int = 1024, intermediate: int = 1024
    ) -> None:
        super().__init__()
        self.key = Half(sharer, receiver, hidden, intermediate)
        self.value = Half(sharer, receiver, hidden, intermediate)

    def forward(self, sharer: Pair, receiver: Pair) -> Pair:
        return self.key(sharer[0], receiver[0]), self.value(sharer[1], receiver[1])


def make_fusers(
    sharer: CacheGeometry, receiver: CacheGeometry, layers: int, *, device: torch.device, dtype: torch.dtype
) -> list[C2CFuser]:
    """``layers`` fusers with random weights."""
    with torch.device(device):
        fusers = [C2CFuser(sharer, receiver) for _ in range(layers)]
    return [fuser.to(dtype).eval().requires_grad_(False) for fuser in fusers]
