"""Two models and what lies between them, from the folders or hub ids that a command is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..c2c.fuser import C2CFuser
from ..channels.agent import Agent
from ..checkpoint import load_adapter
from ..training.models import load_config, load_model, load_tokenizer

__all__ = ["load_adapters", "load_agents", "load_fuser"]


def load_agents(
    sharer: str,
    receiver: str,
    precision: str,
    device: torch.device,
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, Agent]:
    """``"receiver"`` and ``"sharer"``; of one name on both sides they are one model. Raises as `load_model` does."""
    names = {"receiver": receiver, "sharer": sharer}
    tokenizers = {role: load_tokenizer(role, name) for role, name in names.items()}
    load_config("sharer", sharer)  # what is no language model is refused before the receiver's weights are read
    models = {
        role: load_model(role, name, precision).to(device)
        for role, name in names.items()
        if role == "receiver" or sharer != receiver
    }
    return {
        role: Agent(role, models.get(role, models["receiver"]), tokenizers[role], template_options=template_options)
        for role in names
    }


def load_adapters(
    folders: Sequence[Path], models: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None = None
) -> list[Any]:
    """Adapters of any kind for ``models`` (or configs), by role. Raises as their ``from_pretrained`` does."""
    return [load_adapter(folder, device=device, dtype=dtype, **models) for folder in folders]


def load_fuser(
    folder: Path, models: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None = None
) -> C2CFuser:
    """A fuser of C2C for ``models`` (or configs), by role, in eval mode. Raises as `C2CFuser.from_pretrained` does."""
    return C2CFuser.from_pretrained(folder, device=device, dtype=dtype, **models).eval()
