"""What is refused, before anything is launched or written.

Shapes, dtypes and devices are always checked. VALUES (``sharer_index``, ``span_offsets``) are checked when they lie
on the CPU; reading them off a GPU would stall it, so there they are checked only with ``LCF_FAST_CHECK=1``. The kernels
are memory-safe without: a row out of range counts as "none", an offset is clamped to the sequence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import DeviceError, DTypeError, GeometryError, IndexRangeError, ShapeError, SpanError
from .layouts import KnownLayouts, Layers, Layout, has_own_elements
from .noise import TrainingNoise
from .overlaps import first_met, first_shared

Pair = tuple[Tensor, Tensor]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def describe(value: object) -> str:
    """What came, for an error's text."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None), tuple)) else type(value).__name__


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise DTypeError(name, expected="a torch.Tensor", got=describe(value))
    if value.layout is not torch.strided:
        raise DTypeError(name, expected="a dense tensor", got=str(value.layout).removeprefix("torch."))
    return value


def check_dtype(dtype: object) -> None:
    """What parameters are to be cast to; None: nothing else."""
    if dtype is not None and dtype not in FLOATS:
        raise DTypeError("dtype", expected="a float dtype of torch, or None", got=repr(dtype)[:80])


def check_has_memory(name: str, tensor: Tensor) -> None:
    """The ops compute: a meta tensor, which has no memory, would end in an error of torch's own."""
    if tensor.device.type == "meta":
        raise DeviceError(name, expected="a device with memory", got="meta")


def check_pair(key: object, value: object, names: tuple[str, str]) -> None:
    """One layer's cache: two ``(B, H, N, D)`` float tensors, alike."""
    key, value = check_tensor(names[0], key), check_tensor(names[1], value)
    if key.dim() != 4:
        raise ShapeError(names[0], expected="(B, H, N, D)", got=describe(key))
    if key.dtype not in FLOATS:
        raise DTypeError(names[0], expected="float64, float32, float16 or bfloat16", got=describe(key))
    if key.shape[1] == 0 or key.shape[3] == 0:
        raise ShapeError(names[0], expected="at least one head and one channel", got=describe(key))
    if value.shape != key.shape:
        raise ShapeError(names[1], expected=f"{tuple(key.shape)}, as {names[0]}", got=describe(value))
    if value.dtype != key.dtype:
        raise DTypeError(names[1], expected=f"{key.dtype}, as {names[0]}", got=str(value.dtype))
    if value.device != key.device:
        raise DeviceError(names[1], expected=f"{key.device}, as {names[0]}", got=str(value.device))
    check_has_memory(names[0], key)


def check_layers(name: str, layers: object, count: int, like: Tensor | None = None) -> None:
    """``count`` pairs that agree in shape, dtype and device; ``like`` gives batch and device if given."""
    if not isinstance(layers, Sequence) or len(layers) != count:
        got = f"{len(layers)} pairs" if isinstance(layers, Sequence) else describe(layers)
        raise GeometryError(name, expected=f"a (key, value) pair for each of {count} layers", got=got)
    first: Tensor | None = None
    for i, pair in enumerate(layers):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ShapeError(f"{name}[{i}]", expected="a (key, value) pair", got=describe(pair))
        key, value = pair
        if first is None:
            check_pair(key, value, (f"{name}[{i}].key", f"{name}[{i}].value"))
            first, shape, dtype, device = key, key.shape, key.dtype, key.device
            continue
        for part, tensor in (("key", key), ("value", value)):
            where = f"{name}[{i}].{part}"
            if not isinstance(tensor, Tensor) or tensor.shape != shape:
                raise ShapeError(where, expected=f"{tuple(shape)}, as layer 0", got=describe(tensor))
            if tensor.dtype != dtype:
                raise DTypeError(where, expected=f"{dtype}, as layer 0", got=str(tensor.dtype))
            if tensor.device != device:
                raise DeviceError(where, expected=f"{device}, as layer 0", got=str(tensor.device))
    if like is not None and first is not None:
        check_same_batch(name, first, like)


_known_layers: KnownLayouts[Layout] = KnownLayouts(only_again=True)


def flat_layers(
    name: str, layers: Any, count: int, like: Tensor | None = None
) -> tuple[list[Tensor], Layout | None]:
    """`check_layers`, by one look at layers like those that passed before.

    Returns:
        ``[k0, v0, k1, v1, ...]``, and their layout; that is None while tracing.
    """
    if torch.compiler.is_compiling():
        check_layers(name, layers, count, like)
        return [tensor for pair in layers for tensor in pair], None
    flat, different, places = _flattened(layers, count)
    layout = _known_layers.find(different, places)
    if layout is None:
        if not _are_alike(different):
            check_layers(name, layers, count)
        flat = [tensor for pair in layers for tensor in pair]
        if flat:
            layout = Layout.of(flat)
            if different:
                _known_layers.remember(layout, different, places)
    if like is not None and flat:
        check_same_batch(name, flat[0], like)
    return flat, layout


