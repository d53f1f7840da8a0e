"""The slots of the eager reference: a version by hand in loops over numbers, gradients, and its own algebra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from helpers import Geometry, Pair, make_cache, make_slot_weights
from lcf_fast import reference
from lcf_fast.noise import TrainingNoise

SHARER, RECEIVER = Geometry(2, 2, 3), Geometry(2, 3, 2)
WIDTH, SLOTS = 4, 3
F64 = torch.float64
Array = npt.NDArray[np.float64]


def cache(batch: int, length: int, generator: torch.Generator) -> list[Pair]:
    return make_cache(SHARER, batch, length, dtype=F64, generator=generator)


def weights_of(generator: torch.Generator) -> dict[str, Tensor]:
    return make_slot_weights(SHARER, RECEIVER, WIDTH, SLOTS, dtype=F64, generator=generator)


def layer_of(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name: tensor[layer] for name, tensor in weights.items()}


def close(got: Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, torch.as_tensor(np.asarray(expected)), rtol=1e-12, atol=1e-13)


# --- by hand, one number at a time
# ---------------------------------------------------------------------


def dot(a: Any, b: Any) -> float:
    assert len(a) == len(b)
    return math.fsum(float(x) * float(y) for x, y in zip(a, b))


def hand_pool(key: Array, value: Array, query: Array, tokens: list[int]) -> tuple[Array, Array, Array]:
    """``key``, ``value`` ``(H, N, D)``, ``query (k, H, D)``: ``K~``, ``V~`` ``(k, H, D)``, weights ``(k, H, N)``."""
    slots, heads, dim = query.shape
    pooled = [np.zeros((slots, heads, dim)), np.zeros((slots, heads, dim))]
    weights = np.zeros((slots, heads, key.shape[1]))
    for j in range(slots):
        for h in range(heads):
            e = [math.exp(dot(query[j, h], key[h, t]) / math.sqrt(dim)) for t in tokens]
            for t, x in zip(tokens, e):
                weights[j, h, t] = x / math.fsum(e)
                pooled[0][j, h] += weights[j, h, t] * key[h, t]
                pooled[1][j, h] += weights[j, h, t] * value[h, t]
    return pooled[0], pooled[1], weights


def hand_latent(slot_key: Array, slot_value: Array, w: Mapping[str, Array]) -> list[list[float]]:
    """``(k, d)`` of ``(k, H, D)``: keys before values, heads head-major."""
    made = []
    for j, embedding in enumerate(w["slot_embedding"][: len(slot_key)]):
        x = [float(part[j, h, d]) for part in (slot_key, slot_value) for h in range(2) for d in range(3)]
        made.append([dot(w["down_weight"][i], x) + w["down_bias"][i] + embedding[i] for i in range(WIDTH)])
    return made


def hand_expansion(z: list[float], w: Mapping[str, Array], eps: float) -> list[Array]:
    """Key and value ``(Hr, Dr)`` of one slot."""
    for block in range(2):
        rms = math.sqrt(math.fsum(v * v for v in z) / WIDTH + eps)
        normed = [float(w["norm_weight"][block][i]) * z[i] / rms for i in range(WIDTH)]
        hidden = []
        for row in w["ffn_in_weight"][block]:
            a = dot(row, normed)
            hidden.append(a * 0.5 * (1.0 + math.erf(a / math.sqrt(2.0))))
        z = [z[i] + dot(w["ffn_out_weight"][block][i], hidden) for i in range(WIDTH)]
    made = []
    for i in (0, 1):
        out = np.zeros((3, 2))
        for h in range(3):
            for d in range(2):
                out[h, d] = dot(w["up_weight"][i][2 * h + d], z) + w["up_bias"][i][2 * h + d]
        made.append(out)
    return made


def test_slots_are_what_their_formula_says(generator: torch.Generator) -> None:
    sharer, weights, eps = cache(2, 5, generator), weights_of(generator), 1e-2
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 1, 0]])
    latent = reference.summarize_slots_layers(sharer, weights, attention_mask=mask)
    expanded = reference.expand_slots_layers(latent, weights, kv_heads=3, norm_eps=eps)
    assert latent.shape == (2, 2, SLOTS, WIDTH)
    for layer, ((key, value), pair) in enumerate(zip(sharer, expanded)):
        w = {name: tensor[layer].numpy() for name, tensor in weights.items()}
        query = weights["slot_query"][layer]
        got = reference.slot_pool(key, value, query, attention_mask=mask, return_weights=True)
        for b in range(2):
            tokens = mask[b].nonzero().flatten().tolist()
            pooled = hand_pool(key[b].numpy(), value[b].numpy(), query.numpy(), tokens)
            for part, expected in zip(got, pooled):
                close(part[b], expected)
            made = hand_latent(pooled[0], pooled[1], w)
            close(latent[layer, b], made)
            for j, c in enumerate(made):
                for side, expected in zip(pair, hand_expansion(c, w, eps)):
                    close(side[b, :, j], expected)


# --- gradients
# ---------------------------------------------------------------------


def test_gradients_of_all_parameters_and_of_the_cache(generator: torch.Generator) -> None:
    sharer, weights = cache(2, 4, generator), weights_of(generator)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    names = list(weights)

    def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
        flat, parameters = tensors[:4], dict(zip(names, tensors[4:]))
        latent = reference.summarize_slots_layers(list(zip(flat[0::2], flat[1::2])), parameters, attention_mask=mask)
        made = reference.expand_slots_layers(latent, parameters, kv_heads=3)
        return latent, *(side for pair in made for side in pair)

    inputs = [side for pair in sharer for side in pair] + list(weights.values())
    assert torch.autograd.gradcheck(formula, [x.requires_grad_() for x in inputs], fast_mode=True)


# --- algebra
# ---------------------------------------------------------------------


def test_one_slot_pools_as_one_span_does(generator: torch.Generator) -> None:
    ((key, value), _) = cache(2, 6, generator)
    query = torch.randn(1, 2, 3, generator=generator, dtype=F64)
    mask = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    slots = reference.slot_pool(key, value, query, attention_mask=mask)
    span = reference.attention_pool(key, value, query[0], query[0], torch.tensor([[0, 6]] * 2), attention_mask=mask)
    for got, expected in zip(slots, span):
        torch.testing.assert_close(got[:, 0], expected)


def test_each_slot_is_its_own(generator: torch.Generator) -> None:
    """Of other slots nothing is seen: fewer of them, or in another order, are the same ones."""
    sharer, weights = cache(1, 5, generator), weights_of(generator)
    whole = reference.summarize_slots_layers(sharer, weights)
    fewer = {**weights, "slot_query": weights["slot_query"][:, :2]}
    torch.testing.assert_close(reference.summarize_slots_layers(sharer, fewer), whole[:, :, :2])
    made = reference.expand_slots_layers(whole, weights, kv_heads=3)
    turned = reference.expand_slots_layers(whole.flip(2), weights, kv_heads=3)
    for pair, other in zip(made, turned):
        for side, flipped in zip(pair, other):
            torch.testing.assert_close(flipped.flip(2), side)


def test_padding_may_hold_anything_and_a_row_without_a_token_is_no_number(generator: torch.Generator) -> None:
    ((key, value), _) = cache(2, 4, generator)
    query = torch.randn(SLOTS, 2, 3, generator=generator, dtype=F64)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    key[:, :, 0], value[:, :, 3] = torch.nan, torch.inf
    slot_key, slot_value, weights = reference.slot_pool(key, value, query, attention_mask=mask, return_weights=True)
    alone = reference.slot_pool(key[:1, :, 1:3], value[:1, :, 1:3], query)
    torch.testing.assert_close(slot_key[:1], alone[0])
    torch.testing.assert_close(slot_value[:1], alone[1])
    assert slot_key[1].isnan().all()
    assert slot_value[1].isnan().all()
    assert torch.equal(weights[1], torch.zeros_like(weights[1]))
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(SLOTS, 2, dtype=F64))


def test_each_group_is_pooled_as_a_cache_of_its_own(generator: torch.Generator) -> None:
    """Overlapping groups, one of a single token; what is of no group may hold anything; another's token is not seen."""
    sharer, weights = cache(2, 6, generator), weights_of(generator)
    groups = [[[0, 1, 2], [2, 4], [4]], [[5], [1, 2, 3, 4, 5], [1]]]
    mask = torch.zeros(2, 3, 6, dtype=torch.bool)
    for b, p in np.ndindex(2, 3):
        mask[b, p, groups[b][p]] = True
    for key, value in sharer:
        key[0, :, [3, 5]], value[1, :, 0] = torch.nan, torch.inf
        value[0, :, 0] = torch.nan  # of the first group alone
    latent = reference.summarize_slots_layers(sharer, weights, attention_mask=mask)
    assert latent.shape == (2, 2, 3 * SLOTS, WIDTH)
    key, value = sharer[0]
    query = weights["slot_query"][0]
    got = reference.slot_pool(key, value, query, attention_mask=mask.long(), return_weights=True)
    assert [part.shape for part in got] == [(6, SLOTS, 2, 3), (6, SLOTS, 2, 3), (6, SLOTS, 2, 6)]
    for b, p in np.ndindex(2, 3):
        at = groups[b][p]
        alone = [(k[b : b + 1, :, at], v[b : b + 1, :, at]) for k, v in sharer]
        expected = reference.summarize_slots_layers(alone, weights)[:, 0]
        torch.testing.assert_close(latent[:, b, p * SLOTS : (p + 1) * SLOTS], expected, equal_nan=True)
        assert expected.isnan().any() == ((b, p) == (0, 0))
        own = reference.slot_pool(*alone[0], query, return_weights=True)
        row = [part[3 * b + p] for part in got]
        row[2] = row[2][..., at]
        for ours, other in zip(row, own):
            torch.testing.assert_close(ours, other[0], equal_nan=True)
        assert not got[2][3 * b + p, :, :, [t for t in range(6) if t not in at]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    sharer = make_cache(SHARER, 2, 4, dtype=dtype, generator=generator)
    weights = make_slot_weights(SHARER, RECEIVER, WIDTH, SLOTS, generator=generator)
    pooled = reference.slot_pool(*sharer[0], weights["slot_query"][0])
    assert {part.dtype for part in pooled} == {dtype}
    latent = reference.summarize_slots_layers(sharer, weights)
    assert latent.dtype == torch.float32
    for pair in reference.expand_slots_layers(latent.to(dtype), weights, kv_heads=3):
        assert {side.dtype for side in pair} == {torch.float32}


def test_dropout_scales_what_it_keeps(generator: torch.Generator) -> None:
    weights = layer_of(weights_of(generator), 1)
    latent = torch.randn(1, SLOTS, WIDTH, generator=generator, dtype=F64)
    plain = reference.expand_slots(latent, weights, kv_heads=3)
    draws = [
        reference.expand_slots(latent, weights, kv_heads=3, noise=TrainingNoise(seed, 1.0, 0.3), layer=1)[1]
        for seed in range(30)
    ]
    assert len({draw.sum().item() for draw in draws}) > 20
    none = reference.expand_slots(latent, weights, kv_heads=3, noise=TrainingNoise(5, 1.0, 0.0), layer=1)
    assert torch.equal(none[1], plain[1])
    again = reference.expand_slots(latent, weights, kv_heads=3, noise=TrainingNoise(4, 1.0, 0.3), layer=1)
    assert torch.equal(again[1], draws[4])
