"""The public functions: checked, differentiable, compilable, on whichever back end serves.

Same names and signatures as `lcf_fast.reference`. Back ends: see `lcf_fast.backends`. Bad input raises a typed error
(`lcf_fast.errors`) before anything is launched or written. Out of place unless the name ends in ``_``.

Products run in the receiver cache's dtype with float32 accumulation; latents, norms, softmax, gates and the residual
add run in float32 (float64 for float64 caches, which the eager path serves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks as check
from . import eager, library, library_layers, reference
from .dispatch import is_plain, needs_grad, refuse_tangents, served_by, undispatched
from .errors import DTypeError, GeometryError, ShapeError
from .layouts import Layers, Layout
from .noise import TrainingNoise
from .ops_pooling import attention_pool, finish_ranges, fold_summary, merge_ranges, pool_range, summarize_layers
from .ops_slots import expand_slots, expand_slots_layers, fold_slots, slot_pool, summarize_slots_layers
from .overlaps import share_memory

__all__ = [
    "attention_pool",
    "expand_slots",
    "expand_slots_layers",
    "finish_ranges",
    "fold_slots",
    "fold_summary",
    "fuse_layers",
    "fuse_layers_",
    "gated_injection",
    "gated_injection_",
    "joint_projection",
    "merge_ranges",
    "pool_range",
    "slot_pool",
    "summarize_layers",
    "summarize_slots_layers",
]

Pair = tuple[Tensor, Tensor]


def _row_index(
    sharer_index: Tensor | None,
    edit_mask: Tensor | None,
    tokens: int,
    sharer_tokens: int,
    device: torch.device,
    backend: str,
) -> Tensor | None:
    """Both masks as one ``(B, N)`` int32: the sharer's row, or -1 where the position must stay as it is.

    To the kernels a row beyond the sharer is none as well; only for others it is made -1 where nobody has looked.
    """
    if sharer_index is None and edit_mask is None:
        return None
    if edit_mask is None:
        assert sharer_index is not None
        return _rows(sharer_index, sharer_tokens, device, backend).contiguous()
    keep = edit_mask.to(device, non_blocking=True) != 0
    if sharer_index is None:
        rows = torch.arange(tokens, device=device, dtype=torch.int32).expand(keep.shape)
    else:
        rows = _rows(sharer_index, sharer_tokens, device, backend)
    return torch.where(keep, rows, rows.new_full((), -1)).contiguous()


def _rows(sharer_index: Tensor, sharer_tokens: int, device: torch.device, backend: str) -> Tensor:
    rows = check.as_int32(sharer_index, device)
    if backend == "triton" or check.reads_values(sharer_index):
        return rows
    return rows.masked_fill(rows >= sharer_tokens, -1)


def joint_projection(
    sharer_key: Tensor | None,
    sharer_value: Tensor | None,
    receiver_key: Tensor,
    receiver_value: Tensor,
    weights: Mapping[str, Tensor],
    *,
    sharer_index: Tensor | None = None,
    message: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Project keys and values of both models together into the bottleneck (paper section 3; spec section 2).

    Args:
        sharer_key, sharer_value: ``(B, Hs, M, Ds)``, one layer's cache; ``M = N`` unless ``sharer_index`` is given;
            ``None`` with ``message``. Any strides; the last axis should have stride 1 (it is copied otherwise).
        receiver_key, receiver_value: ``(B, Hr, N, Dr)``, keys after RoPE, as the model stores them.
        weights: one layer's ``down_weight (d, 2Cs+2Cr)``, ``down_bias (d)``, ``norm_weight (blocks, d)``,
            ``ffn_in_weight (blocks, 4d, d)``, ``ffn_out_weight (blocks, d, 4d)``; other names are ignored.
        sharer_index: ``(B, N)`` int: the sharer's row for each receiver position; -1 for none, whose latent is zero.
        message: ``(B, d)`` instead of the sharer (LCF-X): ``W_down[:, :2Cs]·[K*;V*] + b_down``.
        norm_eps: epsilon of the RMS norm.

    Returns:
        The latent ``z (B, N, d)``, float32 (float64 for float64 caches).

    Raises:
        ShapeError, DTypeError, DeviceError, GeometryError, IndexRangeError, BackendError: named by argument.
    """
    check.check_norm_eps(norm_eps)
    check.check_pair(receiver_key, receiver_value, ("receiver_key", "receiver_value"))
    batch, heads, tokens, head_dim = receiver_key.shape
    device = receiver_key.device
    columns = 2 * heads * head_dim
    if message is None:
        check.check_pair(sharer_key, sharer_value, ("sharer_key", "sharer_value"))
        assert sharer_key is not None and sharer_value is not None
        check.check_same_batch("sharer_key", sharer_key, receiver_key)
        _check_lengths("sharer_key", sharer_key, tokens, sharer_index)
        columns += 2 * sharer_key.shape[1] * sharer_key.shape[3]
    elif sharer_key is not None or sharer_value is not None:
        raise GeometryError("message", expected="either a sharer's cache or a message", got="both")
    width = check.check_projection_weights(weights, (), columns, device, exact=message is None)
    sharer_tokens = tokens if sharer_key is None else sharer_key.shape[2]
    if sharer_index is not None:
        check.check_index(sharer_index, batch, tokens, sharer_tokens)
    if message is not None:
        _check_message(message, (batch, width), device)
    hidden = weights["ffn_in_weight"].shape[1]
    backend = served_by(device, receiver_key.dtype, width, hidden)
    index = _row_index(sharer_index, None, tokens, sharer_tokens, device, backend)
    parameters = [weights[name] for name in library.PROJECTION_WEIGHTS]
    caches = (sharer_key, sharer_value, receiver_key, receiver_value)
    arguments = (*caches, parameters, index, message, norm_eps)
    if not is_plain(receiver_key):
        return library.joint_projection(*arguments)
    if not needs_grad(*caches, message, *parameters):
        return undispatched(library.run_joint_projection, arguments)
    if backend == "eager":
        return reference.joint_projection(*caches, weights, sharer_index=index, message=message, norm_eps=norm_eps)
    return library.joint_projection(*arguments)


