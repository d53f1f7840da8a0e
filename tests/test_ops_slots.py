"""The public functions of slots: within the error budget, checked, differentiable and compilable on every back end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from helpers import (
    ADVERSARIES,
    CACHE_LAYOUTS,
    Adversary,
    CacheLayout,
    Geometry,
    assert_within_budget,
    make_cache,
    make_slot_weights,
    to_double,
)
from lcf_fast import library_slots, ops, reference, use_backend
from lcf_fast.backends import Backend
from lcf_fast.errors import BackendError, DeviceError, DTypeError, GeometryError, LCFError, ShapeError, SpanError
from lcf_fast.noise import TrainingNoise

SHARER, RECEIVER = Geometry(4, 2, 16), Geometry(4, 3, 8)
WIDTH = 64
BACKENDS: tuple[Backend, ...] = ("eager", "triton")
LOW = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(slots: int, generator: torch.Generator) -> dict[str, Tensor]:
    return make_slot_weights(SHARER, RECEIVER, WIDTH, slots, generator=generator)


def ragged(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """A mask with padding on the left, on the right and in between, and a token in every row."""
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[:, length // 2] = True
    return mask


def check_whole(sharer: Any, weights: dict[str, Tensor], mask: Tensor | None) -> None:
    """`ops` within the budget of the reference at the same dtype, against float64."""
    double = {name: tensor.double() for name, tensor in weights.items()}
    truth = reference.summarize_slots_layers(to_double(sharer), double, attention_mask=mask)
    plain = reference.summarize_slots_layers(sharer, weights, attention_mask=mask)
    latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
    assert_within_budget(latent, truth, plain)
    made = ops.expand_slots_layers(latent, weights, kv_heads=3, norm_eps=1e-5)
    expected = reference.expand_slots_layers(latent.double(), double, kv_heads=3, norm_eps=1e-5)
    same = reference.expand_slots_layers(latent, weights, kv_heads=3, norm_eps=1e-5)
    for got, truths, plains in zip(made, expected, same, strict=True):
        for side, exact, simple in zip(got, truths, plains):
            assert side.shape == (len(latent[0]), 3, latent.shape[2], 8)
            assert_within_budget(side, exact, simple)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("slots", "length"), [(1, 1), (3, 17), (8, 63), (16, 16), (64, 1000)])
def test_numbers(slots: int, length: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    sharer = make_cache(SHARER, 2, length, dtype=dtype, generator=generator)
    check_whole(sharer, weights_of(slots, generator), ragged(2, length, generator))


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversarial_numbers(adversary: Adversary, generator: torch.Generator) -> None:
    sharer = make_cache(SHARER, 2, 40, adversary=adversary, generator=generator)
    check_whole(sharer, weights_of(4, generator), None)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_layouts(layout: CacheLayout, generator: torch.Generator) -> None:
    sharer = make_cache(SHARER, 3, 33, layout=layout, generator=generator)
    check_whole(sharer, weights_of(5, generator), ragged(3, 33, generator))


def test_layers_stacked_and_one_by_one_are_alike(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    sharer, weights = make_cache(SHARER, 2, 20, generator=generator), weights_of(4, generator)
    mask = ragged(2, 20, generator)
    stacked = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
    monkeypatch.setattr("lcf_fast.eager_slots._STACK_ELEMENTS", 0)
    torch.testing.assert_close(ops.summarize_slots_layers(sharer, weights, attention_mask=mask), stacked)


def test_padding_may_hold_anything(generator: torch.Generator) -> None:
    sharer, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    mask = ragged(2, 9, generator)
    clean = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
    for key, value in sharer:
        for side, dirt in ((key, torch.nan), (value, torch.inf)):
            side.masked_fill_(~mask[:, None, :, None], dirt)
    assert torch.equal(ops.summarize_slots_layers(sharer, weights, attention_mask=mask), clean)
    alone = ops.summarize_slots_layers(
        [tuple(side[1:, :, mask[1]] for side in pair) for pair in sharer],  # type: ignore[misc]
        weights,
    )
    torch.testing.assert_close(alone, clean[:, 1:])


def test_one_layer_is_a_row_of_all(generator: torch.Generator) -> None:
    sharer, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    mask = ragged(2, 9, generator)
    latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
    made = ops.expand_slots_layers(latent, weights, kv_heads=3)
    for layer, pair in enumerate(sharer):
        one = {name: stacked[layer] for name, stacked in weights.items()}
        slot_key, slot_value, shares = ops.slot_pool(
            *pair, one["slot_query"], attention_mask=mask, return_weights=True
        )
        truth = reference.slot_pool(*pair, one["slot_query"], attention_mask=mask, return_weights=True)
        for got, expected in zip((slot_key, slot_value, shares), truth, strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(ops.fold_slots(slot_key, slot_value, one), latent[layer])
        for got, expected in zip(ops.expand_slots(latent[layer], one, kv_heads=3), made[layer]):
            torch.testing.assert_close(got, expected)
        noise = TrainingNoise(3, 1.0, 0.5)
        noisy = ops.expand_slots_layers(latent, weights, kv_heads=3, noise=noise)[layer]
        for got, expected in zip(ops.expand_slots(latent[layer], one, kv_heads=3, noise=noise, layer=layer), noisy):
            torch.testing.assert_close(got, expected)


def test_gradients_are_those_of_the_reference(generator: torch.Generator) -> None:
    sharer = to_double(make_cache(SHARER, 2, 9, generator=generator))
    mask = ragged(2, 9, generator)
    noise = TrainingNoise(7, 1.0, 0.2)

    def gradients(functions: Any) -> list[Tensor]:
        weights = {n: w.double().requires_grad_() for n, w in weights_of(4, torch.Generator().manual_seed(3)).items()}
        latent = functions.summarize_slots_layers(sharer, weights, attention_mask=mask)
        made = functions.expand_slots_layers(latent, weights, kv_heads=3, noise=noise)
        loss = sum((side * (1 + torch.arange(8.0))).square().mean() for pair in made for side in pair)
        return list(torch.autograd.grad(loss, list(weights.values())))

    for got, expected in zip(gradients(ops), gradients(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_inputs_are_left_alone_and_no_output_is_one_of_them(generator: torch.Generator) -> None:
    sharer, weights = make_cache(SHARER, 2, 1, generator=generator), weights_of(1, generator)
    before = [side.clone() for pair in sharer for side in pair]
    latent = ops.summarize_slots_layers(sharer, weights, attention_mask=torch.ones(2, 1))
    ops.expand_slots_layers(latent, weights, kv_heads=3)
    assert all(torch.equal(a, b) for a, b in zip(before, [side for pair in sharer for side in pair]))
    key, value = ops.slot_pool(*sharer[0], weights["slot_query"][0])[:2]
    assert key.data_ptr() != sharer[0][0].data_ptr()
    assert value.data_ptr() != sharer[0][1].data_ptr()


def test_it_compiles_whole(generator: torch.Generator) -> None:
    sharer, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    mask = ragged(2, 9, generator)

    def both(mask: Tensor) -> Any:
        latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
        return latent, ops.expand_slots_layers(latent, weights, kv_heads=3)

    compiled: Any = torch.compile(both, fullgraph=True, backend="eager")(mask)
    torch.testing.assert_close(compiled, both(mask))


# --- what is refused
# ---------------------------------------------------------------------


def changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(arguments: dict[str, Any]) -> None:
        arguments["weights"] = {**arguments["weights"], name: change(arguments["weights"][name])}

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "argument"),
    [
        (lambda a: a.update(sharer=a["sharer"][:3]), GeometryError, "sharer"),
        (lambda a: a.update(attention_mask=torch.ones(2, 8)), ShapeError, "attention_mask"),
        (lambda a: a.update(attention_mask=torch.tensor([[1] * 9, [0] * 9])), SpanError, "attention_mask"),
        (lambda a: a["weights"].pop("slot_embedding"), GeometryError, "weights['slot_embedding']"),
        (changed("slot_query", lambda q: q[:, :, :1]), ShapeError, "weights['slot_query']"),
        (changed("slot_query", lambda q: q[:, :0]), ShapeError, "weights['slot_query']"),
        (changed("slot_embedding", lambda e: e[:, :3]), ShapeError, "weights['slot_embedding']"),
        (changed("down_weight", lambda w: w[..., :-1]), ShapeError, "weights['down_weight']"),
        (changed("down_bias", lambda b: b.long()), DTypeError, "weights['down_bias']"),
    ],
)
def test_bad_summaries(edit: Any, error: type[LCFError], argument: str, generator: torch.Generator) -> None:
    arguments: dict[str, Any] = {
        "sharer": make_cache(SHARER, 2, 9, generator=generator),
        "weights": weights_of(4, generator),
        "attention_mask": torch.ones(2, 9),
    }
    edit(arguments)
    with pytest.raises(error) as caught:
        ops.summarize_slots_layers(**arguments)
    assert caught.value.argument == argument


def test_an_empty_cache_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(SpanError):
        ops.summarize_slots_layers(make_cache(SHARER, 1, 0), weights_of(4, generator))


@pytest.mark.parametrize(
    ("edit", "error", "argument"),
    [
        (lambda a: a.update(latent=a["latent"][0]), ShapeError, "latent"),
        (lambda a: a.update(latent=a["latent"].long()), DTypeError, "latent"),
        (lambda a: a.update(latent=a["latent"][..., :32]), ShapeError, "weights['norm_weight']"),
        (lambda a: a.update(kv_heads=5), GeometryError, "kv_heads"),
        (lambda a: a.update(kv_heads=3.0), DTypeError, "kv_heads"),
        (changed("up_bias", lambda b: b[:, :1]), ShapeError, "weights['up_bias']"),
        (changed("ffn_out_weight", lambda w: w.mT), ShapeError, "weights['ffn_out_weight']"),
        (lambda a: a.update(weights=None), DTypeError, "weights"),
        (lambda a: a["weights"].pop("norm_weight"), GeometryError, "weights['norm_weight']"),
        (lambda a: a.update(latent=a["latent"].to("meta")), DeviceError, "latent"),
        (lambda a: a.update(norm_eps="1e-6"), DTypeError, "norm_eps"),
        (lambda a: a.update(norm_eps=float("nan")), GeometryError, "norm_eps"),
        (lambda a: a.update(noise=1), DTypeError, "noise"),
    ],
)
def test_bad_expansions(edit: Any, error: type[LCFError], argument: str, generator: torch.Generator) -> None:
    arguments: dict[str, Any] = {
        "latent": torch.randn(4, 2, 4, WIDTH, generator=generator),
        "weights": weights_of(4, generator),
        "kv_heads": 3,
    }
    edit(arguments)
    with pytest.raises(error) as caught:
        ops.expand_slots_layers(**arguments)
    assert caught.value.argument == argument


# --- on either back end
# ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 2])
def test_kernels_asked_for_by_name_serve(count: int, generator: torch.Generator) -> None:
    sharer, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    weights["slot_query"] = weights["slot_query"][:, :count]
    mask = ragged(2, 9, generator)
    with use_backend("triton"):
        latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
        made = ops.expand_slots_layers(latent, weights, kv_heads=3)
    expected = reference.summarize_slots_layers(sharer, weights, attention_mask=mask)
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
    truth = reference.expand_slots_layers(latent, weights, kv_heads=3)
    torch.testing.assert_close(made, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_latents_that_came_in_a_narrow_dtype(dtype: torch.dtype, generator: torch.Generator) -> None:
    """As messages are sent: what they hold is expanded in float32 on either back end."""
    latent, weights = torch.randn(4, 2, 3, WIDTH, generator=generator).to(dtype), weights_of(3, generator)
    double = {name: tensor.double() for name, tensor in weights.items()}
    truth = reference.expand_slots_layers(latent.double(), double, kv_heads=3)
    plain = reference.expand_slots_layers(latent.float(), weights, kv_heads=3)
    for backend in BACKENDS:
        with use_backend(backend):
            made = ops.expand_slots_layers(latent, weights, kv_heads=3)
        for got, exact, same in zip(made, truth, plain):
            for side in (0, 1):
                assert_within_budget(got[side], exact[side], same[side], 4.0)


def test_kernels_asked_for_by_name_say_why_they_cannot_serve(generator: torch.Generator) -> None:
    sharer = make_cache(SHARER, 1, 9, generator=generator)
    double = {name: tensor.double() for name, tensor in weights_of(4, generator).items()}
    many = weights_of(65, generator)
    latent = torch.randn(4, 1, 65, WIDTH, generator=generator)
    with use_backend("triton"):
        assert library_slots.backend_of(sharer[0][0], 64) == "triton"
        with pytest.raises(BackendError, match="float64"):
            ops.summarize_slots_layers(to_double(sharer), double)
        with pytest.raises(BackendError, match="65 slots"):
            ops.summarize_slots_layers(sharer, many)
        with pytest.raises(BackendError, match="65 slots"):
            ops.expand_slots_layers(latent, many, kv_heads=3)
        with pytest.raises(BackendError, match="bottleneck 32"):
            ops.expand_slots_layers(latent[..., :32], make_slot_weights(SHARER, RECEIVER, 32, 65), kv_heads=3)


#: For training on the kernels, which the interpreter takes its time for: two layers.
SMALL = Geometry(2, 2, 16), Geometry(2, 3, 8)


def small(batch: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    sharer = make_cache(SMALL[0], batch, 9, dtype=dtype, generator=generator)
    return sharer, make_slot_weights(*SMALL, WIDTH, 4, generator=generator)


def trained(sharer: Any, weights: dict[str, Tensor], mask: Tensor, noise: TrainingNoise | None) -> dict[str, Tensor]:
    """Latent, made positions, and the gradient of every weight, with fewer slots than there are embeddings."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    used = {**leaves, "slot_query": leaves["slot_query"][:, :3]}
    latent = ops.summarize_slots_layers(sharer, used, attention_mask=mask)
    pairs = ops.expand_slots_layers(latent, used, kv_heads=3, norm_eps=0.1, noise=noise)
    made = torch.stack([torch.stack(pair) for pair in pairs])
    loss = (made * (1 + torch.arange(8.0))).square().mean() + latent.sin().mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"latent": latent.detach(), "made": made.detach(), **dict(zip(leaves, grads))}


