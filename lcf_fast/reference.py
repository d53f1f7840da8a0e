"""The eager reference: what Latent Cache Flow computes, in a few readable lines an op.

Everything else in this package (the Triton kernels, the fast CPU path) is held against these functions. They take any
float dtype; in float64 they are the truth. Products run in the cache's own dtype; the latent, the softmax, the
sigmoid and the residual add run in float32 (float64 for float64 inputs). They favour clarity: they concatenate, they
loop over spans, they compute what a closed gate then throws away.

Source: Rossi, Raghunath, Wu, "Latent Cache Flow", arXiv 2605.22863v2; slots are this package's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .noise import TrainingNoise

Pair = tuple[Tensor, Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of latents, norms and softmax: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flatten_heads(cache: Tensor) -> Tensor:
    """``(B, H, N, D)`` to ``(B, N, H*D)``, heads head-major."""
    return cache.transpose(1, 2).flatten(2)


def rms_norm(z: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, with a learned scale."""
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * scale


def gather_rows(cache: Tensor, sharer_index: Tensor) -> Tensor:
    """Rows of ``(B, H, M, D)`` that ``sharer_index (B, N)`` names, as ``(B, H, N, D)``; -1 reads row 0, or zeros."""
    if not cache.shape[2]:
        return cache.new_zeros(*cache.shape[:2], sharer_index.shape[1], cache.shape[3])
    rows = sharer_index.long().clamp_min(0)[:, None, :, None]
    return cache.gather(2, rows.expand(-1, cache.shape[1], -1, cache.shape[3]))


def edited_rows(sharer_index: Tensor | None, edit_mask: Tensor | None) -> Tensor | None:
    """``(B, N)``, True where a position has a sharer's row and is not masked; None: everywhere."""
    aligned = None if sharer_index is None else sharer_index >= 0
    if edit_mask is None:
        return aligned
    return edit_mask != 0 if aligned is None else aligned & (edit_mask != 0)


@without_autocast
def joint_projection(
    sharer_key: Tensor | None,
    sharer_value: Tensor | None,
    receiver_key: Tensor,
    receiver_value: Tensor,
    weights: Mapping[str, Tensor],
    *,
    sharer_index: Tensor | None = None,
    message: Tensor | None = None,
    edit_mask: Tensor | None = None,
    norm_eps: float = 1e-6,
    noise: TrainingNoise | None = None,
    layer: int = 0,
) -> Tensor:
    """Project keys and values of both models together into the bottleneck (paper section 3; spec section 2).

    ``x = concat(S_K, S_V, R_K, R_V)``, ``z = W_down x + b_down``, then for each block
    ``z = z + W_out · gelu(W_in · rmsnorm(z))``.

    Args:
        sharer_key, sharer_value: ``(B, Hs, M, Ds)``, one layer's cache; ``M = N`` without ``sharer_index``.
            ``None`` with ``message``.
        receiver_key, receiver_value: ``(B, Hr, N, Dr)``.
        weights: one layer's ``down_weight (d, 2Cs+2Cr)``, ``down_bias (d)``, ``norm_weight (blocks, d)``,
            ``ffn_in_weight (blocks, 4d, d)``, ``ffn_out_weight (blocks, d, 4d)``.
        sharer_index: ``(B, N)`` int, the sharer's row for each receiver position. -1: none; that latent row is zero.
        message: ``(B, d)``, LCF-X: the sharer's whole part ``W_down[:, :2Cs]·[K*;V*] + b_down``.
        edit_mask: ``(B, N)``, zero where the latent is not needed; that row is zero, too.
        norm_eps: epsilon of the norm.
        noise: dropout on what each block adds, as in training; ``layer``: the row that its numbers are drawn for.

    Returns:
        The latent ``z (B, N, d)``, float32 (float64 for float64 caches).
    """
    dtype = receiver_key.dtype
    accumulate = accumulation_dtype(dtype)
    down = weights["down_weight"].to(dtype)
    x = torch.cat([flatten_heads(receiver_key), flatten_heads(receiver_value)], -1)
    if message is None:
        assert sharer_key is not None and sharer_value is not None
        if sharer_index is not None:
            sharer_key, sharer_value = gather_rows(sharer_key, sharer_index), gather_rows(sharer_value, sharer_index)
        x = torch.cat([flatten_heads(sharer_key).to(dtype), flatten_heads(sharer_value).to(dtype), x], -1)
    edited = edited_rows(sharer_index, edit_mask)
    if edited is not None:  # zeros from the start: padding may hold NaN, and so would the gradient, zero times NaN
        x = x.masked_fill(~edited[..., None], 0.0)
    if message is None:
        z = F.linear(x, down, weights["down_bias"].to(dtype)).to(accumulate)
    else:
        z = F.linear(x, down[:, down.shape[1] - x.shape[2] :]).to(accumulate) + message.to(accumulate)[:, None]
    if edited is not None:  # the blocks have no biases: zero stays zero
        z = z.masked_fill(~edited[..., None], 0.0)
    blocks = zip(weights["norm_weight"], weights["ffn_in_weight"], weights["ffn_out_weight"])
    for block, (scale, w_in, w_out) in enumerate(blocks):
        hidden = F.gelu(F.linear(rms_norm(z, scale.to(accumulate), norm_eps).to(dtype), w_in.to(dtype)))
        added = F.linear(hidden, w_out.to(dtype)).to(accumulate)
        if noise is not None and noise.threshold:
            shape = (z.shape[0], z.shape[1], z.shape[2])
            added = torch.where(noise.keep(layer, block, shape, z.device), added * noise.keep_scale, 0.0)
        z = z + added
    return z


