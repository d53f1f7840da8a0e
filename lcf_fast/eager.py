"""The eager back end: the reference's formulas in plain torch, arranged for speed. For CPUs first, right on any device.

Same functions and signatures as `lcf_fast.reference`, which documents the arguments. What differs is the cost:

- A tile of token rows of some consecutive layers is worked on at a time. Its caches are packed, head-major, into one
  reused buffer (no concatenation, no fresh memory), and each product is one batched matmul over those layers: few
  tokens put all layers into one call, many tokens put one layer on each core.
- Positions that no edit can reach are neither read nor computed. A closed gate costs nothing, and its tensor is
  returned as it is.
- LCF-X: the sharer's part of the down projection arrives as one vector a layer, the start value of the sum.

In place and out of place run the same operations, so they give the same bits; what is not edited is not written.
In place runs in inference mode: tensors that were made there take an edit nowhere else, and others take it there, too.
Nothing here is differentiable or checks its arguments: `lcf_fast.ops` sees to both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .eager_pooling import attention_pool, summarize_layers
from .eager_tiles import Tile, Workspace, cut_tiles, group_layers, operand_dtype, tile_rows, uncovered
from .reference import Pair, accumulation_dtype

__all__ = [
    "attention_pool",
    "fuse_layers",
    "fuse_layers_",
    "gated_injection",
    "gated_injection_",
    "joint_projection",
    "summarize_layers",
]

_MATRICES = ("down_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "head_gate_weight")
_VECTORS = ("down_bias", "norm_weight", "up_bias", "head_gate_bias")


def _cast(weights: Mapping[str, Tensor], layers: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """Some layers' weights: matrices as operands, vectors in the accumulator's dtype. No copy where they are that."""
    matrices = {name: weights[name][layers].to(dtype) for name in _MATRICES if name in weights}
    vectors = {name: weights[name][layers].to(accumulation_dtype(dtype)) for name in _VECTORS if name in weights}
    return matrices | vectors


def _add_product(space: Workspace, total: Tensor, x: Tensor, matrix: Tensor) -> None:
    """``total += x · matrix``, batched; ``total`` may be of a wider dtype."""
    if total.dtype == x.dtype:
        total.baddbmm_(x, matrix)
    else:
        total += torch.bmm(x, matrix, out=space("product", total.shape, x.dtype))


def _project(
    space: Workspace,
    sources: Sequence[Sequence[Tensor]],
    weights: Mapping[str, Tensor],
    message: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The latent ``(G, rows, d)`` of a tile in ``G`` layers, in the accumulator's dtype.

    Args:
        sources: the parts of ``x`` in the order of their channels: for each, one ``(items, H, tokens, D)`` a layer.
        message: ``(G, items, d)`` in place of the sharer's parts.
        dtype: the operands'.
    """
    layers, (items, _, tokens, _) = len(sources[0]), sources[0][0].shape
    rows = items * tokens
    channels = sum(part[0].shape[1] * part[0].shape[3] for part in sources)
    x = space("x", (layers, rows, channels), dtype)
    column = 0
    for part in sources:
        _, heads, _, dim = part[0].shape
        columns = x[:, :, column : column + heads * dim].view(layers, items, tokens, heads, dim)
        for target, source in zip(columns.transpose(2, 3).unbind(0), part):
            target.copy_(source)
        column += heads * dim

    down = weights["down_weight"]
    accumulate = accumulation_dtype(dtype)
    z = space("z", (layers, rows, down.shape[1]), accumulate)
    if message is None:
        z.copy_(weights["down_bias"][:, None].expand_as(z))
    else:
        z.view(layers, items, tokens, -1).copy_(message[:, :, None].expand(-1, -1, tokens, -1))
    _add_product(space, z, x, down[:, :, down.shape[2] - channels :].mT)

    for block in range(weights["norm_weight"].shape[1]):
        normed = torch.mul(z, z, out=space("normed", z.shape, accumulate))
        scale = normed.sum(-1, keepdim=True).div_(z.shape[2]).add_(norm_eps).rsqrt_()
        torch.mul(z, scale, out=normed).mul_(weights["norm_weight"][:, block, None])
        w_in, w_out = weights["ffn_in_weight"][:, block], weights["ffn_out_weight"][:, block]
        hidden = torch.bmm(normed.to(dtype), w_in.mT, out=space("hidden", (layers, rows, w_in.shape[1]), dtype))
        _add_product(space, z, torch.ops.aten.gelu_(hidden), w_out.mT)
    return z


