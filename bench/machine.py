"""What a result holds for: commit, device and versions. No paths and no host names."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import ROOT


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The CPU's model, as the kernel names it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(.+)$", text, re.MULTILINE)
    model = re.search(r"^model\s*:\s*(.+)$", text, re.MULTILINE)
    if found is None:
        return platform.processor() or platform.machine()
    name = found.group(1).strip()
    if re.search(r"\d", name) is None and family and model:  # virtual machines hide the number
        name += f" (family {family.group(1)}, model {model.group(1)})"
    return name


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


def about(device: torch.device) -> dict[str, Any]:
    """Plain JSON."""
    on_gpu = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if on_gpu else ""
    return {
        "commit": _output("git", "rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "device_type": device.type,
        "driver": driver or None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "flash_attn": _version("flash-attn"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def slug(info: dict[str, Any]) -> str:
    """A file name for the device: ``cpu``, or the GPU's name in lower case."""
    if info["device_type"] != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", str(info["device"]).lower()).strip("-")
