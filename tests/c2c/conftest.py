"""Small fusers with gates of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lcf_fast import CacheGeometry
from lcf_fast.c2c import C2CConfig, C2CFuser

SHARER, RECEIVER = CacheGeometry(3, 2, 4), CacheGeometry(5, 3, 6)
#: By receiver layer, key and value: open, shut, half open; a logit of exactly 0 is shut.
LOGITS = ((0.5, 0.1), (-0.2, 0.0), (2.0, 1.0), (-1.0, 0.7), (0.3, -0.3))

MakeFuser = Callable[..., C2CFuser]


@pytest.fixture
def make_fuser() -> MakeFuser:
    """``make_fuser(logits=..., keep=..., dtype=..., device=..., **fields)``: in eval mode, without gradients."""

    def make(
        logits: Sequence[tuple[float, float]] = LOGITS,
        keep: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        **fields: Any,
    ) -> C2CFuser:
        torch.manual_seed(3)
        sizes: dict[str, Any] = {"sharer": SHARER, "receiver": RECEIVER, "hidden": 16, "intermediate": 10, **fields}
        fuser = C2CFuser(C2CConfig(**sizes), keep_layers=keep)
        with torch.no_grad():
            for t, projector in zip(fuser.kept, fuser.projectors):
                for side, logit in zip(("key", "value"), logits[t]):
                    projector.get_parameter(f"{side}_gate_logit").fill_(logit)
                for name, parameter in projector.named_parameters():
                    if name.endswith("norm.weight"):
                        parameter.uniform_(0.5, 1.5)
                    elif "gate_logit" not in name:
                        parameter.mul_(2.0)  # so that the branches are not near linear
        return fuser.to(device=device, dtype=dtype).requires_grad_(False).eval()

    return make