def _check_lengths(name: str, sharer: Tensor, tokens: int, sharer_index: Tensor | None) -> None:
    if sharer_index is None and sharer.shape[2] != tokens:
        expected = f"{tokens} tokens, as the receiver (or sharer_index to align other lengths)"
        raise ShapeError(name, expected=expected, got=f"{sharer.shape[2]} tokens")


def _check_message(message: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check.check_tensor("message", message)
    if tuple(message.shape) != shape:
        raise ShapeError("message", expected=f"{shape}", got=check.describe(message))
    if message.dtype not in check.FLOATS:
        raise DTypeError("message", expected="a float dtype", got=check.describe(message))
    if message.device != device:
        raise check.DeviceError("message", expected=f"{device}, as the receiver's cache", got=str(message.device))


def gated_injection(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    edit_mask: Tensor | None = None,
) -> Pair:
    """Edit one receiver layer: ``R_i + gate_i · sigmoid(W_a z + b_a) · (W_up z_i + b_up)``, i in K, V (spec section 2).

    Args:
        receiver_key, receiver_value: ``(B, H, N, D)``.
        latent: ``(B, N, d)`` float; its first half makes the key's edit, its second half the value's.
        weights: one layer's ``up_weight (2, C, d/2)``, ``up_bias (2, C)``, ``head_gate_weight (2, H, d)``,
            ``head_gate_bias (2, H)``, ``gate_logit (2)``: not above zero closes the gate.
        edit_mask: ``(B, N)``, zero where the position stays as it is.

    Returns:
        New, contiguous key and value; a closed gate gives a copy.

    Raises:
        ShapeError, DTypeError, DeviceError, GeometryError, BackendError: named by argument.
    """
    backend, parameters, mask = _check_injection(receiver_key, receiver_value, latent, weights, edit_mask)
    arguments = (receiver_key, receiver_value, latent, parameters, mask)
    if not is_plain(receiver_key):
        return library.gated_injection(*arguments)
    if not needs_grad(*arguments[:3], *parameters):
        return undispatched(library.run_gated_injection, arguments)
    if backend == "eager":
        key, value = reference.gated_injection(receiver_key, receiver_value, latent, weights, edit_mask=mask)
        return key.contiguous(), value.contiguous()
    return library.gated_injection(*arguments)


def gated_injection_(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    edit_mask: Tensor | None = None,
) -> Pair:
    """`gated_injection` in place, for inference: it records no graph. Returns the given tensors.

    Raises:
        As `gated_injection`; and ShapeError where elements share memory, of one tensor or of both, or the last axis
        is strided.
    """
    _, parameters, mask = _check_injection(receiver_key, receiver_value, latent, weights, edit_mask)
    check.check_writable("receiver_key", receiver_key)
    check.check_writable("receiver_value", receiver_value)
    arguments = (receiver_key, receiver_value, latent, parameters, mask)
    if is_plain(receiver_key):
        if share_memory(receiver_key, receiver_value):
            raise ShapeError("receiver_value", expected="memory of its own", got="that of receiver_key")
        undispatched(library.run_gated_injection_, arguments)
    else:
        library.gated_injection_(*arguments)
    return receiver_key, receiver_value


def _check_injection(
    key: Tensor, value: Tensor, latent: Tensor, weights: Mapping[str, Tensor], edit_mask: Tensor | None
) -> tuple[str, list[Tensor], Tensor | None]:
    check.check_pair(key, value, ("receiver_key", "receiver_value"))
    batch, heads, tokens, head_dim = key.shape
    check.check_tensor("latent", latent)
    if latent.dim() != 3 or tuple(latent.shape[:2]) != (batch, tokens) or latent.shape[2] % 2:
        raise ShapeError("latent", expected=f"({batch}, {tokens}, d), d even", got=check.describe(latent))
    if latent.dtype not in check.FLOATS:
        raise DTypeError("latent", expected="a float dtype", got=check.describe(latent))
    if latent.device != key.device:
        raise check.DeviceError("latent", expected=f"{key.device}, as the cache", got=str(latent.device))
    check.check_injection_weights(weights, (), latent.shape[2], heads, head_dim, key.device)
    mask = None
    if edit_mask is not None:
        check.check_mask("edit_mask", edit_mask, batch, tokens)
        mask = edit_mask.to(key.device, non_blocking=True) != 0
    backend = served_by(key.device, key.dtype, latent.shape[2])
    return backend, [weights[name] for name in library.INJECTION_WEIGHTS], mask


def fuse_layers(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    weights: Mapping[str, Tensor],
    *,
    live: Sequence[tuple[bool, bool]] | None = None,
    sharer_index: Tensor | None = None,
    message: Tensor | None = None,
    edit_mask: Tensor | None = None,
    positions: tuple[int, int] | None = None,
    norm_eps: float = 1e-6,
    noise: TrainingNoise | None = None,
) -> list[Pair]:
    """Projection to injection for all kept layers, on a GPU in one launch (spec sections 2 and 4).

    Args:
        sharer: one ``(key, value)``, ``(B, Hs, M, Ds)`` each, a kept layer: what that layer reads. ``None`` with
            ``message``.
        receiver: one ``(key, value)``, ``(B, Hr, N, Dr)`` each, a kept layer.
        weights: the adapter's stacked parameters, axis 0 = kept layers (``lcf_fast.adapter`` has the table).
        live: the hard gates on the host, ``(key open, value open)`` a layer. ``None`` reads ``gate_logit``, which on a
            GPU waits for it.
        sharer_index: ``(B, N)`` int: the sharer's row for each receiver position; -1 leaves the position untouched.
        message: ``(L, B, d)`` instead of the sharer (LCF-X).
        edit_mask: ``(B, N)``, zero where the position stays as it is (padding).
        positions: half-open range of receiver positions to edit; ``None`` is all.
        norm_eps: epsilon of the RMS norm.
        noise: makes it a training pass: dropout, and soft, noisy gates, none of which is closed (``live`` says
            nothing then). The same noise gives the same numbers on every back end, and in the backward pass.

    Returns:
        ``(key, value)`` a layer: new tensors where the gate is open; where it is closed, the given tensor itself.

    Raises:
        ShapeError, DTypeError, DeviceError, GeometryError, IndexRangeError, BackendError: named by argument.
    """
    check.check_noise(noise)
    if noise is not None and isinstance(receiver, Sequence):
        live = [(True, True)] * len(receiver)
    call = _check_fuse(sharer, receiver, weights, live, sharer_index, message, edit_mask, positions, norm_eps)
    plain = is_plain(call.receiver[0])
    differentiable = _wants_gradient(call)
    if plain and call.backend == "eager":
        index = call.row_index
        masks: dict[str, Any] = {"sharer_index": index, "edit_mask": None}
        if sharer is None:
            masks = {"sharer_index": None, "edit_mask": None if index is None else index >= 0}
        keywords = {**masks, "message": message, "positions": (call.first, call.last), "norm_eps": norm_eps}
        if not differentiable and noise is None:
            refuse_tangents(call)
            with torch.no_grad():
                return eager.fuse_layers(sharer, receiver, weights, live=call.gates, **keywords)
        fused = reference.fuse_layers(sharer, receiver, weights, noise=noise, **keywords)
        return [
            (new[0] if opened[0] else old[0], new[1] if opened[1] else old[1])
            for new, old, opened in zip(fused, receiver, call.gates)
        ]
    if plain and not differentiable:
        out = undispatched(library_layers.fuse_checked, (*_checked(call), noise, False))
    else:
        parts = library_layers.NO_NOISE if noise is None else (noise.seed, noise.temperature, noise.dropout)
        out = library_layers.fuse_layers(*_flat(call), *parts)
    new = out.unbind(0)
    if len(new) == len(call.receiver):
        return [*zip(new[0::2], new[1::2])]
    edited = iter(new)
    return [
        (next(edited) if open_key else key, next(edited) if open_value else value)
        for (key, value), (open_key, open_value) in zip(receiver, call.gates)
    ]


def _wants_gradient(call: _Call) -> bool:
    if not torch.is_grad_enabled():
        return False
    if call.receiver_layout is None:
        return needs_grad(call.message, *call.parameters, *call.receiver, *call.sharer)
    layouts = (call.receiver_layout, call.sharer_layout)
    caches = any(layout.requires_grad for layout in layouts if layout is not None)
    return caches or needs_grad(call.message, *call.parameters)


def fuse_layers_(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    weights: Mapping[str, Tensor],
    *,
    live: Sequence[tuple[bool, bool]] | None = None,
    sharer_index: Tensor | None = None,
    message: Tensor | None = None,
    edit_mask: Tensor | None = None,
    positions: tuple[int, int] | None = None,
    norm_eps: float = 1e-6,
) -> list[Pair]:
    """`fuse_layers` in place on the receiver's tensors, for inference: it records no graph. Returns those tensors.

    The sharer must not lie in the receiver's memory: layers are edited in no particular order. Both may interleave
    in one buffer.

    Raises:
        As `fuse_layers`; and ShapeError where a receiver's elements share memory, of one tensor or of two, or its last
        axis is strided, GeometryError where a sharer's are a receiver's.
    """
    call = _check_fuse(sharer, receiver, weights, live, sharer_index, message, edit_mask, positions, norm_eps)
    layout = call.receiver_layout
    if layout is None or layout.first_unwritable is not None:
        for i, tensor in enumerate(call.receiver):
            check.check_writable(check.side_name("receiver", i), tensor)
    arguments = None if layout is None else _checked(call)
    if arguments is not None:
        other, own = arguments[1:3]
        check.check_apart("receiver", own)
        if other is not None:
            check.check_sides_apart(other, own)
    if arguments is not None and is_plain(call.receiver[0]):
        undispatched(library_layers.fuse_checked, (*arguments, None, True))
    else:
        library_layers.fuse_layers_(*_flat(call))
    return list(receiver)


class _Call(NamedTuple):
    """A checked call of `fuse_layers`: caches flat, as they cross torch's boundary, and what is known of them."""

    sharer: list[Tensor]
    receiver: list[Tensor]
    parameters: list[Tensor]
    gates: tuple[tuple[bool, bool], ...]
    row_index: Tensor | None
    message: Tensor | None
    first: int
    last: int
    norm_eps: float
    backend: str
    #: None while tracing, and of the sharer where there is none.
    sharer_layout: Layout | None
    receiver_layout: Layout | None


def _flat(call: _Call) -> tuple[Any, ...]:
    """The arguments of the ops in `library_layers`."""
    live = [is_open for pair in call.gates for is_open in pair]
    return (call.sharer, call.receiver, call.parameters, live, *call[4:9])


def _checked(call: _Call) -> tuple[Any, ...]:
    """The arguments of `library_layers.fuse_checked` but for the last two."""
    assert call.receiver_layout is not None
    sharer = None if call.sharer_layout is None else Layers(call.sharer, call.sharer_layout)
    receiver = Layers(call.receiver, call.receiver_layout)
    return (call.backend, sharer, receiver, *call[2:9])


#: The last hard gates of an adapter, found to be pairs of bools, which a tuple of tuples stays.
_last_gates: tuple[tuple[bool, bool], ...] = ()


def _gates(live: Sequence[tuple[Any, Any]]) -> tuple[tuple[bool, bool], ...]:
    """``live`` as bools; what an adapter keeps is that already, and the same object again and again."""
    global _last_gates
    known = _last_gates  # read once: another thread may set it meanwhile
    if live is known and not torch.compiler.is_compiling():
        return known
    if not isinstance(live, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in live):
        raise GeometryError("live", expected="a pair of bools for each layer", got=check.describe(live))
    if torch.compiler.is_compiling():
        return tuple((bool(pair[0]), bool(pair[1])) for pair in live)
    gates = tuple((bool(pair[0]), bool(pair[1])) for pair in live)
    kinds = [type(live), *map(type, live), *map(type, chain.from_iterable(live))]
    if {*kinds[: 1 + len(gates)]} != {tuple} or {*kinds[1 + len(gates) :]} != {bool}:
        return gates  # of what might change
    _last_gates = known = tuple(live)  # the same object
    return known


def _check_fuse(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    weights: Mapping[str, Tensor],
    live: Sequence[tuple[bool, bool]] | None,
    sharer_index: Tensor | None,
    message: Tensor | None,
    edit_mask: Tensor | None,
    positions: tuple[int, int] | None,
    norm_eps: float,
) -> _Call:
    """All checks of `fuse_layers`, by one look each at caches and weights like those that passed before."""
    check.check_norm_eps(norm_eps)
    logit = check.find_weight(weights, "gate_logit")
    layers = logit.shape[0] if logit.dim() else 0
    flat_receiver, receiver_layout = check.flat_layers("receiver", receiver, layers)
    if not layers:
        raise GeometryError("receiver", expected="at least one layer", got="none")
    key = flat_receiver[0]
    batch, heads, tokens, head_dim = key.shape
    device = key.device
    columns = 2 * heads * head_dim
    flat_sharer: list[Tensor] = []
    sharer_layout = None
    if message is None:
        if sharer is None:
            raise GeometryError("sharer", expected="a sharer's cache or a message", got="neither")
        flat_sharer, sharer_layout = check.flat_layers("sharer", sharer, layers, like=key)
        _, sharer_heads, sharer_tokens, sharer_dim = flat_sharer[0].shape
        _check_lengths("sharer", flat_sharer[0], tokens, sharer_index)
        columns += 2 * sharer_heads * sharer_dim
    else:
        if sharer is not None:
            raise GeometryError("message", expected="either a sharer's cache or a message", got="both")
        sharer_tokens = tokens
    parameters, width, hidden = check.check_weights(
        weights, library.WEIGHTS, (layers,), columns, heads, head_dim, device, message is None
    )
    if message is not None:
        _check_message(message, (layers, batch, width), device)
    if sharer_index is not None:
        check.check_index(sharer_index, batch, tokens, sharer_tokens)
    if edit_mask is not None:
        check.check_mask("edit_mask", edit_mask, batch, tokens)
    first, last = check.check_positions(positions, tokens)
    if live is None:
        live = [(bool(k), bool(v)) for k, v in (logit.detach() > 0).tolist()]
    gates = _gates(live)
    if len(gates) != layers:
        raise GeometryError("live", expected=f"a pair of bools for each of {layers} layers", got=f"{len(gates)} pairs")
    backend = served_by(device, key.dtype, width, hidden)
    index = _row_index(sharer_index, edit_mask, tokens, sharer_tokens, device, backend)
    return _Call(
        flat_sharer, flat_receiver, parameters, gates, index, message, first, last, norm_eps, backend, sharer_layout,
        receiver_layout,
    )  # fmt: skip
