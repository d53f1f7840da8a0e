"""What a result holds for, and how busy the machine was. No paths and no host names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lcf_fast import machine

from . import ROOT


def about(device: torch.device) -> dict[str, Any]:
    """Commit, device and versions: plain JSON."""
    return machine.about(device, ROOT)


def scheduled_ns() -> tuple[int, int] | None:
    """Nanoseconds that this thread has run, and that it has waited for a core; None where Linux does not say."""
    try:
        ran, waited, _ = Path("/proc/self/schedstat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(ran), int(waited)


def waited_share(start: tuple[int, int] | None) -> float | None:
    """Since ``start``, of the time that this thread wanted a core: how much it waited for one, behind other work."""
    now = scheduled_ns()
    if start is None or now is None:
        return None
    ran, waited = now[0] - start[0], now[1] - start[1]
    return round(waited / max(ran + waited, 1), 3)


def slug(info: dict[str, Any]) -> str:
    """A file name for the device: ``cpu``, or the GPU's name in lower case."""
    if info["device_type"] != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", str(info["device"]).lower()).strip("-")
