"""Gradients of fold and expansion of slots against float64 autograd of their formulas."""

from __future__ import annotations

import pytest
import torch
from slot_formulas import EPS, EXPANSION, FOLD, Weights, expand_gradients, fold_gradients, make_slot_weights
from torch import Tensor

from helpers import ADVERSARIES, Adversary, adversarial, assert_same_rows, assert_within_budget, guarded
from lcf_fast.kernels.slot_projection import expand_slots
from lcf_fast.kernels.slot_projection_backward import expand_slots_backward, fold_slots_backward
from lcf_fast.noise import TrainingNoise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NOISE = TrainingNoise(5, dropout=0.2)
#: The two round at other places: plain torch makes norms and what is added to the residual in the products' dtype, this
#: in float32.
BUDGET = 3.0


def within(got: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], budget: float) -> None:
    assert set(got) == set(exact)
    for name, gradient in got.items():
        try:
            assert_within_budget(gradient, exact[name], plain[name], budget)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# --- the fold


def check_fold(
    slot_key: Tensor, slot_value: Tensor, weights: Weights, generator: torch.Generator, *, scale: float = 1.0
) -> dict[str, Tensor]:
    """Hold all five gradients to the error budget of the fold in float32; returns them."""
    weights = {name: weights[name] for name in FOLD}
    shape = (*slot_key.shape[:3], weights["down_bias"].shape[1])
    grad = torch.randn(shape, generator=generator).to(slot_key) * scale
    slots, found = fold_slots_backward(grad, slot_key, slot_value, weights, wants_slots=True)
    assert slots is not None
    got = {"slot_key": slots[0], "slot_value": slots[1], **found}

    exact, plain = (
        fold_gradients(grad, slot_key, slot_value, weights, dtype) for dtype in (torch.float64, torch.float32)
    )
    within(got, exact, plain, BUDGET)
    return got


def fold_case(
    batch: int, slots: int, heads: int, head_dim: int, width: int, dtype: torch.dtype, device: torch.device,
    generator: torch.Generator, *, layers: int = 2,
) -> tuple[Tensor, Tensor, Weights]:  # fmt: skip
    key, value = torch.randn(2, layers, batch, slots, heads, head_dim, generator=generator).to(device)
    channels = heads * head_dim
    return key, value, make_slot_weights(
        layers, slots, width, channels, 16, generator, dtype=dtype, device=device
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "slots", "heads", "head_dim", "width"),
    [(1, 8, 2, 64, 64), (5, 17, 3, 80, 64), (5, 1, 1, 16, 64), (3, 3, 1, 40, 128)],
)
def test_fold(
    batch: int, slots: int, heads: int, head_dim: int, width: int, dtype: torch.dtype,
    device: torch.device, generator: torch.Generator,
) -> None:  # fmt: skip
    """One tile of rows and two; ragged channels."""
    check_fold(*fold_case(batch, slots, heads, head_dim, width, dtype, device, generator), generator)


@pytest.mark.parametrize("width", [256, 512])
def test_fold_of_wide_latents(width: int, device: torch.device, generator: torch.Generator) -> None:
    check_fold(*fold_case(2, 3, 1, 32, width, torch.bfloat16, device, generator, layers=1), generator)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fold_gradients_of_any_size(
    scale: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """They are made in float32 whatever the weights' dtype: losses are averaged over a batch."""
    check_fold(*fold_case(2, 3, 1, 64, 64, dtype, device, generator), generator, scale=scale)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_fold_adversary(adversary: Adversary, device: torch.device, generator: torch.Generator) -> None:
    key, value, weights = fold_case(2, 8, 2, 64, 64, torch.float32, device, generator, layers=1)
    check_fold(adversarial(key, adversary), adversarial(value, adversary), weights, generator)


def test_fold_of_fewer_slots_and_other_layouts(device: torch.device, generator: torch.Generator) -> None:
    """Slots that are not used have a gradient of zero; views, and a transposed weight, change no bit."""
    key, value, weights = fold_case(2, 5, 2, 64, 64, torch.float32, device, generator)
    weights = {name: weights[name] for name in FOLD}
    grad = torch.randn(2, 2, 3, 64, generator=generator).to(device)
    few = [x[:, :, :3] for x in (key, value)]
    slots, found = fold_slots_backward(grad, *few, weights, wants_slots=True)
    assert not found["slot_embedding"][:, 3:].any()
    others = {name: weights[name].mT.contiguous().mT for name in ("down_weight", "slot_embedding")}
    strided = grad.mT.contiguous().mT
    again, same = fold_slots_backward(strided, *(x.contiguous() for x in few), weights | others, wants_slots=True)
    assert slots is not None
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(slots, again))
    assert all(torch.equal(found[name], same[name]) for name in FOLD)


