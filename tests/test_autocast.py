"""Under `torch.autocast` every op and adapter gives the bits and dtypes that it gives without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, make_adapter, make_caches
from torch import Tensor

from lcf_fast import LatentSlots, LCFConfig, Message, ops, use_backend
from lcf_fast.autocast import without_autocast

SPANS = [[0, 3, 7], [0, 3, 7]]


def flatten(result: Any) -> list[Tensor]:
    if isinstance(result, Message):
        return list(result.tensors.values())
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flatten(part)]


def lcf(with_grad: bool) -> Any:
    adapter, (sharer, receiver) = make_adapter().requires_grad_(with_grad), make_caches()
    index = torch.tensor([[0, -1, 2, 3, 4, 5, 6]] * 2)
    weights = {name: tensor[0] for name, tensor in adapter.named_parameters()}
    latent = ops.joint_projection(*sharer[0], *receiver[0], weights, sharer_index=index)
    edited = ops.gated_injection(*receiver[0], latent, weights)
    key, value = (tensor.clone() for tensor in receiver[0])
    in_place = ops.gated_injection_(key, value, latent.detach(), weights)
    return adapter.fuse(sharer, receiver, sharer_index=index), latent, edited, in_place


def lcf_x(with_grad: bool) -> Any:
    adapter, (sharer, receiver) = make_adapter(True).requires_grad_(with_grad), make_caches()
    message = adapter.summarize(sharer, SPANS, span_weights=True)
    weights = {name: tensor[0] for name, tensor in adapter.named_parameters()}
    pooled = ops.attention_pool(*sharer[0], weights["span_query"], weights["global_query"], torch.tensor(SPANS))
    grown = adapter.begin().extend(sharer, SPANS).finish()
    return message, pooled, grown, adapter.inject(receiver, message), adapter.combine([message, grown])


def slots(with_grad: bool) -> Any:
    torch.manual_seed(5)
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True, slots=3)
    adapter = LatentSlots(config).eval().requires_grad_(with_grad)
    sharer, _ = make_caches()
    message = adapter.summarize(sharer, slot_weights=True)
    weights = {name: tensor[0] for name, tensor in adapter.named_parameters()}
    pooled = ops.slot_pool(*sharer[0], weights["slot_query"], return_weights=True)
    grown = adapter.begin().extend(sharer).finish()
    return message, pooled, ops.fold_slots(pooled[0], pooled[1], weights), grown, adapter.expand(message)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("method", [lcf, lcf_x, slots])
def test_numbers_and_dtypes_are_the_same(method: Callable[[bool], Any], with_grad: bool) -> None:
    plain = flatten(method(with_grad))
    with torch.autocast("cpu", torch.bfloat16):
        cast = flatten(method(with_grad))
        assert torch.is_autocast_enabled("cpu")  # still, for who comes after
    assert any(tensor.requires_grad for tensor in cast) == with_grad
    for got, wanted in zip(cast, plain, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_gradients_are_the_same() -> None:
    def gradients(adapter: Any, dtype: torch.dtype | None) -> list[Tensor]:
        sharer, receiver = make_caches()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            if adapter.config.cross_context:
                edited = adapter.inject(receiver, adapter.summarize(sharer, SPANS))
            else:
                edited = adapter.fuse(sharer, receiver)
        loss = torch.stack([tensor.sin().sum() for pair in edited for tensor in pair]).sum()
        wanted = [parameter for parameter in adapter.parameters() if parameter is not adapter.gate_logit]
        return list(torch.autograd.grad(loss, wanted))

    for cross_context in (False, True):
        adapter = make_adapter(cross_context).requires_grad_()
        for got, wanted in zip(gradients(adapter, torch.bfloat16), gradients(adapter, None), strict=True):
            assert torch.equal(got, wanted)


def test_gradients_of_kernels_are_the_same_where_the_backward_pass_is_under_it_too() -> None:
    """Of the reference under autograd they are not: its products are torch's own."""
    sharer, receiver = make_caches()
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True, slots=3)
    adapter, crossing, told = make_adapter(), make_adapter(True), LatentSlots(config).eval()
    methods: list[tuple[Any, Callable[[], Any]]] = [
        (adapter, lambda: adapter.fuse(sharer, receiver)),
        (crossing, lambda: crossing.inject(receiver, crossing.summarize(sharer, SPANS))),
        (told, lambda: told.expand(told.summarize(sharer))),
    ]
    for module, method in methods:
        module.requires_grad_()
        found = []
        for enabled in (False, True):
            with use_backend("triton"), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                edited = [tensor for tensor in flatten(method()) if tensor.requires_grad]
                torch.autograd.backward(edited, [torch.ones_like(tensor) for tensor in edited])
            found.append([parameter.grad for parameter in module.parameters() if parameter.grad is not None])
            module.zero_grad()
        assert found[0]
        for got, wanted in zip(*found, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("with_grad", [False, True])
def test_compiled(with_grad: bool) -> None:
    adapter, (sharer, receiver) = make_adapter(True).requires_grad_(with_grad), make_caches()
    message = adapter.summarize(sharer, SPANS)
    summary = message.tensors["summary"].detach()

    def both() -> tuple[Tensor, Any]:
        return ops.fold_summary(summary, dict(adapter.named_parameters())), adapter.inject(receiver, message)

    plain = flatten(both())
    compiled: Any = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        cast = flatten(compiled())
    for got, wanted in zip(cast, plain, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_function_keeps_its_name_and_what_it_raises() -> None:
    @without_autocast
    def product(x: Tensor) -> Tensor:
        """A product."""
        return x @ x

    assert (product.__name__, product.__doc__) == ("product", "A product.")
    with torch.autocast("cpu", torch.bfloat16):
        assert product(torch.eye(2)).dtype == torch.float32
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            product(torch.ones(2, 3))
        assert torch.is_autocast_enabled("cpu")
