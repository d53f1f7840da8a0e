"""Backward kernels against float64 autograd of the reference: every parameter, the message, and caches that ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (
    ADVERSARIES,
    CACHE_LAYOUTS,
    Adversary,
    CacheLayout,
    Geometry,
    Pair,
    assert_within_budget,
    beyond_int32,
    make_cache,
    make_weights,
    rows_beyond_int32,
    with_layout,
)
from lcf_fast import ops, reference, use_backend
from lcf_fast.kernels import fusion_backward
from lcf_fast.noise import TrainingNoise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = Geometry(2, 1, 64)
NOISE = TrainingNoise(5, temperature=0.7, dropout=0.2)
#: The two round at other places: plain torch makes dropped, gated and normed rows in the cache dtype, this in float32.
BUDGET = 3.0
Weights = dict[str, Tensor]
Leaves = dict[str, Tensor]


def leaves_of(
    sharer: list[Pair] | None, receiver: list[Pair], weights: Weights, message: Tensor | None, caches: bool
) -> Leaves:
    named = {**weights, **({} if message is None else {"message": message})}
    for side, pairs in (("receiver", receiver), ("sharer", sharer or [])):
        named |= {f"{side}.{i}.{j}": pair[j] for i, pair in enumerate(pairs) for j in (0, 1)}
    return {
        name: tensor.detach().requires_grad_(caches or "." not in name)
        for name, tensor in named.items()
    }  # fmt: skip


def gradients(
    fuse: Callable[..., list[Pair]], leaves: Leaves, layers: int, seed: int = 3, **keywords: Any
) -> dict[str, Tensor]:
    """Of a random linear function of what `fuse` returns; zeros where it does not depend."""

    def pairs(side: str) -> list[Pair]:
        return [(leaves[f"{side}.{i}.0"], leaves[f"{side}.{i}.1"]) for i in range(layers)]

    has_message = "message" in leaves
    weights = {name: leaf for name, leaf in leaves.items() if "." not in name and name != "message"}
    fused = fuse(
        None if has_message else pairs("sharer"), pairs("receiver"), weights, message=leaves.get("message"), **keywords
    )
    generator = torch.Generator().manual_seed(seed)
    flat = [tensor for pair in fused for tensor in pair]
    grads = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in flat]
    live = [(t, g) for t, g in zip(flat, grads) if t.requires_grad]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not live:
        return {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
    found = torch.autograd.grad([t for t, _ in live], list(wanted.values()), [g for _, g in live], allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(wanted.items(), found)}


def check(
    sharer: list[Pair] | None,
    receiver: list[Pair],
    weights: Weights,
    *,
    message: Tensor | None = None,
    caches: bool = True,
    budget: float = BUDGET,
    **keywords: Any,
) -> dict[str, Tensor]:
    """Hold the kernels' gradients to the error budget; returns them."""
    layers = len(receiver)
    leaves = leaves_of(sharer, receiver, weights, message, caches)
    with use_backend("triton"):
        got = gradients(ops.fuse_layers, leaves, layers, **keywords)
    plain = gradients(reference.fuse_layers, leaves, layers, **keywords)
    double = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}
    exact = gradients(reference.fuse_layers, double, layers, **keywords)
    assert set(got) == set(exact)
    for name, gradient in got.items():
        try:
            if gradient.numel() < 64:  # of a few numbers the median error is one number's luck
                assert_near(gradient, exact[name], plain[name], budget)
            else:
                assert_within_budget(gradient, exact[name], plain[name], budget)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return got


def assert_near(got: Tensor, exact: Tensor, plain: Tensor, budget: float) -> None:
    """The largest error alone, within the budget or 64 units in the last place of the largest value."""
    error, other = (float((x.double() - exact).abs().max()) for x in (got, plain))
    eps, smallest = torch.finfo(got.dtype).eps, torch.finfo(torch.float32).tiny
    bound = max(budget * other, 64 * eps * float(exact.abs().max()), smallest)
    assert error <= bound, f"an error of {error:.2e}, over {bound:.2e}"


