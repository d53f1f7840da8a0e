"""The device that a command runs on, by the name that it is given."""

from __future__ import annotations

import os

import torch

from .errors import DeviceError

__all__ = ["chosen_device"]


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, a GPU with its index; None: a GPU if there is one, else the CPU.

    "cuda" alone is the GPU of this process: under ``torchrun`` that of its local rank, else the first.

    Raises:
        DeviceError: no such device here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        raise DeviceError("--device", expected="a name such as cpu or cuda:0", got=repr(name)) from None
    if device.type != "cuda":
        try:
            torch.zeros((), device=device).item()
        except (RuntimeError, AssertionError, ImportError):  # as torch says what it was built without
            raise DeviceError("--device", expected="a device that this machine has", got=repr(name)) from None
        return device
    if not gpus:
        raise DeviceError("--device", expected="cpu, as there is no CUDA GPU here", got=repr(name))
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= gpus:
        there = "cuda:0, the only one" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise DeviceError("--device", expected=f"a GPU that is there: {there}", got=f"cuda:{index}")
    return torch.device("cuda", index)
