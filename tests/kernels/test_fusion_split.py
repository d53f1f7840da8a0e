"""The two launches of few tokens against the float64 reference and the one launch, where the policy would not split.

The interpreter's policy never splits; `splits` makes it, over as many programs as a test says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fused import check_fuse, double, gates_of

from helpers import (
    ADVERSARIES,
    CACHE_LAYOUTS,
    Adversary,
    CacheLayout,
    Geometry,
    assert_within_budget,
    guarded,
    make_cache,
    make_weights,
    rows_beyond_int32,
    to_double,
)
from lcf_fast import ops, reference, use_backend
from lcf_fast.kernels import fusion_plan, fusion_split, policy
from lcf_fast.noise import TrainingNoise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE = Geometry(1, 1, 64)
SMALL = Geometry(2, 2, 64)
Splits = Callable[..., None]


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Splits]:
    """Call it to have every launch split: ``parts`` programs for the down projection, ``heads`` for the rest."""
    launches = []
    launch = fusion_split.launch_split

    def seen(*arguments: object) -> None:
        launches.append(arguments)
        launch(*arguments)  # type: ignore[arg-type]

    def split(parts: int = 3, heads: int = 2, tile: int = 16) -> None:
        def config(width: int, itemsize: int, target: str, *_: int) -> policy.SplitConfig:
            # Where the policy has no row (wide float32) any will do that is right.
            options = policy.split_options(width, itemsize, target) or (policy.SplitConfig(16, 32, 16, 8, 2, 1),)
            return next((option for option in options if option.block_tokens >= tile), options[-1])

        monkeypatch.setattr(fusion_plan, "split_config", config)
        monkeypatch.setattr(
            fusion_plan, "split_counts", lambda target, programs, steps, most: (parts, min(heads, most))
        )
        monkeypatch.setattr("lcf_fast.kernels.fusion.launch_split", seen)
        fusion_plan.plan_of.cache_clear()

    yield split
    monkeypatch.undo()
    fusion_plan.plan_of.cache_clear()
    assert launches, "nothing was split"


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 64, 128])
def test_lengths(tokens: int, splits: Splits, device: torch.device, generator: torch.Generator) -> None:
    """Around the tile's edge, up to the most that is split."""
    weights = make_weights(ONE, ONE, 64, device=device, generator=generator)
    batch = 2 if tokens < 64 else 1
    own = make_cache(ONE, batch, tokens, device=device, generator=generator)
    other = make_cache(ONE, batch, tokens, device=device, generator=generator)
    splits(tile=16 if tokens < 64 else 64)
    check_fuse(other, own, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "sharer", "receiver", "tokens", "parts", "heads"),
    [
        (64, Geometry(1, 1, 64), Geometry(1, 3, 80), 3, 4, 2),  # three heads for two programs; 80 channels a head
        (128, Geometry(1, 2, 64), Geometry(1, 2, 128), 2, 8, 2),  # the published widths; a step a program
        (256, Geometry(1, 1, 96), Geometry(1, 1, 256), 5, 2, 1),  # parts that straddle key and value
        (512, Geometry(1, 1, 128), Geometry(1, 1, 96), 5, 1, 1),  # the widest latent, and one part of it
    ],
)
def test_widths(
    width: int, sharer: Geometry, receiver: Geometry, tokens: int, parts: int, heads: int, dtype: torch.dtype,
    splits: Splits, device: torch.device, generator: torch.Generator,
) -> None:  # fmt: skip
    weights = make_weights(sharer, receiver, width, dtype=dtype, device=device, generator=generator)
    own = make_cache(receiver, 1, tokens, dtype=dtype, device=device, generator=generator)
    other = make_cache(sharer, 1, tokens, dtype=dtype, device=device, generator=generator)
    splits(parts, heads)
    check_fuse(other, own, weights)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adversarial(
    adversary: Adversary, dtype: torch.dtype, splits: Splits, device: torch.device, generator: torch.Generator
) -> None:
    weights = make_weights(ONE, ONE, 64, saturated=True, dtype=dtype, device=device, generator=generator)
    own = make_cache(ONE, 1, 9, adversary=adversary, dtype=dtype, device=device, generator=generator)
    other = make_cache(ONE, 1, 9, adversary=adversary, dtype=dtype, device=device, generator=generator)
    splits()
    check_fuse(other, own, weights)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_caches_are_read_where_they_lie(
    layout: CacheLayout, splits: Splits, device: torch.device, generator: torch.Generator
) -> None:
    one = Geometry(1, 2, 64)
    weights = make_weights(one, one, 64, device=device, generator=generator)
    own = make_cache(one, 2, 20, layout=layout, dtype=torch.float16, device=device, generator=generator)
    other = make_cache(one, 2, 20, layout=layout, dtype=torch.float16, device=device, generator=generator)
    splits()
    check_fuse(other, own, weights)


