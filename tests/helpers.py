"""What the tests share. Import as ``from helpers import ...``: pyproject.toml puts tests/ on pytest's path.

The error budget, guard bands, and makers of caches and stacked weights, random and adversarial.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
#: How a tensor lies in memory. Only the last axis always has stride 1.
Layout = Literal["contiguous", "token_major", "padded", "offset", "expanded"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
#: How a cache does: keys and values alike, or ``unlike``, keys ``padded`` and values ``token_major``.
CacheLayout = Literal[Layout, "unlike"]
CACHE_LAYOUTS: tuple[CacheLayout, ...] = get_args(CacheLayout)
#: Data that `randn` never makes.
Adversary = Literal["zeros", "all_equal", "huge_element", "large_offset", "tiny"]
ADVERSARIES: tuple[Adversary, ...] = get_args(Adversary)
#: Signs of the hard gates ``(key, value)``, repeated over the layers.
GATES: dict[str, tuple[tuple[bool, bool], ...]] = {
    "open": ((True, True),),
    "closed": ((False, False),),
    "key_only": ((True, False),),
    "value_only": ((False, True),),
    "mixed": ((True, True), (False, False), (True, False), (False, True)),
}


class GeometryLike(Protocol):
    """What `lcf_fast.CacheGeometry` and `Geometry` have in common."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Geometry(NamedTuple):
    """A cache's geometry, for tests below the adapter."""

    layers: int
    kv_heads: int
    head_dim: int


#: The pair that the paper's figures are for: Qwen2.5-0.5B informs Qwen3-0.6B.
PUBLISHED_SHARER = Geometry(24, 2, 64)
PUBLISHED_RECEIVER = Geometry(28, 8, 128)


def assert_within_budget(got: Tensor, reference64: Tensor, same_dtype: Tensor, k: float = 2.0) -> None:
    """The one numeric rule: no further from the truth than ``k`` times what plain torch is at the same dtype.

    Held at the largest error, at the root mean square, and at the median, which one huge element cannot hide;
    plus two units in the last place of the values' own largest, root mean square and median.

    Args:
        got: the result under test.
        reference64: the same in float64, by the reference.
        same_dtype: the same in plain torch, at the dtype under test.
    """
    shapes = got.shape, reference64.shape, same_dtype.shape
    assert len(set(shapes)) == 1, shapes
    assert got.dtype == same_dtype.dtype, f"{got.dtype}, plain torch gives {same_dtype.dtype}"
    assert reference64.dtype == torch.float64, reference64.dtype
    assert torch.isfinite(reference64).all(), "the reference itself is not finite"
    if got.numel() == 0:
        return
    bad = int((~torch.isfinite(got)).sum())
    assert bad == 0, f"{bad} of {got.numel()} elements are not finite"
    truth = reference64.cpu().abs().flatten()
    error = (got.cpu().double() - reference64.cpu()).abs().flatten()
    plain = (same_dtype.cpu().double() - reference64.cpu()).abs().flatten()
    measures: dict[str, Callable[[Tensor], Tensor]] = {
        "largest": torch.max,
        "rms": lambda x: x.square().mean().sqrt(),
        "median": torch.median,
    }
    for name, measure in measures.items():
        tiny = 2 * torch.finfo(got.dtype).eps * measure(truth)
        bound = k * measure(plain) + tiny
        assert measure(error) <= bound, (
            f"{name} error {measure(error):.3e} is over the budget {bound:.3e} = "
            f"{k} * {measure(plain):.3e} (plain torch) + {tiny:.1e}; values are {measure(truth):.2e}"
        )


