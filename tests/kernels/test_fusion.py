"""The fused kernel, and the projection and injection kernels it is made of, against the float64 reference.

The published geometries are large for the interpreter, so a case takes few layers, heads and tokens; what each case
stresses is beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fused import check_fuse, double

from bench.trials import forced
from helpers import (
    ADVERSARIES,
    CACHE_LAYOUTS,
    Adversary,
    CacheLayout,
    Geometry,
    assert_within_budget,
    beyond_int32,
    guarded,
    make_cache,
    make_weights,
    rows_beyond_int32,
    to_double,
)
from lcf_fast import ops, reference, use_backend
from lcf_fast.kernels import fusion_plan, injection, projection
from lcf_fast.kernels.policy import tile_options

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = Geometry(2, 1, 64)
#: The policy's tile of 256 tokens, for few as well.
LARGEST = {"tile": next(row for row in tile_options(128, 2, "sm_90") if row.block_tokens == 256), "split": None}

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "sharer", "receiver", "tokens"),
    [
        (64, Geometry(2, 2, 64), Geometry(2, 3, 80), 70),  # odd heads; 80 channels a head; two tiles
        (128, Geometry(1, 2, 64), Geometry(1, 2, 128), 17),  # the published widths
        (256, Geometry(1, 1, 96), Geometry(1, 1, 256), 16),  # the widest head
        (512, Geometry(1, 1, 128), Geometry(1, 1, 96), 5),  # the widest latent
    ],
)
def test_fuse_widths(
    width: int, sharer: Geometry, receiver: Geometry, tokens: int, dtype: torch.dtype,
    device: torch.device, generator: torch.Generator,
) -> None:  # fmt: skip
    weights = make_weights(sharer, receiver, width, dtype=dtype, device=device, generator=generator)
    own = make_cache(receiver, 1, tokens, dtype=dtype, device=device, generator=generator)
    other = make_cache(sharer, 1, tokens, dtype=dtype, device=device, generator=generator)
    before = [(key.clone(), value.clone()) for key, value in own]
    check_fuse(other, own, weights)
    assert all(torch.equal(a, b) for x, y in zip(own, before) for a, b in zip(x, y)), "the input was changed"


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65])
def test_fuse_lengths(tokens: int, device: torch.device, generator: torch.Generator) -> None:
    """Around the tile's edge; batch 2."""
    weights = make_weights(SMALL, SMALL, 64, layers=1, device=device, generator=generator)
    own = make_cache(Geometry(1, 1, 64), 2, tokens, device=device, generator=generator)
    other = make_cache(Geometry(1, 1, 64), 2, tokens, device=device, generator=generator)
    check_fuse(other, own, weights)


def test_a_tile_of_256_tokens(device: torch.device, generator: torch.Generator) -> None:
    """Halves that take turns in the FFN and are edited 32 channels at a time: rows of both, a ragged end, rows that
    stay, in place, and a message."""
    sharer, receiver, tokens = Geometry(1, 1, 64), Geometry(1, 2, 128), 300
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    weights = make_weights(sharer, receiver, 128, **options)
    own, other = make_cache(receiver, 1, tokens, **options), make_cache(sharer, 1, tokens, **options)
    index = torch.arange(tokens, device=device).flip(0)[None]
    index[:, ::7] = -1
    message = torch.randn(1, 1, 128, generator=generator).to(device)
    copies = [(key.clone(), value.clone()) for key, value in own]
    with forced(LARGEST):
        fused = check_fuse(other, own, weights, sharer_index=index, positions=(3, tokens - 2))
        with use_backend("triton"):
            ops.fuse_layers_(other, copies, weights, sharer_index=index, positions=(3, tokens - 2))
        assert all(torch.equal(a, b) for new, copy in zip(fused, copies) for a, b in zip(new, copy))
        check_fuse(None, own, weights, message=message)