def _inject(
    space: Workspace,
    z: Tensor,
    halves: Sequence[int],
    receiver: Sequence[Sequence[Tensor]],
    out: Sequence[Sequence[Tensor]],
    weights: Mapping[str, Tensor],
    keep: Tensor | None,
) -> None:
    """Write a tile's edited keys (half 0) and values (half 1).

    Args:
        z: ``(G, rows, d)``, operands' dtype.
        halves: those whose gate is open.
        receiver, out: for each of ``halves`` one ``(items, H, tokens, D)`` view a layer; in place, the same objects.
        keep: ``(items, tokens)`` bool. Where it is False, ``out`` becomes ``receiver``, bit for bit.
    """
    layers, rows, width = z.shape
    items, heads, tokens, dim = receiver[0][0].shape
    gate, bias = weights["head_gate_weight"], weights["head_gate_bias"]
    if len(halves) == 1:
        only = slice(halves[0], halves[0] + 1)
        gate, bias = gate[:, only], bias[:, only]
    score = space("score", (layers, rows, len(halves) * heads), accumulation_dtype(z.dtype))
    score.copy_(bias.flatten(1)[:, None].expand_as(score))
    _add_product(space, score, z, gate.flatten(1, 2).mT)
    alpha = score.sigmoid_().view(layers, items, tokens, len(halves), heads).permute(3, 0, 1, 4, 2)[..., None]
    if keep is not None:
        keep = keep[:, None, :, None]
    for at, half in enumerate(halves):
        z_half = z[..., half * (width // 2) : (half + 1) * (width // 2)]
        # Filled with the bias and added to: baddbmm's three-argument form takes 1.6 times as long.
        delta = space("delta", (layers, rows, heads * dim), z.dtype)
        delta.copy_(weights["up_bias"][:, half, None].expand_as(delta))
        delta.baddbmm_(z_half, weights["up_weight"][:, half].mT)
        by_head = delta.view(layers, items, tokens, heads, dim).transpose(2, 3)
        for old, new, a, change in zip(receiver[at], out[at], alpha[at].unbind(0), by_head.unbind(0)):
            if keep is None:
                torch.addcmul(old, a, change, out=new)
            else:
                edited = torch.addcmul(old, a, change, out=space("edited", old.shape, old.dtype))
                torch.where(keep, edited, old, out=new)


def _sharer_rows(tile: Tile, sharer_index: Tensor | None, sharer_tokens: int) -> slice | Tensor:
    """The sharer's rows that a tile reads: a range, or an index ``(items, tokens)`` where they are none.

    An index that only masks, or shifts, is a range, and nothing is gathered. Only on a CPU is it looked at.
    """
    if sharer_index is None:
        return tile.tokens
    index = sharer_index[tile.items, tile.tokens].long()
    if index.device.type == "cpu":
        shift = index - torch.arange(index.shape[1], device=index.device)
        if tile.keep is not None:
            shift = shift[tile.keep]
        start = int(shift.flatten()[0])  # cut_tiles leaves no tile without a row that counts
        if 0 <= start <= sharer_tokens - index.shape[1] and bool((shift == start).all()):
            return slice(start, start + index.shape[1])
    return index.clamp_min(0)


def _read_sharer(sharer: Sequence[Pair], items: slice, rows: slice | Tensor) -> list[list[Tensor]]:
    """A tile's part of the sharer's keys and values: for each, one ``(items, H, tokens, D)`` a layer."""
    if isinstance(rows, slice):
        return [[pair[half][items, :, rows] for pair in sharer] for half in (0, 1)]
    item = torch.arange(len(rows), device=rows.device)[:, None]
    # Advanced indices that do not touch put their axes first: (items, tokens, H, D), each row copied whole.
    return [[pair[half][items][item, :, rows].transpose(1, 2) for pair in sharer] for half in (0, 1)]


def _fresh(receiver: Sequence[Pair], live: Sequence[tuple[bool, bool]], tiles: Sequence[Tile]) -> list[Pair]:
    """New tensors where a gate is open, filled in where no tile will write; elsewhere the given ones."""
    batch, _, length, _ = receiver[0][0].shape
    gaps = uncovered(tiles, batch, length)

    def fresh(old: Tensor, is_open: bool) -> Tensor:
        if not is_open:
            return old
        new = torch.empty(old.shape, dtype=old.dtype, device=old.device)
        for items, tokens in gaps:
            new[items, :, tokens] = old[items, :, tokens]
        return new

    return [(fresh(key, opened[0]), fresh(value, opened[1])) for (key, value), opened in zip(receiver, live)]


def _fuse(
    sharer: Sequence[Pair] | None,
    receiver: Sequence[Pair],
    weights: Mapping[str, Tensor],
    live: Sequence[tuple[bool, bool]] | None,
    sharer_index: Tensor | None,
    message: Tensor | None,
    edit_mask: Tensor | None,
    positions: tuple[int, int] | None,
    norm_eps: float,
    in_place: bool,
) -> list[Pair]:
    if not receiver:
        return []
    if live is None:
        live = [(gates[0], gates[1]) for gates in (weights["gate_logit"] > 0).tolist()]
    cache = receiver[0][0]
    batch, _, length, _ = cache.shape
    device = cache.device
    mask = None if edit_mask is None else edit_mask != 0
    if sharer_index is not None:
        aligned = sharer_index >= 0
        mask = aligned if mask is None else mask & aligned
    tiles = cut_tiles(mask, batch, positions or (0, length), tile_rows(device), device)
    out = [(key, value) for key, value in receiver] if in_place else _fresh(receiver, live, tiles)
    if not tiles:
        return out

    dtype = operand_dtype(cache.dtype, device)
    space = Workspace(device)
    rows = [_sharer_rows(tile, sharer_index, sharer[0][0].shape[2]) if sharer else None for tile in tiles]
    for layers in group_layers(live, tiles, device):
        halves = [half for half in (0, 1) if live[layers.start][half]]
        cast = _cast(weights, layers, dtype)
        for tile, read in zip(tiles, rows):
            region = (tile.items, slice(None), tile.tokens)
            sources = _read_sharer(sharer[layers], tile.items, read) if sharer and read is not None else []
            old = [[pair[half][region] for pair in receiver[layers]] for half in (0, 1)]
            start = None if message is None else message[layers, tile.items]
            z = _project(space, [*sources, *old], cast, start, norm_eps, dtype)
            old = [old[half] for half in halves]
            new = old if in_place else [[pair[half][region] for pair in out[layers]] for half in halves]
            _inject(space, z.to(dtype), halves, old, new, cast, tile.keep)
    return out


def _one_layer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[None] for name, tensor in weights.items()}


@torch.no_grad()
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
    """As `lcf_fast.reference.joint_projection`: the latent ``(B, N, d)``, float32 (float64 for float64 caches)."""
    batch, _, length, _ = receiver_key.shape
    device = receiver_key.device
    dtype = operand_dtype(receiver_key.dtype, device)
    shape = (batch, length, weights["down_weight"].shape[0])
    latent = torch.zeros(shape, dtype=accumulation_dtype(dtype), device=device)
    mask = None if sharer_index is None else sharer_index >= 0
    space = Workspace(device)
    cast = _cast(_one_layer(weights), slice(0, 1), dtype)
    for tile in cut_tiles(mask, batch, (0, length), tile_rows(device), device):
        region = (tile.items, slice(None), tile.tokens)
        sources = [[receiver_key[region]], [receiver_value[region]]]
        if sharer_key is not None and sharer_value is not None:
            rows = _sharer_rows(tile, sharer_index, sharer_key.shape[2])
            sources = _read_sharer([(sharer_key, sharer_value)], tile.items, rows) + sources
        start = None if message is None else message[None, tile.items]
        z = _project(space, sources, cast, start, norm_eps, dtype).view(*tile.shape, -1)
        target = latent[tile.items, tile.tokens]
        if tile.keep is None:
            target.copy_(z)
        else:
            torch.where(tile.keep[..., None], z, target, out=target)
    return latent


def _inject_one(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    edit_mask: Tensor | None,
    in_place: bool,
) -> Pair:
    pair = (receiver_key, receiver_value)
    live = tuple((weights["gate_logit"] > 0).tolist())
    halves = [half for half in (0, 1) if live[half]]
    batch, _, length, _ = receiver_key.shape
    device = receiver_key.device
    dtype = operand_dtype(receiver_key.dtype, device)
    mask = None if edit_mask is None else edit_mask != 0
    tiles = cut_tiles(mask, batch, (0, length), tile_rows(device), device) if halves else []
    out = pair if in_place else _fresh([pair], [(live[0], live[1])], tiles)[0]
    space = Workspace(device)
    cast = _cast(_one_layer(weights), slice(0, 1), dtype) if tiles else {}
    for tile in tiles:
        region = (tile.items, slice(None), tile.tokens)
        old = [[pair[half][region]] for half in halves]
        new = old if in_place else [[out[half][region]] for half in halves]
        z = latent[tile.items, tile.tokens].to(dtype).reshape(1, -1, latent.shape[2])
        _inject(space, z, halves, old, new, cast, tile.keep)
    return out


@torch.no_grad()
def gated_injection(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    edit_mask: Tensor | None = None,
) -> Pair:
    """As `lcf_fast.reference.gated_injection`; a closed gate's tensor is returned as it is."""
    return _inject_one(receiver_key, receiver_value, latent, weights, edit_mask, in_place=False)


@torch.inference_mode()
def gated_injection_(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    edit_mask: Tensor | None = None,
) -> Pair:
    """`gated_injection` in place: writes into the given tensors, through views too, and returns them."""
    return _inject_one(receiver_key, receiver_value, latent, weights, edit_mask, in_place=True)


@torch.no_grad()
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
) -> list[Pair]:
    """As `lcf_fast.reference.fuse_layers`; a closed gate's tensor is returned as it is.

    Args:
        live: which of a layer's two gates are open, K then V; ``None`` reads ``gate_logit``, which waits for a device.
    """
    return _fuse(sharer, receiver, weights, live, sharer_index, message, edit_mask, positions, norm_eps, False)


@torch.inference_mode()
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
    """`fuse_layers` in place: writes into the receiver's tensors, through views too, and returns them."""
    return _fuse(sharer, receiver, weights, live, sharer_index, message, edit_mask, positions, norm_eps, True)