def setup(
    sharer: Geometry, receiver: Geometry, width: int, tokens: int, device: torch.device, generator: torch.Generator,
    *, batch: int = 1, dtype: torch.dtype = torch.float32, layout: CacheLayout = "contiguous", **keywords: Any,
) -> tuple[list[Pair], list[Pair], Weights]:  # fmt: skip
    weights = make_weights(sharer, receiver, width, dtype=dtype, device=device, generator=generator, **keywords)
    of = {"dtype": dtype, "device": device, "generator": generator, "layout": layout}
    own = make_cache(receiver, batch, tokens, **of)  # type: ignore[arg-type]
    other = make_cache(sharer, batch, tokens, **of)  # type: ignore[arg-type]
    return other, own, weights


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
def test_widths(
    width: int, sharer: Geometry, receiver: Geometry, tokens: int, dtype: torch.dtype,
    device: torch.device, generator: torch.Generator,
) -> None:  # fmt: skip
    other, own, weights = setup(sharer, receiver, width, tokens, device, generator, dtype=dtype)
    check(other, own, weights)


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65])
def test_ragged_lengths_with_noise(tokens: int, device: torch.device, generator: torch.Generator) -> None:
    """Around the tile's edge; batch 2; the training gate and dropout."""
    one = Geometry(1, 1, 64)
    other, own, weights = setup(one, one, 64, tokens, device, generator, batch=2)
    check(other, own, weights, noise=NOISE)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float16, 40), (torch.bfloat16, 150)], ids=str)
def test_noise_in_half_precision(
    dtype: torch.dtype, tokens: int, device: torch.device, generator: torch.Generator
) -> None:
    """Less than a tile, and more than any chip's."""
    other, own, weights = setup(SMALL, SMALL, 64, tokens, device, generator, batch=2, dtype=dtype)
    check(other, own, weights, noise=NOISE, caches=False)


@pytest.mark.parametrize("noise", [None, NOISE])
def test_message(noise: TrainingNoise | None, device: torch.device, generator: torch.Generator) -> None:
    """LCF-X, a range of positions, and padding."""
    _, own, weights = setup(SMALL, SMALL, 64, 70, device, generator, batch=2)
    message = torch.randn(2, 2, 64, generator=generator).to(device)
    mask = (torch.rand(2, 70, generator=generator) > 0.2).to(device)
    got = check(None, own, weights, message=message, edit_mask=mask, positions=(3, 66), noise=noise)
    columns = 2 * 64
    assert not got["down_weight"][:, :, :columns].any(), "the sharer's columns are the message's business"
    assert not got["down_bias"].any()


def test_index(device: torch.device, generator: torch.Generator) -> None:
    """Rows of the sharer in any order, some twice, some positions without one; a sharer of another length."""
    _, own, weights = setup(SMALL, SMALL, 64, 70, device, generator, batch=2)
    other = make_cache(SMALL, 2, 31, device=device, generator=generator)
    index = torch.randint(-1, 31, (2, 70), generator=generator).to(device)
    check(other, own, weights, sharer_index=index, positions=(2, 69), noise=NOISE)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_layouts(layout: CacheLayout, device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 2, 64)
    other, own, weights = setup(one, one, 64, 20, device, generator, batch=2, layout=layout)
    # Where all rows are one row, its gradient is a sum that autograd makes by itself.
    check(other, own, weights, caches=layout != "expanded", positions=(3, 20))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_offsets_beyond_2_to_the_31(axis: int, device: torch.device, generator: torch.Generator) -> None:
    """Each axis of both caches in turn, whose last row alone is edited where it is the tokens'."""
    shape = [1, 1, 2, 64]
    shape[axis] = 3
    batch, heads, tokens, dim = shape
    one = Geometry(1, heads, dim)
    _, own, weights = setup(one, one, 64, tokens, device, generator, batch=batch, dtype=torch.float16)
    far = beyond_int32((batch, heads, tokens, dim), axis, device)
    far.copy_(torch.randn(shape, generator=generator))
    plain, keywords = own[0][1], {"caches": False, "positions": (tokens - 1, tokens)}
    check([(far, plain)], [(plain, far)], weights, **keywords)  # type: ignore[arg-type]
    index = torch.full((batch, tokens), tokens - 1, device=device)
    check([(plain, far)], [(far, plain)], weights, sharer_index=index, **keywords)  # type: ignore[arg-type]


