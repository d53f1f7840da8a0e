"""Out of `torch.autocast`: the ops say which dtype each product runs in, and a caller's autocast does not change it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["without_autocast"]

P = ParamSpec("P")
R = TypeVar("R")

#: Where torch may be asked to cast.
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def without_autocast(run: Callable[P, R]) -> Callable[P, R]:
    """A function that runs in the dtypes of its own code, whatever autocast it is called under.

    For what multiplies by torch's operators: kernels, and products into given memory, are no concern of autocast's.
    """

    @wraps(run)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return exact(*args, **kwargs)
        return run(*args, **kwargs)

    return exact
