"""Fold and expansion of slots against float64 formulas: widths, dtypes, destinations of every layout, splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from slot_formulas import EPS, Weights, expand_formula, fold_formula, make_slot_weights
from torch import Tensor

from helpers import (
    ADVERSARIES,
    Adversary,
    Pair,
    adversarial,
    assert_same_rows,
    assert_within_budget,
    beyond_int32,
    guarded,
)
from lcf_fast.kernels import slot_projection
from lcf_fast.kernels.slot_policy import SlotExpandConfig, slot_expand_config, slot_expand_options, slot_fold_config
from lcf_fast.kernels.slot_projection import expand_slots, fold_slots
from lcf_fast.noise import TrainingNoise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Of the fold, float32 throughout: sums in another order than plain torch's.
BUDGET = 4.0


def pooled(layers: int, batch: int, slots: int, heads: int, head_dim: int, generator: torch.Generator) -> Pair:
    key, value = torch.randn(2, layers, batch, slots, heads, head_dim, generator=generator)
    return key, value


def check_fold(slot_key: Tensor, slot_value: Tensor, weights: Weights) -> Tensor:
    got = fold_slots(slot_key, slot_value, weights)
    truth, plain = (fold_formula(slot_key, slot_value, weights, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(got, truth, plain, BUDGET)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "slots", "heads", "head_dim", "width"),
    [(1, 8, 2, 64, 64), (2, 17, 3, 80, 64), (5, 1, 1, 16, 10), (1, 64, 1, 128, 128), (3, 30, 2, 40, 70)],
)
def test_fold(
    batch: int,
    slots: int,
    heads: int,
    head_dim: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    """Ragged tiles of rows, width and channels."""
    slot_key, slot_value = (x.to(device) for x in pooled(2, batch, slots, heads, head_dim, generator))
    weights = make_slot_weights(2, slots, width, heads * head_dim, 16, generator, dtype=dtype, device=device)
    check_fold(slot_key, slot_value, weights)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_adversary(
    adversary: Adversary, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """Tiny values and a large one keep their digits in float16, too, which has few exponents."""
    slot_key, slot_value = (adversarial(x, adversary).to(device) for x in pooled(1, 1, 8, 2, 64, generator))
    weights = make_slot_weights(1, 8, 64, 128, 16, generator, dtype=dtype, device=device)
    if adversary == "tiny":
        weights["down_bias"].zero_()
        weights["slot_embedding"].zero_()
    check_fold(slot_key, slot_value, weights)


def test_fold_of_fewer_slots_and_other_layouts(device: torch.device, generator: torch.Generator) -> None:
    """Any k' of the slots, from views; parameters that lie transposed or in a wider table; nothing else is read."""
    slot_key, slot_value = (x.to(device) for x in pooled(2, 2, 5, 2, 64, generator))
    weights = make_slot_weights(2, 5, 32, 128, 16, generator, device=device)
    straight = check_fold(slot_key, slot_value, weights)
    assert_same_rows(check_fold(slot_key[:, :, :3], slot_value[:, :, :3], weights), straight[:, :, :3])
    wide = torch.full((2, 32, 300), torch.nan, device=device)
    wide[..., :256] = weights["down_weight"]
    table = torch.full((2, 9, 40), torch.nan, device=device)
    table[:, :5, :32] = weights["slot_embedding"]
    others = {"down_weight": wide[..., :256], "slot_embedding": table[:, :5, :32]}
    assert torch.equal(fold_slots(slot_key, slot_value, weights | others), straight)
    others = {name: weights[name].mT.contiguous().mT for name in ("down_weight", "slot_embedding")}
    assert torch.equal(fold_slots(slot_key, slot_value, weights | others), straight)


def test_fold_reads_and_writes_nothing_beyond(device: torch.device, generator: torch.Generator) -> None:
    out, guards = guarded((1, 3, 7, 20), torch.float32, device)
    weights = make_slot_weights(1, 7, 20, 80, 16, generator, dtype=torch.bfloat16, device=device)
    fenced = []
    for name in ("down_weight", "down_bias", "slot_embedding"):
        tensor, check = guarded(weights[name].shape, torch.bfloat16, device)
        weights[name] = tensor.copy_(weights[name])
        fenced.append(check)
    slot_key, slot_value = (guarded(x.shape, x.dtype, device)[0].copy_(x) for x in pooled(1, 3, 7, 1, 80, generator))
    expected = check_fold(slot_key, slot_value, weights)
    slot_projection._launch_fold(slot_key, slot_value, weights, out)
    for check in (guards, *fenced):
        check()
    assert torch.equal(out, expected)


