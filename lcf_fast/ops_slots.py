"""The public functions of slots; `lcf_fast.ops` exports them.

Same names and signatures as `lcf_fast.reference`. `slot_pool`, `fold_slots` and `expand_slots` serve one layer,
`summarize_slots_layers` and `expand_slots_layers` all of them at once, on a GPU in one launch a step. Softmax, sums,
latents and norms run in float32 (float64 for float64 caches). Autograd goes through the eager path as it is; the
kernels have gradients of their own (`library_slots`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from . import checks as check
from . import eager_slots
from . import library_slots as library
from .config import MAX_LAYERS
from .dispatch import count_edits, is_plain, needs_grad, undispatched
from .errors import DeviceError, DTypeError, GeometryError, IndexRangeError, ShapeError, SpanError
from .layouts import Layers
from .library import unit_rows
from .noise import TrainingNoise
from .slot_states import SlotStates

__all__ = ["expand_slots", "expand_slots_layers", "fold_slots", "slot_pool", "summarize_slots_layers"]

Pair = tuple[Tensor, Tensor]


def slot_pool(
    key: Tensor,
    value: Tensor,
    slot_query: Tensor,
    *,
    attention_mask: Tensor | None = None,
    return_weights: bool = False,
) -> tuple[Tensor, ...]:
    """Pool a whole cache to k keys and values a head: slot j weighs tokens by ``softmax(q_j·K / sqrt(D))``.

    Args:
        key, value: ``(B, H, N, D)``, one layer's cache.
        slot_query: ``(k, H, D)``.
        attention_mask: ``(B, N)``, zero where the token is padding, which is not pooled; or ``(B, P, N)``: P groups of
            tokens of each item, such as spans, which may overlap, pooled each by itself. There are R = B·P rows
            then, else B: row b·P + p is group p of item b.
        return_weights: whether the third result is returned, too; the eager path makes it, with another pass over the
            keys.

    Returns:
        ``K~, V~``, each ``(R, k, H, D)`` in the cache's dtype; and the weights ``(R, k, H, N)``, float32 (float64 for
        float64 caches), 0 at padding.

    Raises:
        ShapeError, DTypeError, DeviceError, SpanError, BackendError: named by argument.
    """
    check.check_pair(key, value, ("key", "value"))
    query = check.check_tensor("slot_query", slot_query)
    if query.dim() != 3 or not query.shape[0] or query.shape[1:] != (key.shape[1], key.shape[3]):
        raise ShapeError("slot_query", expected=f"(k, {key.shape[1]}, {key.shape[3]})", got=check.describe(query))
    if query.dtype not in check.FLOATS:
        raise DTypeError("slot_query", expected="a float dtype", got=check.describe(query))
    if query.device != key.device:
        raise DeviceError("slot_query", expected=f"{key.device}, as the cache", got=str(query.device))
    mask = _token_mask(attention_mask, key)
    layers = [(key, value)]
    slot_key, slot_value = (x[0].to(key.dtype) for x in _pool(layers, slot_query[None], mask))
    if not return_weights:
        return slot_key, slot_value
    return slot_key, slot_value, eager_slots.slot_weights(layers, slot_query[None], mask)[0].transpose(1, 2)


def fold_slots(slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The message of one layer's slots: ``c_j = W_down·[K~_j; V~_j] + b_down + slot_embedding_j``.

    Args:
        slot_key, slot_value: ``(B, k, Hs, Ds)``.
        weights: one layer's ``down_weight (d, 2Cs)``, ``down_bias (d)``, ``slot_embedding (at least k, d)``, of which
            the first k are used.

    Returns:
        The latent ``(B, k, d)``, float32 (float64 for float64 slots).

    Raises:
        ShapeError, DTypeError, DeviceError, GeometryError, BackendError: named by argument.
    """
    check.check_pair(slot_key, slot_value, ("slot_key", "slot_value"))
    one = _one_layer(weights, library.FOLD_WEIGHTS)
    slots, columns = slot_key.shape[1], 2 * slot_key.shape[2] * slot_key.shape[3]
    width = _check_fold(one, 1, slots, columns, slot_key.device)
    return _fold(slot_key[None], slot_value[None], one, slots, width)[0]


