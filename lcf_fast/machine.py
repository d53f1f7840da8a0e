"""What a figure holds for: commit, device and versions. No paths and no host names."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["about", "cpu_name"]


def about(device: torch.device, checkout: Path | None = None) -> dict[str, Any]:
    """Plain JSON. Of a copy without its repository, on a GPU's machine, ``LCF_FAST_COMMIT`` names the commit.

    Args:
        checkout: the repository whose commit it is; None: the one that this package lies in, if it lies in one.
    """
    on_gpu = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if on_gpu else ""
    root = Path(__file__).resolve().parents[1] if checkout is None else checkout
    # An installed package may lie within somebody else's repository.
    git = ("git", "-C", str(root)) if (root / ".git").exists() else ()
    return {
        "commit": (_output(*git, "rev-parse", "HEAD") if git else "") or os.environ.get("LCF_FAST_COMMIT") or None,
        "uncommitted_changes": bool(git and _output(*git, "status", "--porcelain", "--untracked-files=no")),
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


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