def fresh(
    layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[Pair]:
    """Destinations of NaN, each by itself."""
    shape = (batch, heads, slots, head_dim)
    return [
        tuple(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in "kv")  # type: ignore[misc]
        for _ in range(layers)
    ]


def check_expand(latent: Tensor, weights: Weights, destinations: Sequence[Pair]) -> None:
    """Expand into ``destinations`` and hold what they then contain to the error budget."""
    expand_slots(latent, weights, destinations, norm_eps=EPS)
    heads, dtype = destinations[0][0].shape[1], destinations[0][0].dtype
    truth, plain = (expand_formula(latent, weights, heads, kind) for kind in (torch.float64, dtype))
    for layer in zip(destinations, truth, plain):
        for got, exact, same_dtype in zip(*layer):
            assert_within_budget(got, exact, same_dtype)


def latents(
    layers: int, batch: int, slots: int, width: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    return torch.randn(layers, batch, slots, width, generator=generator).to(device)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [*((width, dtype) for width in (64, 128) for dtype in DTYPES), (256, torch.float16), (512, torch.float32)],
    ids=str,
)
def test_width(width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    blocks = 2 if width < 512 else 1  # the interpreter's time
    weights = make_slot_weights(1, 3, width, 16, 2 * 64, generator, blocks=blocks, dtype=dtype, device=device)
    check_expand(latents(1, 1, 3, width, generator, device), weights, fresh(1, 1, 2, 3, 64, dtype, device))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        (1, 16, torch.float32),
        (3, 80, torch.bfloat16),
        (3, 80, torch.float32),
        (5, 96, torch.float16),
        (1, 128, torch.bfloat16),
        (2, 256, torch.float16),
    ],
    ids=str,
)
def test_heads(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    weights = make_slot_weights(2, 3, 64, 16, heads * head_dim, generator, dtype=dtype, device=device)
    check_expand(latents(2, 2, 3, 64, generator, device), weights, fresh(2, 2, heads, 3, head_dim, dtype, device))


@pytest.mark.parametrize("slots", [1, 3, 8, 16, 17, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows(batch: int, slots: int, device: torch.device, generator: torch.Generator) -> None:
    """The rows of all items are packed into tiles: an item may begin within one."""
    weights = make_slot_weights(1, slots, 64, 16, 64, generator, device=device)
    latent = latents(1, batch, slots, 64, generator, device)
    check_expand(latent, weights, fresh(1, batch, 1, slots, 64, torch.float32, device))


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_blocks(blocks: int, device: torch.device, generator: torch.Generator) -> None:
    weights = make_slot_weights(1, 3, 64, 16, 64, generator, blocks=blocks, device=device)
    check_expand(latents(1, 1, 3, 64, generator, device), weights, fresh(1, 1, 1, 3, 64, torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_of_a_half_precision_receiver(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    weights = make_slot_weights(1, 3, 64, 16, 128, generator, device=device)
    check_expand(latents(1, 1, 3, 64, generator, device), weights, fresh(1, 1, 2, 3, 64, dtype, device))


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_adversary(
    adversary: Adversary, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    latent = adversarial(latents(1, 1, 8, 64, generator, device), adversary)
    weights = make_slot_weights(1, 8, 64, 16, 64, generator, dtype=dtype, device=device)
    check_expand(latent, weights, fresh(1, 1, 1, 8, 64, dtype, device))


Strides = tuple[int, int, int, int]
#: Strides and first element, of (B, H, k, D): where k slots may lie in a longer cache, or in a pool of pages.
DESTINATIONS: dict[str, Callable[[int, int, int], tuple[Strides, int]]] = {
    "before_the_prompt": lambda h, k, d: ((h * (k + 7) * d, (k + 7) * d, d, 1), 0),
    "after_the_prompt": lambda h, k, d: ((h * (k + 7) * d, (k + 7) * d, d, 1), 7 * d),
    "every_other": lambda h, k, d: ((h * 2 * k * d, 2 * k * d, 2 * d, 1), d),
    "token_major": lambda h, k, d: (((k + 7) * h * d, d, h * d, 1), 3 * h * d),
    "pages": lambda h, k, d: ((2 * k * h * d, d, h * d, 1), 5 * 2 * k * h * d),
    "odd_address": lambda h, k, d: ((h * k * d, k * d, d, 1), 1),
    "odd_rows": lambda h, k, d: ((h * k * (d + 1), k * (d + 1), d + 1, 1), 0),
}
INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize("name", DESTINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_destination(name: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """All of the destination is written, and nothing beside it; head dim and rows are of no tile's width."""
    batch, heads, slots, head_dim = shape = (2, 2, 5, 40)
    strides, first = DESTINATIONS[name](heads, slots, head_dim)
    weights = make_slot_weights(2, slots, 64, 16, heads * head_dim, generator, dtype=dtype, device=device)
    buffers = [torch.full((8000,), -1, dtype=INTEGER[dtype], device=device) for _ in range(4)]
    keys, values = ([b.view(dtype).as_strided(shape, strides, first) for b in buffers[i::2]] for i in (0, 1))
    check_expand(latents(2, batch, slots, 64, generator, device), weights, list(zip(keys, values)))
    for buffer in buffers:
        buffer.as_strided(shape, strides, first).fill_(-1)
        assert (buffer == -1).all(), "written beside the destination"


def test_layers_equal_layer_by_layer(device: torch.device, generator: torch.Generator) -> None:
    """Neighbours that lie alike share a launch; each layer takes its own weights and latent."""
    weights = make_slot_weights(4, 3, 64, 16, 128, generator, device=device)
    latent = latents(4, 2, 3, 64, generator, device)
    together = fresh(4, 2, 2, 3, 64, torch.float32, device)
    together[2] = (together[2][0].transpose(1, 2).contiguous().transpose(1, 2), together[2][1])
    check_expand(latent, weights, together)
    for i, pair in enumerate(together):
        ((key, value),) = alone = fresh(1, 2, 2, 3, 64, torch.float32, device)
        one = {name: tensor[i : i + 1] for name, tensor in weights.items()}
        expand_slots(latent[i : i + 1], one, alone, norm_eps=EPS)
        assert torch.equal(key, pair[0])
        assert torch.equal(value, pair[1])


@pytest.mark.parametrize("splits", [2, 8])
def test_splits_change_no_bit(
    splits: int, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that end within a side, within a head, or are empty."""
    weights = make_slot_weights(2, 3, 64, 16, 3 * 80, generator, device=device)
    latent = latents(2, 1, 3, 64, generator, device)
    config = slot_expand_options(64, 4, "sm_90")[-1]
    made = []
    for parts in (1, splits):
        monkeypatch.setattr(slot_projection, "slot_expand_config", lambda *_, n=parts, **__: replace(config, splits=n))
        made.append(fresh(2, 1, 3, 3, 80, torch.float32, device))
        check_expand(latent, weights, made[-1])
    for pair, other in zip(*made):
        assert all(torch.equal(a, b) for a, b in zip(pair, other))


def test_rows_do_not_see_each_other(device: torch.device, generator: torch.Generator) -> None:
    """Items permuted, a subset of slots, an item of NaN: the same bits for the rest; and run to run."""
    weights = make_slot_weights(1, 5, 64, 16, 64, generator, dtype=torch.bfloat16, device=device)
    latent = latents(1, 3, 5, 64, generator, device)

    def expanded(latent: Tensor) -> Tensor:
        ((key, value),) = out = fresh(1, latent.shape[1], 1, latent.shape[2], 64, torch.bfloat16, device)
        expand_slots(latent, weights, out, norm_eps=EPS)
        return torch.stack([key, value])

    straight = expanded(latent)
    assert torch.equal(expanded(latent), straight)
    order = [2, 0, 1]
    assert torch.equal(expanded(latent[:, order]), straight[:, order])
    assert torch.equal(expanded(latent[:, :, 1:4]), straight[:, :, :, 1:4])
    latent[:, 1] = torch.nan
    assert torch.equal(expanded(latent)[:, ::2], straight[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "slots"), [(1, 1), (3, 3), (2, 17), (5, 17)])
def test_dropout(
    batch: int, slots: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    """The same elements as the definition drops, wherever an item begins within a tile, in every layer and block."""
    noise, row = TrainingNoise(11, dropout=0.4), 5
    weights = make_slot_weights(2, slots, 64, 16, 64, generator, dtype=dtype, device=device)
    latent = latents(2, batch, slots, 64, generator, device)
    destinations = fresh(2, batch, 1, slots, 64, dtype, device)
    expand_slots(latent, weights, destinations, norm_eps=EPS, noise=noise.arguments, row=row)
    truth, plain = (expand_formula(latent, weights, 1, kind, noise, row) for kind in (torch.float64, dtype))
    for layer in zip(destinations, truth, plain):
        for got, exact, same_dtype in zip(*layer):
            assert_within_budget(got, exact, same_dtype)


def test_from_pooled_slots_to_the_receiver(device: torch.device, generator: torch.Generator) -> None:
    """Fold and expansion in a row, as a message goes."""
    weights = make_slot_weights(2, 4, 64, 128, 128, generator, device=device)
    latent = fold_slots(*(x.to(device) for x in pooled(2, 2, 4, 2, 64, generator)), weights)
    check_expand(latent, weights, fresh(2, 2, 2, 4, 64, torch.float32, device))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_beyond_two_to_the_31_elements(axis: int, device: torch.device, generator: torch.Generator) -> None:
    shape = [1, 1, 1, 64]
    shape[axis] = 3
    key, value = (beyond_int32(tuple(shape), axis, device) for _ in "kv")  # type: ignore[arg-type]
    batch, heads, slots, _ = shape
    weights = make_slot_weights(1, slots, 64, 16, 64 * heads, generator, dtype=torch.float16, device=device)
    check_expand(latents(1, batch, slots, 64, generator, device), weights, [(key, value)])


def test_nothing_to_do_for_no_rows(device: torch.device, generator: torch.Generator) -> None:
    weights = make_slot_weights(1, 3, 64, 128, 64, generator, device=device)
    empty = torch.empty(1, 0, 3, 2, 64, device=device)
    latent = fold_slots(empty, empty, weights)
    assert latent.shape == (1, 0, 3, 64)
    expand_slots(latent, weights, fresh(1, 0, 1, 3, 64, torch.float32, device), norm_eps=EPS)


@pytest.mark.parametrize(
    ("layers", "rows", "block_rows", "splits"),
    [
        (28, 8, 16, 2),  # a message of the published pair: 56 programs
        (9, 8, 16, 4),
        (6, 8, 16, 8),
        (1, 8, 16, 8),
        (28, 17, 16, 1),  # two tiles
        (28, 320, 64, 1),  # 140 tiles fill 132 multiprocessors
    ],
)
def test_tiles_and_splits(layers: int, rows: int, block_rows: int, splits: int) -> None:
    config = slot_expand_config(128, 2, 2, "sm_90", layers, rows, 132)
    assert (config.block_rows, config.splits) == (block_rows, splits)


def test_random_numbers_take_the_smallest_tile() -> None:
    for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
        config = slot_expand_config(128, 2, 2, chip, 28, 4096, 132, has_noise=True)
        assert (config.block_rows, config.splits) == (16, 1)


def test_wider_weights_wait_in_a_shorter_pipeline() -> None:
    for width in (64, 128, 256, 512):
        narrow, wide = (slot_expand_config(width, 2, size, "sm_80", 28, 8, 108) for size in (2, 4))
        assert 2 * wide.num_stages <= max(narrow.num_stages, 2)


def test_every_width_has_a_tile() -> None:
    for width in (64, 128, 256, 512):
        for size in (2, 4):
            options: tuple[SlotExpandConfig, ...] = slot_expand_options(width, size, "sm_90")
            assert [config.block_rows for config in options] == sorted({c.block_rows for c in options}, reverse=True)
            assert all(config.block_rows >= 16 and config.splits == 1 for config in options)
    for chip, most in (("sm_90", 64), ("gfx942", 32)):
        rows = [slot_fold_config(2, rows, chip).block_rows for rows in (1, 16, 17, 64, 4096)]
        assert rows == [16, 16, 32, most, most]