def test_frozen_slots_cost_nothing(device: torch.device, generator: torch.Generator) -> None:
    key, value, weights = fold_case(1, 3, 1, 64, 64, torch.float32, device, generator)
    grad = torch.ones(2, 1, 3, 64, device=device)
    assert fold_slots_backward(grad, key, value, weights, wants_slots=False)[0] is None


# --- the expansion


def expand_case(
    batch: int, slots: int, heads: int, head_dim: int, width: int, dtype: torch.dtype, device: torch.device,
    generator: torch.Generator, *, layers: int = 1, blocks: int = 2,
) -> tuple[Tensor, Tensor, Weights]:  # fmt: skip
    """The gradient of keys and values in ``dtype``, latents, and weights in ``dtype``."""
    channels = heads * head_dim
    weights = make_slot_weights(
        layers, slots, width, 16, channels, generator, blocks=blocks, dtype=dtype, device=device
    )  # fmt: skip
    latent = torch.randn(layers, batch, slots, width, generator=generator).to(device)
    grad = torch.randn(layers, 2, batch, heads, slots, head_dim, generator=generator).to(device, dtype)
    return grad, latent, {name: weights[name] for name in EXPANSION}


def check_expand(
    grad: Tensor, latent: Tensor, weights: Weights, noise: TrainingNoise | None = None, *, budget: float = BUDGET
) -> dict[str, Tensor]:
    """Hold the gradients of latent and weights to the error budget of plain torch in the gradient's dtype."""
    row = 0 if noise is None else 4
    arguments = None if noise is None else noise.arguments
    dlatent, found = expand_slots_backward(grad, latent, weights, norm_eps=EPS, noise=arguments, row=row)
    got = {"latent": dlatent, **found}
    exact, plain = (
        expand_gradients(grad, latent, weights, dtype, noise, row) for dtype in (torch.float64, grad.dtype)
    )
    within(got, exact, plain, budget)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "slots", "noise"), [(1, 1, None), (3, 3, NOISE), (2, 8, None), (5, 17, NOISE)], ids=str
)
def test_rows(
    batch: int, slots: int, noise: TrainingNoise | None, dtype: torch.dtype,
    device: torch.device, generator: torch.Generator,
) -> None:  # fmt: skip
    """One tile of rows and two; an item begins within a tile; dropout by item and slot."""
    check_expand(*expand_case(batch, slots, 1, 64, 64, dtype, device, generator), noise)