def assert_same_rows(got: Tensor, expected: Tensor) -> None:
    """Rows that took another place in a tile: alike to the bit, but in the interpreter to rounding.

    There numpy multiplies, and some BLAS add up the last rows of a matrix in another order than the others.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-6)


def guarded(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu", *, band: int = 4096
) -> tuple[Tensor, Callable[[], None]]:
    """A tensor of NaN with ``band`` bytes of NaN before and after it, and the check that those are untouched.

    The bands hold 0xFF bytes, NaN in every float dtype: a read beyond the tensor shows in the result, a write
    fails the check, even one of another NaN.
    """
    size = prod(shape) * dtype.itemsize
    buffer = torch.full((size + 2 * band,), 0xFF, dtype=torch.uint8, device=device)
    tensor = buffer[band : band + size].view(dtype).view(list(shape))

    def check() -> None:
        for where, guard in (("before", buffer[:band]), ("after", buffer[band + size :])):
            touched = (guard != 0xFF).nonzero().flatten()
            assert len(touched) == 0, f"{len(touched)} bytes written {where}, from byte {int(touched[0])}"

    return tensor, check


def with_layout(tensor: Tensor, layout: Layout) -> Tensor:
    """``(B, H, N, D)`` with the same values, but laid out as ``layout`` says.

    ``token_major`` is ``(B, N, H, D)`` seen transposed; ``padded`` a longer preallocated buffer, as a
    StaticCache has; ``offset`` starts at an odd element, so that no vector load is aligned; ``expanded``
    repeats row 0 over the batch with stride 0 (so its VALUES are row 0's).
    """
    batch, heads, length, dim = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "token_major":
        assert heads > 1, "of one head that is how it lies anyway"
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        buffer = tensor.new_full((batch, heads, length + 5, dim), torch.nan)
        buffer[:, :, :length] = tensor
        return buffer[:, :, :length]
    if layout == "offset":
        flat = tensor.new_full((tensor.numel() + 1,), torch.nan)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    return tensor[:1].contiguous().expand(batch, -1, -1, -1)


def adversarial(tensor: Tensor, kind: Adversary) -> Tensor:
    """A tensor like ``tensor`` that holds what `randn` never gives."""
    if kind == "zeros":
        return torch.zeros_like(tensor)
    if kind == "all_equal":
        return torch.full_like(tensor, 0.37)
    if kind == "large_offset":
        return tensor + 40.0  # the mean is forty deviations off: cancellation in every sum
    if kind == "tiny":
        return tensor * 2e-4
    result = tensor.clone()
    if result.numel():
        result.view(-1)[result.numel() // 3] = 300.0
    return result


def make_cache(
    geometry: GeometryLike,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: CacheLayout = "contiguous",
    adversary: Adversary | None = None,
    generator: torch.Generator | None = None,
) -> list[Pair]:
    """One ``(key, value)`` a layer, each ``(B, H, N, D)``; drawn on the CPU, so the same on every device."""
    of_keys: Layout = "padded" if layout == "unlike" else layout
    of_values: Layout = "token_major" if layout == "unlike" else layout

    def draw(of: Layout) -> Tensor:
        values = torch.randn(batch, geometry.kv_heads, length, geometry.head_dim, generator=generator)
        if adversary is not None:
            values = adversarial(values, adversary)
        return with_layout(values.to(device, dtype), of)

    return [(draw(of_keys), draw(of_values)) for _ in range(geometry.layers)]


def make_weights(
    sharer: GeometryLike,
    receiver: GeometryLike,
    bottleneck: int,
    *,
    layers: int | None = None,
    blocks: int = 2,
    expansion: int = 4,
    cross_context: bool = False,
    gates: str = "open",
    saturated: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """An adapter's stacked parameters, by their public names and shapes; activations come out of order 1.

    Args:
        layers: kept layers; the receiver's number if not given.
        gates: a key of `GATES`.
        saturated: per-head gates at sigmoid(+-60), that is 0 or 1.
    """
    kept = receiver.layers if layers is None else layers
    sharer_channels = sharer.kv_heads * sharer.head_dim
    channels = receiver.kv_heads * receiver.head_dim
    fan_in = 2 * sharer_channels + 2 * channels
    wide = expansion * bottleneck

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(kept, *shape, generator=generator) * scale

    weights = {
        "down_weight": draw(bottleneck, fan_in, scale=fan_in**-0.5),
        "down_bias": draw(bottleneck, scale=0.1),
        "norm_weight": 1.0 + draw(blocks, bottleneck, scale=0.1),
        "ffn_in_weight": draw(blocks, wide, bottleneck, scale=bottleneck**-0.5),
        "ffn_out_weight": draw(blocks, bottleneck, wide, scale=wide**-0.5),
        "up_weight": draw(2, channels, bottleneck // 2, scale=(bottleneck / 2) ** -0.5),
        "up_bias": draw(2, channels, scale=0.1),
        "head_gate_weight": draw(2, receiver.kv_heads, bottleneck, scale=bottleneck**-0.5),
        "head_gate_bias": draw(2, receiver.kv_heads, scale=0.5),
    }
    if saturated:
        weights["head_gate_bias"] = 60.0 * torch.sign(weights["head_gate_bias"])
    signs = [GATES[gates][layer % len(GATES[gates])] for layer in range(kept)]
    closed = (0.0, -0.5)  # zero is closed, too
    weights["gate_logit"] = torch.tensor([[0.5 if is_open else low for is_open, low in zip(p, closed)] for p in signs])
    if cross_context:
        weights["span_query"] = draw(sharer.kv_heads, sharer.head_dim, scale=1.0)
        weights["global_query"] = draw(sharer.kv_heads, sharer.head_dim, scale=1.0)
    return {name: tensor.to(device, dtype) for name, tensor in weights.items()}


def make_slot_weights(
    sharer: GeometryLike,
    receiver: GeometryLike,
    bottleneck: int,
    slots: int,
    *,
    blocks: int = 2,
    expansion: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """A slots adapter's stacked parameters, by their public names and shapes; activations come out of order 1."""
    layers, wide = receiver.layers, expansion * bottleneck
    fan_in, channels = 2 * sharer.kv_heads * sharer.head_dim, receiver.kv_heads * receiver.head_dim

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(layers, *shape, generator=generator) * scale

    weights = {
        "slot_query": draw(slots, sharer.kv_heads, sharer.head_dim, scale=1.0),
        "slot_embedding": draw(slots, bottleneck, scale=0.5),
        "down_weight": draw(bottleneck, fan_in, scale=fan_in**-0.5),
        "down_bias": draw(bottleneck, scale=0.1),
        "norm_weight": 1.0 + draw(blocks, bottleneck, scale=0.1),
        "ffn_in_weight": draw(blocks, wide, bottleneck, scale=bottleneck**-0.5),
        "ffn_out_weight": draw(blocks, bottleneck, wide, scale=wide**-0.5),
        "up_weight": draw(2, channels, bottleneck, scale=bottleneck**-0.5),
        "up_bias": draw(2, channels, scale=0.1),
    }
    return {name: tensor.to(device, dtype) for name, tensor in weights.items()}


def beyond_int32(shape: tuple[int, int, int, int], axis: int, device: torch.device | str = "cpu") -> Tensor:
    """A float16 ``(B, H, N, D)`` whose steps along ``axis`` are 2^30 elements apart: the last lies beyond 2^31.

    Returns uninitialised memory. On the CPU it is promised, not taken: only the pages in use cost any.
    """
    assert shape[axis] == 3, "two steps of 2^30 reach 2^31"
    strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1]
    strides[axis] = 2**30
    elements = 2**31 + sum((size - 1) * step for i, (size, step) in enumerate(zip(shape, strides)) if i != axis) + 1
    if torch.device(device).type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        buffer = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)
    else:
        buffer = torch.empty(elements, dtype=torch.float16, device=device)
    return buffer.as_strided(shape, strides)


def rows_beyond_int32(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """`beyond_int32` of one head, ``(1, 1, rows, 64)``: only the last row begins 2^31 elements on, or barely more."""
    step = -(-(2**31) // (rows - 1))
    return beyond_int32((1, 2, 3, 64), 2, device).as_strided((1, 1, rows, 64), (64, 64, step, 1))


def to_double(pairs: Sequence[Pair]) -> list[Pair]:
    """The cache in float64: the exact values that the tested dtype holds."""
    return [(key.double(), value.double()) for key, value in pairs]
