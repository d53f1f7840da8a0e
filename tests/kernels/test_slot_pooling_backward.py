"""Gradient of the slots' queries against float64 autograd of the formula."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from slot_formulas import pool_formula
from torch import Tensor

from helpers import ADVERSARIES, Adversary, Geometry, Pair, assert_within_budget, guarded, make_cache, with_layout
from lcf_fast.kernels import slot_pooling_backward
from lcf_fast.kernels.slot_policy import SlotPoolConfig, slot_backward_config, slot_pool_config
from lcf_fast.kernels.slot_pooling import finish_slot_states, pool_slot_states, pool_slots
from lcf_fast.kernels.slot_pooling_backward import pool_slots_backward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Closed form and autograd round at other places; a gradient of a softmax is a difference of near equals.
BUDGET = 6.0
SMALL = SlotPoolConfig(
    block_slots=16, block_tokens=16, num_warps=4, num_stages=2, masked_stages=3, merge_parts=4, merge_warps=4
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Few tokens make many chunks of two steps."""
    monkeypatch.setattr(slot_pooling_backward, "slot_backward_config", lambda *_: SMALL)
    monkeypatch.setattr(slot_pooling_backward, "chunk_tokens", lambda *_: 32)


def autograd(sharer: Sequence[Pair], query: Tensor, mask: Tensor | None, grad: Pair, dtype: torch.dtype) -> Tensor:
    leaf = query.detach().to(dtype).requires_grad_()
    pooled = pool_formula(sharer, leaf, mask, dtype)
    (found,) = torch.autograd.grad(pooled, leaf, [x.to(dtype) for x in grad])
    return found


