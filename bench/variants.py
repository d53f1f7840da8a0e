"""Who computes a case: ours through the public names, the naive reference, and what else a user could take.

Everything is called with one `Operands`. Names of ours are looked up when called, through the public modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcf_fast import Message, ops, reference

from . import slots
from .c2c import fuse, fuse_as_released, make_fuser
from .cases import AS_RELEASED
from .inputs import Operands
from .training import Training

Run = Callable[[Operands], Any]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """One implementation of a group.

    Attributes:
        name: as the tables call it.
        kind: ``ours``; ``reference``, the naive eager formula; ``baseline``, another way to the same result;
            ``other``, another method at the same shapes.
        run: what is timed.
        layers: how many layers it covers where that is not all of the group's, else None.
        note: what a reader must know of the figure.
        no_graph: why it cannot be a CUDA graph; empty: it is tried.
    """

    name: str
    kind: str
    run: Run
    layers: int | None = None
    note: str = ""
    no_graph: str = ""


def flatten(result: Any, kept: Sequence[int]) -> list[Tensor]:
    """The tensors of a result: of a whole cache those of the kept layers, key before value."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Message):
        return list(result.tensors.values())
    if hasattr(result, "layers"):
        result = [(result.layers[t].keys, result.layers[t].values) for t in kept]
    return [tensor for part in result for tensor in flatten(part, kept)]


# --- ours ---------------------------------------------------------------------------------------------------------


def _projection(module: Any, o: Operands) -> Any:
    return module.joint_projection(*o.sharer[o.row], *o.receiver[o.row], o.layer_weights[o.row])


def _injection(module: Any, o: Operands) -> Any:
    return module.gated_injection(*o.receiver[o.row], o.latent, o.layer_weights[o.row])


def _pool_with(pool: Callable[..., Any], o: Operands, spans: Tensor) -> Any:
    one = o.layer_weights[o.row]
    return pool(*o.sharer[o.row], one["span_query"], one["global_query"], spans)


def _live(o: Operands) -> list[tuple[bool, bool]]:
    return [(True, True)] * len(o.kept)


def _extend(o: Operands) -> Message:
    growing = o.adapter.begin()
    for cache, spans in o.pieces:
        growing.extend(cache, spans)
    return growing.finish()


def _summarize_and_inject(o: Operands) -> Any:
    return o.adapter.inject(o.receiver_cache, o.adapter.summarize(o.sharer_cache, o.spans))


#: By case name.
OURS: dict[str, Run] = {
    "joint_projection": lambda o: _projection(ops, o),
    "gated_injection": lambda o: _injection(ops, o),
    "attention_pool": lambda o: _pool_with(ops.attention_pool, o, o.spans),
    "fuse_layers": lambda o: ops.fuse_layers(o.sharer, o.receiver, o.weights, live=_live(o)),
    "fuse_layers (train)": Training(lambda o: partial(ops.fuse_layers, live=_live(o))),
    "fuse_layers(message)": lambda o: ops.fuse_layers(None, o.receiver, o.weights, live=_live(o), message=o.message),
    "summarize_layers": lambda o: ops.summarize_layers(o.sharer, o.weights, o.spans),
    "summarize_layers (windows)": lambda o: ops.summarize_layers(o.sharer, o.weights, o.spans),
    "adapter.extend": _extend,
    "adapter.merge": lambda o: o.adapter.finish(o.adapter.merge(o.parts)),
    "adapter.fuse": lambda o: o.adapter.fuse(o.sharer_cache, o.receiver_cache),
    "adapter.fuse (pruned)": lambda o: o.adapter.fuse(o.sharer_cache, o.receiver_cache),
    "adapter.inject": lambda o: o.adapter.inject(o.receiver_cache, o.sent),
    "adapter.inject (4 messages)": lambda o: o.adapter.inject(o.receiver_cache, o.sent_by_several),
    "adapter.summarize+inject": _summarize_and_inject,
    **slots.OURS,
}


# --- the naive reference ------------------------------------------------------------------------------------------


def _reference_summary(o: Operands) -> Any:
    return reference.summarize_layers(o.sharer, o.weights, o.spans_host)


def _reference_lcfx(o: Operands) -> Any:
    message, _ = reference.summarize_layers(o.sharer, o.weights, o.spans_host)
    return reference.fuse_layers(None, o.receiver, o.weights, message=message)


#: By group name. In float64 this is the truth.
REFERENCE: dict[str, Run] = {
    "projection": lambda o: _projection(reference, o),
    "injection": lambda o: _injection(reference, o),
    "pool": lambda o: _pool_with(reference.attention_pool, o, o.spans_host),
    "lcf": lambda o: reference.fuse_layers(o.sharer, o.receiver, o.weights),
    "train": Training(lambda o: reference.fuse_layers),
    "lcf_pruned": lambda o: reference.fuse_layers(o.sharer, o.receiver, o.weights),
    "inject": lambda o: reference.fuse_layers(None, o.receiver, o.weights, message=o.message),
    "summarize": _reference_summary,
    "windows": _reference_summary,
    "merge": _reference_summary,  # at once, from the cache: without states there is no other way
    "lcfx": _reference_lcfx,
    **slots.REFERENCE,
}