@pytest.mark.parametrize("gates", ["mixed", "key_only", "value_only"])
def test_closed_gates_cost_nothing(
    gates: str, splits: Splits, device: torch.device, generator: torch.Generator
) -> None:
    layers = Geometry(4, 2, 64)
    weights = make_weights(layers, layers, 64, gates=gates, device=device, generator=generator)
    own = make_cache(layers, 1, 5, device=device, generator=generator)
    other = make_cache(layers, 1, 5, device=device, generator=generator)
    splits()
    check_fuse(other, own, weights)


@pytest.mark.parametrize("parts", [1, 3])
def test_masks_index_and_a_range(parts: int, splits: Splits, device: torch.device, generator: torch.Generator) -> None:
    """Another tokenizer's rows, a ragged batch, and a range; the last tiles edit nothing, and are copied."""
    weights = make_weights(SMALL, SMALL, 64, gates="mixed", layers=2, device=device, generator=generator)
    own = make_cache(SMALL, 2, 50, layout="unlike", device=device, generator=generator)
    other = make_cache(SMALL, 2, 11, layout="unlike", device=device, generator=generator)
    index = torch.randint(-1, 11, (2, 50), generator=generator).to(device)
    mask = torch.ones(2, 50, dtype=torch.long, device=device)
    mask[1, :17] = 0
    splits(parts)
    fused = check_fuse(other, own, weights, sharer_index=index, edit_mask=mask, positions=(3, 30))
    edit = (index >= 0) & (mask != 0)
    edit[:, :3] = edit[:, 30:] = False
    for new, old in zip(fused, own):
        for got, given in zip(new, old):
            assert (got == given).movedim(2, 1)[~edit].all(), "an unedited position changed"


