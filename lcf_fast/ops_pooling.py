"""The public functions of pooling; `lcf_fast.ops` exports them.

Whole contexts (`attention_pool`, `summarize_layers`) and pieces of one: `pool_range` makes a piece's state, of fixed
size; `merge_ranges` joins those of neighbours; `finish_ranges` makes the summary, `fold_summary` the message of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import checks as check
from . import eager_ranges
from . import library_pooling as library
from .autocast import without_autocast
from .backends import resolve
from .dispatch import is_plain, needs_grad, served_by, undispatched
from .errors import DTypeError, GeometryError, ShapeError
from .layouts import Layers, Layout

Pair = tuple[Tensor, Tensor]


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

    Args:
        key, value: ``(B, H, N, D)``, one layer's cache.
        span_query, global_query: ``(H, D)``.
        span_offsets: ``(B, P+1)`` int, non-decreasing: span ``p`` is tokens ``[offsets[p], offsets[p+1])``; an empty
            span weighs nothing, a row with no token to pool is an error. ``(B, T, P+1)``: T tracks of spans that may
            overlap those of other tracks; a token counts in each of its spans.
        attention_mask: ``(B, N)``, zero where the token is padding: it is not pooled. ``(B, T, N)``: a track's own.

    Returns:
        ``K*, V*``, each ``(B, H, D)`` in the cache's dtype; softmax and sums run in float32.

    Raises:
        ShapeError, DTypeError, DeviceError, SpanError, BackendError: named by argument.
    """
    check.check_pair(key, value, ("key", "value"))
    batch, heads, tokens, head_dim = key.shape
    queries = {"span_query": span_query, "global_query": global_query}
    for name, query in queries.items():
        _check_query(name, query, (heads, head_dim), key.device)
    check.check_offsets(span_offsets, batch, tokens, attention_mask)
    served_by(key.device, key.dtype)
    offsets, mask = _on_device(span_offsets, attention_mask, key.device)
    arguments = (key, value, span_query, global_query, offsets, mask)
    if not is_plain(key):
        return library.attention_pool(*arguments)
    if not needs_grad(*arguments[:4]):
        return undispatched(library.run_attention_pool, arguments)
    return library.attention_pool(*arguments)


