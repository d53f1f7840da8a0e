"""How a message's tensors are stored: as floats, or as int8 or fp8 numbers with float32 scales.

Quantisation is symmetric: ``value = stored * scale``, one scale for all that one layer sends for one item (and for
keys and values apart, where both are sent; and for each slot), the smallest that lets the largest magnitude through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import DTypeError, MessageError

__all__ = ["STORAGES", "Storage", "all_finite", "restore", "storage_of", "store"]


@dataclass(frozen=True)
class Storage:
    """One way to store numbers.

    Attributes:
        name: as callers and messages have it.
        dtype: of the stored tensor.
        code: the name that safetensors has for the dtype.
        top: the largest magnitude of a quantised number; 0 where there is no scale.
    """

    name: str
    dtype: torch.dtype
    code: str
    top: float = 0.0


#: By name. fp8 is the form with four exponent bits and no infinities, whose largest number is 448.
STORAGES = {
    storage.name: storage
    for storage in (
        Storage("float64", torch.float64, "F64"),
        Storage("float32", torch.float32, "F32"),
        Storage("bfloat16", torch.bfloat16, "BF16"),
        Storage("float16", torch.float16, "F16"),
        Storage("int8", torch.int8, "I8", top=127.0),
        Storage("fp8", torch.float8_e4m3fn, "F8_E4M3", top=448.0),
    )
}
_BY_DTYPE = {storage.dtype: storage for storage in STORAGES.values()}


def storage_of(dtype: Any) -> Storage:
    """The storage that a name or a torch dtype means; a DTypeError lists the names."""
    found = STORAGES.get(dtype) if isinstance(dtype, str) else None
    if isinstance(dtype, torch.dtype):
        found = _BY_DTYPE.get(dtype)
    if found is None:
        raise DTypeError("dtype", expected=f"None, or one of {', '.join(STORAGES)}", got=repr(dtype))
    return found


def all_finite(tensor: Tensor) -> bool:
    """Whether no element of a float tensor is NaN or infinite; makes no second tensor of its size."""
    if tensor.dtype == torch.float8_e4m3fn:  # of which only two bit patterns are no numbers, both NaN
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    smallest, largest = tensor.aminmax()  # a NaN is both of them
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))


def store(name: str, tensor: Tensor, storage: Storage, axes: int) -> tuple[Tensor, Tensor | None]:
    """``tensor`` as ``storage`` has it, and the scales, of the shape of its first ``axes`` axes (None: not quantised).

    Args:
        name: of the tensor, for the error.
        tensor: of a float dtype, any shape and strides, on any device; the results lie contiguous on the CPU.

    Raises:
        MessageError: it holds NaN or infinity, or numbers beyond what ``storage`` can hold.
    """
    tensor = tensor.detach().cpu()
    if not all_finite(tensor):
        raise MessageError(name, expected="finite numbers", got="NaN or infinity")
    if not storage.top:
        stored, scale = tensor.to(storage.dtype).contiguous(), None
        fits = all_finite(stored)
    else:
        values = tensor.double().flatten(axes)
        peak = values.abs().amax(-1)
        scale = _scales(peak, storage.top)
        # A row of zeros has the scale zero, and stays zero over any divisor.
        steps = values / scale.double().masked_fill(scale == 0, 1.0).unsqueeze(-1)
        steps = (steps.round() if storage.dtype == torch.int8 else steps).clamp(-storage.top, storage.top)
        stored = steps.float().to(storage.dtype).view(tensor.shape)
        fits = all_finite(scale)
    if not fits:
        got = f"magnitudes up to {float(tensor.abs().amax()):.4g}"
        raise MessageError(name, expected=f"numbers that {storage.name} can hold", got=got)
    return stored, scale


def _scales(peak: Tensor, top: float) -> Tensor:
    """float32 scales for rows of largest magnitude ``peak`` (float64); infinite where float32 cannot hold ``peak``."""
    scale = (peak / top).float()
    # Subnormal scales are so coarse that one rounded down would cut the peak off.
    cuts = (scale.double() * top < peak) & (scale < torch.finfo(torch.float32).tiny)
    scale = torch.where(cuts, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    # One rounded up at the far end would restore the peak as infinity.
    over = (scale * top).isinf() & (peak <= torch.finfo(torch.float32).max)
    scale = torch.where(over, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    return scale.masked_fill(peak > torch.finfo(torch.float32).max, torch.inf)


def restore(name: str, stored: Tensor, scale: Tensor | None) -> Tensor:
    """What :func:`store` took: ``stored`` itself, or float32 of the stored numbers times their scales.

    Raises:
        MessageError: NaN, infinity, or a number that the storage does not use; a negative scale.
    """
    if stored.dtype == torch.int8:
        if int(stored.amin()) < -127:
            raise MessageError(name, expected="int8 numbers in [-127, 127]", got="-128")
    elif not all_finite(stored):
        raise MessageError(name, expected="finite numbers", got="NaN or infinity")
    if scale is None:
        return stored
    if not all_finite(scale) or float(scale.amin()) < 0:
        raise MessageError(f"{name}_scale", expected="finite scales of at least 0", got="others")
    values = stored.float().mul_(scale.view(*scale.shape, *[1] * (stored.dim() - scale.dim())))
    if not all_finite(values):
        raise MessageError(name, expected="numbers that float32 can hold", got="infinity once scaled")
    return values