def test_projection_and_injection_by_256_tokens(device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 1, 128)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    stacked = make_weights(one, one, 128, **options)
    weights = {name: tensor[0] for name, tensor in stacked.items()}
    own, other = make_cache(one, 1, 300, **options)[0], make_cache(one, 1, 300, **options)[0]
    wide, exact = double(weights), (*to_double([other])[0], *to_double([own])[0])
    with forced(LARGEST), use_backend("triton"):
        latent = ops.joint_projection(*other, *own, weights)
        edited = ops.gated_injection(*own, latent, weights)
    truth = reference.joint_projection(*exact, wide)
    assert_within_budget(latent, truth, reference.joint_projection(*other, *own, weights))
    truth_pair = reference.gated_injection(*exact[2:], latent.double(), wide)
    plain_pair = reference.gated_injection(*own, latent, weights)
    for got, exactly, same in zip(edited, truth_pair, plain_pair):
        assert_within_budget(got, exactly, same)


@pytest.mark.parametrize(("width", "tokens"), [(128, 17), (256, 40), (512, 5)])
def test_float32_weights_beside_16_bit_caches(
    width: int, tokens: int, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter as training saves it. Its weights take twice the shared memory, which the policy must hear of."""
    one = Geometry(1, 1, 128)
    stacked = make_weights(one, one, width, device=device, generator=generator)
    weights = {name: tensor[0] for name, tensor in stacked.items()}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    own, other = make_cache(one, 1, tokens, **options), make_cache(one, 1, tokens, **options)
    told: list[int] = []

    def watched(chosen: Callable[..., Any], *given: Any) -> Any:
        told.append(given[5])
        return chosen(*given)

    for module, name in (
        (fusion_plan, "split_config"), (fusion_plan, "tile_config"), (projection, "tile_config"),
        (injection, "injection_config"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, partial(watched, getattr(module, name)))
    fusion_plan.plan_of.cache_clear()
    check_fuse(other, own, stacked)
    with use_backend("triton"):
        latent = ops.joint_projection(*other[0], *own[0], weights)
        edited = ops.gated_injection(*own[0], latent, weights)
    assert told == [4] * 4
    truth = reference.gated_injection(*to_double(own)[0], latent.double(), double(weights))
    for got, exactly, plain in zip(edited, truth, reference.gated_injection(*own[0], latent, weights)):
        assert_within_budget(got, exactly, plain)


def test_the_widest_injection_by_its_largest_tile(device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 1, 128)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    weights = {name: tensor[0] for name, tensor in make_weights(one, one, 512, **options).items()}
    own, latent = make_cache(one, 1, 70, **options)[0], torch.randn(1, 70, 512, generator=generator).to(device)
    with forced({"tile": tile_options(512, 2, "sm_90")[0]}), use_backend("triton"):
        edited = ops.gated_injection(*own, latent, weights)
    truth = reference.gated_injection(*to_double([own])[0], latent.double(), double(weights))
    for got, exactly, plain in zip(edited, truth, reference.gated_injection(*own, latent, weights)):
        assert_within_budget(got, exactly, plain)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_fuse_reads_caches_where_they_lie(
    layout: CacheLayout, device: torch.device, generator: torch.Generator
) -> None:
    one = Geometry(1, 2, 64)  # heads, items and tiles: each stride counts
    weights = make_weights(one, one, 64, device=device, generator=generator)
    own = make_cache(one, 2, 70, layout=layout, dtype=torch.float16, device=device, generator=generator)
    other = make_cache(one, 2, 70, layout=layout, dtype=torch.float16, device=device, generator=generator)
    check_fuse(other, own, weights)


def test_layers_of_different_strides_fuse_in_groups(device: torch.device, generator: torch.Generator) -> None:
    three = Geometry(3, 2, 64)  # of one head the layouts would be the same
    weights = make_weights(three, three, 64, device=device, generator=generator)
    own, other = (make_cache(three, 1, 9, device=device, generator=generator) for _ in "ab")
    strided = make_cache(three, 1, 9, layout="token_major", device=device, generator=generator)
    check_fuse([*other[:2], strided[2]], [own[0], strided[1], own[2]], weights)
    check_fuse([*other[:2], strided[2]], own, weights)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fuse_adversarial(
    adversary: Adversary, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    one = Geometry(1, 1, 64)
    weights = make_weights(one, one, 64, saturated=True, dtype=dtype, device=device, generator=generator)
    own = make_cache(one, 1, 20, adversary=adversary, dtype=dtype, device=device, generator=generator)
    other = make_cache(one, 1, 20, adversary=adversary, dtype=dtype, device=device, generator=generator)
    check_fuse(other, own, weights)


@pytest.mark.parametrize("gates", ["mixed", "key_only", "value_only", "closed"])
def test_closed_gates_cost_nothing(gates: str, device: torch.device, generator: torch.Generator) -> None:
    layers = Geometry(4, 1, 64)
    weights = make_weights(layers, layers, 64, gates=gates, device=device, generator=generator)
    own = make_cache(layers, 1, 9, device=device, generator=generator)
    other = make_cache(layers, 1, 9, device=device, generator=generator)
    check_fuse(other, own, weights)


def test_index_masks_positions(device: torch.device, generator: torch.Generator) -> None:
    """Another tokenizer's rows, -1 among them, a ragged left-padded batch and a range: all at once."""
    two = Geometry(2, 2, 64)
    weights = make_weights(two, two, 64, gates="mixed", device=device, generator=generator)
    own = make_cache(two, 2, 80, layout="unlike", device=device, generator=generator)
    other = make_cache(two, 2, 33, layout="unlike", device=device, generator=generator)
    index = torch.randint(-1, 33, (2, 80), generator=generator).to(device)
    mask = torch.ones(2, 80, dtype=torch.long, device=device)
    mask[1, :30] = 0
    mask[0, 64:] = 0  # a tile without an edit: copied
    fused = check_fuse(other, own, weights, sharer_index=index, edit_mask=mask, positions=(3, 71))
    edit = (index >= 0) & (mask != 0)
    edit[:, :3] = edit[:, 71:] = False
    for new, old in zip(fused, own):
        for got, given in zip(new, old):
            still = got == given
            assert still.movedim(2, 1)[~edit].all(), "an unedited position changed"
            if got is not given:
                assert not still.movedim(2, 1)[edit].flatten(1).all(1).any(), "an edited position did not change"


def test_rows_that_the_sharer_has_not_are_none(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indices that nobody looks at, as on a GPU: beyond the sharer's last row, where NaN lies."""
    monkeypatch.setattr("lcf_fast.checks.reads_values", lambda _: False)
    weights = make_weights(SMALL, SMALL, 64, device=device, generator=generator)
    own = make_cache(SMALL, 1, 9, device=device, generator=generator)
    other = make_cache(SMALL, 1, 6, layout="padded", device=device, generator=generator)
    index = torch.tensor([[0, 6, 5, -1, 7, 3, -2, 6, 1]], device=device)
    known = index.where((index >= 0) & (index < 6), -1)
    one = {name: tensor[0] for name, tensor in weights.items()}
    with use_backend("triton"):
        for got, same in zip(*(ops.fuse_layers(other, own, weights, sharer_index=rows) for rows in (index, known))):
            assert torch.equal(got[0], same[0]) and torch.equal(got[1], same[1])
        latents = [ops.joint_projection(*other[0], *own[0], one, sharer_index=rows) for rows in (index, known)]
    assert torch.equal(*latents)


def test_unedited_positions_may_hold_anything(device: torch.device, generator: torch.Generator) -> None:
    """NaN in padding neither spreads nor is lost, in place and out of place."""
    one = Geometry(1, 2, 64)
    weights = make_weights(one, one, 64, device=device, generator=generator)
    own = make_cache(one, 1, 20, device=device, generator=generator)
    other = make_cache(one, 1, 20, device=device, generator=generator)
    mask = torch.arange(20, device=device)[None] >= 7
    for tensor in (*own[0], *other[0]):
        tensor[:, :, :7] = torch.nan
    with use_backend("triton"):
        fused = ops.fuse_layers(other, own, weights, edit_mask=mask)
        ops.fuse_layers_(other, own, weights, edit_mask=mask)
    for got, inplace in zip(fused[0], own[0]):
        assert torch.isnan(got[:, :, :7]).all()
        assert torch.isfinite(got[:, :, 7:]).all()
        assert torch.equal(got, inplace) or torch.equal(got.nan_to_num(), inplace.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_message_stands_in_for_the_sharer(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    sharer = Geometry(2, 3, 32)
    weights = make_weights(sharer, SMALL, 64, dtype=dtype, device=device, generator=generator)
    own = make_cache(SMALL, 2, 18, dtype=dtype, device=device, generator=generator)
    message = torch.randn(2, 2, 64, generator=generator).to(device)
    check_fuse(None, own, weights, message=message, positions=(1, 17))


def test_in_place_equals_out_of_place_bitwise(device: torch.device, generator: torch.Generator) -> None:
    weights = make_weights(SMALL, SMALL, 64, gates="mixed", device=device, generator=generator)
    own = make_cache(SMALL, 2, 70, device=device, generator=generator)
    other = make_cache(SMALL, 2, 70, device=device, generator=generator)
    with use_backend("triton"):
        fused = ops.fuse_layers(other, own, weights, positions=(5, 69))
        again = ops.fuse_layers(other, own, weights, positions=(5, 69))
        returned = ops.fuse_layers_(other, own, weights, positions=(5, 69))
    for new, repeat, old, back in zip(fused, again, own, returned):
        for i in range(2):
            assert torch.equal(new[i], repeat[i]), "not deterministic"
            if device.type == "cuda":
                assert torch.equal(new[i], old[i])
            else:  # tiles begin elsewhere, and a row's bits hang on its place in the tile in some builds of NumPy
                torch.testing.assert_close(new[i], old[i], rtol=1e-5, atol=1e-5)
            assert back[i] is old[i]


def test_two_half_ranges_equal_one(device: torch.device, generator: torch.Generator) -> None:
    weights = make_weights(SMALL, SMALL, 64, device=device, generator=generator)
    own = make_cache(SMALL, 1, 70, device=device, generator=generator)
    other = make_cache(SMALL, 1, 70, device=device, generator=generator)
    with use_backend("triton"):
        whole = ops.fuse_layers(other, own, weights)
        half = ops.fuse_layers(
            other, ops.fuse_layers(other, own, weights, positions=(0, 33)), weights, positions=(33, 70)
        )
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for x, y in zip(whole, half) for a, b in zip(x, y))


def test_a_permuted_batch_permutes_the_output(device: torch.device, generator: torch.Generator) -> None:
    weights = make_weights(SMALL, SMALL, 64, device=device, generator=generator)
    own = make_cache(SMALL, 3, 12, device=device, generator=generator)
    other = make_cache(SMALL, 3, 12, device=device, generator=generator)
    order = torch.tensor([2, 0, 1], device=device)
    with use_backend("triton"):
        fused = ops.fuse_layers(other, own, weights)
        other, own = ([(k[order], v[order]) for k, v in cache] for cache in (other, own))
        moved = ops.fuse_layers(other, own, weights)
    assert all(torch.equal(a[order], b) for x, y in zip(fused, moved) for a, b in zip(x, y))


def test_in_place_touches_nothing_beside_the_cache(device: torch.device, generator: torch.Generator) -> None:
    weights = make_weights(SMALL, SMALL, 64, layers=1, device=device, generator=generator)
    key, check_key = guarded((1, 1, 21, 64), torch.float32, device)
    value, check_value = guarded((1, 1, 21, 64), torch.float32, device)
    for tensor in (key, value):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    other = make_cache(Geometry(1, 1, 64), 1, 21, device=device, generator=generator)
    with use_backend("triton"):
        ops.fuse_layers_(other, [(key, value)], weights)
    check_key()
    check_value()
    assert torch.isfinite(key).all()
    assert torch.isfinite(value).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_and_injection_alone(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """The single-layer ops: gathered rows, a latent that is zero where there is none, a mask, a closed gate."""
    sharer, receiver = Geometry(1, 2, 80), Geometry(1, 3, 64)
    stacked = make_weights(sharer, receiver, 64, gates="value_only", dtype=dtype, device=device, generator=generator)
    weights = {name: tensor[0] for name, tensor in stacked.items()}
    weights["gate_logit"][0] = 0.0  # as in a new adapter: closed
    own = make_cache(receiver, 2, 70, dtype=dtype, layout="unlike", device=device, generator=generator)[0]
    other = make_cache(sharer, 2, 9, dtype=dtype, layout="unlike", device=device, generator=generator)[0]
    index = torch.randint(-1, 9, (2, 70), generator=generator).to(device)
    wide, exact = double(weights), (*to_double([other])[0], *to_double([own])[0])
    with use_backend("triton"):
        latent = ops.joint_projection(*other, *own, weights, sharer_index=index)
    truth = reference.joint_projection(*exact, wide, sharer_index=index)
    plain = reference.joint_projection(*other, *own, weights, sharer_index=index)
    assert_within_budget(latent, truth, plain)
    assert (latent[index < 0] == 0).all()

    mask = index >= 0
    with use_backend("triton"):
        edited = ops.gated_injection(*own, latent, weights, edit_mask=mask)
        copies = (own[0].clone(), own[1].clone())
        ops.gated_injection_(*copies, latent, weights, edit_mask=mask)
    truth_pair = reference.gated_injection(*exact[2:], latent.double(), wide, edit_mask=mask)
    plain_pair = reference.gated_injection(*own, latent, weights, edit_mask=mask)
    for got, exactly, same, inplace in zip(edited, truth_pair, plain_pair, copies):
        assert_within_budget(got, exactly, same)
        assert torch.equal(got, inplace)
    assert torch.equal(edited[0], own[0])
    assert edited[0] is not own[0]


def test_projection_from_a_message(device: torch.device, generator: torch.Generator) -> None:
    sharer, receiver = Geometry(1, 2, 64), Geometry(1, 1, 64)
    stacked = make_weights(sharer, receiver, 128, device=device, generator=generator)
    weights = {name: tensor[0] for name, tensor in stacked.items()}
    own = make_cache(receiver, 2, 10, device=device, generator=generator)[0]
    message = torch.randn(2, 128, generator=generator).to(device)
    with use_backend("triton"):
        latent = ops.joint_projection(None, None, *own, weights, message=message)
    exact = reference.joint_projection(None, None, *to_double([own])[0], double(weights), message=message.double())
    plain = reference.joint_projection(None, None, *own, weights, message=message)
    assert_within_budget(latent, exact, plain)


def test_weights_of_another_dtype_are_cast(device: torch.device, generator: torch.Generator) -> None:
    """A float32 adapter on half-precision caches, and a sharer of yet another dtype."""
    one = Geometry(1, 1, 64)
    weights = make_weights(one, one, 64, device=device, generator=generator)
    own = make_cache(one, 1, 9, dtype=torch.float16, device=device, generator=generator)
    other = make_cache(one, 1, 9, device=device, generator=generator)
    check_fuse(other, own, weights)


@pytest.mark.parametrize(("blocks", "expansion"), [(1, 1), (0, 4), (3, 2)])
def test_other_depths(blocks: int, expansion: int, device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 1, 64)
    weights = make_weights(one, one, 64, blocks=blocks, expansion=expansion, device=device, generator=generator)
    own = make_cache(one, 1, 9, device=device, generator=generator)
    other = make_cache(one, 1, 9, device=device, generator=generator)
    check_fuse(other, own, weights)


def test_float32_is_exact_to_1e_minus_6(device: torch.device, generator: torch.Generator) -> None:
    """float32 products are IEEE, not TF32; relative error over everything."""
    weights = make_weights(SMALL, SMALL, 128, device=device, generator=generator)
    own = make_cache(SMALL, 1, 33, device=device, generator=generator)
    other = make_cache(SMALL, 1, 33, device=device, generator=generator)
    fused = check_fuse(other, own, weights)
    truth = reference.fuse_layers(to_double(other), to_double(own), double(weights))
    for got, exact in zip(fused, truth):
        for i in range(2):
            assert float((got[i].double() - exact[i]).norm() / exact[i].norm()) < 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_offsets_beyond_2_to_the_31(axis: int, device: torch.device, generator: torch.Generator) -> None:
    """Each axis of the receiver's and the sharer's caches in turn; read, and written in place."""
    shape = [1, 2, 2, 64]
    shape[axis] = 3
    batch, heads, tokens, dim = shape
    one = Geometry(1, heads, dim)
    weights = make_weights(one, one, 64, dtype=torch.float16, device=device, generator=generator)
    own, other = (beyond_int32((batch, heads, tokens, dim), axis, device) for _ in range(2))
    for tensor in (own, other):
        tensor.copy_(torch.randn(batch, heads, tokens, dim, generator=generator))
    plain = make_cache(one, batch, tokens, dtype=torch.float16, device=device, generator=generator)[0][1]
    index = torch.arange(tokens, device=device).flip(0).expand(batch, -1)
    fused = check_fuse([(other, other)], [(own, plain)], weights, sharer_index=index)
    with use_backend("triton"):
        ops.fuse_layers_([(other, other)], [(own, plain)], weights, sharer_index=index)
    assert torch.equal(own, fused[0][0])


def test_a_tile_beyond_2_to_the_31(device: torch.device, generator: torch.Generator) -> None:
    """The second tile begins 2**31 elements on; both caches, read, and the receiver's written in place, too."""
    one = Geometry(1, 1, 64)
    weights = make_weights(one, one, 64, dtype=torch.float16, device=device, generator=generator)
    weights_of_one = {name: tensor[0] for name, tensor in weights.items()}
    own, other = (rows_beyond_int32(65, device) for _ in "ab")
    for tensor in (own, other):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    plain = make_cache(one, 1, 65, dtype=torch.float16, device=device, generator=generator)[0][1]
    ((edited, _),) = check_fuse([(other, other)], [(own, plain)], weights)
    with use_backend("triton"):
        latent = ops.joint_projection(other, other, own, plain, weights_of_one)
        alone, _ = ops.gated_injection(own, plain, latent, weights_of_one)
        ops.fuse_layers_([(other, other)], [(own, plain.clone())], weights)
    torch.testing.assert_close(alone, edited, rtol=0.01, atol=0.01)
    assert torch.equal(own, edited)


def test_a_gathered_row_beyond_2_to_the_31(device: torch.device, generator: torch.Generator) -> None:
    """A tile's own rows would fit 32 bits; those that an index takes from anywhere do not."""
    one = Geometry(1, 1, 64)
    weights = make_weights(one, one, 64, dtype=torch.float16, device=device, generator=generator)
    far = rows_beyond_int32(66, device)
    far.copy_(torch.randn(far.shape, generator=generator))
    own = make_cache(one, 1, 3, dtype=torch.float16, device=device, generator=generator)
    index = torch.tensor([[65, 0, 64]], device=device)
    check_fuse([(far, far)], own, weights, sharer_index=index)
    with use_backend("triton"):
        latent = ops.joint_projection(
            far, far, *own[0], {name: tensor[0] for name, tensor in weights.items()}, sharer_index=index
        )
    assert torch.isfinite(latent).all()