def _check_query(name: str, query: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check.check_tensor(name, query)
    if tuple(query.shape) != shape:
        raise ShapeError(name, expected=f"{shape}", got=check.describe(query))
    if query.dtype not in check.FLOATS:
        raise DTypeError(name, expected="a float dtype", got=check.describe(query))
    if query.device != device:
        raise check.DeviceError(name, expected=f"{device}, as the cache", got=str(query.device))


def _on_device(
    span_offsets: Tensor, attention_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    offsets = check.as_int32(span_offsets, device).contiguous()
    if attention_mask is None:
        return offsets, None
    return offsets, attention_mask.to(device, non_blocking=True) != 0


def summarize_layers(
    sharer: Sequence[Pair],
    weights: Mapping[str, Tensor],
    span_offsets: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool every kept layer's sharer cache and fold it through the sharer's half of ``W_down`` (spec section 4).

    Args:
        sharer: one ``(key, value)``, ``(B, Hs, N, Ds)`` each, a kept layer.
        weights: stacked ``span_query``, ``global_query (L, Hs, Ds)``, ``down_weight (L, d, 2Cs+2Cr)``,
            ``down_bias (L, d)``; other names are ignored.
        span_offsets, attention_mask: as in `attention_pool`.

    Returns:
        ``latent (L, B, d)``: ``c = W_down[:, :2Cs]·[K*;V*] + b_down``; and ``summary (L, 2, B, Hs, Ds)``: K*, V*.
        Both float32 (float64 for float64 caches).

    Raises:
        As `attention_pool`, and GeometryError for weights or layers that do not fit.
    """
    layers, flat, layout = _check_sharer(sharer, weights)
    key = flat[0]
    batch, heads, tokens, head_dim = key.shape
    _check_down(weights, layers, 2 * heads * head_dim, key.device)
    check.check_offsets(span_offsets, batch, tokens, attention_mask)
    served_by(key.device, key.dtype)
    offsets, mask = _on_device(span_offsets, attention_mask, key.device)
    parameters = [weights[name] for name in library.SUMMARY_WEIGHTS]
    if layout is None or not is_plain(key):
        return library.summarize_layers(flat, parameters, offsets, mask)
    if not needs_grad(*parameters) and not (layout.requires_grad and torch.is_grad_enabled()):
        return undispatched(library.summarize_checked, (Layers(flat, layout), parameters, offsets, mask))
    return library.summarize_layers(flat, parameters, offsets, mask)


def _check_sharer(
    sharer: Sequence[Pair], weights: Mapping[str, Tensor]
) -> tuple[int, list[Tensor], Layout | None]:
    """Layers and queries fit; returns the number of layers and what `checks.flat_layers` does."""
    query = check.find_weight(weights, "span_query")
    layers = query.shape[0] if query.dim() else 0
    flat, layout = check.flat_layers("sharer", sharer, layers)
    if not layers:
        raise GeometryError("sharer", expected="at least one layer", got="none")
    key = flat[0]
    for name in ("span_query", "global_query"):
        check.check_weight(weights, name, (layers, key.shape[1], key.shape[3]), key.device)
    return layers, flat, layout


def pool_range(
    sharer: Sequence[Pair],
    weights: Mapping[str, Tensor],
    span_offsets: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> Pair:
    """Pool a piece of a context to its state, which merges with its neighbours' (spec section 4). For inference.

    Args:
        sharer: one ``(key, value)``, ``(B, Hs, N, Ds)`` each, a kept layer: the piece.
        weights: stacked ``span_query``, ``global_query (L, Hs, Ds)``; other names are ignored.
        span_offsets: as in `attention_pool`, counted from the piece's first token. One below 0 or beyond N belongs to a
            span that began before the piece or goes on after it. A row may have no token.
        attention_mask: as in `attention_pool`.

    Returns:
        ``states (L, B, Hs, T, 3, 2, Ds)`` and ``stats (L, B, Hs, T, 8)``, float32 (float64 for float64 caches), of a
        size that does not depend on N: the span that began before, the one that goes on after, and those inside.

    Raises:
        As `summarize_layers`.
    """
    _, flat, _ = _check_sharer(sharer, weights)
    key = flat[0]
    batch, _, tokens, _ = key.shape
    check.check_offsets(span_offsets, batch, tokens, attention_mask, is_piece=True)
    backend = resolve(key.device, key.dtype)
    offsets, mask = _on_device(span_offsets, attention_mask, key.device)
    queries = weights["span_query"], weights["global_query"]
    if backend == "eager" or not tokens:
        return eager_ranges.pool_range(sharer, *queries, offsets, mask)
    from .kernels import pooling

    flat = [library.unit_rows(tensor) for tensor in flat]
    with torch.no_grad():
        return pooling.pool_range(flat[0::2], flat[1::2], *queries, offsets, mask)


def merge_ranges(states: Tensor, stats: Tensor, global_query: Tensor) -> Pair:
    """The state of neighbouring pieces together. Merging is exact and associative: any grouping gives the same.

    Args:
        states, stats: what `pool_range` made, stacked on a new axis 4 in the order of the tokens:
            ``(L, B, Hs, T, R, 3, 2, Ds)`` and ``(L, B, Hs, T, R, 8)``, ``R >= 1``.
        global_query: ``(L, Hs, Ds)``.

    Returns:
        ``states`` and ``stats`` without axis 4.

    Raises:
        ShapeError, DTypeError, DeviceError, BackendError: named by argument.
    """
    _check_states(states, stats, global_query, axes=8)
    if not states.shape[4]:
        raise ShapeError("states", expected="at least one piece on axis 4", got=check.describe(states))
    if resolve(states.device, states.dtype) == "eager":
        return eager_ranges.merge_ranges(states, stats, global_query)
    from .kernels import pooling

    with torch.no_grad():
        return pooling.merge_ranges(states.contiguous(), stats.contiguous(), global_query)


def finish_ranges(states: Tensor, stats: Tensor, global_query: Tensor) -> Tensor:
    """The summary of a whole context from its state: ``K*, V*`` as ``(L, 2, B, Hs, Ds)``; what is open ends here.

    Args:
        states, stats: ``(L, B, Hs, T, 3, 2, Ds)`` and ``(L, B, Hs, T, 8)``.
        global_query: ``(L, Hs, Ds)``.

    Returns:
        float32 (float64 for float64 states); NaN in a row that never had a token.

    Raises:
        As `merge_ranges`.
    """
    _check_states(states, stats, global_query, axes=7)
    if resolve(states.device, states.dtype) == "eager":
        return eager_ranges.finish_ranges(states, stats, global_query)
    from .kernels import pooling

    with torch.no_grad():
        return pooling.finish_ranges(states.contiguous(), stats.contiguous(), global_query)


def _check_states(states: Tensor, stats: Tensor, global_query: Tensor, axes: int) -> None:
    check.check_tensor("states", states)
    check.check_tensor("stats", stats)
    form = "(L, B, H, T, R, 3, 2, D)" if axes == 8 else "(L, B, H, T, 3, 2, D)"
    if states.dim() != axes or tuple(states.shape[-3:-1]) != (3, 2):
        raise ShapeError("states", expected=form, got=check.describe(states))
    if tuple(stats.shape) != (*states.shape[:-3], eager_ranges.STATS):
        expected = f"{(*states.shape[:-3], eager_ranges.STATS)}"
        raise ShapeError("stats", expected=expected, got=check.describe(stats))
    check.check_state_numbers(states, stats)
    check.check_has_memory("states", states)
    layers, _, heads = states.shape[:3]
    _check_query("global_query", global_query, (layers, heads, states.shape[-1]), states.device)


@without_autocast
def fold_summary(summary: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The message of a summary: ``c = W_down[:, :2Cs]·[K*;V*] + b_down`` a layer and item (spec section 4).

    Args:
        summary: ``(L, 2, B, Hs, Ds)`` float.
        weights: stacked ``down_weight (L, d, >= 2Cs)``, ``down_bias (L, d)``; other names are ignored.

    Returns:
        The latent ``(L, B, d)``, float32 (float64 for a float64 summary).

    Raises:
        ShapeError, DTypeError, DeviceError, GeometryError: named by argument.
    """
    check.check_tensor("summary", summary)
    if summary.dim() != 5 or summary.shape[1] != 2:
        raise ShapeError("summary", expected="(L, 2, B, Hs, Ds)", got=check.describe(summary))
    if summary.dtype not in check.FLOATS:
        raise DTypeError("summary", expected="a float dtype", got=check.describe(summary))
    check.check_has_memory("summary", summary)
    layers, columns = summary.shape[0], 2 * summary.shape[3] * summary.shape[4]
    down = _check_down(weights, layers, columns, summary.device)
    dtype = torch.float64 if summary.dtype == torch.float64 else torch.float32
    flat = summary.to(dtype).transpose(1, 2).flatten(2)  # (L, B, 2Cs): K* then V*, heads head-major
    bias = weights["down_bias"].to(dtype)[:, None]
    return torch.baddbmm(bias, flat, down[:, :, :columns].to(dtype).mT)


def _check_down(weights: Mapping[str, Tensor], layers: int, columns: int, device: torch.device) -> Tensor:
    down = check.check_weight(weights, "down_weight", (layers, None, None), device)
    if down.shape[2] < columns:
        expected = f"at least 2Cs = {columns} columns"
        raise ShapeError("weights['down_weight']", expected=expected, got=check.describe(down))
    check.check_weight(weights, "down_bias", (layers, down.shape[1]), device)
    return down