def _broadcast(summary: Tensor, o: Operands) -> list[Pair]:
    """``K*, V*`` at every receiver position, one pair a layer: what the paper feeds to the unchanged projector."""
    like = o.receiver[0][0]
    spread = summary.to(like.dtype)[:, :, :, :, None].expand(-1, -1, -1, -1, like.shape[2], -1)
    return [(key, value) for key, value in spread.unbind(0)]


def _paper_inject(o: Operands) -> Any:
    assert o.summary is not None
    return reference.fuse_layers(_broadcast(o.summary, o), o.receiver, o.weights)


def _paper_lcfx(o: Operands) -> Any:
    _, summary = reference.summarize_layers(o.sharer, o.weights, o.spans_host)
    return reference.fuse_layers(_broadcast(summary, o), o.receiver, o.weights)


#: The naive formula where it is not the reference's: the paper's, which does not fold the sharer's part to one vector.
#: The folded one, an insight of spec section 4, then is the stronger baseline beside it.
PAPER: dict[str, Run] = {"inject": _paper_inject, "lcfx": _paper_lcfx}


# --- torch.compile of the reference, a layer a graph: 28 in one take minutes to compile, and run no faster ------------


def compiled(group: str, mode: str | None) -> Run:
    """The reference under ``torch.compile``, by group name."""

    def compiles(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, mode=mode)

    if group in slots.REFERENCE:
        return slots.compiled(group, compiles)
    if group == "projection":
        projection = compiles(reference.joint_projection)
        return lambda o: projection(*o.sharer[o.row], *o.receiver[o.row], o.layer_weights[o.row])
    if group == "injection":
        injection = compiles(reference.gated_injection)
        return lambda o: injection(*o.receiver[o.row], o.latent, o.layer_weights[o.row])
    if group == "pool":
        pool = compiles(reference.attention_pool)
        return lambda o: _pool_with(pool, o, o.spans_host)
    edit, summary = compiles(_edit_layer), compiles(_summarize_layer)

    def fuse(o: Operands) -> list[Pair]:
        layers = zip(o.sharer, o.receiver, o.layer_weights)
        return [edit(*sharer, *receiver, weights, None) for sharer, receiver, weights in layers]

    def summarize(o: Operands) -> tuple[Tensor, Tensor]:
        layers = zip(o.sharer, o.layer_weights)
        parts = [summary(key, value, weights, o.spans_host) for (key, value), weights in layers]
        return torch.cat([latent for latent, _ in parts]), torch.cat([pooled for _, pooled in parts])

    def inject(o: Operands, message: Tensor | None = None) -> list[Pair]:
        latents = o.message if message is None else message
        assert latents is not None
        layers = zip(o.receiver, o.layer_weights, latents)
        return [edit(None, None, *receiver, weights, latent) for receiver, weights, latent in layers]

    def fuse_sliced(sharer: list[Pair], receiver: list[Pair], weights: dict[str, Tensor]) -> list[Pair]:
        rows = [{name: tensor[row] for name, tensor in weights.items()} for row in range(len(receiver))]
        return [edit(*s, *r, one, None) for s, r, one in zip(sharer, receiver, rows)]

    runs: dict[str, Run] = {
        "lcf": fuse,
        "train": Training(lambda o: fuse_sliced),
        "lcf_pruned": fuse,
        "inject": inject,
        **dict.fromkeys(("summarize", "windows", "merge"), summarize),
        "lcfx": lambda o: inject(o, summarize(o)[0]),
    }
    return runs[group]


def _edit_layer(
    sharer_key: Tensor | None,
    sharer_value: Tensor | None,
    key: Tensor,
    value: Tensor,
    weights: dict[str, Tensor],
    message: Tensor | None,
) -> Pair:
    latent = reference.joint_projection(sharer_key, sharer_value, key, value, weights, message=message)
    return reference.gated_injection(key, value, latent, weights)


def _summarize_layer(key: Tensor, value: Tensor, weights: dict[str, Tensor], spans: Tensor) -> tuple[Tensor, Tensor]:
    one = {name: weights[name][None] for name in ("span_query", "global_query", "down_weight", "down_bias")}
    return reference.summarize_layers([(key, value)], one, spans)


# --- pooling by attention kernels ---------------------------------------------------------------------------------


def _across_spans(key: Tensor, value: Tensor, query: Tensor) -> Pair:
    """The second stage: ``(B, H, P, D)`` summaries to ``(B, H, D)``."""
    weight = (torch.einsum("bhpd,hd->bhp", key, query) * key.shape[-1] ** -0.5).softmax(-1)[..., None]
    return (weight * key).sum(2), (weight * value).sum(2)


def sdpa_pool(key: Tensor, value: Tensor, span_query: Tensor, global_query: Tensor, mask: Tensor) -> Pair:
    """Spans by ``scaled_dot_product_attention``: a query a span under a mask ``(P, N)``; once for V, once for K."""
    heads, dim = span_query.shape
    query = span_query.to(key.dtype)[None, :, None].expand(len(key), heads, mask.shape[0], dim)
    span_key = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    span_value = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return _across_spans(span_key, span_value, global_query.to(key.dtype))