@pytest.mark.parametrize(
    ("width", "heads", "head_dim", "dtype"),
    [
        (128, 2, 128, torch.bfloat16),  # the published width
        (64, 3, 80, torch.float32),  # odd heads; channels of no chunk's width
        (64, 1, 40, torch.float16),
        (256, 1, 64, torch.float16),
        (512, 1, 32, torch.float32),
    ],
    ids=str,
)
def test_widths(
    width: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    blocks = 2 if width < 256 else 1  # the interpreter's time
    check_expand(*expand_case(2, 3, heads, head_dim, width, dtype, device, generator, blocks=blocks), NOISE)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_blocks(blocks: int, device: torch.device, generator: torch.Generator) -> None:
    check_expand(*expand_case(1, 3, 1, 64, 64, torch.float32, device, generator, blocks=blocks), NOISE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_of_a_half_precision_receiver(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    grad, latent, weights = expand_case(2, 3, 1, 64, 64, torch.float32, device, generator)
    check_expand(grad.to(dtype), latent, weights, NOISE)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversary(adversary: Adversary, device: torch.device, generator: torch.Generator) -> None:
    grad, latent, weights = expand_case(2, 8, 1, 64, 64, torch.float32, device, generator)
    check_expand(grad, adversarial(latent, adversary), weights, NOISE, budget=6.0)


def test_what_is_dropped_is_what_the_forward_pass_drops(device: torch.device, generator: torch.Generator) -> None:
    """By the kernels alone: the slope of the forward kernel's result along a direction is the gradient's."""
    grad, latent, weights = expand_case(3, 3, 1, 64, 64, torch.float32, device, generator, blocks=1)
    noise = TrainingNoise(3, dropout=0.5).arguments

    def result(latent: Tensor) -> Tensor:
        made = torch.full_like(grad, torch.nan)
        expand_slots(latent, weights, [(made[0, 0], made[0, 1])], norm_eps=EPS, noise=noise)
        return (made.double() * grad).sum()

    along = torch.randn(latent.shape, generator=generator).to(device)
    step = 1e-2
    slope = (result(latent + step * along) - result(latent - step * along)) / (2 * step)
    dlatent, _ = expand_slots_backward(grad, latent, weights, norm_eps=EPS, noise=noise)
    expected = (dlatent.double() * along).sum()
    assert abs(float(slope - expected)) < 2e-3 * float((dlatent.double() * along).abs().sum())


def test_packed_rows_are_the_rows_of_each_item(device: torch.device, generator: torch.Generator) -> None:
    """Of two items at once: each item's own latent gradients to the bit, and the sum of the weights'."""
    grad, latent, weights = expand_case(2, 5, 2, 64, 64, torch.float32, device, generator, layers=2)
    dlatent, found = expand_slots_backward(grad, latent, weights, norm_eps=EPS)
    parts = [
        expand_slots_backward(grad[:, :, i : i + 1], latent[:, i : i + 1], weights, norm_eps=EPS) for i in range(2)
    ]
    for i, (alone, _) in enumerate(parts):
        assert_same_rows(dlatent[:, i : i + 1], alone)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parts[0][1][name] + parts[1][1][name], rtol=1e-4, atol=1e-4)


def test_layers_equal_layer_by_layer_and_bits_are_the_same_every_time(
    device: torch.device, generator: torch.Generator
) -> None:
    """Each layer takes its own weights and its own random numbers; however the gradient lies."""
    grad, latent, weights = expand_case(3, 5, 1, 40, 64, torch.float32, device, generator, layers=2)
    noise = NOISE.arguments
    first = expand_slots_backward(grad, latent, weights, norm_eps=EPS, noise=noise)
    token_major = grad.transpose(3, 4).contiguous().transpose(3, 4)
    again = expand_slots_backward(token_major, latent.mT.contiguous().mT, weights, norm_eps=EPS, noise=noise)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in EXPANSION)
    for i in range(2):
        one = {name: tensor[i : i + 1] for name, tensor in weights.items()}
        dlatent, found = expand_slots_backward(
            grad[i : i + 1], latent[i : i + 1], one, norm_eps=EPS, noise=noise, row=i
        )  # fmt: skip
        assert torch.equal(first[0][i : i + 1], dlatent)
        assert all(torch.equal(first[1][name][i : i + 1], found[name]) for name in EXPANSION)


def test_a_gradient_that_is_one_number_everywhere(device: torch.device, generator: torch.Generator) -> None:
    """As of a sum: an expanded scalar, all of whose strides are 0."""
    grad, latent, weights = expand_case(2, 3, 1, 64, 64, torch.float32, device, generator)
    one = torch.ones((), device=device).expand(grad.shape)
    got, _ = expand_slots_backward(one, latent, weights, norm_eps=EPS)
    assert torch.equal(got, expand_slots_backward(torch.ones_like(grad), latent, weights, norm_eps=EPS)[0])


def test_reads_nothing_beyond(device: torch.device, generator: torch.Generator) -> None:
    grad, latent, weights = expand_case(1, 5, 1, 40, 64, torch.float32, device, generator)
    fenced = {n: guarded(x.shape, x.dtype, device)[0].copy_(x) for n, x in weights.items()}
    latent = guarded(latent.shape, latent.dtype, device)[0].copy_(latent)
    grad = guarded(grad.shape, grad.dtype, device)[0].copy_(grad)
    check_expand(grad, latent, fenced, NOISE)


def test_frozen_weights_and_no_rows(device: torch.device, generator: torch.Generator) -> None:
    grad, latent, weights = expand_case(2, 3, 1, 64, 64, torch.float32, device, generator)
    whole, _ = expand_slots_backward(grad, latent, weights, norm_eps=EPS)
    alone, none = expand_slots_backward(grad, latent, weights, norm_eps=EPS, wants_weights=False)
    assert torch.equal(whole, alone)
    assert none == {}
    dlatent, found = expand_slots_backward(grad[:, :, :0], latent[:, :0], weights, norm_eps=EPS)
    assert dlatent.shape == latent[:, :0].shape
    assert all(found[name].shape == weights[name].shape and not found[name].any() for name in EXPANSION)
    key = torch.empty(1, 0, 3, 2, 64, device=device)
    fold = {name: torch.ones(shape, device=device) for name, shape in zip(FOLD, ((1, 64, 256), (1, 64), (1, 3, 64)))}
    slots, found = fold_slots_backward(dlatent, key, key, fold, wants_slots=True)
    assert slots is not None
    assert slots[0].shape == key.shape
    assert not any(gradient.any() for gradient in found.values())
