"""Slots of groups of tokens, ``attention_mask (B, P, N)``: each pooled by itself, on every back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from helpers import Geometry, assert_within_budget, make_cache, make_slot_weights, to_double
from lcf_fast import library_slots, ops, ops_slots, reference, use_backend
from lcf_fast.backends import Backend
from lcf_fast.errors import LCFError, ShapeError, SpanError
from lcf_fast.slot_states import finish_states, merge_states

SHARER, RECEIVER = Geometry(4, 2, 16), Geometry(4, 3, 8)
WIDTH = 64
BACKENDS: tuple[Backend, ...] = ("eager", "triton")
LOW = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(slots: int, generator: torch.Generator) -> dict[str, Tensor]:
    return make_slot_weights(SHARER, RECEIVER, WIDTH, slots, generator=generator)


def grouped(batch: int, groups: int, length: int, generator: torch.Generator) -> Tensor:
    """``(B, P, N)``: ranges that overlap and have holes, the last group of one token, and tokens of no group."""
    start = torch.randint(0, length, (batch, groups, 1), generator=generator)
    stop = start + 1 + torch.randint(0, length, (batch, groups, 1), generator=generator)
    at = torch.arange(length)
    mask = (at >= start) & (at < stop) & (torch.rand(batch, groups, length, generator=generator) < 0.8)
    mask |= at == start
    mask[:, -1] = at == start[:, -1]
    return mask


def spoiled(sharer: Any, mask: Tensor) -> None:
    """NaN and infinities where no group has a token."""
    outside = ~mask.any(1)[:, None, :, None]
    for key, value in sharer:
        key.masked_fill_(outside, torch.nan)
        value.masked_fill_(outside, torch.inf)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("groups", "slots", "length"), [(1, 3, 9), (2, 1, 17), (5, 3, 63), (9, 4, 70)])
def test_groups(groups: int, slots: int, length: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Numbers, and that each group is pooled as a cache of its own tokens would be."""
    sharer, weights = make_cache(SHARER, 2, length, dtype=dtype, generator=generator), weights_of(slots, generator)
    mask = grouped(2, groups, length, generator)
    spoiled(sharer, mask)
    double = {name: tensor.double() for name, tensor in weights.items()}
    truth = reference.summarize_slots_layers(to_double(sharer), double, attention_mask=mask)
    plain = reference.summarize_slots_layers(sharer, weights, attention_mask=mask)
    latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask.int())
    assert latent.shape == (4, 2, groups * slots, WIDTH)
    assert_within_budget(latent, truth, plain)
    for b in range(2):
        for p in range(groups):
            own = [(key[b, None, :, mask[b, p]], value[b, None, :, mask[b, p]]) for key, value in sharer]
            alone = ops.summarize_slots_layers(own, weights)[:, 0]
            torch.testing.assert_close(latent[:, b, p * slots : (p + 1) * slots], alone, rtol=1e-5, atol=1e-5)


