"""The public ops: checked before anything is written, differentiable and compilable on every back end."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import lcf_fast
from helpers import Geometry, make_cache, make_weights, to_double
from lcf_fast import backends, errors, library, library_layers, library_pooling, ops, reference, use_backend
from lcf_fast.backends import Backend, resolve

BACKENDS: tuple[Backend, ...] = ("eager", "triton")
SHARER, RECEIVER = Geometry(2, 1, 32), Geometry(2, 2, 32)
LIVE = [(True, False), (False, True)]


class Inputs:
    """One call's worth of everything."""

    def __init__(self, device: torch.device, generator: torch.Generator, tokens: int = 12, batch: int = 2) -> None:
        weights = make_weights(SHARER, RECEIVER, 64, cross_context=True, device=device, generator=generator)
        weights["gate_logit"] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], device=device)
        self.weights = weights
        self.one = {name: tensor[0] for name, tensor in weights.items()}
        self.sharer = make_cache(SHARER, batch, tokens, device=device, generator=generator)
        self.receiver = make_cache(RECEIVER, batch, tokens, device=device, generator=generator)
        self.latent = torch.randn(batch, tokens, 64, generator=generator).to(device)
        self.offsets = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=device).repeat(batch, 1)
        self.queries = (self.one["span_query"], self.one["global_query"])


@pytest.fixture
def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
    return Inputs(device, generator)


def calls(x: Inputs) -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    """Each op as a function of the stacked weights."""

    def one(w: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in w.items()}

    return {
        "joint_projection": lambda w: ops.joint_projection(*x.sharer[0], *x.receiver[0], one(w)),
        "attention_pool": lambda w: ops.attention_pool(
            *x.sharer[0], w["span_query"][0], w["global_query"][0], x.offsets
        ),
        "gated_injection": lambda w: ops.gated_injection(*x.receiver[0], x.latent, one(w)),
        "fuse_layers": lambda w: ops.fuse_layers(x.sharer, x.receiver, w, live=LIVE),
        "summarize_layers": lambda w: ops.summarize_layers(x.sharer, w, x.offsets),
    }


def truths(x: Inputs) -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    """The same by the reference, in float64."""
    sharer, receiver = to_double(x.sharer), to_double(x.receiver)

    def one(w: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in w.items()}

    return {
        "joint_projection": lambda w: reference.joint_projection(*sharer[0], *receiver[0], one(w)),
        "attention_pool": lambda w: reference.attention_pool(
            *sharer[0], w["span_query"][0], w["global_query"][0], x.offsets
        ),
        "gated_injection": lambda w: reference.gated_injection(*receiver[0], x.latent.double(), one(w)),
        "fuse_layers": lambda w: reference.fuse_layers(sharer, receiver, w),
        "summarize_layers": lambda w: reference.summarize_layers(sharer, w, x.offsets),
    }


OPS = ("joint_projection", "attention_pool", "gated_injection", "fuse_layers", "summarize_layers")


def flatten(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flatten(part)]


def loss_of(result: Any) -> Tensor:
    return torch.stack([tensor.double().sin().sum() for tensor in flatten(result)]).sum()