def summarize_slots_layers(
    sharer: Sequence[Pair], weights: Mapping[str, Tensor], *, attention_mask: Tensor | None = None
) -> Tensor:
    """Pool every layer's sharer cache to slots and fold them: the latent ``(L, B, k, d)``.

    Args:
        sharer: one ``(key, value)``, ``(B, Hs, N, Ds)`` each, a receiver layer: what that layer reads.
        weights: stacked ``slot_query (L, k, Hs, Ds)``, ``down_weight (L, d, 2Cs)``, ``down_bias (L, d)`` and
            ``slot_embedding (L, at least k, d)``; other names are ignored.
        attention_mask: ``(B, N)``, zero where the token is padding, which is not pooled; or ``(B, P, N)``: P groups of
            tokens of each item, such as spans, which may overlap, pooled each by itself. The latent is ``(L, B, P·k,
            d)`` then, the k slots of a group side by side, with the same k embeddings in each.

    Returns:
        float32 (float64 for float64 caches).

    Raises:
        As `slot_pool`, and GeometryError for weights or layers that do not fit.
    """
    query = check.find_weight(weights, "slot_query")
    layers = query.shape[0] if query.dim() else 0
    flat, _ = check.flat_layers("sharer", sharer, layers)
    if not layers:
        raise GeometryError("sharer", expected="at least one layer", got="none")
    key = flat[0]
    heads, head_dim = key.shape[1], key.shape[3]
    slots = check.check_weight(weights, "slot_query", (layers, None, heads, head_dim), key.device).shape[1]
    if not slots:
        raise ShapeError("weights['slot_query']", expected="at least one slot", got=check.describe(query))
    width = _check_fold(weights, layers, slots, 2 * heads * head_dim, key.device)
    mask = _token_mask(attention_mask, key)
    pooled = _pool(sharer, query, mask)
    latent = _fold(*pooled, weights, slots, width)
    if attention_mask is not None and attention_mask.dim() == 3:
        latent = latent.unflatten(1, (key.shape[0], attention_mask.shape[1])).flatten(2, 3)
    return latent


def expand_slots(
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    kv_heads: int,
    norm_eps: float = 1e-6,
    noise: TrainingNoise | None = None,
    layer: int = 0,
) -> Pair:
    """The receiver's half: a latent as one key and value a slot and head, the key not rotated to any position.

    Args:
        latent: ``(B, k, d)`` float.
        weights: one layer's ``norm_weight (blocks, d)``, ``ffn_in_weight (blocks, 4d, d)``, ``ffn_out_weight (blocks,
            d, 4d)``, ``up_weight (2, Cr, d)``, ``up_bias (2, Cr)``.
        kv_heads: Hr, the receiver's.
        norm_eps: epsilon of the norm.
        noise: dropout on what each block adds, as in training; ``layer``: the row that its numbers are drawn for.

    Returns:
        Key and value ``(B, Hr, k, Dr)``, float32 (float64 for a float64 latent).

    Raises:
        ShapeError, DTypeError, DeviceError, GeometryError, BackendError: named by argument.
    """
    check.check_tensor("latent", latent)
    if latent.dim() != 3:
        raise ShapeError("latent", expected="(B, k, d)", got=check.describe(latent))
    if type(layer) is not int or not 0 <= layer < MAX_LAYERS:
        raise IndexRangeError("layer", expected=f"an int in [0, {MAX_LAYERS})", got=check.describe(layer))
    one = _one_layer(weights, library.EXPANSION_WEIGHTS)
    return _expand(latent[None], one, kv_heads, norm_eps, noise, layer)[0]


def expand_slots_layers(
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    kv_heads: int,
    norm_eps: float = 1e-6,
    noise: TrainingNoise | None = None,
) -> list[Pair]:
    """`expand_slots` of every layer: ``latent (L, B, k, d)`` to one ``(B, Hr, k, Dr)`` key and value a layer.

    Args:
        weights: as in `expand_slots`, stacked over L layers; other names are ignored.

    Raises:
        As `expand_slots`.
    """
    return _expand(latent, weights, kv_heads, norm_eps, noise, 0)