def _are_alike(tensors: list[Any]) -> bool:
    """Whether `check_layers` would pass, by a few looks at all tensors; False too where it must say what is wrong."""
    if not tensors or {*map(type, tensors)} != {Tensor} or len({tensor.shape for tensor in tensors}) > 1:
        return False
    first = tensors[0]
    is_cache = first.dim() == 4 and first.shape[1] > 0 and first.shape[3] > 0 and first.dtype in FLOATS
    is_cache = is_cache and first.device.type != "meta" and {t.layout for t in tensors} == {torch.strided}
    return is_cache and {t.dtype for t in tensors} == {first.dtype} and {t.device for t in tensors} == {first.device}


def _flattened(layers: Any, count: int) -> tuple[list[Any], list[Any], tuple[int, ...] | None]:
    """The tensors of ``count`` pairs; those of each pair once, where layers read the same pair; and which pair a layer
    reads, None where each reads its own. Of what is anything else than pairs, nothing."""
    is_list = type(layers) in (list, tuple) and len(layers) == count and {*map(type, layers)} <= {tuple, list}
    if not is_list or {*map(len, layers)} != {2}:
        return [], [], None
    flat = [*chain.from_iterable(layers)]
    different = dict(zip(map(id, layers), layers))
    if len(different) == count:
        return flat, flat, None
    number = dict(zip(different, range(count))).__getitem__
    return flat, [*chain.from_iterable(different.values())], tuple(map(number, map(id, layers)))


def check_same_batch(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise DeviceError(name, expected=f"{like.device}, as the receiver's cache", got=str(tensor.device))
    if tensor.shape[0] != like.shape[0]:
        raise ShapeError(name, expected=f"batch size {like.shape[0]}, as the receiver's cache", got=describe(tensor))


def check_writable(name: str, tensor: Tensor) -> None:
    """An in-place edit needs every element to have memory of its own and rows with stride 1."""
    if not has_own_elements(tensor.shape, tensor.stride()):
        raise ShapeError(name, expected="memory of its own for every element", got=f"strides {tensor.stride()}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ShapeError(name, expected="stride 1 along the head dim", got=f"strides {tensor.stride()}")


def side_name(name: str, i: int) -> str:
    """Entry ``i`` of layers ``[k0, v0, k1, v1, ...]``."""
    return f"{name}[{i // 2}].{('key', 'value')[i % 2]}"


def check_apart(name: str, layers: Layers) -> None:
    """An in-place edit needs each of the tensors ``[k0, v0, k1, v1, ...]`` in memory of its own."""
    shared = first_shared(layers)
    if shared is not None:
        first, second = (side_name(name, i) for i in shared)
        raise ShapeError(second, expected="memory of its own", got=f"that of {first}")


def check_sides_apart(sharer: Layers, receiver: Layers) -> None:
    """Whose layers are edited in no order, no tensor of the other side may lie in their memory, its own or another."""
    met = first_met(receiver, sharer)
    if met is not None:
        expected = "memory apart from the receiver's, which is edited in place (only out of place may they share it)"
        got = f"that of {side_name('receiver', met[1])}"
        raise GeometryError(side_name("sharer", met[0]), expected=expected, got=got)


def plain_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """A module's own dictionary: building one a call would cost more host time than the checks.

    Of a parametrized weight it lacks what a call would make, and by which no message could be known.
    """
    if "parametrizations" in module._modules:
        names = ", ".join(cast("nn.ModuleDict", module._modules["parametrizations"]))
        expected = "parameters of its own (torch.nn.utils.parametrize is not served)"
        raise GeometryError("adapter", expected=expected, got=f"a parametrized {names}")
    return cast("Mapping[str, Tensor]", module._parameters)


def find_weight(weights: object, name: str) -> Tensor:
    """A parameter by its name, of whatever shape."""
    if type(weights) is not dict and not isinstance(weights, (Mapping, nn.ParameterDict)):
        raise DTypeError("weights", expected="a mapping of names to tensors", got=describe(weights))
    if name not in weights:
        got = f"only {', '.join(sorted(map(str, weights)))}"[:200] if len(weights) else "none"
        raise GeometryError(f"weights[{name!r}]", expected="a tensor", got=got)
    weight = weights[name]
    # Asked first: a name that is put together for nothing costs more than the look.
    is_dense = isinstance(weight, Tensor) and weight.layout is torch.strided
    return weight if is_dense else check_tensor(f"weights[{name!r}]", weight)


def check_weight(
    weights: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], device: torch.device
) -> Tensor:
    """One parameter; ``None`` in ``shape`` is any size."""
    weight = find_weight(weights, name)
    if weight.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, weight.shape)):
        wanted = "(" + ", ".join("*" if n is None else str(n) for n in shape) + ")"
        raise ShapeError(f"weights[{name!r}]", expected=wanted, got=describe(weight))
    if weight.dtype not in FLOATS:
        raise DTypeError(f"weights[{name!r}]", expected="a float dtype", got=str(weight.dtype))
    if weight.device != device:
        raise DeviceError(f"weights[{name!r}]", expected=f"{device}, as the caches", got=str(weight.device))
    return weight


