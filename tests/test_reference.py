"""The eager reference against the specification: a version by hand, in loops over numbers, and its own algebra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from helpers import Geometry, Pair, make_cache, make_weights
from lcf_fast import reference
from lcf_fast.noise import TrainingNoise

SHARER, RECEIVER = Geometry(2, 2, 3), Geometry(2, 3, 2)
WIDTH = 4
F64 = torch.float64
Array = npt.NDArray[np.float64]


def cache(geometry: Geometry, batch: int, length: int, generator: torch.Generator) -> list[Pair]:
    return make_cache(geometry, batch, length, dtype=F64, generator=generator)


def small_weights(generator: torch.Generator, *, gates: str = "open") -> dict[str, Tensor]:
    return make_weights(SHARER, RECEIVER, WIDTH, cross_context=True, gates=gates, dtype=F64, generator=generator)


def layer_of(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name: tensor[layer] for name, tensor in weights.items()}


# --- by hand: spec.md sections 2 and 4, one number at a time --------------------------------------------------------


def dot(row: Sequence[float] | Array, x: Sequence[float] | Array) -> float:
    assert len(row) == len(x)
    return math.fsum(float(a) * float(b) for a, b in zip(row, x))


def hand_input(vectors: Sequence[Array]) -> list[float]:
    """``concat`` of ``(H, D)`` parts, heads head-major."""
    return [float(part[h, d]) for part in vectors for h in range(part.shape[0]) for d in range(part.shape[1])]


def hand_projection(x: list[float], w: Mapping[str, Array], eps: float) -> list[float]:
    width = len(w["down_bias"])
    z = [dot(w["down_weight"][i], x) + float(w["down_bias"][i]) for i in range(width)]
    for block in range(len(w["norm_weight"])):
        rms = math.sqrt(math.fsum(v * v for v in z) / width + eps)
        normed = [float(w["norm_weight"][block][i]) * z[i] / rms for i in range(width)]
        hidden = []
        for row in w["ffn_in_weight"][block]:
            a = dot(row, normed)
            hidden.append(a * 0.5 * (1.0 + math.erf(a / math.sqrt(2.0))))
        z = [z[i] + dot(w["ffn_out_weight"][block][i], hidden) for i in range(width)]
    return z


def hand_edit(old: Array, z: list[float], w: Mapping[str, Array], i: int) -> Array:
    """``(Hr, Dr)`` of one token and layer; ``i`` is 0 for the key, 1 for the value."""
    half = z[: len(z) // 2] if i == 0 else z[len(z) // 2 :]
    gate = 1.0 if w["gate_logit"][i] > 0 else 0.0
    new = old.copy()
    heads, dim = old.shape
    for h in range(heads):
        alpha = 1.0 / (1.0 + math.exp(-(dot(w["head_gate_weight"][i][h], z) + float(w["head_gate_bias"][i][h]))))
        for d in range(dim):
            channel = h * dim + d
            new[h, d] += gate * alpha * (dot(w["up_weight"][i][channel], half) + float(w["up_bias"][i][channel]))
    return new


def hand_pool(key: Array, value: Array, q_span: Array, q_global: Array, spans: Sequence[Sequence[int]]) -> list[Array]:
    """``key``, ``value`` ``(H, N, D)``; ``spans``: the tokens of each. Returns ``K*``, ``V*`` ``(H, D)``."""
    heads, _, dim = key.shape
    pooled = [np.zeros((heads, dim)), np.zeros((heads, dim))]
    for h in range(heads):
        summaries = []
        for span in spans:
            if len(span) == 0:
                continue
            e = [math.exp(dot(q_span[h], key[h, t]) / math.sqrt(dim)) for t in span]
            a = [x / math.fsum(e) for x in e]
            summaries.append([sum(a_t * cache[h, t] for a_t, t in zip(a, span)) for cache in (key, value)])
        e = [math.exp(dot(q_global[h], k) / math.sqrt(dim)) for k, _ in summaries]
        for b, (k, v) in zip((x / math.fsum(e) for x in e), summaries):
            pooled[0][h] += b * k
            pooled[1][h] += b * v
    return pooled


def numpy_layer(weights: Mapping[str, Tensor], layer: int) -> dict[str, Array]:
    return {name: tensor[layer].numpy() for name, tensor in weights.items()}


def close(got: Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, torch.as_tensor(np.asarray(expected)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gates", ["open", "key_only", "value_only"])
def test_fuse_layers_is_what_the_specification_says(generator: torch.Generator, gates: str) -> None:
    batch, length, eps = 2, 3, 1e-2  # an epsilon that counts
    sharer, receiver = cache(SHARER, batch, length, generator), cache(RECEIVER, batch, length, generator)
    weights = small_weights(generator, gates=gates)
    fused = reference.fuse_layers(sharer, receiver, weights, norm_eps=eps)
    for layer, pair in enumerate(fused):
        w = numpy_layer(weights, layer)
        for b in range(batch):
            for n in range(length):
                parts = [cache[b, :, n].numpy() for cache in (*sharer[layer], *receiver[layer])]
                z = hand_projection(hand_input(parts), w, eps)
                for i in (0, 1):
                    close(pair[i][b, :, n], hand_edit(receiver[layer][i][b, :, n].numpy(), z, w, i))


def test_joint_projection_reads_the_sharer_row_that_the_index_names(generator: torch.Generator) -> None:
    (sharer, _), (receiver, _) = cache(SHARER, 2, 5, generator), cache(RECEIVER, 2, 3, generator)
    weights = layer_of(small_weights(generator), 0)
    index = torch.tensor([[4, -1, 0], [2, 2, -1]])
    latent = reference.joint_projection(*sharer, *receiver, weights, sharer_index=index)
    w = {name: tensor.numpy() for name, tensor in weights.items()}
    for b in range(2):
        for n in range(3):
            row = int(index[b, n])
            if row < 0:
                assert torch.equal(latent[b, n], torch.zeros(WIDTH, dtype=F64))
                continue
            parts = [cache[b, :, row].numpy() for cache in sharer] + [cache[b, :, n].numpy() for cache in receiver]
            close(latent[b, n], hand_projection(hand_input(parts), w, 1e-6))


def test_pooling_is_what_the_specification_says(generator: torch.Generator) -> None:
    ((key, value), _) = cache(SHARER, 2, 6, generator)
    q_span, q_global = torch.randn(2, 2, 3, generator=generator, dtype=F64)
    offsets = torch.tensor([[0, 2, 2, 6], [1, 3, 4, 4]], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    spans = [[[0, 1], [], [3, 4]], [[1, 2], [3], []]]
    got = reference.attention_pool(key, value, q_span, q_global, offsets, attention_mask=mask)
    for b in range(2):
        for i, expected in enumerate(
            hand_pool(key[b].numpy(), value[b].numpy(), q_span.numpy(), q_global.numpy(), spans[b])
        ):
            close(got[i][b], expected)


def test_summaries_fold_into_what_the_projection_would_read(generator: torch.Generator) -> None:
    """LCF-X is LCF with ``K*, V*`` at every position, and the message carries all of it."""
    batch, length = 2, 4
    sharer, receiver = cache(SHARER, batch, 7, generator), cache(RECEIVER, batch, length, generator)
    weights = small_weights(generator)
    offsets = torch.tensor([[0, 3, 7], [0, 1, 5]])
    message, summary = reference.summarize_layers(sharer, weights, offsets)
    assert message.shape == (2, batch, WIDTH)
    assert summary.shape == (2, 2, batch, 2, 3)
    for layer, (key, value) in enumerate(sharer):
        queries = weights["span_query"][layer], weights["global_query"][layer]
        pooled = reference.attention_pool(key, value, *queries, offsets)
        assert torch.equal(summary[layer, 0], pooled[0])
        assert torch.equal(summary[layer, 1], pooled[1])
    broadcast = [tuple(x[:, :, None].expand(-1, -1, length, -1) for x in layer) for layer in summary]
    as_lcf = reference.fuse_layers([(key, value) for key, value in broadcast], receiver, weights)
    as_lcf_x = reference.fuse_layers(None, receiver, weights, message=message)
    for one, other in zip(as_lcf, as_lcf_x):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(as_lcf_x[0][0], receiver[0][0])


# --- which number goes where ----------------------------------------------------------------------------------------


def changed(before: Sequence[Pair], after: Sequence[Pair]) -> set[tuple[int, int]]:
    """``(layer, half)`` of the tensors that differ."""
    pairs = list(zip(before, after))
    return {(layer, i) for layer, (a, b) in enumerate(pairs) for i in (0, 1) if not torch.equal(a[i], b[i])}


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("up_weight", (1, 0), {(1, 0)}),
        ("up_weight", (0, 1), {(0, 1)}),
        ("up_bias", (1, 1), {(1, 1)}),
        ("head_gate_bias", (0, 0), {(0, 0)}),
        ("head_gate_weight", (1, 1), {(1, 1)}),
        ("gate_logit", (0, 1), {(0, 1)}),
        ("down_weight", (1,), {(1, 0), (1, 1)}),
        ("norm_weight", (0, 1), {(0, 0), (0, 1)}),
    ],
)
def test_a_weight_moves_its_own_layer_and_half_alone(
    generator: torch.Generator, name: str, index: tuple[int, ...], expected: set[tuple[int, int]]
) -> None:
    sharer, receiver = cache(SHARER, 1, 3, generator), cache(RECEIVER, 1, 3, generator)
    weights = small_weights(generator)
    before = reference.fuse_layers(sharer, receiver, weights)
    weights[name] = weights[name].clone()
    weights[name][index] -= 0.7
    assert changed(before, reference.fuse_layers(sharer, receiver, weights)) == expected


def test_the_latents_first_half_makes_the_key_edit(generator: torch.Generator) -> None:
    receiver = cache(RECEIVER, 1, 3, generator)[0]
    weights = layer_of(small_weights(generator), 0)
    weights["head_gate_weight"] = torch.zeros_like(weights["head_gate_weight"])  # the gates read the whole latent
    latent = torch.randn(1, 3, WIDTH, dtype=F64, generator=generator)
    other = latent.clone()
    other[..., : WIDTH // 2] += 1.0
    before = reference.gated_injection(*receiver, latent, weights)
    after = reference.gated_injection(*receiver, other, weights)
    assert changed([before], [after]) == {(0, 0)}


def test_what_is_not_edited_keeps_its_bits(generator: torch.Generator) -> None:
    sharer, receiver = cache(SHARER, 2, 5, generator), cache(RECEIVER, 2, 5, generator)
    index = torch.tensor([[0, -1, 1, 2, 4], [0, 1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
    edited = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    for pair in receiver:
        for tensor in pair:
            tensor.transpose(1, 2)[~edited] = torch.nan
    before = [(key.clone(), value.clone()) for key, value in receiver]
    weights = small_weights(generator)
    after = reference.fuse_layers(sharer, receiver, weights, sharer_index=index, edit_mask=mask, positions=(0, 4))
    for old, new, given in zip(before, after, receiver):
        for i in (0, 1):
            assert torch.equal(given[i].view(torch.int64), old[i].view(torch.int64)), "the input was written"
            same = (new[i].view(torch.int64) == old[i].view(torch.int64)).all(1).all(-1)
            assert torch.equal(same, ~edited)
            assert torch.isfinite(new[i].transpose(1, 2)[edited]).all()


def test_a_row_without_tokens_pools_to_nan_and_no_batch_to_nothing(generator: torch.Generator) -> None:
    ((key, value), _) = cache(SHARER, 2, 4, generator)
    query = torch.randn(2, 3, dtype=F64, generator=generator)
    pooled = reference.attention_pool(key, value, query, query, torch.tensor([[0, 4], [2, 2]]))
    assert torch.isfinite(pooled[0][0]).all()
    assert torch.isnan(pooled[0][1]).all()
    assert torch.isnan(pooled[1][1]).all()
    empty = reference.attention_pool(key[:0], value[:0], query, query, torch.zeros(0, 2, dtype=torch.int32))
    assert [x.shape for x in empty] == [(0, 2, 3)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtypes_of_the_results(generator: torch.Generator, dtype: torch.dtype) -> None:
    sharer = make_cache(SHARER, 1, 3, dtype=dtype, generator=generator)
    receiver = make_cache(RECEIVER, 1, 3, dtype=dtype, generator=generator)
    weights = make_weights(SHARER, RECEIVER, WIDTH, cross_context=True, generator=generator)  # float32 all the same
    one, accumulate = layer_of(weights, 0), F64 if dtype == F64 else torch.float32
    offsets = torch.tensor([[0, 3]])
    assert reference.joint_projection(*sharer[0], *receiver[0], one).dtype == accumulate
    pooled = reference.attention_pool(*sharer[0], one["span_query"], one["global_query"], offsets)
    assert [x.dtype for x in pooled] == [dtype] * 2
    assert [x.dtype for x in reference.summarize_layers(sharer, weights, offsets)] == [accumulate] * 2
    assert [x.dtype for pair in reference.fuse_layers(sharer, receiver, weights) for x in pair] == [dtype] * 4


# --- gradients ------------------------------------------------------------------------------------------------------

PROJECTION = ("down_weight", "down_bias", "norm_weight", "ffn_in_weight", "ffn_out_weight")
INJECTION = ("up_weight", "up_bias", "head_gate_weight", "head_gate_bias")


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("case", ["plain", "sharer_index", "message"])
def test_gradcheck_of_the_projection(generator: torch.Generator, case: str) -> None:
    weights = layer_of(small_weights(generator), 0)
    receiver = cache(RECEIVER, 2, 2, generator)[0]
    index = torch.tensor([[3, -1], [0, 2]]) if case == "sharer_index" else None
    source: Sequence[Tensor] = cache(SHARER, 2, 2 if index is None else 4, generator)[0]
    if case == "message":
        source = [torch.randn(2, WIDTH, dtype=F64, generator=generator)]

    def run(key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        named = dict(zip(PROJECTION, rest[: len(PROJECTION)]))
        given = rest[len(PROJECTION) :]
        if case == "message":
            return reference.joint_projection(None, None, key, value, named, message=given[0])
        return reference.joint_projection(given[0], given[1], key, value, named, sharer_index=index)

    assert torch.autograd.gradcheck(run, leaves(*receiver, *(weights[name] for name in PROJECTION), *source))


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_pooling(generator: torch.Generator, masked: bool) -> None:
    ((key, value), _) = cache(SHARER, 2, 5, generator)
    queries = torch.randn(2, 2, 3, generator=generator, dtype=F64)
    offsets = torch.tensor([[0, 2, 2, 5], [0, 1, 3, 4]])
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]) if masked else None

    def run(key: Tensor, value: Tensor, q_span: Tensor, q_global: Tensor) -> Pair:
        return reference.attention_pool(key, value, q_span, q_global, offsets, attention_mask=mask)

    assert torch.autograd.gradcheck(run, leaves(key, value, *queries))


@pytest.mark.parametrize("gates", ["open", "key_only"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_injection(generator: torch.Generator, gates: str, masked: bool) -> None:
    weights = layer_of(small_weights(generator, gates=gates), 0)
    receiver = cache(RECEIVER, 2, 2, generator)[0]
    latent = torch.randn(2, 2, WIDTH, dtype=F64, generator=generator)
    mask = torch.tensor([[1, 0], [1, 1]]) if masked else None

    def run(key: Tensor, value: Tensor, latent: Tensor, *rest: Tensor) -> Pair:
        named = dict(zip(INJECTION, rest)) | {"gate_logit": weights["gate_logit"]}
        return reference.gated_injection(key, value, latent, named, edit_mask=mask)

    inputs = leaves(*receiver, latent, *(weights[name] for name in INJECTION))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("case", ["mask", "positions", "index", "message"])
def test_what_padding_holds_reaches_no_gradient(generator: torch.Generator, case: str, with_noise: bool) -> None:
    """NaN, infinity or zeros where nothing is edited: the same gradients of weights, message and caches."""
    weights = small_weights(generator)
    sharer, receiver = cache(SHARER, 2, 5, generator), cache(RECEIVER, 2, 5, generator)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    options: dict[str, Any] = {"edit_mask": mask}
    if case == "positions":
        mask = torch.tensor([[0, 1, 1, 0, 0]] * 2)
        options = {"positions": (1, 3)}
    elif case == "index":  # row 0, which an index of -1 would read, and row 4, which only a masked position names
        options["sharer_index"] = torch.tensor([[4, 3, -1, 2, 4], [1, -1, -1, -1, 4]])
        mask = mask & (options["sharer_index"] >= 0)
    hidden = mask == 0
    unread = hidden if case != "index" else torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    message = torch.randn(2, 2, WIDTH, dtype=F64, generator=generator)
    if case == "message":
        options["message"] = message
    noise = TrainingNoise(3, 0.7, 0.25) if with_noise else None

    def gradients(filler: float) -> list[Tensor]:
        tensors = [tensor.clone() for pair in (*sharer, *receiver) for tensor in pair]
        for i, tensor in enumerate(tensors):
            tensor.transpose(1, 2)[unread if i < 4 else hidden] = filler
        given = dict(options)
        if case == "message":
            given["message"] = message.clone()
            given["message"][:, 1] = filler  # of the row that is all padding
        inputs = [*weights.values(), *tensors, *([given["message"]] if case == "message" else [])]
        for tensor in inputs:
            tensor.grad = None
            tensor.requires_grad_()
        pairs = [(a, b) for a, b in zip(tensors[0::2], tensors[1::2])]
        own = None if case == "message" else pairs[:2]
        fused = reference.fuse_layers(own, pairs[2:], weights, noise=noise, **given)
        torch.stack([x.transpose(1, 2)[~hidden].sin().sum() for pair in fused for x in pair]).sum().backward()
        return [tensor.grad for tensor in inputs if tensor.grad is not None]

    truth = gradients(0.0)
    assert len(truth) >= len(PROJECTION) + len(INJECTION) and any(bool((grad != 0).any()) for grad in truth)
    for filler in (torch.nan, torch.inf):
        for got, wanted in zip(gradients(filler), truth, strict=True):
            assert torch.equal(got, wanted)


def test_a_masked_latent_reaches_no_gradient_of_the_injection(generator: torch.Generator) -> None:
    weights = layer_of(small_weights(generator), 0)
    key, value = cache(RECEIVER, 1, 2, generator)[0]
    latent = torch.full((1, 2, WIDTH), torch.nan, dtype=F64)
    latent[:, 1] = 0.5
    named = dict(zip(INJECTION, leaves(*(weights[name] for name in INJECTION)))) | {"gate_logit": weights["gate_logit"]}
    edited = reference.gated_injection(key, value, latent, named, edit_mask=torch.tensor([[0, 1]]))
    (edited[0].sum() + edited[1].sum()).backward()
    for name in INJECTION:
        grad = named[name].grad
        assert grad is not None and bool(torch.isfinite(grad).all()) and bool((grad != 0).any()), name


def test_gradients_reach_the_message_through_all_layers(generator: torch.Generator) -> None:
    """What training LCF-X needs: from the edited cache back to the pool queries."""
    sharer, receiver = cache(SHARER, 1, 4, generator), cache(RECEIVER, 1, 2, generator)
    weights = small_weights(generator)
    names = ("span_query", "global_query", "down_weight", "down_bias")
    offsets = torch.tensor([[0, 1, 4]])

    def run(*tensors: Tensor) -> list[Tensor]:
        named = weights | dict(zip(names, tensors))
        message, _ = reference.summarize_layers(sharer, named, offsets)
        return [x for pair in reference.fuse_layers(None, receiver, named, message=message) for x in pair]

    assert torch.autograd.gradcheck(run, leaves(*(weights[name] for name in names)))
