"""Training mode: dropout and soft gates, the same numbers in the reference, the kernels and both passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from adapters import RECEIVER, SHARER, Pair, assert_close, assert_equal, cloned, make_adapter, make_caches
from hypothesis import given
from hypothesis import strategies as st

from lcf_fast import LatentCacheFlow, LatentSlots, LCFConfig, reference, use_backend
from lcf_fast.backends import Backend
from lcf_fast.errors import DTypeError, GeometryError
from lcf_fast.noise import TrainingNoise, random_bits

CPU = torch.device("cpu")
SPANS = [[0, 3, 7], [0, 3, 7]]
BACK_ENDS: tuple[Backend, ...] = ("eager", "triton")


def edit(adapter: LatentCacheFlow, sharer: list[Pair], receiver: list[Pair]) -> list[Pair]:
    if adapter.config.cross_context:
        edited: list[Pair] = adapter.inject(receiver, adapter.summarize(sharer, SPANS))
    else:
        edited = adapter.fuse(sharer, receiver)
    return edited


def trained(cross_context: bool = False, dropout: float = 0.1) -> LatentCacheFlow:
    return make_adapter(cross_context, dropout=dropout).train()


def test_philox_is_the_published_generator() -> None:
    """Known answers of Philox 4x32-10 (Random123's kat_vectors), of which the first word is drawn."""
    assert int(random_bits(0, 0, 0, (1, 1, 1), CPU)) == 0x6627E8D5
    # Counter (channel, token, item, layer | stream << 16) and key (seed, 0): each moves the result.
    seen = {int(random_bits(seed, layer, stream, (2, 2, 2), CPU)[i, n, c])
            for seed in (0, 1) for layer in (0, 1) for stream in (0, 1)
            for i in (0, 1) for n in (0, 1) for c in (0, 1)}  # fmt: skip
    assert len(seen) == 64


@given(dropout=st.floats(0, 0.9), seed=st.integers(0, 2**31 - 1))
def test_dropout_keeps_its_share(dropout: float, seed: int) -> None:
    noise = TrainingNoise(seed, dropout=dropout)
    kept = noise.keep(3, 1, (2, 64, 64), CPU).double()
    assert float(kept.mean()) == pytest.approx(1 - dropout, abs=6 * math.sqrt(0.25 / kept.numel()))
    assert noise.keep_scale == pytest.approx(1 / (1 - dropout), rel=1e-6)


def test_of_a_probability_next_to_one_some_are_kept() -> None:
    noise = TrainingNoise(0, dropout=1 - 1e-12)
    assert noise.threshold == 2**31 - 1
    assert math.isfinite(noise.keep_scale)


def test_soft_gates_are_gumbel_sigmoids() -> None:
    noise = TrainingNoise(5, temperature=0.5)
    gate = noise.gate(0, 1, torch.tensor(0.3, dtype=torch.float64), (4, 500, 16))
    gumbel = (gate.logit() * 0.5 - 0.3).flatten()
    assert float(gumbel.mean()) == pytest.approx(0.5772, abs=0.05)  # Euler's constant
    assert float(gumbel.var()) == pytest.approx(math.pi**2 / 6, rel=0.05)
    cold = TrainingNoise(5, temperature=1e-4).gate(0, 1, torch.tensor(0.3), (4, 500, 16))
    assert float(((cold == 0) | (cold == 1)).float().mean()) > 0.99


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("cross_context", [False, True])
def test_training_mode_is_the_reference_with_noise(
    cross_context: bool, back_end: Backend, device: torch.device
) -> None:
    adapter = make_adapter(cross_context, dropout=0.25, norm_eps=0.5).train().to(device)
    adapter.gate_temperature = 0.7
    sharer, receiver = make_caches(device)
    torch.manual_seed(3)
    with use_backend(back_end):
        got = edit(adapter, sharer, receiver)
    torch.manual_seed(3)
    noise = TrainingNoise(int(torch.randint(1 << 31, (), dtype=torch.int64)), 0.7, 0.25)
    weights = {name: p.double() for name, p in adapter.named_parameters()}
    own = [(k.double(), v.double()) for k, v in receiver]
    other = [(k.double(), v.double()) for k, v in sharer]
    if cross_context:
        message = adapter.double().summarize(other, SPANS).latent
        expected = reference.fuse_layers(None, own, weights, message=message, norm_eps=0.5, noise=noise)
    else:
        chosen = [other[s] for s in adapter.sharer_layers.tolist()]
        expected = reference.fuse_layers(chosen, own, weights, norm_eps=0.5, noise=noise)
    assert_close(got, expected, 1e-5)
    quiet = reference.fuse_layers(None, own, weights, message=message, norm_eps=0.5) if cross_context else (
        reference.fuse_layers(chosen, own, weights, norm_eps=0.5))  # fmt: skip
    assert float((expected[0][0] - quiet[0][0]).abs().max()) > 1e-2, "the noise does nothing"


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_every_call_has_its_own_noise_and_the_seed_fixes_it(back_end: Backend, device: torch.device) -> None:
    adapter = trained().to(device)
    sharer, receiver = make_caches(device)
    before = cloned(receiver)
    with use_backend(back_end):
        torch.manual_seed(1)
        first, second = edit(adapter, sharer, receiver), edit(adapter, sharer, receiver)
        torch.manual_seed(1)
        assert_equal(edit(adapter, sharer, receiver), first)
    assert not torch.equal(first[0][0], second[0][0])
    assert_equal(receiver, before)


def slots_adapter() -> LatentSlots:
    torch.manual_seed(5)
    return LatentSlots(LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True, slots=3, dropout=0.25))