def gradients(call: Callable[[dict[str, Tensor]], Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    loss_of(call(leaves)).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_grad", [False, True])
def test_an_injection_is_contiguous_and_new_whatever_the_cache(
    with_grad: bool, backend: Backend, inputs: Inputs
) -> None:
    key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs.receiver[0])
    latent = inputs.latent.requires_grad_(with_grad)
    with use_backend(backend):
        edited = ops.gated_injection(key, value, latent, inputs.one)
    assert not key.is_contiguous() and edited[0].requires_grad == with_grad
    for new, old in zip(edited, (key, value)):
        assert new.is_contiguous() and new.data_ptr() != old.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["joint_projection", "attention_pool", "gated_injection", "fuse_layers", "summarize_layers"]
)
def test_a_gradient_takes_the_back_end_of_its_forward_pass(
    name: str, backend: Backend, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever thread it runs: on a GPU autograd has one of its own, where no `use_backend` holds."""
    seen: list[str] = []
    right = backends.current_backend

    def watched() -> str:
        seen.append(right())
        return seen[-1]

    monkeypatch.setattr(backends, "current_backend", watched)
    weights = {key: tensor.clone().requires_grad_(key != "gate_logit") for key, tensor in inputs.weights.items()}
    with use_backend(backend):
        total = torch.stack([tensor.float().sum() for tensor in flatten(calls(inputs)[name](weights))]).sum()
    seen.clear()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert {*seen} <= {backend} and (seen or backend == "eager")  # which may be plain torch, without an op of ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_value_and_gradient(name: str, backend: Backend, inputs: Inputs) -> None:
    with use_backend(backend):
        got = flatten(calls(inputs)[name](inputs.weights))
        grads = gradients(calls(inputs)[name], inputs.weights)
    wide = {key: tensor.double() for key, tensor in inputs.weights.items()}
    for ours, exact in zip(got, flatten(truths(inputs)[name](wide))):
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-5
    exact_grads = gradients(truths(inputs)[name], wide)
    assert any(float(grad.norm()) > 0 for grad in exact_grads.values())
    for key, exact in exact_grads.items():
        scale = max(float(exact.norm()), 1e-3)
        assert float((grads[key].double() - exact).norm()) / scale < 1e-4, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_compiles_whole_forward_and_backward(name: str, backend: Backend, inputs: Inputs) -> None:
    call = calls(inputs)[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for ours, same in zip(flatten(compiled(inputs.weights)), flatten(call(inputs.weights))):
            assert torch.allclose(ours, same, rtol=1e-5, atol=1e-5)
        plain, traced = gradients(call, inputs.weights), gradients(compiled, inputs.weights)
    for key, grad in traced.items():
        assert torch.allclose(grad, plain.get(key, torch.zeros_like(grad)), rtol=1e-4, atol=1e-4), key


def test_compiles_with_inductor(inputs: Inputs) -> None:
    """The default back end of torch.compile, once; the rest takes aot_eager, which traces alike and is quick."""
    compiled = torch.compile(calls(inputs)["fuse_layers"], fullgraph=True)
    for ours, same in zip(flatten(compiled(inputs.weights)), flatten(calls(inputs)["fuse_layers"](inputs.weights))):
        assert torch.allclose(ours, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_place(backend: Backend, inputs: Inputs) -> None:
    def edit(receiver: list[tuple[Tensor, Tensor]]) -> Tensor:
        ops.fuse_layers_(inputs.sharer, receiver, inputs.weights, live=LIVE)
        ops.gated_injection_(*receiver[1], inputs.latent, inputs.one)
        return receiver[0][0] + receiver[1][1]

    first, second = ([(k.clone(), v.clone()) for k, v in inputs.receiver] for _ in range(2))
    with use_backend(backend), torch.no_grad():
        assert torch.allclose(torch.compile(edit, fullgraph=True, backend="aot_eager")(first), edit(second), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for x, y in zip(first, second) for a, b in zip(x, y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: Backend, inputs: Inputs) -> None:
    """Schema, fake, autograd registration and aot dispatch of each op; one layout is permuted-dense."""
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs.receiver[0]]
    flat_sharer = [t for pair in inputs.sharer for t in pair]
    flat_receiver = [t for pair in inputs.receiver for t in pair]
    live = [flag for pair in LIVE for flag in pair]

    def leaves(weights: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
        return [weights[name].detach().clone().requires_grad_() for name in names]

    stacked = leaves(inputs.weights, library.WEIGHTS)
    frozen = [weight.detach() for weight in stacked]
    injection = [inputs.one[name] for name in library.INJECTION_WEIGHTS]
    index = torch.full((2, 12), 3, dtype=torch.int32, device=inputs.latent.device)
    projection_weights = leaves(inputs.one, library.PROJECTION_WEIGHTS)
    injection_weights = leaves(inputs.one, library.INJECTION_WEIGHTS)
    summary_weights = leaves(inputs.weights, library_pooling.SUMMARY_WEIGHTS)
    latent = inputs.latent.clone().requires_grad_()
    with use_backend(backend):
        opcheck(library.joint_projection, (*inputs.sharer[0], *permuted, projection_weights, index, None, 1e-6))
        opcheck(library_pooling.attention_pool, (*inputs.sharer[0], *inputs.queries, inputs.offsets, None))
        opcheck(library.gated_injection, (*permuted, latent, injection_weights, None))
        opcheck(library.gated_injection_, (*permuted, inputs.latent, injection, None))
        caches = flat_sharer, flat_receiver
        quiet, noisy = (-1, 1.0, 0.0), (7, 0.5, 0.1)
        opcheck(library_layers.fuse_layers, (*caches, stacked, live, index, None, 1, 11, 1e-6, *quiet))
        arguments = (*caches, stacked, [True] * 4, index, None, 1, 11, 1e-6, *noisy)
        opcheck(library_layers.fuse_layers, arguments, test_utils=("test_schema", "test_faketensor"))
        opcheck(library_layers.fuse_layers_, (flat_sharer, flat_receiver, frozen, live, None, None, 0, 12, 1e-6))
        opcheck(library_pooling.summarize_layers, (flat_sharer, summary_weights, inputs.offsets, None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs_give_empty_results(
    batch: int, tokens: int, backend: Backend, device: torch.device, generator: torch.Generator
) -> None:
    x = Inputs(device, generator, tokens, batch)
    shape = x.receiver[0][0].shape
    with use_backend(backend):
        assert ops.joint_projection(*x.sharer[0], *x.receiver[0], x.one).shape == (batch, tokens, 64)
        assert ops.gated_injection(*x.receiver[0], x.latent, x.one)[0].shape == shape
        assert ops.fuse_layers(x.sharer, x.receiver, x.weights)[0][0].shape == shape
        ops.fuse_layers_(x.sharer, x.receiver, x.weights)
        ops.gated_injection_(*x.receiver[0], x.latent, x.one)
        message = torch.zeros(2, batch, 64, device=device)
        assert ops.fuse_layers(None, x.receiver, x.weights, message=message)[0][0].shape == shape
        if not batch:
            assert ops.attention_pool(*x.sharer[0], *x.queries, x.offsets)[0].shape == (0, 1, 32)
            latent, summary = ops.summarize_layers(x.sharer, x.weights, x.offsets)
            assert latent.shape == (2, 0, 64)
            assert summary.shape == (2, 2, 0, 1, 32)


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
        ("sharer", lambda: ops.fuse_layers_(inputs.receiver, inputs.receiver, self_weights)),
        ("sharer_index", lambda: ops.fuse_layers_(inputs.sharer, inputs.receiver, inputs.weights, sharer_index=far)),
        ("receiver_value", lambda: ops.gated_injection_(last[0], expanded, inputs.latent, inputs.one)),
    ]
    for argument, attempt in attempts:
        with use_backend(backend), pytest.raises(errors.LCFError) as caught:
            attempt()
        assert caught.value.argument == argument
    for tensor, old in zip((t for pair in inputs.receiver for t in pair), before):
        assert torch.equal(tensor, old)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_what_is_edited_in_place(backend: Backend, inputs: Inputs) -> None:
    """And refuses gradients of what is no longer there; tensors of closed gates stay good."""

    leaf = torch.ones((), device=inputs.latent.device, requires_grad=True)

    def squared() -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        receiver = [(key * leaf, value * leaf) for key, value in inputs.receiver]
        return receiver, [(tensor**2).sum() for tensor in flatten(receiver)]

    with use_backend(backend):
        receiver, sums = squared()
        ops.fuse_layers_(inputs.sharer, receiver, inputs.weights, live=LIVE)
        for total, is_open in zip(sums, [is_open for pair in LIVE for is_open in pair]):
            if is_open:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    total.backward()
            else:
                total.backward()
        receiver, sums = squared()
        ops.gated_injection_(*receiver[0], inputs.latent, inputs.one)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sums[0].backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("all_of_it", [True, False])
def test_caches_made_in_inference_mode_are_edited_outside_it(all_of_it: bool, backend: Backend, inputs: Inputs) -> None:
    """As generate() under inference_mode leaves them; also where only the last layer is one."""

    def made() -> list[tuple[Tensor, Tensor]]:
        plain = [(key.clone(), value.clone()) for key, value in inputs.receiver]
        with torch.inference_mode():
            inferred = [(key.clone(), value.clone()) for key, value in inputs.receiver]
        return inferred if all_of_it else [*plain[:-1], inferred[-1]]

    with use_backend(backend):
        expected = ops.fuse_layers(inputs.sharer, inputs.receiver, inputs.weights)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                fused = ops.fuse_layers_(inputs.sharer, made(), inputs.weights)
                key, value = ops.gated_injection_(*made()[-1], inputs.latent, inputs.one)
                wanted = ops.gated_injection(*inputs.receiver[-1], inputs.latent, inputs.one)
            for got, same in zip(flatten([fused, key, value]), flatten([expected, *wanted])):
                torch.testing.assert_close(got.clone(), same.clone())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_what_nobody_has_looked_at_counts_as_none_out_of_range(
    is_compiled: bool, dtype: torch.dtype, backend: Backend, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 rows; also what a cast to 32 bits would make row 2 of. Nothing is looked at, as on a GPU."""
    far = [12, 40, -2, -(1 << 31), (1 << 31) - 1] + [(1 << 32) + 2, -(1 << 32) + 2, 1 << 62] * (dtype == torch.int64)
    index = torch.arange(12).repeat(2, 1)
    index[1, : len(far)] = -1
    wild, whole = index.clone(), torch.tensor([[0, 5, 12]]).repeat(2, 1)
    wild[1, : len(far)] = torch.tensor(far)
    past = whole.clone()
    past[:, 0], past[:, -1] = min(far), max(far)

    def call(index: Tensor, offsets: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
        fused = ops.fuse_layers(inputs.sharer, inputs.receiver, weights, live=LIVE, sharer_index=index)
        latent = ops.joint_projection(*inputs.sharer[0], *inputs.receiver[0], inputs.one, sharer_index=index)
        return flatten([fused, latent, *ops.summarize_layers(inputs.sharer, weights, offsets)])

    # Once with a graph, which takes the eager path to the reference.
    weights = {name: tensor.clone().requires_grad_(not is_compiled) for name, tensor in inputs.weights.items()}
    with use_backend(backend):
        expected = call(index, whole, weights)
        monkeypatch.setattr("lcf_fast.checks.reads_values", lambda tensor: False)
        run = torch.compile(call, fullgraph=True, backend="aot_eager") if is_compiled else call
        for ours, same in zip(run(wild.to(dtype), past.to(dtype), weights), expected):
            torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-5)


def test_values_are_read_on_the_cpu_only(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand in for a GPU's: nothing is read off them, unless asked, and the shapes come out."""
    meta = [(key.to("meta"), value.to("meta")) for key, value in inputs.sharer]
    weights = {name: tensor.to("meta") for name, tensor in inputs.weights.items()}
    latent, _ = library_pooling.summarize_layers(
        [tensor for pair in meta for tensor in pair],
        [weights[name] for name in library_pooling.SUMMARY_WEIGHTS],
        inputs.offsets.to("meta"),
        None,
    )
    assert latent.shape == (2, 2, 64)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    cpu = torch.device("cpu")
    assert resolve(cpu, torch.float32) == "eager"
    monkeypatch.setenv("LCF_FAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(cpu, torch.float32, 64) == "triton"
    with use_backend("eager"):
        assert resolve(cpu, torch.float32) == "eager"
    for dtype, width in ((torch.float64, 64), (torch.float32, 96)):
        with pytest.raises(errors.BackendError):
            resolve(cpu, dtype, width)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(errors.BackendError, match="TRITON_INTERPRET"):
        resolve(cpu, torch.float32)
    monkeypatch.setenv("LCF_FAST_BACKEND", "cuda")
    with pytest.raises(errors.BackendError, match="LCF_FAST_BACKEND"):
        resolve(cpu, torch.float32)
    with pytest.raises(errors.BackendError), use_backend("fast"):  # type: ignore[arg-type]
        pass


def test_an_automatic_fall_back_says_why_once() -> None:
    """A GPU whose call the kernels cannot serve: asked for by device and dtype alone, so no GPU is needed."""
    cuda = torch.device("cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve(cuda, torch.float64, 64) == "eager"
        assert resolve(cuda, torch.float64, 64) == "eager"
    assert len([w for w in caught if "float64" in str(w.message)]) == 1


def test_unknown_names_of_the_package() -> None:
    with pytest.raises(AttributeError):
        _ = lcf_fast.nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_passed_once_excuses_nothing_else(backend: Backend, inputs: Inputs) -> None:
    """Checks are skipped for tensors that look like ones that passed: not for any that looks different."""
    x = inputs

    def fuse(**changes: Any) -> Any:
        arguments = {"sharer": x.sharer, "receiver": x.receiver, "weights": x.weights} | changes
        return ops.fuse_layers(**arguments, live=LIVE)

    def with_last(cache: list[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
        return [*cache[:-1], (cache[-1][0], change(cache[-1][1]))]

    with use_backend(backend):
        expected = flatten(fuse())
        for name, cache in (("sharer", x.sharer), ("receiver", x.receiver)):
            for error, change in (
                (errors.ShapeError, lambda t: t[:, :, 1:]),
                (errors.DTypeError, lambda t: t.half()),
                (errors.DeviceError, lambda t: t.to("meta")),
            ):
                with pytest.raises(error, match=rf"{name}\[1\]\.value"):
                    fuse(**{name: with_last(cache, change)})
        for name in library.WEIGHTS:
            with pytest.raises(errors.ShapeError, match=name):
                fuse(weights=x.weights | {name: x.weights[name][..., :-1]})
        # Other strides, and a weight of another dtype, are served as what they are.
        moved = with_last(x.receiver, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
        wide = x.weights | {"up_bias": x.weights["up_bias"].double()}
        for same in (fuse(), fuse(receiver=moved), fuse(weights=wide) if backend == "eager" else fuse()):
            for got, wanted in zip(flatten(same), expected):
                torch.testing.assert_close(got, wanted)


def test_layers_that_read_the_same_layer(inputs: Inputs) -> None:
    """Which layer reads which is part of how a sharer looks: strides go by it."""
    x = inputs
    one = x.sharer[0]
    other = (one[0].transpose(1, 2).contiguous().transpose(1, 2), one[1].transpose(2, 3).contiguous().transpose(2, 3))
    weights = {name: tensor[[0, 1, 1]] for name, tensor in x.weights.items()}
    receiver = [*x.receiver, x.receiver[0]]
    receiver = [(key.clone(), value.clone()) for key, value in receiver]
    with use_backend("triton"):
        expected = flatten(ops.fuse_layers([one] * 3, receiver, weights, live=[(True, True)] * 3))
        for sharer in ([one, one, other], [one, other, other], [other, one, other], [one, one, one]):
            got = flatten(ops.fuse_layers(sharer, receiver, weights, live=[(True, True)] * 3))
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