def test_groups_of_one_layer(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of all layers; layers one by one; weights of tokens; states of pieces."""
    sharer, weights = make_cache(SHARER, 2, 20, generator=generator), weights_of(4, generator)
    mask = grouped(2, 3, 20, generator)
    latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
    monkeypatch.setattr("lcf_fast.eager_slots._STACK_ELEMENTS", 0)
    torch.testing.assert_close(ops.summarize_slots_layers(sharer, weights, attention_mask=mask), latent)
    one = {name: stacked[1] for name, stacked in weights.items()}
    got = ops.slot_pool(*sharer[1], one["slot_query"], attention_mask=mask, return_weights=True)
    truth = reference.slot_pool(*sharer[1], one["slot_query"], attention_mask=mask, return_weights=True)
    for ours, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(ours, expected)
    folded = ops.fold_slots(got[0], got[1], one)
    torch.testing.assert_close(folded.unflatten(0, (2, 3)).flatten(1, 2), latent[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_a_context_in_pieces(backend: Backend, generator: torch.Generator) -> None:
    """States of B·P rows merge as any do: here before and after token 7, where some groups have none."""
    sharer = make_cache(SHARER, 2, 20, generator=generator)[:1]
    weights = {name: stacked[:1] for name, stacked in weights_of(4, generator).items()}
    mask = grouped(2, 3, 20, generator)
    with use_backend(backend):
        parts = [
            ops_slots.pool_slot_states([(k[:, :, at], v[:, :, at]) for k, v in sharer], query, mask[:, :, at])
            for at in (slice(0, 7), slice(7, 7), slice(7, 20))
            for query in [weights["slot_query"]]
        ]
        pooled = finish_states(merge_states(parts))
    for layer, pair in enumerate(sharer):
        expected = reference.slot_pool(*pair, weights["slot_query"][layer], attention_mask=mask)
        for ours, other in zip(pooled, expected):
            torch.testing.assert_close(ours[layer], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(2, 3, 8), ShapeError),
        (torch.ones(2, 0, 9), ShapeError),
        (torch.ones(1, 3, 9), ShapeError),
        (torch.ones(2, 3, 9, 1), ShapeError),
        (torch.ones(2, 3, 9) * torch.tensor([1.0, 0.0, 1.0])[:, None], SpanError),
        (torch.zeros(2, 1, 9), SpanError),
    ],
)
def test_groups_that_do_not_fit(mask: Tensor, error: type[LCFError], generator: torch.Generator) -> None:
    sharer, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    with pytest.raises(error) as caught:
        ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
    assert caught.value.argument == "attention_mask"


def test_an_empty_group_is_named(generator: torch.Generator) -> None:
    mask = torch.ones(2, 3, 9, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(SpanError, match=r"every group.*\(1, 2\)"):
        ops.summarize_slots_layers(
            make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator), attention_mask=mask
        )


@pytest.mark.parametrize("layers", [0, 1 << 16], ids=["apart", "stacked"])
def test_gradients_of_groups_are_those_of_the_reference(
    layers: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcf_fast.eager_slots._STACK_ELEMENTS", layers)
    sharer = to_double(make_cache(SHARER, 2, 9, generator=generator))
    mask = grouped(2, 3, 9, generator)

    def gradients(functions: Any) -> list[Tensor]:
        flat = [side.detach().requires_grad_() for pair in sharer for side in pair]
        weights = {n: w.double() for n, w in weights_of(4, torch.Generator().manual_seed(3)).items()}
        query = weights["slot_query"].requires_grad_()
        pairs = list(zip(flat[0::2], flat[1::2]))
        latent = functions.summarize_slots_layers(pairs, weights, attention_mask=mask)
        loss = (latent * (1 + torch.arange(12.0))[:, None]).sin().sum()
        return list(torch.autograd.grad(loss, [query, *flat]))

    for got, expected in zip(gradients(ops), gradients(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# --- as ops, trained and compiled
# ---------------------------------------------------------------------

#: The interpreter takes its time for each layer.
SMALL = Geometry(1, 2, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_groups(backend: Backend, generator: torch.Generator) -> None:
    """Its results have B·P rows; one group is as good as more."""
    ((key, value),) = make_cache(Geometry(1, 1, 16), 2, 9, generator=generator)
    query = torch.randn(1, 3, 1, 16, generator=generator).requires_grad_()
    caches = [side.clone().requires_grad_() for side in (key, value)]
    with use_backend(backend):
        opcheck(library_slots.pool_slots, ([key, value], query, grouped(2, 2, 9, generator)))
        one = caches, query.detach(), grouped(2, 1, 9, generator)
        opcheck(library_slots.pool_slots, one, test_utils=("test_schema", "test_faketensor"))


def summary(sharer: Any, weights: dict[str, Tensor], mask: Tensor) -> Tensor:
    return ops.summarize_slots_layers(sharer, weights, attention_mask=mask)


def latent_and_gradients(function: Any, sharer: Any, weights: dict[str, Tensor], mask: Tensor) -> list[Tensor]:
    leaves = {name: weights[name].detach().requires_grad_() for name in ("slot_query", *library_slots.FOLD_WEIGHTS)}
    latent = function(sharer, leaves, mask)
    grads = torch.autograd.grad((latent * (1 + torch.arange(WIDTH))).sin().mean(), list(leaves.values()))
    return [latent.detach(), *grads]


@pytest.mark.parametrize("dtype", LOW)
def test_the_kernels_train_on_groups(dtype: torch.dtype, generator: torch.Generator) -> None:
    sharer = make_cache(SMALL, 2, 9, dtype=dtype, generator=generator)
    weights = make_slot_weights(SMALL, SMALL, WIDTH, 4, generator=generator)
    mask = grouped(2, 3, 9, generator)
    spoiled(sharer, mask)
    with use_backend("triton"):
        got = latent_and_gradients(summary, sharer, weights, mask)
    double = {name: tensor.double() for name, tensor in weights.items()}
    exact = latent_and_gradients(summary, to_double(sharer), double, mask)
    for ours, truth, plain in zip(got, exact, latent_and_gradients(summary, sharer, weights, mask), strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, truth, plain, 6.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_compile_whole_forward_and_backward(backend: Backend, generator: torch.Generator) -> None:
    """Two numbers of groups and lengths by one function."""
    weights = make_slot_weights(SMALL, SMALL, WIDTH, 4, generator=generator)
    compiled: Any = torch.compile(summary, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for groups, length in ((2, 9), (3, 5)):
            sharer, mask = make_cache(SMALL, 2, length, generator=generator), grouped(2, groups, length, generator)
            got = latent_and_gradients(compiled, sharer, weights, mask)
            for ours, expected in zip(got, latent_and_gradients(summary, sharer, weights, mask), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_what_is_not_finite_in_one_group_stays_there(
    backend: Backend, spoil: float, generator: torch.Generator
) -> None:
    """Forward, as a state of a piece, and in the gradient of the cache."""
    sharer, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(2, generator)
    mask = torch.zeros(2, 2, 9, dtype=torch.bool)
    mask[:, 0, :5] = mask[:, 1, 3:] = True
    for side in sharer[1]:
        side[1, :, 0] = spoil  # of item 1's first group
    truth = reference.summarize_slots_layers(sharer, weights, attention_mask=mask)
    flat = [tensor.requires_grad_() for pair in sharer for tensor in pair]
    with use_backend(backend):
        latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
        states = ops_slots.pool_slot_states(sharer, weights["slot_query"], mask)
        grads = torch.autograd.grad(latent[1, 1, 2:].sum(), flat[2:4])
    assert torch.equal(latent.isfinite(), truth.isfinite())
    assert not latent[1, 1, :2].isfinite().any() and latent[1, 1, 2:].isfinite().all()
    finite = truth.isfinite()
    torch.testing.assert_close(latent.detach()[finite], truth[finite])
    assert states.states[1, 3].isfinite().all() and not states.states[1, 2].isfinite().all()
    assert all(grad[1, :, 5:].isfinite().all() and grad[1, :, 5:].any() for grad in grads)
