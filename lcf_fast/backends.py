"""Which implementation serves a call: Triton kernels, or the eager path.

``auto`` takes Triton for CUDA tensors and eager for the rest. An explicit choice that cannot be served raises; an
automatic one that falls back says why, once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from .errors import BackendError

Backend = Literal["auto", "triton", "eager"]
_NAMES = get_args(Backend)
_chosen: ContextVar[str | None] = ContextVar("lcf_fast_backend", default=None)

#: Dtypes and bottleneck widths that the kernels are compiled and tested for.
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_WIDTHS = (64, 128, 256, 512)


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the back end inside a ``with`` block; it wins over the environment variable ``LCF_FAST_BACKEND``.

    Args:
        name: ``"auto"``, ``"triton"`` or ``"eager"``.

    Raises:
        BackendError: the name is none of these.
    """
    token = _chosen.set(_checked(name, "name"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _checked(name: str, argument: str) -> str:
    if name not in _NAMES:
        raise BackendError(argument, expected=f"one of {', '.join(_NAMES)}", got=repr(name))
    return name


def current_backend() -> str:
    """The back end asked for: by `use_backend`, else by ``LCF_FAST_BACKEND``, else ``auto``."""
    return _chosen.get() or _checked(os.environ.get("LCF_FAST_BACKEND", "auto"), "LCF_FAST_BACKEND")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _obstacle(device: torch.device, dtype: torch.dtype, width: int | None, hidden: int | None) -> str | None:
    """Why the kernels can not serve these tensors; ``None`` if they can."""
    if not _has_triton():
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"tensors on {device.type} (CPU tensors are served under TRITON_INTERPRET=1 only)"
    if dtype not in TRITON_DTYPES:
        return f"dtype {dtype}"
    if width is not None and width not in TRITON_WIDTHS:
        return f"bottleneck {width}, not one of {TRITON_WIDTHS}"
    if hidden is not None and (hidden == 0 or hidden % 16):
        return f"{hidden} hidden units in the FFN, not a multiple of 16"
    return None


@lru_cache(maxsize=64)
def _say_once(obstacle: str) -> None:
    warnings.warn(f"lcf_fast falls back to its eager path: {obstacle}", RuntimeWarning, stacklevel=4)


def resolve(
    device: torch.device, dtype: torch.dtype, width: int | None = None, hidden: int | None = None
) -> Literal["triton", "eager"]:
    """The back end that serves caches of ``dtype`` on ``device``, with bottleneck ``width`` and an FFN of ``hidden``.

    Raises:
        BackendError: Triton was asked for by name and cannot serve.
    """
    name = current_backend()
    if name == "eager" or (name == "auto" and device.type != "cuda"):
        return "eager"
    obstacle = _obstacle(device, dtype, width, hidden)
    if obstacle is None:
        return "triton"
    if name == "triton":
        raise BackendError("backend", expected="tensors that the Triton kernels serve", got=obstacle)
    _say_once(obstacle)
    return "eager"