@without_autocast
def attention_pool(
    key: Tensor,
    value: Tensor,
    span_query: Tensor,
    global_query: Tensor,
    span_offsets: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> Pair:
    """Pool a whole cache to one key and one value a head, in two stages (paper section 4; spec section 4).

    Within a span, ``a = softmax(q_span·K / sqrt(D))`` weighs its keys and values alike; across spans,
    ``b = softmax(q_global·K~ / sqrt(D))``.

    Args:
        key, value: ``(B, H, N, D)``, one layer's cache.
        span_query, global_query: ``(H, D)``.
        span_offsets: ``(B, P+1)`` int, non-decreasing: span ``p`` is tokens ``[offsets[p], offsets[p+1])``. An
            empty span weighs nothing. ``(B, T, P+1)``: T tracks of spans; spans of different tracks may overlap, and
            a token counts in each of its spans.
        attention_mask: ``(B, N)``, zero where the token is padding, which is not pooled; ``(B, T, N)``: a track's own.

    Returns:
        ``K*, V*``, each ``(B, H, D)`` in the cache's dtype. A row whose spans are all empty gives NaN (``lcf_fast.ops``
        refuses it).
    """
    accumulate = accumulation_dtype(key.dtype)
    k, v = key.to(accumulate), value.to(accumulate)
    scale = key.shape[-1] ** -0.5
    scores = torch.einsum("bhnd,hd->bhn", k, span_query.to(accumulate)) * scale
    pooled_keys, pooled_values = [], []
    tracked = span_offsets if span_offsets.dim() == 3 else span_offsets[:, None]
    if attention_mask is not None:
        per_track = attention_mask if attention_mask.dim() == 3 else attention_mask[:, None]
        attention_mask = per_track.expand(-1, tracked.shape[1], -1)
    for b, tracks in enumerate(tracked.tolist()):
        summaries = []
        for track, offsets in enumerate(tracks):
            for start, stop in zip(offsets, offsets[1:]):
                tokens = torch.arange(start, stop, device=key.device)
                if attention_mask is not None:
                    tokens = tokens[attention_mask[b, track, start:stop] != 0]
                if len(tokens):
                    a = scores[b, :, tokens].softmax(-1)[..., None]
                    summaries.append(((a * k[b, :, tokens]).sum(1), (a * v[b, :, tokens]).sum(1)))
        if not summaries:
            pooled_keys.append(k.new_full((k.shape[1], k.shape[3]), torch.nan))
            pooled_values.append(pooled_keys[-1])
            continue
        span_key, span_value = (torch.stack(part, 1) for part in zip(*summaries))  # (H, P, D)
        weight = (torch.einsum("hpd,hd->hp", span_key, global_query.to(accumulate)) * scale).softmax(-1)[..., None]
        pooled_keys.append((weight * span_key).sum(1))
        pooled_values.append((weight * span_value).sum(1))
    if not pooled_keys:
        empty = k.new_empty(0, k.shape[1], k.shape[3]).to(key.dtype)
        return empty, empty.clone()
    return torch.stack(pooled_keys).to(key.dtype), torch.stack(pooled_values).to(key.dtype)


@without_autocast
def gated_injection(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    edit_mask: Tensor | None = None,
    noise: TrainingNoise | None = None,
    layer: int = 0,
) -> Pair:
    """Edit one receiver layer: ``R_i + gate_i · sigmoid(W_a z + b_a) · (W_up z_i + b_up)``, i in K, V (spec section 2).

    Args:
        receiver_key, receiver_value: ``(B, H, N, D)``.
        latent: ``(B, N, d)``; its first half makes the key's edit, its second half the value's.
        weights: one layer's ``up_weight (2, C, d/2)``, ``up_bias (2, C)``, ``head_gate_weight (2, H, d)``,
            ``head_gate_bias (2, H)``, ``gate_logit (2)``; a logit that is not above zero closes its gate.
        edit_mask: ``(B, N)``, zero where the position must stay as it is.
        noise: soft gates, as in training; ``layer``: the row that its numbers are drawn for.

    Returns:
        New key and value, shaped and typed as the given ones.
    """
    dtype = receiver_key.dtype
    accumulate = accumulation_dtype(dtype)
    z = latent.to(dtype)
    if edit_mask is not None:
        z = z.masked_fill((edit_mask == 0)[..., None], 0.0)
    edited = []
    for i, (cache, z_half) in enumerate(zip((receiver_key, receiver_value), z.chunk(2, -1))):
        delta = F.linear(z_half, weights["up_weight"][i].to(dtype), weights["up_bias"][i].to(dtype))
        delta = delta.unflatten(-1, (cache.shape[1], cache.shape[3])).transpose(1, 2)
        score = F.linear(z, weights["head_gate_weight"][i].to(dtype), weights["head_gate_bias"][i].to(dtype))
        alpha = score.to(accumulate).sigmoid().transpose(1, 2)[..., None]
        keep = weights["gate_logit"][i] > 0
        if noise is not None:
            shape = (cache.shape[0], cache.shape[2], cache.shape[1])
            gate = noise.gate(layer, i, weights["gate_logit"][i].to(accumulate), shape)
            alpha = alpha * gate.transpose(1, 2)[..., None]
            keep = torch.ones_like(keep)
        result = (cache.to(accumulate) + alpha * delta.to(accumulate)).to(dtype)
        if edit_mask is not None:
            keep = keep & (edit_mask != 0)[:, None, :, None]
        edited.append(torch.where(keep, result, cache))
    return edited[0], edited[1]


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
    """The naive whole: `joint_projection` and `gated_injection`, layer by layer (spec sections 2 and 4).

    Args:
        sharer, receiver: one ``(key, value)`` a kept layer, in kept-layer order; ``sharer`` is ``None`` with a message.
        weights: the adapter's stacked parameters, axis 0 = kept layers.
        live: ignored here: the reference reads ``gate_logit``.
        sharer_index, edit_mask: as in the two ops; a position that is masked out or has no sharer row stays as it is.
        message: ``(L, B, d)``, LCF-X.
        positions: half-open range of receiver positions to edit; ``None`` is all.
        norm_eps: epsilon of the norm.
        noise: dropout and soft gates, as in training.

    Returns:
        New ``(key, value)`` a layer.
    """
    batch, _, length, _ = receiver[0][0].shape
    mask = edited_rows(sharer_index, edit_mask)
    if positions is not None and positions != (0, length):
        token = torch.arange(length, device=receiver[0][0].device)
        inside = (token >= positions[0]) & (token < positions[1])
        mask = inside.expand(batch, length) if mask is None else mask & inside
    fused = []
    for layer, (receiver_key, receiver_value) in enumerate(receiver):
        one = {name: stacked[layer] for name, stacked in weights.items()}
        sharer_key, sharer_value = sharer[layer] if sharer is not None else (None, None)
        latent = joint_projection(
            sharer_key,
            sharer_value,
            receiver_key,
            receiver_value,
            one,
            sharer_index=sharer_index if message is None else None,
            message=None if message is None else message[layer],
            edit_mask=mask,
            norm_eps=norm_eps,
            noise=noise,
            layer=layer,
        )
        edited = gated_injection(receiver_key, receiver_value, latent, one, edit_mask=mask, noise=noise, layer=layer)
        fused.append(edited)
    return fused


@without_autocast
def summarize_layers(
    sharer: Sequence[Pair],
    weights: Mapping[str, Tensor],
    span_offsets: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool every layer and fold it through the sharer's half of ``W_down`` (spec section 4).

    Returns:
        ``latent (L, B, d)``: ``c = W_down[:, :2Cs]·[K*;V*] + b_down``, and ``summary (L, 2, B, Hs, Ds)``: ``K*`` and
        ``V*``. Both float32 (float64 for float64 caches).
    """
    latents, summaries = [], []
    for layer, (key, value) in enumerate(sharer):
        accumulate = accumulation_dtype(key.dtype)
        pooled = attention_pool(
            key.to(accumulate),
            value.to(accumulate),
            weights["span_query"][layer],
            weights["global_query"][layer],
            span_offsets,
            attention_mask=attention_mask,
        )
        summary = torch.stack(pooled)
        flat = summary.flatten(2).transpose(0, 1).flatten(1)  # (B, 2Cs): K* then V*, heads head-major
        down = weights["down_weight"][layer].to(accumulate)
        latents.append(F.linear(flat, down[:, : flat.shape[1]], weights["down_bias"][layer].to(accumulate)))
        summaries.append(summary)
    return torch.stack(latents), torch.stack(summaries)


# --- slots
# ---------------------------------------------------------------------


@without_autocast
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
            tokens of each item, which may overlap, pooled each by itself. There are R = B·P rows then, else B: row
            b·P + p is group p of item b.
        return_weights: whether the third result is returned, too.

    Returns:
        ``K~, V~``, each ``(R, k, H, D)`` in the cache's dtype; and the weights ``(R, k, H, N)``, float32 (float64 for
        float64 caches), 0 at padding. A row without a token gives NaN (``lcf_fast.ops`` refuses it).
    """
    accumulate = accumulation_dtype(key.dtype)
    scores = torch.einsum("khd,bhnd->bkhn", slot_query.to(accumulate), key.to(accumulate)) * key.shape[-1] ** -0.5
    groups = 1 if attention_mask is None or attention_mask.dim() == 2 else attention_mask.shape[1]
    masks = None if attention_mask is None else attention_mask.reshape(-1, key.shape[2])
    weights = scores.new_zeros((groups * scores.shape[0], *scores.shape[1:]))
    slot_key = scores.new_full((*weights.shape[:3], key.shape[3]), torch.nan)
    slot_value = slot_key.clone()
    for row in range(weights.shape[0]):
        b = row // groups
        tokens = torch.arange(key.shape[2], device=key.device)
        if masks is not None:
            tokens = tokens[masks[row] != 0]
        if not len(tokens):
            continue
        a = scores[b, :, :, tokens].softmax(-1)
        weights[row, :, :, tokens] = a
        slot_key[row] = torch.einsum("khn,hnd->khd", a, key[b, :, tokens].to(accumulate))
        slot_value[row] = torch.einsum("khn,hnd->khd", a, value[b, :, tokens].to(accumulate))
    pooled = slot_key.to(key.dtype), slot_value.to(key.dtype)
    return (*pooled, weights) if return_weights else pooled


@without_autocast
def fold_slots(slot_key: Tensor, slot_value: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The message of one layer's slots: ``c_j = W_down·[K~_j; V~_j] + b_down + slot_embedding_j``.

    Args:
        slot_key, slot_value: ``(B, k, Hs, Ds)``.
        weights: one layer's ``down_weight (d, 2Cs)``, ``down_bias (d)``, ``slot_embedding (at least k, d)``, of which
            the first k are used.

    Returns:
        The latent ``(B, k, d)``, float32 (float64 for float64 slots).
    """
    accumulate = accumulation_dtype(slot_key.dtype)
    flat = torch.cat([slot_key.flatten(2), slot_value.flatten(2)], -1).to(accumulate)
    latent = F.linear(flat, weights["down_weight"].to(accumulate), weights["down_bias"].to(accumulate))
    return latent + weights["slot_embedding"][: slot_key.shape[1]].to(accumulate)


@without_autocast
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

    ``z = c``, then for each block ``z = z + W_out · gelu(W_in · rmsnorm(z))``; ``W_up[0] z + b`` is the key,
    ``W_up[1] z + b`` the value: both read all of z.

    Args:
        latent: ``(B, k, d)``.
        weights: one layer's ``norm_weight (blocks, d)``, ``ffn_in_weight (blocks, 4d, d)``, ``ffn_out_weight (blocks,
            d, 4d)``, ``up_weight (2, Cr, d)``, ``up_bias (2, Cr)``.
        kv_heads: Hr, the receiver's.
        norm_eps: epsilon of the norm.
        noise: dropout on what each block adds, as in training; ``layer``: the row that its numbers are drawn for.

    Returns:
        Key and value ``(B, Hr, k, Dr)``, float32 (float64 for a float64 latent).
    """
    accumulate = accumulation_dtype(latent.dtype)
    z = latent.to(accumulate)
    blocks = zip(weights["norm_weight"], weights["ffn_in_weight"], weights["ffn_out_weight"])
    for block, (scale, w_in, w_out) in enumerate(blocks):
        hidden = F.gelu(F.linear(rms_norm(z, scale.to(accumulate), norm_eps), w_in.to(accumulate)))
        added = F.linear(hidden, w_out.to(accumulate))
        if noise is not None and noise.threshold:
            shape = (z.shape[0], z.shape[1], z.shape[2])
            added = torch.where(noise.keep(layer, block, shape, z.device), added * noise.keep_scale, 0.0)
        z = z + added
    made = []
    for i in (0, 1):
        flat = F.linear(z, weights["up_weight"][i].to(accumulate), weights["up_bias"][i].to(accumulate))
        made.append(flat.unflatten(-1, (kv_heads, -1)).transpose(1, 2))
    return made[0], made[1]


def summarize_slots_layers(
    sharer: Sequence[Pair], weights: Mapping[str, Tensor], *, attention_mask: Tensor | None = None
) -> Tensor:
    """Pool every layer's sharer cache to slots and fold them: the latent ``(L, B, k, d)``, float32 (or float64).

    Args:
        sharer: one ``(key, value)``, ``(B, Hs, N, Ds)`` each, a receiver layer.
        weights: stacked ``slot_query (L, k, Hs, Ds)`` and what `fold_slots` reads, axis 0 = receiver layers.
        attention_mask: ``(B, N)``, zero at padding; or ``(B, P, N)``, groups of tokens as in `slot_pool`: the latent is
            ``(L, B, P·k, d)``, the k slots of a group side by side.
    """
    latents = []
    for layer, (key, value) in enumerate(sharer):
        accumulate = accumulation_dtype(key.dtype)
        one = {name: stacked[layer] for name, stacked in weights.items()}
        pooled = slot_pool(
            key.to(accumulate), value.to(accumulate), one["slot_query"], attention_mask=attention_mask
        )
        latents.append(fold_slots(pooled[0], pooled[1], one))
    latent = torch.stack(latents)
    if attention_mask is not None and attention_mask.dim() == 3:
        latent = latent.unflatten(1, tuple(attention_mask.shape[:2])).flatten(2, 3)
    return latent


def expand_slots_layers(
    latent: Tensor,
    weights: Mapping[str, Tensor],
    *,
    kv_heads: int,
    norm_eps: float = 1e-6,
    noise: TrainingNoise | None = None,
) -> list[Pair]:
    """`expand_slots` of every layer: ``latent (L, B, k, d)`` to one ``(B, Hr, k, Dr)`` key and value a layer."""
    expanded = []
    for layer, one in enumerate(latent):
        own = {name: stacked[layer] for name, stacked in weights.items()}
        expanded.append(expand_slots(one, own, kv_heads=kv_heads, norm_eps=norm_eps, noise=noise, layer=layer))
    return expanded