@pytest.mark.parametrize(
    ("dtype", "noise"),
    [
        (torch.float32, TrainingNoise(7, 1.0, 0.2)),
        (torch.bfloat16, TrainingNoise(7, 1.0, 0.2)),
        (torch.float16, None),
    ],
    ids=str,
)
def test_the_kernels_train(dtype: torch.dtype, noise: TrainingNoise | None, generator: torch.Generator) -> None:
    """Gradients of float32 parameters as near the truth as the eager path's, from caches of any dtype."""
    sharer, weights = small(2, generator, dtype)
    mask = ragged(2, 9, generator)
    with use_backend("triton"):
        got = trained(sharer, weights, mask, noise)
        again = trained(sharer, weights, mask, noise) if dtype == torch.float32 else got
    double = {name: tensor.double() for name, tensor in weights.items()}
    truth, plain = trained(to_double(sharer), double, mask, noise), trained(sharer, weights, mask, noise)
    for name, found in got.items():
        assert torch.equal(found, again[name]), name
        assert found.dtype == torch.float32
        assert_within_budget(found, truth[name], plain[name], 6.0 if name == "slot_query" else 4.0)
    assert not got["slot_embedding"][:, 3:].any()


def test_dropout_of_nothing_is_no_dropout(generator: torch.Generator) -> None:
    _, weights = small(2, generator)
    latent = torch.randn(2, 2, 4, WIDTH, generator=generator)
    with use_backend("triton"):
        quiet, none = (
            ops.expand_slots_layers(latent, weights, kv_heads=3, noise=noise)
            for noise in (None, TrainingNoise(7, 1.0, 0.0))
        )
    assert all(torch.equal(a, b) for x, y in zip(quiet, none) for a, b in zip(x, y))