def flash_pool(
    key: Tensor, value: Tensor, span_query: Tensor, global_query: Tensor, offsets: Tensor, longest: int
) -> Pair:
    """Spans by flash-attn: each span a sequence with one query; once for V, once for K."""
    from flash_attn import flash_attn_varlen_func

    spans = offsets.numel() - 1
    query = span_query.to(key.dtype).expand(spans, -1, -1).contiguous()
    ones = torch.arange(spans + 1, device=key.device, dtype=torch.int32)
    rows, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    span_key, span_value = (
        flash_attn_varlen_func(query, rows, one, ones, offsets, 1, longest) for one in (rows, values)
    )
    span_key, span_value = (one.transpose(0, 1)[None] for one in (span_key, span_value))
    return _across_spans(span_key, span_value, global_query.to(key.dtype))


def _offsets(o: Operands) -> Tensor:
    """Offsets of the spans that are not empty, on the CPU: attention over no token is not defined."""
    return o.spans_host[0].unique_consecutive()


def _span_mask(o: Operands) -> Tensor:
    """``(P, N)``: which tokens a span holds; they may overlap."""
    positions = torch.arange(o.sharer[0][0].shape[2])
    starts, stops = torch.tensor(o.context_spans.bounds()[0])[:, :, None].unbind(1)
    return ((positions >= starts) & (positions < stops)).to(o.spans.device)


def _pooling(group: str, pool: Callable[..., Pair], *rest: Any) -> Run:
    """One layer, or all of them and the fold through W_down."""

    def one(o: Operands) -> Any:
        weights = o.layer_weights[o.row]
        return pool(*o.sharer[o.row], weights["span_query"], weights["global_query"], *rest)

    def all_layers(o: Operands) -> Any:
        summaries, latents = [], []
        for (key, value), weights in zip(o.sharer, o.layer_weights):
            summary = torch.stack(pool(key, value, weights["span_query"], weights["global_query"], *rest))
            flat = summary.flatten(2).transpose(0, 1).flatten(1)
            latents.append(F.linear(flat, weights["down_weight"][:, : flat.shape[1]], weights["down_bias"]))
            summaries.append(summary)
        return torch.stack(latents).float(), torch.stack(summaries).float()

    return one if group == "pool" else all_layers


# --- the list -----------------------------------------------------------------------------------------------------


def baselines(group: str, o: Operands, *, eager_only: bool = False) -> list[Variant]:
    """The reference, other ways to the same result, and C2C; ``torch.compile`` and CUDA graphs come on top of these.

    Args:
        eager_only: the reference and its folded form alone.
    """
    again = "pooling again: " if group == "merge" else ""
    found = [Variant(f"{again}reference (eager)", "reference", PAPER.get(group, REFERENCE[group]))]
    if group in PAPER:
        found.append(Variant("reference, folded", "baseline", REFERENCE[group]))
    if eager_only:
        return found
    on_gpu = o.spans.device.type == "cuda"
    if group in ("pool", "summarize", "windows", "merge"):
        found.append(Variant(f"{again}SDPA", "baseline", _pooling(group, sdpa_pool, _span_mask(o))))
        # flash-attn has no float32, and no sequences that overlap; `flash_pool` has no batch.
        can_flash = group != "windows" and o.sharer[0][0].dtype != torch.float32 and len(o.spans) == 1
        if can_flash and on_gpu and find_spec("flash_attn") is not None:
            offsets = _offsets(o)
            flash = _pooling(group, flash_pool, offsets.to(o.spans.device), int(offsets.diff().max()))
            found.append(Variant(f"{again}flash-attn", "baseline", flash))
    if group == "slots_summarize":
        found.append(Variant("SDPA", "baseline", slots.sdpa_summarize))
    if group == "lcf":
        found += _c2c(o, len(o.kept) if on_gpu else 1)
    return found


def _c2c(o: Operands, layers: int) -> list[Variant]:
    """C2C as this package runs it, and as its released code does; on a CPU one layer of it."""
    key = o.receiver[0][0]
    fuser = make_fuser(o.config.sharer, o.config.receiver, layers, device=key.device, dtype=key.dtype)
    every = len(o.kept)
    note = "another method, at the same shapes"
    part, covers = "", None
    if layers < every:
        note += f"; per layer: ONE of {every} layers was run"
        part, covers = f", 1 layer of {every}", layers

    def variant(name: str, call: Callable[..., Any], no_graph: str = "") -> Variant:
        def run(one: Operands) -> list[Pair]:
            found: list[Pair] = call(fuser, one.sharer, one.receiver)
            return found

        return Variant(f"{name}{part}", "other", run, layers=covers, note=note, no_graph=no_graph)

    return [
        variant("C2C fuser", fuse),
        variant(f"C2C fuser{AS_RELEASED}", fuse_as_released, "it copies to the host in every layer"),
    ]
