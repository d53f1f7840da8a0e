"""What the public ops refuse, before anything is computed; what is edited in place has memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_inputs import BACKENDS, RECEIVER, Inputs
from torch import Tensor

from helpers import make_weights
from lcf_fast import errors, ops, use_backend
from lcf_fast.backends import Backend
from lcf_fast.ops import Pair


@pytest.fixture
def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
    return Inputs(device, generator)


def changed(weights: dict[str, Tensor], **tensors: Tensor) -> dict[str, Tensor]:
    return {**weights, **tensors}


BAD: dict[str, tuple[type[errors.LCFError], str, Callable[[Inputs], Any]]] = {
    "not 4-D": (
        errors.ShapeError, "receiver_key",
        lambda x: ops.joint_projection(*x.sharer[0], x.receiver[0][0][0], x.receiver[0][1], x.one)),
    "integer cache": (
        errors.DTypeError, "key",
        lambda x: ops.attention_pool(x.sharer[0][0].int(), x.sharer[0][1], *x.queries, x.offsets)),
    "K and V differ": (
        errors.ShapeError, "receiver_value",
        lambda x: ops.gated_injection(x.receiver[0][0], x.receiver[0][1][:, :, 1:], x.latent, x.one)),
    "K and V differ in dtype": (
        errors.DTypeError, "receiver_value",
        lambda x: ops.gated_injection(x.receiver[0][0], x.receiver[0][1].half(), x.latent, x.one)),
    "another device": (
        errors.DeviceError, "latent",
        lambda x: ops.gated_injection(*x.receiver[0], x.latent.to("meta"), x.one)),
    "latent's shape": (
        errors.ShapeError, "latent",
        lambda x: ops.gated_injection(*x.receiver[0], x.latent[:, 1:], x.one)),
    "a weight is missing": (
        errors.GeometryError, "weights['up_bias']",
        lambda x: ops.gated_injection(*x.receiver[0], x.latent, {k: v for k, v in x.one.items() if k != "up_bias"})),
    "a weight of another geometry": (
        errors.ShapeError, "weights['down_weight']",
        lambda x: ops.fuse_layers(
            x.sharer, x.receiver, changed(x.weights, down_weight=x.weights["down_weight"][:, :, 1:]))),
    "lengths differ without an index": (
        errors.ShapeError, "sharer",
        lambda x: ops.fuse_layers([(k[:, :, 1:], v[:, :, 1:]) for k, v in x.sharer], x.receiver, x.weights)),
    "batches differ": (
        errors.ShapeError, "sharer",
        lambda x: ops.fuse_layers([(k[:1], v[:1]) for k, v in x.sharer], x.receiver, x.weights)),
    "too few layers": (
        errors.GeometryError, "receiver", lambda x: ops.fuse_layers(x.sharer, x.receiver[:1], x.weights)),
    "too few sharer layers": (
        errors.GeometryError, "sharer", lambda x: ops.fuse_layers(x.sharer[:1], x.receiver, x.weights)),
    "layers differ": (
        errors.ShapeError, "receiver[1].key",
        lambda x: ops.fuse_layers(
            x.sharer, [x.receiver[0], (x.receiver[1][0][:, :, 1:], x.receiver[1][1])], x.weights)),
    "not a pair": (
        errors.ShapeError, "receiver[0]",
        lambda x: ops.fuse_layers(x.sharer, [(x.receiver[0][0],)] * 2, x.weights)),  # type: ignore[list-item]
    "both sharer and message": (
        errors.GeometryError, "message",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, message=torch.zeros(2, 2, 64))),
    "neither": (
        errors.GeometryError, "sharer", lambda x: ops.fuse_layers(None, x.receiver, x.weights)),
    "message's shape": (
        errors.ShapeError, "message",
        lambda x: ops.fuse_layers(None, x.receiver, x.weights, message=torch.zeros(2, 3, 64))),
    "gates that are no pairs": (
        errors.GeometryError, "live",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, live=[True] * 2)),  # type: ignore[list-item]
    "index too high": (
        errors.IndexRangeError, "sharer_index",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, sharer_index=torch.full((2, 12), 12))),
    "index below -1": (
        errors.IndexRangeError, "sharer_index",
        lambda x: ops.joint_projection(
            *x.sharer[0], *x.receiver[0], x.one, sharer_index=torch.full((2, 12), -2))),
    "index's shape": (
        errors.ShapeError, "sharer_index",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, sharer_index=torch.zeros(2, 11).long())),
    "index's dtype": (
        errors.DTypeError, "sharer_index",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, sharer_index=torch.zeros(2, 12))),
    "mask's shape": (
        errors.ShapeError, "edit_mask",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, edit_mask=torch.ones(1, 12))),
    "positions leave the cache": (
        errors.IndexRangeError, "positions",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, positions=(0, 13))),
    "positions run backwards": (
        errors.IndexRangeError, "positions",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, positions=(5, 4))),
    "live's length": (
        errors.GeometryError, "live", lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, live=[(True, True)])),
    "offsets decrease": (
        errors.SpanError, "span_offsets",
        lambda x: ops.attention_pool(*x.sharer[0], *x.queries, torch.tensor([[0, 7, 5], [0, 1, 2]]))),
    "offsets leave the sequence": (
        errors.SpanError, "span_offsets",
        lambda x: ops.summarize_layers(x.sharer, x.weights, torch.tensor([[0, 13]] * 2))),
    "offsets below zero": (
        errors.SpanError, "span_offsets",
        lambda x: ops.summarize_layers(x.sharer, x.weights, torch.tensor([[-1, 3]] * 2))),
    "nothing to pool": (
        errors.SpanError, "span_offsets",
        lambda x: ops.attention_pool(*x.sharer[0], *x.queries, torch.tensor([[0, 3], [5, 5]]))),
    "all that a span holds is masked": (
        errors.SpanError, "span_offsets",
        lambda x: ops.attention_pool(
            *x.sharer[0], *x.queries, torch.tensor([[0, 3]] * 2),
            attention_mask=torch.arange(12)[None].expand(2, -1) > 2)),
    "offsets' shape": (
        errors.ShapeError, "span_offsets",
        lambda x: ops.attention_pool(*x.sharer[0], *x.queries, torch.tensor([[0, 3]]))),
    "no weights": (
        errors.DTypeError, "weights",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, None)),  # type: ignore[arg-type]
    "weights in a list": (
        errors.DTypeError, "weights",
        lambda x: ops.summarize_layers(x.sharer, list(x.weights), x.offsets)),  # type: ignore[arg-type]
    "one layer's weights": (
        errors.DTypeError, "weights",
        lambda x: ops.gated_injection(*x.receiver[0], x.latent, None)),  # type: ignore[arg-type]
    "weights of no names": (
        errors.GeometryError, "weights['gate_logit']", lambda x: ops.fuse_layers(x.sharer, x.receiver, {})),
    "a weight missing": (
        errors.GeometryError, "weights['up_bias']",
        lambda x: ops.fuse_layers(
            x.sharer, x.receiver, {name: w for name, w in x.weights.items() if name != "up_bias"})),
    "a weight that is no tensor": (
        errors.DTypeError, "weights['gate_logit']",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, {**x.weights, "gate_logit": [0.0]})),  # type: ignore[dict-item]
    "caches without memory": (
        errors.DeviceError, "receiver[0].key",
        lambda x: ops.fuse_layers_(x.sharer, [(k.to("meta"), v.to("meta")) for k, v in x.receiver], x.weights)),
    "a cache without memory": (
        errors.DeviceError, "key",
        lambda x: ops.attention_pool(*(t.to("meta") for t in (*x.sharer[0], *x.queries, x.offsets)))),
    "an index without memory": (
        errors.DeviceError, "sharer_index",
        lambda x: ops.fuse_layers(
            x.sharer, x.receiver, x.weights, sharer_index=torch.zeros(2, 12, dtype=torch.int64, device="meta"))),
    "a mask without memory": (
        errors.DeviceError, "edit_mask",
        lambda x: ops.fuse_layers_(x.sharer, x.receiver, x.weights, edit_mask=torch.ones(2, 12, device="meta"))),
    "offsets without memory": (
        errors.DeviceError, "span_offsets",
        lambda x: ops.summarize_layers(x.sharer, x.weights, x.offsets.to("meta"))),
    "a sparse cache": (
        errors.DTypeError, "receiver_key",
        lambda x: ops.gated_injection(x.receiver[0][0].to_sparse(), x.receiver[0][1], x.latent, x.one)),
    "a sparse mask": (
        errors.DTypeError, "edit_mask",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, edit_mask=torch.ones(2, 12).to_sparse())),
    "no epsilon": (
        errors.DTypeError, "norm_eps",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, norm_eps=None)),  # type: ignore[arg-type]
    "an epsilon below zero": (
        errors.GeometryError, "norm_eps",
        lambda x: ops.joint_projection(*x.sharer[0], *x.receiver[0], x.one, norm_eps=-1e-6)),
    "an epsilon without end": (
        errors.GeometryError, "norm_eps",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, norm_eps=float("inf"))),
    "a message, and weights that know no sharer": (
        errors.ShapeError, "weights['down_weight']",
        lambda x: ops.fuse_layers(
            None, x.receiver, changed(x.weights, down_weight=x.weights["down_weight"][:, :, 64:]),
            message=torch.zeros(2, 2, 64))),
    "noise by its seed": (
        errors.DTypeError, "noise",
        lambda x: ops.fuse_layers(x.sharer, x.receiver, x.weights, noise=3)),  # type: ignore[arg-type]
    "query's shape": (
        errors.ShapeError, "span_query",
        lambda x: ops.attention_pool(*x.sharer[0], x.queries[0][:, :8], x.queries[1], x.offsets)),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, inputs: Inputs) -> None:
    """Each error is typed, names its argument, and says what was expected and what came."""
    kind, argument, call = BAD[what]
    with pytest.raises(kind) as caught:
        call(inputs)
    assert caught.value.argument == argument
    assert caught.value.expected
    assert caught.value.got
    assert str(caught.value).startswith(f"{argument}: expected ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_cache_is_half_edited(backend: Backend, inputs: Inputs) -> None:
    """In place, an error leaves every tensor as it was."""
    before = [tensor.clone() for pair in inputs.receiver for tensor in pair]
    last = inputs.receiver[1]
    expanded = last[1][:, :1].expand(-1, 2, -1, -1)
    halved = [inputs.receiver[0], (last[0], expanded)]
    far = torch.full((2, 12), 40)
    same, twice, view = [inputs.receiver[0], (last[0], last[0])], [inputs.receiver[0]] * 2, last[0][:]
    self_weights = make_weights(RECEIVER, RECEIVER, 64, device=inputs.latent.device)
    longer = torch.cat([last[0], last[0]], 2)
    parts = longer[:, :, :12], longer[:, :, 6:18]
    windows = longer.as_strided(last[0].shape, (longer.stride(0), longer.stride(1), 8, 1))
    attempts: list[tuple[str, Callable[[], Any]]] = [
        ("receiver[1].value", lambda: ops.fuse_layers_(inputs.sharer, halved, inputs.weights)),
        ("receiver[1].value", lambda: ops.fuse_layers_(inputs.sharer, same, inputs.weights)),
        ("receiver[1].key", lambda: ops.fuse_layers_(inputs.sharer, twice, inputs.weights)),
        ("receiver_value", lambda: ops.gated_injection_(last[0], view, inputs.latent, inputs.one)),
        ("receiver_value", lambda: ops.gated_injection_(*parts, inputs.latent, inputs.one)),
        ("receiver_key", lambda: ops.gated_injection_(windows, last[1], inputs.latent, inputs.one)),
        ("receiver[1].value", lambda: ops.fuse_layers_(inputs.sharer, [inputs.receiver[0], parts], inputs.weights)),
        (
            "receiver[1].key",
            lambda: ops.fuse_layers_(inputs.sharer, [(last[0], parts[0]), (parts[1], last[1])], inputs.weights),
        ),
        ("sharer[0].key", lambda: ops.fuse_layers_(inputs.receiver, inputs.receiver, self_weights)),
        ("sharer_index", lambda: ops.fuse_layers_(inputs.sharer, inputs.receiver, inputs.weights, sharer_index=far)),
        ("receiver_value", lambda: ops.gated_injection_(last[0], expanded, inputs.latent, inputs.one)),
    ]
    for argument, attempt in attempts:
        with use_backend(backend), pytest.raises(errors.LCFError) as caught:
            attempt()
        assert caught.value.argument == argument
    for tensor, old in zip((t for pair in inputs.receiver for t in pair), before):
        assert torch.equal(tensor, old)


def view_of(caches: list[Pair], first: int, last: int) -> list[Pair]:
    return [(key[:, :, first:last], value[:, :, first:last]) for key, value in caches]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sharer_lies_in_what_is_edited(backend: Backend, inputs: Inputs) -> None:
    """Nor does it in another layer's memory, or in part of it."""
    own, before = inputs.receiver, [tensor.clone() for pair in inputs.receiver for tensor in pair]
    weights = make_weights(RECEIVER, RECEIVER, 64, device=inputs.latent.device)
    fresh = [(key.clone(), value.clone()) for key, value in own]
    none = torch.full((2, 12), -1, device=inputs.latent.device)
    attempts: list[tuple[str, list[Pair], list[Pair], dict[str, Any]]] = [
        ("sharer[0].key", view_of(own, 1, 12), view_of(own, 0, 11), {}),
        ("sharer[0].key", view_of(own, 0, 11), view_of(own, 1, 12), {}),
        ("sharer[1].value", [fresh[0], (fresh[1][0], own[0][0])], own, {}),
        ("sharer[0].key", view_of(own, 2, 5), own, {"sharer_index": none}),
    ]
    for argument, sharer, receiver, options in attempts:
        with use_backend(backend), pytest.raises(errors.GeometryError, match="memory apart") as caught:
            ops.fuse_layers_(sharer, receiver, weights, **options)
        assert caught.value.argument == argument
    assert all(map(torch.equal, (t for pair in own for t in pair), before))
    # Other positions of one buffer are served.
    with use_backend(backend):
        expected = ops.fuse_layers(view_of(own, 0, 5), view_of(own, 5, 10), weights)
        ops.fuse_layers_(view_of(own, 0, 5), view_of(own, 5, 10), weights)
    for got, wanted in zip(view_of(own, 5, 10), expected):
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_interleaves_in_one_buffer_is_edited(backend: Backend, inputs: Inputs) -> None:
    """Layers, keys and values may lie side by side at each token, as some engines have them."""
    plain = [tensor.clone() for pair in inputs.receiver for tensor in pair]
    buffer = torch.stack([tensor.transpose(1, 2) for tensor in plain], 2)  # (B, N, 2 L, H, D)
    flat = buffer.permute(2, 0, 3, 1, 4)
    with use_backend(backend):
        for out in (plain, flat):
            ops.fuse_layers_(inputs.sharer, [(out[0], out[1]), (out[2], out[3])], inputs.weights)
            ops.gated_injection_(out[0], out[1], inputs.latent, inputs.one)
    for tensor, expected in zip(flat, plain):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_without_elements_share_no_memory(backend: Backend, inputs: Inputs) -> None:
    """All of them have address 0."""
    nothing = Inputs(inputs.latent.device, torch.Generator(), tokens=0)
    with use_backend(backend):
        ops.fuse_layers_(nothing.sharer, nothing.receiver, inputs.weights)
        ops.gated_injection_(*nothing.receiver[0], nothing.latent, inputs.one)
