"""C2C's fuser (Fu et al., "Cache-to-Cache", arXiv 2510.03215) at the same shapes, for comparison: another method.

Twice: as this package runs it, and operation by operation as its released code does (`lcf_fast.c2c.faithful`), which
shows what of the time is the method's and what its code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcf_fast import CacheGeometry
from lcf_fast.c2c import C2CConfig, C2CFuser, C2CProjector, faithful_fuse

Pair = tuple[Tensor, Tensor]


def make_fuser(
    sharer: CacheGeometry,
    receiver: CacheGeometry,
    layers: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    **widths: Any,
) -> C2CFuser:
    """A fuser of ``layers`` layers with random weights and open gates, in eval mode.

    Of the geometries only heads and head dims count. ``widths``: other than the published ones.
    """
    theirs, own = (CacheGeometry(layers, side.kv_heads, side.head_dim) for side in (sharer, receiver))
    fuser = C2CFuser(C2CConfig(theirs, own, **widths), device=device, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in fuser.named_parameters():
        if name.endswith("gate_logit"):
            parameter.fill_(1.0)
    return fuser


def fuse(fuser: C2CFuser, sharer: Sequence[Pair], receiver: Sequence[Pair]) -> list[Pair]:
    """The first layers of caches, edited: a pair a layer of the fuser. The networks alone, no checks around them."""
    found = []
    for projector, theirs, own in zip(fuser.projectors, sharer, receiver):
        assert isinstance(projector, C2CProjector)
        found.append(projector(theirs, own, live=(True, True)))
    return found


def fuse_as_released(fuser: C2CFuser, sharer: Sequence[Pair], receiver: Sequence[Pair]) -> list[Pair]:
    """The same, with all that the released code does besides."""
    layers = len(fuser.kept)
    edited: list[Pair] = faithful_fuse(fuser, list(sharer[:layers]), list(receiver[:layers]))
    return edited