def check(
    sharer: Sequence[Pair],
    query: Tensor,
    generator: torch.Generator,
    mask: Tensor | None = None,
    *,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    states, stats = pool_slot_states(sharer, query, attention_mask=mask)
    pooled = finish_slot_states(states, stats)
    grad_key, grad_value = (torch.randn(x.shape, generator=generator).to(x) * by for x, by in zip(pooled, scales))
    grad = grad_key, grad_value
    got = pool_slots_backward(sharer, query, pooled, stats, grad, attention_mask=mask)
    truth, plain = (autograd(sharer, query, mask, grad, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(got, truth, plain, BUDGET)
    return got


def case(
    slots: int,
    tokens: int,
    head_dim: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = 1,
    batch: int = 1,
    heads: int = 1,
    adversary: Adversary | None = None,
) -> tuple[list[Pair], Tensor]:
    """A sharer's cache, and float32 queries, as in training."""
    geometry = Geometry(layers, heads, head_dim)
    sharer = make_cache(
        geometry, batch, tokens, generator=generator, device=device, dtype=dtype, adversary=adversary
    )
    return sharer, torch.randn(layers, slots, heads, head_dim, generator=generator).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("slots", "tokens", "head_dim"), [(3, 63, 64), (17, 16, 64), (1, 1, 64), (8, 100, 80)])
def test_sizes(
    slots: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    sharer, query = case(slots, tokens, head_dim, generator, device, dtype)
    if tokens == 1:  # the softmax of one token has no slope
        states, stats = pool_slot_states(sharer, query)
        pooled = finish_slot_states(states, stats)
        got = pool_slots_backward(sharer, query, pooled, stats, pooled)
        assert got.abs().max() < 1e-4
    else:
        check(sharer, query, generator)


@pytest.mark.parametrize("scales", [(1e-6, 1e-6), (1e4, 1e4), (1.0, 1e4), (1e4, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_any_size(
    scales: tuple[float, float], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """Losses are averaged over a batch: gradients are often below what float16 holds; one side's may be larger."""
    sharer, query = case(3, 40, 64, generator, device, dtype)
    check(sharer, query, generator, scales=scales)


def test_layers_batch_heads_and_masks(device: torch.device, generator: torch.Generator) -> None:
    """Padding may hold anything; an item of padding alone has no part; layers may lie differently."""
    sharer, query = case(3, 40, 64, generator, device, layers=2, batch=3, heads=2)
    sharer[1] = (with_layout(sharer[1][0], "token_major"), sharer[1][1])
    mask = (torch.arange(40) >= torch.tensor([[5], [40], [33]])).to(device)
    for key, value in sharer:
        key.masked_fill_(~mask[:, None, :, None], torch.nan)
        value.masked_fill_(~mask[:, None, :, None], torch.nan)
    states, stats = pool_slot_states(sharer, query, attention_mask=mask)
    pooled = finish_slot_states(states, stats)
    grad_key, grad_value = (torch.randn(x.shape, generator=generator).to(x) for x in pooled)
    got = pool_slots_backward(sharer, query, pooled, stats, (grad_key, grad_value), attention_mask=mask)
    rest = [(key[::2], value[::2]) for key, value in sharer]
    grad = grad_key[:, ::2], grad_value[:, ::2]
    truth, plain = (autograd(rest, query, mask[::2], grad, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(got, truth, plain, BUDGET)
    assert torch.equal(
        got, pool_slots_backward(sharer, query, pooled, stats, (grad_key, grad_value), attention_mask=mask)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Overlapping, of one token, of none, which has no part; what is of no group may hold anything."""
    sharer, query = case(3, 90, 64, generator, device, dtype, batch=2)
    at = torch.arange(90)
    mask = torch.stack([(at >= 70) & (at < 85), at % 3 == 1, at == 40, (at > 30) & (at < 84)])
    mask = torch.stack([mask, mask.roll(-3, -1)]).to(device)
    mask[1, 1] = False
    for key, value in sharer:
        key.masked_fill_(~mask.any(1)[:, None, :, None], torch.nan)
        value.masked_fill_(~mask.any(1)[:, None, :, None], torch.inf)
    states, stats = pool_slot_states(sharer, query, attention_mask=mask)
    pooled = finish_slot_states(states, stats)
    grad_key, grad_value = (torch.randn(x.shape, generator=generator).to(x) for x in pooled)
    got = pool_slots_backward(sharer, query, pooled, stats, (grad_key, grad_value), attention_mask=mask)
    kept = [0, 1, 2, 3, 4, 6, 7]
    rows = [(key.repeat_interleave(4, 0)[kept], value.repeat_interleave(4, 0)[kept]) for key, value in sharer]
    grad, alone = (grad_key[:, kept], grad_value[:, kept]), mask.flatten(0, 1)[kept]
    truth, plain = (autograd(rows, query, alone, grad, kind) for kind in (torch.float64, torch.float32))
    assert_within_budget(got, truth, plain, BUDGET)


@pytest.mark.parametrize("adversary", [a for a in ADVERSARIES if a not in ("zeros", "all_equal")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversary(adversary: Adversary, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    sharer, query = case(3, 70, 64, generator, device, dtype, adversary=adversary)
    check(sharer, query, generator)


@pytest.mark.parametrize("adversary", ["zeros", "all_equal"])
def test_equal_tokens_have_no_gradient(
    adversary: Adversary, device: torch.device, generator: torch.Generator
) -> None:
    sharer, query = case(3, 70, 64, generator, device, adversary=adversary)
    states, stats = pool_slot_states(sharer, query)
    pooled = finish_slot_states(states, stats)
    assert pool_slots_backward(sharer, query, pooled, stats, pooled).abs().max() < 1e-5


def test_reads_nothing_beyond(device: torch.device, generator: torch.Generator) -> None:
    sharer, query = case(3, 37, 80, generator, device, torch.float16)
    fenced = [tuple(guarded(x.shape, x.dtype, device)[0].copy_(x) for x in pair) for pair in sharer]
    query = guarded(query.shape, query.dtype, device)[0].copy_(query)
    check(fenced, query, generator)  # type: ignore[arg-type]


def test_the_states_are_those_of_the_forward_pass(device: torch.device, generator: torch.Generator) -> None:
    sharer, query = case(3, 70, 64, generator, device)
    for one, other in zip(pool_slots(sharer, query), finish_slot_states(*pool_slot_states(sharer, query))):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_policy() -> None:
    assert slot_backward_config(128, 2, 64, "sm_90").block_slots == 32
    assert slot_backward_config(128, 2, 8, "sm_90") == slot_pool_config(128, 2, 8, "sm_90")
    assert slot_backward_config(256, 2, 64, "sm_80").block_slots == 16
    assert slot_backward_config(128, 2, 64, "gfx942").block_slots == 16


def test_nothing_for_no_rows(device: torch.device) -> None:
    empty, query = torch.empty(0, 2, 10, 64, device=device), torch.zeros(1, 3, 2, 64, device=device)
    stats, pooled = torch.empty(1, 0, 2, 3, 2, device=device), torch.empty(1, 0, 3, 2, 64, device=device)
    got = pool_slots_backward([(empty, empty)], query, (pooled, pooled), stats, (pooled, pooled))
    assert torch.equal(got, torch.zeros_like(query))
