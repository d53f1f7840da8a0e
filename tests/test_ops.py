"""The public ops: checked before anything is written, differentiable and compilable on every back end."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_inputs import BACKENDS, LIVE, Inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

import lcf_fast
from helpers import Geometry, make_cache, to_double
from lcf_fast import backends, checks, errors, library, library_layers, library_pooling, ops, reference, use_backend
from lcf_fast.backends import Backend, resolve


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
        half, one = [t.bfloat16() for t in flat_sharer], [t.detach() for t in projection_weights]
        fake: Any = {"test_utils": "test_faketensor"}
        opcheck(library.joint_projection, (*half[:2], *(t.bfloat16() for t in permuted), one, None, None, 1e-6), **fake)
        frozen = [t.detach() for t in summary_weights]
        opcheck(library_pooling.summarize_layers, (half, frozen, inputs.offsets, None), **fake)


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
@pytest.mark.parametrize("name", OPS)
def test_caches_made_in_inference_mode_have_gradients_beside_them(
    name: str, backend: Backend, inputs: Inputs
) -> None:
    """As frozen models leave them; autograd keeps no such tensor."""
    with use_backend(backend):
        expected = gradients(calls(inputs)[name], inputs.weights)
        with torch.inference_mode():
            inputs.sharer = [(key.clone(), value.clone()) for key, value in inputs.sharer]
            inputs.receiver = [(key.clone(), value.clone()) for key, value in inputs.receiver]
            inputs.offsets = inputs.offsets.clone()
        got = gradients(calls(inputs)[name], inputs.weights)
    assert got.keys() == expected.keys()
    for key, grad in got.items():
        torch.testing.assert_close(grad, expected[key])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("name", [*OPS, "fuse_layers_", "gated_injection_"])
def test_a_tangent_is_served_or_refused_and_never_lost(
    name: str, with_grad: bool, backend: Backend, inputs: Inputs
) -> None:
    """Of forward-mode AD: torch itself refuses it for ops that it sees and that have none."""
    in_place: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "fuse_layers_": lambda w: ops.fuse_layers_(inputs.sharer, inputs.receiver, w),
        "gated_injection_": lambda w: ops.gated_injection_(
            *inputs.receiver[0], inputs.latent, {key: tensor[0] for key, tensor in w.items()}
        ),
    }
    call = (calls(inputs) | in_place)[name]
    weights = {key: tensor.requires_grad_(with_grad) for key, tensor in inputs.weights.items()}
    with use_backend(backend), forward_ad.dual_level():
        call(weights)  # of no tangent nothing is lost
        tangents = {key: forward_ad.make_dual(tensor, torch.ones_like(tensor)) for key, tensor in weights.items()}
        if (backend, with_grad) == ("eager", True) and name in ("joint_projection", "gated_injection", "fuse_layers"):
            served = flatten(call(tangents))
            assert any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in served)
            return
        seen_by_torch = (NotImplementedError,) if with_grad else ()
        with pytest.raises((errors.BackendError, *seen_by_torch), match="forward"):
            call(tangents)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_masked_message_are_the_references(backend: Backend, inputs: Inputs) -> None:
    """Of the op itself, as a compiled graph calls it."""
    mask = torch.arange(12, device=inputs.latent.device).expand(2, -1) % 3 > 0
    index = torch.where(mask, 0, -1).int()
    message = inputs.latent[:2, :2].clone().requires_grad_()
    weights = [inputs.weights[name].clone().requires_grad_(name != "gate_logit") for name in library.WEIGHTS]
    live = [is_open for pair in LIVE for is_open in pair]
    with use_backend(backend):
        edited = library_layers.fuse_layers(
            [], flatten(inputs.receiver), weights, live, index, message, 1, 11, 1e-6, *library_layers.NO_NOISE
        )
        loss_of(edited).backward()
    leaves = [tensor.detach().double().requires_grad_() for tensor in (message, *weights)]
    fused = reference.fuse_layers(
        None,
        to_double(inputs.receiver),
        dict(zip(library.WEIGHTS, leaves[1:])),
        message=leaves[0],
        edit_mask=mask,
        positions=(1, 11),
    )
    loss_of([fused[0][0], fused[1][1]]).backward()
    for tensor, leaf in zip((message, *weights), leaves):
        if tensor.grad is not None and leaf.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)
    assert message.grad is not None and leaves[0].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_masks_and_offsets_of_any_strides(backend: Backend, inputs: Inputs) -> None:
    device = inputs.latent.device
    index = torch.tensor([[3, -1, 0, 7], [11, 2, 2, -1]], device=device).repeat(1, 3)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], device=device).repeat(1, 4) != 0

    def call(index: Tensor, mask: Tensor, offsets: Tensor) -> list[Tensor]:
        x = inputs
        fused = ops.fuse_layers(x.sharer, x.receiver, x.weights, sharer_index=index, edit_mask=mask)
        latent = ops.joint_projection(*x.sharer[0], *x.receiver[0], x.one, sharer_index=index)
        injected = ops.gated_injection(*x.receiver[0], x.latent, x.one, edit_mask=mask)
        pooled = ops.attention_pool(*x.sharer[0], *x.queries, offsets, attention_mask=mask)
        summary = ops.summarize_layers(x.sharer, x.weights, offsets, attention_mask=mask)
        return flatten([fused, latent, injected, pooled, summary])

    given = (index, mask, inputs.offsets)
    strided = [tensor.mT.contiguous().mT for tensor in given]
    assert not any(tensor.is_contiguous() for tensor in strided)
    with use_backend(backend):
        for ours, same in zip(call(*strided), call(*given)):
            assert torch.equal(ours, same)


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
        with use_backend("triton"):
            assert resolve(cpu, torch.float32) == "triton"
        assert resolve(cpu, torch.float32) == "eager"
    for dtype, width, hidden in ((torch.float64, 64, 16), (torch.float32, 96, 16), (torch.float32, 64, 0)):
        with pytest.raises(errors.BackendError):
            resolve(cpu, dtype, width, hidden)
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
        for _ in range(2):  # the second time it is remembered
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
        with pytest.raises(errors.ShapeError, match="down_weight"):
            fuse(sharer=make_cache(Geometry(2, 2, 32), 2, 12))
        halved = {"sharer": make_cache(Geometry(2, 1, 64), 2, 12), "receiver": make_cache(Geometry(2, 2, 16), 2, 12)}
        with pytest.raises(errors.ShapeError, match="up_weight"):  # of as many channels in all
            fuse(**halved)
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
    for sharer in [[one, one, other], [one, other, other], [one, other, one]] * 3:  # what comes again is remembered
        flat, layout = checks.flat_layers("sharer", sharer, 3)
        assert layout is not None and layout.strides == tuple(tensor.stride() for tensor in flat)


def test_gates_that_another_thread_remembers_in_the_middle_of_a_call() -> None:
    """At each line in turn, which is where threads may change."""
    mine, others = tuple((True, i == 1) for i in range(4)), tuple((False, i == 2) for i in range(4))
    lines = 0

    def step(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code is ops._gates.__code__ and event == "line":
            lines += 1
            if lines == line:
                ops._last_gates = others
        return step

    before = sys.gettrace()
    for line in range(1, 20):
        for remembered in (mine, ()):
            lines, ops._last_gates = 0, remembered
            sys.settrace(step)
            try:
                found = ops._gates(mine)
            finally:
                sys.settrace(before)
            assert found == mine, line
    assert line > lines > 5