def test_unedited_positions_may_hold_anything(splits: Splits, device: torch.device, generator: torch.Generator) -> None:
    """NaN in padding neither spreads nor is lost, in place and out of place."""
    one = Geometry(1, 2, 64)
    weights = make_weights(one, one, 64, device=device, generator=generator)
    own = make_cache(one, 1, 20, device=device, generator=generator)
    other = make_cache(one, 1, 20, device=device, generator=generator)
    mask = torch.arange(20, device=device)[None] >= 7
    for tensor in (*own[0], *other[0]):
        tensor[:, :, :7] = torch.nan
    splits()
    with use_backend("triton"):
        fused = ops.fuse_layers(other, own, weights, edit_mask=mask)
        ops.fuse_layers_(other, own, weights, edit_mask=mask)
    for got, inplace in zip(fused[0], own[0]):
        assert torch.isnan(got[:, :, :7]).all()
        assert torch.isfinite(got[:, :, 7:]).all()
        assert torch.equal(got.nan_to_num(), inplace.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_message_stands_in_for_the_sharer(
    dtype: torch.dtype, splits: Splits, device: torch.device, generator: torch.Generator
) -> None:
    sharer, receiver = Geometry(1, 3, 32), Geometry(1, 2, 64)
    weights = make_weights(sharer, receiver, 64, dtype=dtype, device=device, generator=generator)
    own = make_cache(receiver, 2, 10, dtype=dtype, device=device, generator=generator)
    message = torch.randn(1, 2, 64, generator=generator).to(device)
    mask = torch.ones(2, 10, dtype=torch.bool, device=device)
    mask[1, :4] = False
    splits(4)
    check_fuse(None, own, weights, message=message, positions=(1, 9), edit_mask=mask)


def test_in_place_and_again_is_the_same_to_the_bit(
    splits: Splits, device: torch.device, generator: torch.Generator
) -> None:
    """In place no program reads a row that another has edited: else heads would hang on their order."""
    four = Geometry(1, 4, 64)
    weights = make_weights(ONE, four, 64, device=device, generator=generator)
    own = make_cache(four, 1, 18, device=device, generator=generator)
    other = make_cache(ONE, 1, 18, device=device, generator=generator)
    splits(3, heads=4)
    with use_backend("triton"):
        fused = ops.fuse_layers(other, own, weights)
        again = ops.fuse_layers(other, own, weights)
        ops.fuse_layers_(other, own, weights)
    for new, repeat, old in zip(fused, again, own):
        for i in range(2):
            assert torch.equal(new[i], repeat[i]), "not deterministic"
            assert torch.equal(new[i], old[i])


def test_split_equals_whole_to_rounding(splits: Splits, device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 2, 64)
    weights = make_weights(ONE, one, 64, device=device, generator=generator)
    own = make_cache(one, 1, 20, device=device, generator=generator)
    other = make_cache(ONE, 1, 20, device=device, generator=generator)
    with use_backend("triton"):
        ((key, value),) = ops.fuse_layers(other, own, weights)
        for parts, heads in ((1, 1), (6, 2)):
            splits(parts, heads)
            ((split_key, split_value),) = ops.fuse_layers(other, own, weights)
            torch.testing.assert_close(split_key, key, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(split_value, value, rtol=1e-5, atol=1e-5)


def test_layers_of_different_strides_and_dtypes(
    splits: Splits, device: torch.device, generator: torch.Generator
) -> None:
    """Two launches a group of strides; a float32 adapter and sharer on a half-precision cache."""
    weights = make_weights(SMALL, SMALL, 64, device=device, generator=generator)
    half = torch.float16
    a = make_cache(SMALL, 2, 6, dtype=half, device=device, generator=generator)
    b = make_cache(SMALL, 2, 6, dtype=half, layout="token_major", device=device, generator=generator)
    other = make_cache(SMALL, 2, 6, device=device, generator=generator)
    splits()
    check_fuse(other, [a[0], b[1]], weights)


def test_in_place_touches_nothing_beside_the_cache(
    splits: Splits, device: torch.device, generator: torch.Generator
) -> None:
    weights = make_weights(ONE, SMALL, 64, layers=1, device=device, generator=generator)
    key, check_key = guarded((1, 2, 21, 64), torch.float32, device)
    value, check_value = guarded((1, 2, 21, 64), torch.float32, device)
    for tensor in (key, value):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    before = [(key.clone(), value.clone())]
    other = make_cache(ONE, 1, 21, device=device, generator=generator)
    splits()
    with use_backend("triton"):
        ops.fuse_layers_(other, [(key, value)], weights)
    check_key()
    check_value()
    truth = reference.fuse_layers(to_double(other), to_double(before), double(weights))
    plain = reference.fuse_layers(other, before, weights)
    for got, exact, same in zip((key, value), truth[0], plain[0]):
        assert_within_budget(got, exact, same, 2.0)


def test_a_tile_beyond_2_to_the_31(splits: Splits, device: torch.device, generator: torch.Generator) -> None:
    """The third tile begins 2**31 elements on, in both caches."""
    weights = make_weights(ONE, ONE, 64, dtype=torch.float16, device=device, generator=generator)
    own, other = (rows_beyond_int32(33, device) for _ in "ab")
    for tensor in (own, other):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    splits()
    check_fuse([(other, other)], [(own, own)], weights)


def test_training_is_never_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a training pass was to be split")

    generator = torch.Generator().manual_seed(3)
    weights = make_weights(ONE, ONE, 64, generator=generator)
    own, other = (make_cache(ONE, 1, 4, generator=generator) for _ in range(2))
    monkeypatch.setattr(fusion_plan, "split_config", refuse)
    fusion_plan.plan_of.cache_clear()
    noise = TrainingNoise(1, 1.0, 0.1)
    with use_backend("triton"):
        got = ops.fuse_layers(other, own, weights, noise=noise)
    expected = reference.fuse_layers(other, own, weights, noise=noise)
    assert gates_of(weights) == [(True, True)]
    for a, b in zip(got[0], expected[0]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