def check_projection_weights(
    weights: Mapping[str, Tensor], stack: tuple[int, ...], columns: int, device: torch.device, exact: bool
) -> int:
    """Down projection and FFN; returns the width d. ``columns`` is 2Cs + 2Cr, or with ``exact`` false a lower bound."""
    down = check_weight(weights, "down_weight", (*stack, None, columns if exact else None), device)
    width = down.shape[-2]
    if width < 2 or width % 2:
        raise ShapeError("weights['down_weight']", expected="an even width d", got=describe(down))
    if not exact and (down.shape[-1] <= columns or down.shape[-1] % 2):
        expected = f"2Cs + {columns} columns, for a receiver of {columns // 2} channels"
        raise ShapeError("weights['down_weight']", expected=expected, got=describe(down))
    check_weight(weights, "down_bias", (*stack, width), device)
    blocks = check_weight(weights, "norm_weight", (*stack, None, width), device).shape[-2]
    hidden = check_weight(weights, "ffn_in_weight", (*stack, blocks, None, width), device).shape[-2]
    check_weight(weights, "ffn_out_weight", (*stack, blocks, width, hidden), device)
    return width


def check_injection_weights(
    weights: Mapping[str, Tensor], stack: tuple[int, ...], width: int, heads: int, head_dim: int, device: torch.device
) -> None:
    channels = heads * head_dim
    check_weight(weights, "up_weight", (*stack, 2, channels, width // 2), device)
    check_weight(weights, "up_bias", (*stack, 2, channels), device)
    check_weight(weights, "head_gate_weight", (*stack, 2, heads, width), device)
    check_weight(weights, "head_gate_bias", (*stack, 2, heads), device)
    check_weight(weights, "gate_logit", (*stack, 2), device)


_known_weights: KnownLayouts[tuple[int, int]] = KnownLayouts(16)


def check_weights(
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    stack: tuple[int, ...],
    columns: int,
    heads: int,
    head_dim: int,
    device: torch.device,
    exact: bool,
) -> tuple[list[Tensor], int, int]:
    """`check_projection_weights` and `check_injection_weights`, by one look at weights like those that passed before.

    Returns:
        The parameters of these names, the width d, and the FFN's hidden units.
    """
    context = (stack, columns, heads, head_dim, device, exact)
    is_traced = torch.compiler.is_compiling()
    parameters: list[Any] = [] if is_traced else [weights.get(name) for name in names]
    sizes = None if is_traced else _known_weights.find(parameters, *context)
    if sizes is None:
        width = check_projection_weights(weights, stack, columns, device, exact)
        check_injection_weights(weights, stack, width, heads, head_dim, device)
        parameters = [weights[name] for name in names]
        sizes = width, weights["ffn_in_weight"].shape[-2]
        if not is_traced:
            _known_weights.remember(sizes, parameters, *context)
    return parameters, *sizes


def check_state_numbers(states: Tensor, stats: Tensor) -> None:
    """What a piece of a context has been pooled to: in one dtype, in one place."""
    for name, tensor in (("states", states), ("stats", stats)):
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != states.dtype:
            raise DTypeError(name, expected="float32, or float64 in both", got=describe(tensor))
    if stats.device != states.device:
        raise DeviceError("stats", expected=f"{states.device}, as the states", got=str(stats.device))


def check_norm_eps(norm_eps: object) -> None:
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, (float, int)):
        raise DTypeError("norm_eps", expected="a number", got=describe(norm_eps))
    if not 0 <= norm_eps < 1e18:
        raise GeometryError("norm_eps", expected="a finite number, 0 or more", got=str(norm_eps))


def check_noise(noise: object) -> None:
    if noise is not None and not isinstance(noise, TrainingNoise):
        raise DTypeError("noise", expected="a TrainingNoise or None", got=describe(noise))


def reads_values(tensor: Tensor) -> bool:
    """Whether values may be read: never while tracing, on a GPU only if asked."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) is not Tensor:
        return False
    return tensor.device.type == "cpu" or os.environ.get("LCF_FAST_CHECK", "0") == "1"


def as_int32(tensor: Tensor, device: torch.device) -> Tensor:
    """Integers as the kernels read them. Of values that nobody has looked at, one that does not fit becomes the nearest
    that does: it stays out of range, where a plain cast could make a row of it."""
    if tensor.dtype == torch.int64 and not reads_values(tensor):
        bounds = torch.iinfo(torch.int32)
        tensor = tensor.clamp(bounds.min, bounds.max)
    return tensor.to(device, torch.int32, non_blocking=True)


def check_index(sharer_index: object, batch: int, tokens: int, sharer_tokens: int) -> None:
    index = check_tensor("sharer_index", sharer_index)
    check_has_memory("sharer_index", index)
    if index.dtype not in INTEGERS:
        raise DTypeError("sharer_index", expected="an integer dtype", got=describe(index))
    if tuple(index.shape) != (batch, tokens):
        raise ShapeError("sharer_index", expected=f"(B, N) = {(batch, tokens)}", got=describe(index))
    if reads_values(index) and index.numel():
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < -1 or high >= sharer_tokens:
            expected = f"rows of a sharer of {sharer_tokens} tokens, or -1 for none"
            raise IndexRangeError("sharer_index", expected=expected, got=f"values from {low} to {high}")


def check_mask(name: str, mask: object, batch: int, tokens: int, tracks: int = 0) -> None:
    """``(B, N)``; ``(B, T, N)`` is as good where there are ``tracks``."""
    mask = check_tensor(name, mask)
    check_has_memory(name, mask)
    if mask.dtype not in (torch.bool, *INTEGERS, *FLOATS):
        raise DTypeError(name, expected="bool or integer, zero where masked out", got=describe(mask))
    if tuple(mask.shape) != (batch, tokens) and not (tracks and tuple(mask.shape) == (batch, tracks, tokens)):
        also = f" or (B, T, N) = {(batch, tracks, tokens)}" if tracks else ""
        raise ShapeError(name, expected=f"(B, N) = {(batch, tokens)}{also}", got=describe(mask))


def check_positions(positions: object, tokens: int) -> tuple[int, int]:
    if positions is None:
        return 0, tokens
    if (
        not isinstance(positions, Sequence)
        or len(positions) != 2
        or any(isinstance(p, bool) or not isinstance(p, int) for p in positions)
    ):
        raise DTypeError("positions", expected="(start, stop), two ints", got=describe(positions))
    start, stop = positions
    if not 0 <= start <= stop <= tokens:
        raise IndexRangeError("positions", expected=f"0 <= start <= stop <= {tokens}", got=f"({start}, {stop})")
    return start, stop


def check_offsets(
    span_offsets: object, batch: int, tokens: int, attention_mask: Tensor | None, *, is_piece: bool = False
) -> None:
    """``(B, P+1)`` or ``(B, T, P+1)`` non-decreasing token offsets, every row with at least one token to pool.

    Of a piece of a sequence (``is_piece``) they may lie anywhere, and a row may have no token.
    """
    offsets = check_tensor("span_offsets", span_offsets)
    check_has_memory("span_offsets", offsets)
    if offsets.dtype not in INTEGERS:
        raise DTypeError("span_offsets", expected="an integer dtype", got=describe(offsets))
    if offsets.dim() not in (2, 3) or offsets.shape[0] != batch or offsets.shape[-1] < 2 or not offsets.shape[1]:
        expected = f"(B, P+1) or (B, T, P+1) with B = {batch}, P >= 1 and T >= 1"
        raise ShapeError("span_offsets", expected=expected, got=describe(offsets))
    if attention_mask is not None:
        check_mask("attention_mask", attention_mask, batch, tokens, tracks_of(offsets))
    if not reads_values(offsets) or not batch:
        return
    rows = offsets.long()
    if bool((rows[..., 1:] < rows[..., :-1]).any()):
        raise SpanError("span_offsets", expected="offsets that do not decrease", got=f"{rows.tolist()}"[:200])
    if is_piece:
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high > tokens:
        raise SpanError("span_offsets", expected=f"offsets within [0, {tokens}]", got=f"values from {low} to {high}")
    rows = rows if rows.dim() == 3 else rows[:, None]
    token = torch.arange(tokens, device=rows.device)
    pooled = (token >= rows[..., :1]) & (token < rows[..., -1:])
    if attention_mask is not None:
        if attention_mask.device != rows.device and not reads_values(attention_mask):
            return
        visible = attention_mask.to(rows.device) != 0
        pooled &= visible if visible.dim() == 3 else visible[:, None]
    empty = (~pooled.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise SpanError("span_offsets", expected="a token to pool in every row", got=f"none in rows {empty}"[:200])


def tracks_of(span_offsets: Tensor) -> int:
    """Tracks of overlapping spans: the middle axis of ``(B, T, P+1)`` offsets."""
    return span_offsets.shape[1] if span_offsets.dim() == 3 else 1