@torch.no_grad()
def expand_slots_layers_(
    latent: Tensor,
    weights: Mapping[str, Tensor],
    into: Sequence[Pair],
    *,
    kv_heads: int,
    norm_eps: float = 1e-6,
    turn: Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
) -> list[Pair]:
    """`expand_slots_layers` into tensors that are there, such as a cache's free room; for inference: without a graph.

    The kernels write values, and keys that need no turning, straight to where they are to lie, in products of that
    dtype; the eager path rounds once to it.

    Args:
        latent, weights, kv_heads: as in `expand_slots_layers`.
        into: one ``(key, value)`` a layer, ``(B, Hr, k, Dr)``, of one float dtype. Any strides but the last one's,
            which is 1; no two elements in one place.
        turn: makes of each layer's key, ``(B, Hr, k, Dr)`` in float32 (or float64), the one that is written: rotated to
            its positions. By the time it is called values may be written, so that it must not raise.

    Returns:
        The tensors of ``into``.

    Raises:
        As `expand_slots_layers`, and ShapeError for an ``into`` that does not fit or cannot be written to.
    """
    layers = latent.shape[0] if isinstance(latent, Tensor) and latent.dim() else 0
    check.check_layers("into", into, layers)
    hidden = _check_expand(latent, weights, kv_heads, norm_eps)
    key = into[0][0]
    wanted = (latent.shape[1], kv_heads, latent.shape[2], weights["up_weight"].shape[2] // kv_heads)
    if key.shape != wanted:
        raise ShapeError("into[0].key", expected=f"(B, Hr, k, Dr) = {wanted}", got=check.describe(key))
    if key.device != latent.device:
        raise DeviceError("into", expected=f"{latent.device}, as the latent", got=str(key.device))
    sides = [tensor for pair in into for tensor in pair]
    for i, tensor in enumerate(sides):
        check.check_writable(check.side_name("into", i), tensor)
    if not torch.compiler.is_compiling():
        check.check_apart("into", Layers.of(sides))
    if library.backend_of(key, latent.shape[2], latent.shape[3], hidden) == "eager":
        made = eager_slots.expand_slots(latent, weights, kv_heads, norm_eps, None)
        keys = [one for one, _ in made]
        _write([pair[1] for pair in into], [value for _, value in made])
        _write([pair[0] for pair in into], keys if turn is None else turn(keys))
        return [(pair[0], pair[1]) for pair in into]
    from .kernels import slot_projection

    straight = list(into)
    if turn is not None:
        scratch = key.new_empty(layers, *key.shape)
        straight = [(bare, pair[1]) for bare, pair in zip(scratch, into)]
    slot_projection.expand_slots(latent.to(torch.float32).contiguous(), weights, straight, norm_eps=norm_eps)
    count_edits(tensor for pair in straight for tensor in pair)
    if turn is not None:
        _write([pair[0] for pair in into], turn(list(scratch.to(torch.float32).unbind(0))))
    return [(pair[0], pair[1]) for pair in into]


@torch.inference_mode()  # for tensors that were made in it
def _write(into: list[Tensor], made: Sequence[Tensor]) -> None:
    for there, tensor in zip(into, made):
        there.copy_(tensor)


# --- contexts in pieces, for `lcf_fast.slots`, which has checked
# ---------------------------------------------------------------------


@torch.no_grad()
def pool_slot_states(sharer: Sequence[Pair], slot_query: Tensor, mask: Tensor | None) -> SlotStates:
    """All layers of a piece of a context as states that merge. ``mask (B, N)`` bool, or ``(B, P, N)`` for states of B·P
    rows; N may be 0."""
    flat = [tensor for pair in sharer for tensor in pair]
    is_traced = torch.compiler.is_compiling()  # a piece's state has no op: it is for inference
    if is_traced or not flat[0].shape[2] or library.backend_of(flat[0], slot_query.shape[1]) == "eager":
        return SlotStates(*eager_slots.pool_states(sharer, slot_query, mask))
    from .kernels import slot_pooling

    pairs = [(unit_rows(key), unit_rows(value)) for key, value in sharer]
    return SlotStates(*slot_pooling.pool_slot_states(pairs, slot_query, attention_mask=mask))


def fold_slots_layers(slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """`fold_slots` of all layers: ``(L, B, k, Hs, Ds)`` twice to the latent ``(L, B, k, d)``."""
    width = weights["down_bias"].shape[1]
    return _fold(slot_key, slot_value, weights, slot_key.shape[2], width)


# --- what is checked, and where it goes
# ---------------------------------------------------------------------


def _token_mask(attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """``(B, N)`` or, of several groups, ``(B, P, N)`` bool on the cache's device; None where every token counts, as far
    as the host can tell."""
    batch, _, tokens, _ = key.shape
    if attention_mask is not None:
        mask = check.check_tensor("attention_mask", attention_mask)
        check.check_mask("attention_mask", mask, batch, tokens, mask.shape[1] if mask.dim() == 3 else 0)
    if batch and not tokens:
        raise SpanError("attention_mask", expected="a token to pool in every row", got="a cache of no tokens")
    if attention_mask is None:
        return None
    mask = attention_mask != 0
    if mask.dim() == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if check.reads_values(mask):
        empty = (~mask.any(-1)).nonzero().tolist()
        if empty and mask.dim() == 3:
            got = f"none in (row, group) {', '.join(str(tuple(at)) for at in empty)}"[:200]
            raise SpanError("attention_mask", expected="a token to pool in every group", got=got)
        if empty:
            got = f"none in rows {[row for (row,) in empty]}"[:200]
            raise SpanError("attention_mask", expected="a token to pool in every row", got=got)
        if mask.dim() == 2 and bool(mask.all()):
            return None
    return mask.to(key.device, non_blocking=True)


def _one_layer(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """One layer's parameters as stacked ones."""
    return {name: check.find_weight(weights, name)[None] for name in names}


def _check_fold(
    weights: Mapping[str, Tensor], layers: int, slots: int, columns: int, device: torch.device
) -> int:
    """``W_down`` and embeddings fit; the width d."""
    width = check.check_weight(weights, "down_weight", (layers, None, columns), device).shape[1]
    check.check_weight(weights, "down_bias", (layers, width), device)
    embedding = check.check_weight(weights, "slot_embedding", (layers, None, width), device)
    if embedding.shape[1] < slots:
        expected = f"embeddings of {slots} slots or more"
        raise ShapeError("weights['slot_embedding']", expected=expected, got=check.describe(embedding))
    return width


def _check_expand(latent: Tensor, weights: Mapping[str, Tensor], kv_heads: int, norm_eps: float) -> int:
    """The latent and the receiver's half fit; the FFN's inner width."""
    check.check_norm_eps(norm_eps)
    check.check_tensor("latent", latent)
    if latent.dim() != 4 or not latent.shape[0]:
        raise ShapeError("latent", expected="(L, B, k, d), at least one layer", got=check.describe(latent))
    if latent.dtype not in check.FLOATS:
        raise DTypeError("latent", expected="a float dtype", got=check.describe(latent))
    check.check_has_memory("latent", latent)
    layers, _, _, width = latent.shape
    device = latent.device
    blocks = check.check_weight(weights, "norm_weight", (layers, None, width), device).shape[1]
    hidden = check.check_weight(weights, "ffn_in_weight", (layers, blocks, None, width), device).shape[2]
    check.check_weight(weights, "ffn_out_weight", (layers, blocks, width, hidden), device)
    channels = check.check_weight(weights, "up_weight", (layers, 2, None, width), device).shape[2]
    check.check_weight(weights, "up_bias", (layers, 2, channels), device)
    if type(kv_heads) is not int:
        raise DTypeError("kv_heads", expected="an int", got=repr(kv_heads))
    if kv_heads < 1 or channels % kv_heads:
        raise GeometryError("kv_heads", expected=f"a divisor of {channels} channels", got=str(kv_heads))
    return hidden


def _pool(sharer: Sequence[Pair], slot_query: Tensor, mask: Tensor | None) -> Pair:
    flat = [tensor for pair in sharer for tensor in pair]
    backend = _serving(flat[0], slot_query.shape[1])
    if backend == "eager":
        return eager_slots.pool_slots(sharer, slot_query, mask)
    arguments = (flat, slot_query, mask)
    if backend == "triton" and is_plain(flat[0]) and not needs_grad(slot_query, *flat):
        slot_key, slot_value, _ = undispatched(library.run_pool_slots, arguments)
    else:
        slot_key, slot_value, _ = library.pool_slots(*arguments)
    return slot_key, slot_value


def _fold(slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor], slots: int, width: int) -> Tensor:
    own = [weights[name] for name in library.FOLD_WEIGHTS]
    backend = _serving(slot_key, slots, width)
    if backend == "eager":
        return eager_slots.fold_slots(slot_key, slot_value, weights)
    arguments = (slot_key, slot_value, own)
    latent: Tensor
    if backend == "triton" and is_plain(slot_key) and not needs_grad(slot_key, slot_value, *own):
        latent = undispatched(library.run_fold_slots, arguments)
    else:
        latent = library.fold_slots(*arguments)
    return latent


def _expand(
    latent: Tensor,
    weights: Mapping[str, Tensor],
    kv_heads: int,
    norm_eps: float,
    noise: TrainingNoise | None,
    row: int,
) -> list[Pair]:
    """``row``: what the noise calls the first layer."""
    check.check_noise(noise)
    hidden = _check_expand(latent, weights, kv_heads, norm_eps)
    own = [weights[name] for name in library.EXPANSION_WEIGHTS]
    backend = _serving(latent, latent.shape[2], latent.shape[3], hidden)
    dropout = library.NO_NOISE if noise is None else (noise.seed, noise.dropout)
    arguments = (latent, own, kv_heads, norm_eps, *dropout, row)
    if backend == "eager":
        made = eager_slots.expand_slots(latent, weights, kv_heads, norm_eps, noise, row)
    elif backend == "triton" and is_plain(latent) and not needs_grad(latent, *own):
        made = undispatched(library.run_expand_slots, arguments)
    else:
        made = library.expand_slots(*arguments)
    return [(pair[0], pair[1]) for pair in made.unbind(0)]


def _serving(like: Tensor, slots: int, width: int | None = None, hidden: int | None = None) -> str:
    """The back end, or its error, before anything runs. A compiled graph chooses when it runs, not when traced."""
    return "compiled" if torch.compiler.is_compiling() else library.backend_of(like, slots, width, hidden)
