"""Tensors that say they lie on ``cuda:0`` and refuse what a GPU refuses; import as ``from elsewhere import ...``.

Their numbers are on the CPU. What they find without a GPU: tensors of two devices in one operation, ``.numpy()`` of a
GPU's tensor, generators and factories on the wrong device. What they cannot: what kernels compute there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["GPU", "Elsewhere", "a_gpu_elsewhere", "on_the_host"]

GPU = torch.device("cuda", 0)
#: What takes tensors of two devices: copies, and indices, which may lie on the host.
_COPIES = ("aten::_to_copy", "aten::copy_")
_INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl_")


class Elsewhere(Tensor):
    """``held``, a tensor on the CPU, as one on `GPU`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        # For torch's own code it is on the CPU, whose autograd needs no device; only Python is told otherwise.
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=held.device,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cpu:
            return _moved(args[0], "cpu")
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made on the GPU are `Elsewhere`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if _aside else _run(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """What torch's own code does past `_Factories`: it looks for the device, and ``torch.tensor`` copies to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _aside:
            return func(*args, **kwargs)
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        device = kwargs.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        made = func(*args, **kwargs)
        return made if device is None else _moved(made, device)


#: Not empty: within `_moved`, and within `on_the_host`.
_moving: list[bool] = []
_aside: list[bool] = []


def _moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    other = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("other")
    if other is not None:
        device, dtype = other.device, other.dtype
    else:
        kwargs.pop("copy", None)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type == x.device.type:
        with torch._C.DisableTorchFunction():
            return x if dtype is None else x.to(dtype)
    _moving.append(True)
    try:
        moved: Tensor = torch.ops.aten._to_copy.default(x, device=device, dtype=dtype)
    finally:
        _moving.pop()
    return moved


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.name()
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [x for x in given if isinstance(x, Elsewhere)]
    asked = kwargs.get("device")
    if away and not _moving:
        asked = None  # autograd asks for what it takes for the device
    to_gpu = bool(away) if asked is None else torch.device(asked).type == "cuda"
    if away and not name.startswith(_COPIES + _INDEXED):
        here = [x for x in given if not isinstance(x, Elsewhere) and x.dim()]
        if "backward" in name:  # zeros are autograd's own, for a result that nobody used
            here = [x for x in here if x.any()]
        if here:
            shapes = [tuple(x.shape) for x in here]
            raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU, the latter of {shapes}")
    if name.startswith("aten::copy_"):
        to_gpu = isinstance(args[0], Elsewhere)
    if isinstance(generator := kwargs.get("generator"), torch.Generator) and to_gpu:
        raise RuntimeError(f"{name}: a generator of {generator.device} for a tensor on cuda:0")
    inner = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
    found = func(*tree_map(_held, args), **tree_map(_held, inner))
    if not to_gpu:
        return found
    wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if away else wrapped


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x


class _Event:
    """Of no stream."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, later: Any) -> float:
        return 1.0


@contextmanager
def on_the_host() -> Iterator[None]:
    """Within the block all is as without `a_gpu_elsewhere`: for libraries with hooks of their own, as on loading."""
    _aside.append(True)
    try:
        yield
    finally:
        _aside.pop()


@contextmanager
def a_gpu_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Within the block there is one GPU, `GPU`; all tensors on it are `Elsewhere`."""
    # A parameter that moves there is another one: the data of the old one cannot become an `Elsewhere`.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)  # called as soon as a device is named
        for name in ("set_device", "synchronize"):
            patch.setattr(torch.cuda, name, lambda device=None: None)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # which optimizers ask
        patch.setattr(torch.cuda, "Event", _Event)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with _Factories(), _Moves():
                yield GPU
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