def test_a_gathered_row_beyond_2_to_the_31(device: torch.device, generator: torch.Generator) -> None:
    """A tile's own rows would fit 32 bits; those that an index takes from anywhere do not."""
    one = Geometry(1, 1, 64)
    _, own, weights = setup(one, one, 64, 3, device, generator, dtype=torch.float16)
    far = rows_beyond_int32(66, device)
    far.copy_(torch.randn(far.shape, generator=generator))
    index = torch.tensor([[65, 0, 64]], device=device)
    check([(far, far)], own, weights, sharer_index=index, caches=False)


def test_rows_that_the_sharer_has_not_have_no_gradient(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indices that nobody looks at, as on a GPU: as those that say so. Of all layers, and of the projection alone."""
    monkeypatch.setattr("lcf_fast.checks.reads_values", lambda _: False)
    one = Geometry(1, 1, 64)
    _, own, weights = setup(one, one, 64, 9, device, generator)
    other = make_cache(one, 1, 6, layout="padded", device=device, generator=generator)
    leaves = leaves_of(other, own, weights, None, caches=True)
    index = torch.tensor([[0, 6, 5, -1, 7, 3, -2, 6, 1]], device=device)

    def alone(sharer: list[Pair], receiver: list[Pair], weights: Weights, **keywords: Any) -> list[Pair]:
        stacked = {name: tensor[0] for name, tensor in weights.items()}
        latent = ops.joint_projection(*sharer[0], *receiver[0], stacked, sharer_index=keywords["sharer_index"])
        return [(latent, latent)]

    for run in (ops.fuse_layers, alone):
        with use_backend("triton"):
            got, same = (
                gradients(run, leaves, 1, sharer_index=rows)  # type: ignore[arg-type]
                for rows in (index, index.where((index >= 0) & (index < 6), -1))
            )
        assert all(torch.equal(got[name], same[name]) for name in got)


def test_layers_of_different_strides_go_in_pieces(device: torch.device, generator: torch.Generator) -> None:
    three = Geometry(3, 2, 64)
    other, own, weights = setup(three, three, 64, 20, device, generator)
    own[2], other[1] = (
        (with_layout(key, "token_major"), with_layout(value, "token_major")) for key, value in (own[2], other[1])
    )
    check(other, own, weights, noise=NOISE)


@pytest.mark.parametrize("gates", ["mixed", "key_only", "value_only", "closed"])
def test_dead_gates(gates: str, device: torch.device, generator: torch.Generator) -> None:
    four = Geometry(4, 1, 64)
    other, own, weights = setup(four, four, 64, 20, device, generator, gates=gates)
    got = check(other, own, weights)
    for layer, is_open in enumerate((weights["gate_logit"] > 0).tolist()):
        for half in (0, 1):
            assert bool(got["up_weight"][layer, half].any()) == is_open[half]
        assert bool(got["down_weight"][layer].any()) == any(is_open)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversarial(adversary: Adversary, device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 1, 64)
    weights = make_weights(one, one, 64, saturated=True, device=device, generator=generator)
    own = make_cache(one, 1, 20, adversary=adversary, device=device, generator=generator)
    other = make_cache(one, 1, 20, adversary=adversary, device=device, generator=generator)
    check(other, own, weights, budget=6.0)


def test_what_lies_at_padding_never_reaches_a_gradient(device: torch.device, generator: torch.Generator) -> None:
    other, own, weights = setup(SMALL, SMALL, 64, 40, device, generator, batch=2)
    mask = torch.ones(2, 40, dtype=torch.bool, device=device)
    mask[0, :7] = mask[1, 33:] = False
    expected = check(other, own, weights, edit_mask=mask, caches=False, noise=NOISE)
    for pair in (*own, *other):
        for tensor in pair:
            tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    leaves = leaves_of(other, own, weights, None, False)
    with use_backend("triton"):
        got = gradients(ops.fuse_layers, leaves, 2, edit_mask=mask, noise=NOISE)
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


def test_gradients_are_the_same_bits_run_to_run_and_however_layers_are_cut(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = Geometry(3, 1, 64)
    other, own, weights = setup(three, three, 64, 66, device, generator)
    leaves = leaves_of(other, own, weights, None, True)
    with use_backend("triton"):
        first = gradients(ops.fuse_layers, leaves, 3, noise=NOISE)
        monkeypatch.setattr(fusion_backward, "WORKSPACE", 0)
        monkeypatch.setattr(fusion_backward, "PIECES", 2)
        second = gradients(ops.fuse_layers, leaves, 3, noise=NOISE)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def test_nothing_but_inputs_is_kept_and_frozen_caches_cost_nothing(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, own, weights = setup(SMALL, SMALL, 64, 20, device, generator)
    leaves = leaves_of(other, own, weights, None, False)
    given = {tensor.data_ptr() for tensor in leaves.values()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    asked: list[tuple[bool, bool]] = []
    run = fusion_backward.fuse_layers_backward

    def watched(*arguments: Any, **keywords: Any) -> Any:
        asked.append((keywords["wants_sharer"], keywords["wants_receiver"]))
        found = run(*arguments, **keywords)
        assert found.sharer is None
        assert found.receiver is None
        return found

    monkeypatch.setattr(fusion_backward, "fuse_layers_backward", watched)
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(ops.fuse_layers, leaves, 2, noise=NOISE)
    assert asked == [(False, False)]
    assert kept
    assert all(tensor.data_ptr() in given for tensor in kept)


# --- projection and injection alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["sharer", "index", "message"])
def test_projection(source: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 2, 64)
    other, own, stacked = setup(one, one, 64, 40, device, generator, batch=2, dtype=dtype)
    names = ("down_weight", "down_bias", "norm_weight", "ffn_in_weight", "ffn_out_weight")
    tensors = [*own[0], *(stacked[name][0] for name in names)]
    tensors += [torch.randn(2, 64, generator=generator).to(device)] if source == "message" else [*other[0]]
    index = torch.randint(-1, 40, (2, 40), generator=generator).to(device) if source == "index" else None
    grad = torch.randn(2, 40, 64, generator=generator).to(device)

    def found(project: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        weights = dict(zip(names, leaves[2:7]))
        rest: list[Any] = leaves[7:] if source != "message" else [None, None]
        message = leaves[7] if source == "message" else None
        latent = project(*rest, *leaves[:2], weights, sharer_index=index, message=message)
        grads = torch.autograd.grad(latent, leaves, grad.to(latent.dtype), allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves)]

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with use_backend("triton"):
        got = found(ops.joint_projection, leaves)
    exact = found(reference.joint_projection, [leaf.detach().double().requires_grad_() for leaf in leaves])
    for ours, truth, plain in zip(got, exact, found(reference.joint_projection, leaves)):
        assert_within_budget(ours, truth, plain, BUDGET)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", ["open", "key_only"])
def test_injection(gates: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    one = Geometry(1, 3, 80)
    _, own, stacked = setup(one, one, 64, 40, device, generator, batch=2, dtype=dtype, gates=gates)
    names = ("up_weight", "up_bias", "head_gate_weight", "head_gate_bias", "gate_logit")
    latent = torch.randn(2, 40, 64, generator=generator).to(device)
    if gates == "key_only":
        stacked["gate_logit"][0, 1] = 0.0  # as in a new adapter: closed
    tensors = [*own[0], latent, *(stacked[name][0] for name in names)]
    mask = (torch.rand(2, 40, generator=generator) > 0.3).to(device)
    grads = [torch.randn(own[0][0].shape, generator=generator).to(device, dtype) for _ in range(2)]

    def found(inject: Callable[..., Pair], leaves: list[Tensor]) -> list[Tensor]:
        edited = inject(*leaves[:3], dict(zip(names, leaves[3:])), edit_mask=mask)
        of = torch.autograd.grad(edited, leaves, [g.to(edited[0].dtype) for g in grads], allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(of, leaves)]

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with use_backend("triton"):
        got = found(ops.gated_injection, leaves)
    exact = found(reference.gated_injection, [leaf.detach().double().requires_grad_() for leaf in leaves])
    for ours, truth, plain in zip(got, exact, found(reference.gated_injection, leaves)):
        assert_within_budget(ours, truth, plain, BUDGET)