def test_parameters_of_half_precision_have_gradients_of_their_dtype(generator: torch.Generator) -> None:
    sharer, weights = small(2, generator, torch.bfloat16)
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    mask = ragged(2, 9, generator)
    with use_backend("triton"):
        got = trained(sharer, weights, mask, None)
    plain = trained(sharer, weights, mask, None)
    truth = trained(to_double(sharer), {name: tensor.double() for name, tensor in weights.items()}, mask, None)
    for name in weights:
        assert got[name].dtype == torch.bfloat16
        assert_within_budget(got[name], truth[name], plain[name], 4.0)


def test_one_layer_trains_as_a_row_of_all(generator: torch.Generator) -> None:
    """Pool, fold and expansion of a single layer, the noise of layer 2."""
    sharer, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    noise = TrainingNoise(3, 1.0, 0.4)

    def gradients() -> list[Tensor]:
        one = {name: stacked[2].detach().requires_grad_() for name, stacked in weights.items()}
        slot_key, slot_value = ops.slot_pool(*sharer[2], one["slot_query"])
        latent = ops.fold_slots(slot_key, slot_value, one)
        key, value = ops.expand_slots(latent, one, kv_heads=3, noise=noise, layer=2)
        return list(torch.autograd.grad((key * value.sin()).sum(), list(one.values())))

    with use_backend("triton"):
        got = gradients()
    for ours, expected in zip(got, gradients(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_caches_that_ask_have_gradients(generator: torch.Generator) -> None:
    """And the queries beside them; a layer of the sharer may serve two."""
    given, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    mask = ragged(2, 9, generator)

    def gradients() -> list[Tensor]:
        flat = [side.detach().requires_grad_() for pair in given[:3] for side in pair]
        query = weights["slot_query"].detach().requires_grad_()
        sharer = list(zip(flat[0::2], flat[1::2]))
        latent = ops.summarize_slots_layers(
            [sharer[0], *sharer], weights | {"slot_query": query}, attention_mask=mask
        )
        return list(torch.autograd.grad(latent.sin().sum(), [query, *flat]))

    with use_backend("triton"):
        got = gradients()
    for ours, expected in zip(got, gradients(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not got[1].masked_select(~mask[:, None, :, None]).any(), "padding has a gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_and_latents_made_in_inference_mode_have_gradients_beside_them(
    backend: Backend, generator: torch.Generator
) -> None:
    caches, weights = make_cache(SHARER, 2, 9, generator=generator), weights_of(4, generator)
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}

    def gradients(sharer: Any, latent: Tensor) -> list[Tensor]:
        made = ops.expand_slots_layers(latent, leaves, kv_heads=3)
        total = ops.summarize_slots_layers(sharer, leaves).sin().sum() + sum(t.sin().sum() for p in made for t in p)
        return [grad for grad in torch.autograd.grad(total, [*leaves.values()], allow_unused=True) if grad is not None]

    with use_backend(backend):
        with torch.no_grad():
            latent = ops.summarize_slots_layers(caches, leaves)
        with torch.inference_mode():
            frozen, read = [(key.clone(), value.clone()) for key, value in caches], latent.clone()
        for got, wanted in zip(gradients(frozen, read), gradients(caches, latent), strict=True):
            torch.testing.assert_close(got, wanted)


def test_the_kernels_take_a_head_dim_of_any_stride(generator: torch.Generator) -> None:
    """Also of a later layer alone; what is trained by then is the queries."""
    sharer, weights = small(2, generator)
    moved = [sharer[0], (sharer[1][0], sharer[1][1].mT.contiguous().mT)]
    assert moved[1][1].stride(-1) != 1
    mask = ragged(2, 9, generator)
    with use_backend("triton"):
        got, expected = (trained(cache, weights, mask, None) for cache in (moved, sharer))
    for name, found in got.items():
        assert torch.equal(found, expected[name]), name


def test_what_is_frozen_costs_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new sharer of a trained receiver's half: no gradient of that half is made, and none of the caches."""
    from lcf_fast.kernels import slot_projection_backward as kernels

    sharer, weights = small(2, generator)
    own = ("slot_query", "slot_embedding", "down_weight", "down_bias")
    leaves = {name: tensor.requires_grad_(name in own) for name, tensor in weights.items()}
    given = {tensor.data_ptr() for tensor in leaves.values()} | {s.data_ptr() for pair in sharer for s in pair}
    kept: list[Tensor] = []
    made: list[dict[str, Tensor]] = []
    run = kernels.expand_slots_backward

    def watched(*arguments: Any, **keywords: Any) -> Any:
        found = run(*arguments, **keywords)
        made.append(found[1])
        return found

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept.append(tensor)
        return tensor

    monkeypatch.setattr(kernels, "expand_slots_backward", watched)
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latent = ops.summarize_slots_layers(sharer, leaves)
        pairs = ops.expand_slots_layers(latent, leaves, kv_heads=3)
        torch.stack([side for pair in pairs for side in pair]).sum().backward()
    assert made == [{}]
    assert all((tensor.grad is not None) == (name in own) for name, tensor in leaves.items())
    # What was pooled, of the pool and of the fold; the stats; the latent.
    pooled, stats = [2 * 2 * 4 * 2 * 16] * 4, 2 * 2 * 2 * 4 * 2
    assert sorted(tensor.numel() for tensor in kept) == sorted([*pooled, stats, latent.numel()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: Backend, generator: torch.Generator) -> None:
    """Schema, fake, autograd registration and aot dispatch of each op; one layout is permuted-dense."""
    sharer, weights = small(2, generator)
    flat = [side.transpose(1, 2).contiguous().transpose(1, 2) for pair in sharer for side in pair]
    mask = ragged(2, 9, generator)

    def leaves(names: tuple[str, ...]) -> list[Tensor]:
        return [weights[name].detach().clone().requires_grad_() for name in names]

    slot_key, slot_value = (torch.randn(2, 2, 3, 2, 16).requires_grad_() for _ in "kv")
    latent = torch.randn(2, 2, 4, WIDTH).requires_grad_()
    (query,) = leaves(("slot_query",))
    with use_backend(backend):
        opcheck(library_slots.pool_slots, (flat, query, mask))
        opcheck(library_slots.pool_slots, ([side.clone().requires_grad_() for side in flat], query.detach(), None))
        half = [side.bfloat16() for side in flat]
        opcheck(library_slots.pool_slots, (half, query.detach(), None), test_utils="test_faketensor")
        opcheck(library_slots.fold_slots, (slot_key, slot_value, leaves(library_slots.FOLD_WEIGHTS)))
        expansion = leaves(library_slots.EXPANSION_WEIGHTS)
        opcheck(library_slots.expand_slots, (latent, expansion, 3, 1e-6, 5, 0.3, 2))
        quiet = (latent.detach(), expansion, 3, 1e-6, *library_slots.NO_NOISE, 0)
        opcheck(library_slots.expand_slots, quiet, test_utils=("test_schema", "test_faketensor"))
        opcheck(library_slots.expand_slots, (quiet[0].bfloat16(), *quiet[1:]), test_utils="test_faketensor")


@pytest.mark.parametrize("noise", [None, TrainingNoise(7, 1.0, 0.2)], ids=["quiet", "dropout"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_whole_forward_and_backward(
    backend: Backend, noise: TrainingNoise | None, generator: torch.Generator
) -> None:
    sharer, weights = small(2, generator)
    mask = ragged(2, 9, generator)

    def both(weights: dict[str, Tensor]) -> Any:
        latent = ops.summarize_slots_layers(sharer, weights, attention_mask=mask)
        made = ops.expand_slots_layers(latent, weights, kv_heads=3, norm_eps=0.1, noise=noise)
        return latent, torch.stack([side for pair in made for side in pair])

    def gradients(function: Any) -> list[Tensor]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        latent, made = function(leaves)
        loss = latent.sin().mean() + (made * (1 + torch.arange(8.0))).square().mean()
        return [latent, made, *torch.autograd.grad(loss, list(leaves.values()))]

    compiled: Any = torch.compile(both, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for got, expected in zip(gradients(compiled), gradients(both), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Backend, generator: torch.Generator) -> None:
    sharer, weights = make_cache(SHARER, 0, 9, generator=generator), weights_of(4, generator)
    with use_backend(backend):
        found = trained(sharer, weights, torch.ones(0, 9, dtype=torch.bool), None)
    assert found["latent"].shape == (4, 0, 3, WIDTH)
    assert all(found[name].shape == weights[name].shape for name in weights)


def test_a_weight_of_one_layer_that_is_no_tensor_is_named() -> None:
    slots, latent = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 64)
    with pytest.raises(DTypeError, match="down_weight"):
        ops.fold_slots(slots, slots, {"down_weight": None})  # type: ignore[dict-item]
    with pytest.raises(DTypeError, match="norm_weight"):
        ops.expand_slots(latent, {"norm_weight": None}, kv_heads=1)  # type: ignore[dict-item]