@pytest.mark.parametrize("method", ["lcf", "slots"])
def test_training_compiles_whole(method: str, device: torch.device) -> None:
    """One graph for every back end, which an op chooses when it runs. It draws anew at each call and each time it runs:
    numbers and gradients are the eager call's."""
    lcf = make_adapter(keep=[0, 2], dropout=0.1).train().requires_grad_()
    adapter = (slots_adapter() if method == "slots" else lcf).to(device)
    sharer, receiver = make_caches(device)

    def call() -> list[Pair]:
        if isinstance(adapter, LatentSlots):
            return adapter.expand(adapter.summarize(sharer))
        return edit(adapter, sharer, receiver)

    def both() -> list[Pair]:
        return [*call(), *call()]

    def step(run: Callable[[], list[Pair]], seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        edited = [tensor for pair in run() for tensor in pair]
        wanted = list(adapter.parameters())
        return edited + list(torch.autograd.grad(torch.stack([t.sin().sum() for t in edited]).sum(), wanted))

    torch.compiler.reset()
    graphs: list[int] = []
    traced: Any = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(both, fullgraph=True, backend=traced)
    for seed in (1, 2):
        got, expected = step(compiled, seed), step(both, seed)
        for ours, truth in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
        assert not torch.equal(got[0], got[2 * RECEIVER.layers]), "both calls drew one seed"
        graphs.append(traced.frame_count)
    assert graphs == [1, 1]


def test_a_temperature_that_changes_compiles_whole() -> None:
    """What a trainer anneals becomes a symbolic number after the first change."""
    adapter = trained(False)
    sharer, receiver = make_caches()
    torch.compiler.reset()
    compiled: Any = torch.compile(adapter.fuse, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 0.9, 0.8):
        adapter.gate_temperature = temperature
        torch.manual_seed(3)
        got = compiled(sharer, receiver)
        torch.manual_seed(3)
        torch.testing.assert_close(got, adapter.fuse(sharer, receiver), rtol=1e-4, atol=1e-5)


def test_slots_train_compiled_whole_on_a_batch_of_one() -> None:
    torch.manual_seed(0)
    adapter = LatentSlots(LCFConfig(RECEIVER, RECEIVER, bottleneck=64, slots=2)).train()
    _, cache = make_caches(batch=1)
    compiled = torch.compile(
        lambda: adapter.expand(adapter.summarize(cache))[0][0], fullgraph=True, backend="aot_eager"
    )
    first = compiled()
    assert not torch.equal(first, compiled())
    first.sum().backward()
    grad = adapter.get_parameter("slot_embedding").grad
    assert grad is not None and float(grad.abs().max()) > 0


@pytest.mark.parametrize("cross_context", [False, True])
def test_eval_mode_and_edits_in_place_have_none(cross_context: bool) -> None:
    adapter = trained(cross_context)
    sharer, receiver = make_caches()
    state = torch.get_rng_state()
    plain = edit(adapter.eval(), sharer, receiver)
    assert_equal(edit(adapter, sharer, receiver), plain)
    adapter.train()
    own = cloned(receiver)
    if cross_context:
        adapter.inject_(own, adapter.summarize(sharer, SPANS))
    else:
        adapter.fuse_(sharer, own)
    assert_close(own, [(k.double(), v.double()) for k, v in plain], 1e-6)
    assert torch.equal(torch.get_rng_state(), state), "inference drew a random number"


def test_no_gate_is_closed_in_training() -> None:
    """make_adapter's layer 1 is dead: in training its gates are soft and learn."""
    adapter = trained()
    adapter.requires_grad_(True)
    sharer, receiver = make_caches()
    edited = edit(adapter, sharer, receiver)
    assert not torch.equal(edited[1][0], receiver[1][0])
    torch.stack([t.square().mean() for pair in edited for t in pair]).sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert all(float(row.abs().max()) > 0 for row in parameter.grad), name


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("train", [False, True])
def test_a_sharer_of_no_tokens_edits_nothing_and_gives_no_gradient(train: bool, back_end: Backend) -> None:
    adapter = trained().train(train).requires_grad_(True)
    sharer, receiver = make_caches(sharer_length=0)
    nowhere = torch.full((2, 7), -1)
    with use_backend(back_end):
        fused = adapter.fuse(sharer, receiver, sharer_index=nowhere)
        torch.stack([t.square().mean() for pair in fused for t in pair]).sum().backward()
    assert_equal(fused, receiver)
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_a_fresh_adapter_trains_and_a_loaded_one_does_not(tmp_path: object) -> None:
    fresh = LatentCacheFlow(LCFConfig(RECEIVER, RECEIVER, bottleneck=64))
    assert fresh.training
    fresh.save_pretrained(str(tmp_path))
    assert not LatentCacheFlow.from_pretrained(str(tmp_path)).training


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: TrainingNoise(-1), GeometryError, "seed"),
        (lambda: TrainingNoise(2**31), GeometryError, "seed"),
        (lambda: TrainingNoise(True), DTypeError, "seed"),
        (lambda: TrainingNoise(0, temperature=0.0), GeometryError, "temperature"),
        (lambda: TrainingNoise(0, temperature=math.nan), GeometryError, "temperature"),
        (lambda: TrainingNoise(0, dropout=1.0), GeometryError, "dropout"),
    ],
)
def test_bad_noise(make: Callable[[], TrainingNoise], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_a_wrong_temperature_is_refused_before_anything_runs() -> None:
    adapter = trained()
    adapter.gate_temperature = 0.0
    sharer, receiver = make_caches()
    with pytest.raises(GeometryError, match="temperature"):
        edit(adapter, sharer, receiver)
