"""Training: the noise and its gates, gradients, and the package's own trainer on a fuser in place of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import RandomData, read_log, tiny_model, tiny_settings
from torch import Tensor, nn

from helpers import Pair, make_cache, to_double
from lcf_fast import CacheGeometry
from lcf_fast.c2c import C2CConfig, C2CFuser
from lcf_fast.errors import GeometryError
from lcf_fast.training.trainer import Trainer

MakeFuser = Callable[..., C2CFuser]
SHARER, RECEIVER = CacheGeometry(3, 2, 4), CacheGeometry(5, 3, 6)
OPEN = ((1.0, 1.0),) * 5


def caches(batch: int = 2, length: int = 5) -> tuple[list[Pair], list[Pair]]:
    generator = torch.Generator().manual_seed(7)
    return make_cache(SHARER, batch, length, generator=generator), make_cache(
        RECEIVER, batch, length, generator=generator
    )


def gates_drawn(fuser: C2CFuser, batch: int, length: int) -> Tensor:
    """What an edit in training is over the same edit with open gates: ``(layers, 2, B, H, N)``; no dropout."""
    sharer, receiver = (to_double(cache) for cache in caches(batch, length))
    noisy = fuser.train().fuse(sharer, receiver)
    hard = fuser.eval().fuse(sharer, receiver)
    found = []
    for new, full, old in zip(noisy, hard, receiver, strict=True):
        for i in range(2):
            ratio = (new[i] - old[i]) / (full[i] - old[i])
            # One draw a batch item, head and token: every channel has it.
            spread = ratio.amax(-1) - ratio.amin(-1)
            assert float(spread.max()) < 1e-6
            found.append(ratio.median(-1).values)
    return torch.stack(found).unflatten(0, (len(receiver), 2))


def test_gates_are_a_gumbel_sigmoid(make_fuser: MakeFuser) -> None:
    fuser = make_fuser(logits=((0.7, 0.7),) * 5, dropout=0.0, dtype=torch.float64)
    fuser.gate_temperature = 0.8
    drawn = gates_drawn(fuser, 3, 40)
    assert drawn.min() > 0 and drawn.max() <= 1 + 1e-9
    flat = drawn.flatten()
    assert len(flat.unique()) == len(flat)  # no draw is used twice
    # P(sigmoid((logit + G) / tau) < x) = P(G < tau logit(x) - 0.7), with P(G < g) = exp(-exp(-g)).
    for x in (0.2, 0.5, 0.8, 0.95):
        bound = 0.8 * torch.logit(torch.tensor(x)) - 0.7
        expected = float((-(-bound).exp()).exp())
        assert abs(float((flat < x).double().mean()) - expected) < 4 * 0.5 / len(flat) ** 0.5


def test_a_cold_gate_is_nearly_hard(make_fuser: MakeFuser) -> None:
    fuser = make_fuser(logits=OPEN, dropout=0.0, dtype=torch.float64)
    fuser.gate_temperature = 1e-3
    drawn = gates_drawn(fuser, 2, 40)
    assert float(((drawn > 0.01) & (drawn < 0.99)).double().mean()) < 0.02
    assert fuser.gate_temperature == 1e-3
    assert {float(p.get_buffer("gate_temperature")) for p in fuser.projectors} == {1e-3}
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(GeometryError):
            fuser.gate_temperature = bad


def test_dropout_is_on_what_a_block_adds(make_fuser: MakeFuser) -> None:
    fuser = make_fuser(logits=OPEN, dropout=0.5)
    block: Any = fuser.projectors[0].get_submodule("key_mlp1").get_submodule("blocks.0")
    h = torch.randn(400, 16)
    generator = torch.Generator().manual_seed(1)
    full, noisy = block(h, 0.0, None) - h, block(h, 0.5, generator) - h
    dropped = noisy.abs() < 1e-7
    assert abs(float(dropped.float().mean()) - 0.5) < 0.03
    torch.testing.assert_close(noisy[~dropped], 2 * full[~dropped], rtol=1e-4, atol=1e-5)
    sharer, receiver = caches()
    fuser.gate_temperature = 1e-6  # the gates are hard, so what differs is dropout
    fuser.train()
    torch.manual_seed(0)
    a, b = fuser.fuse(sharer, receiver), fuser.fuse(sharer, receiver)
    assert not torch.equal(a[0][0], b[0][0])


def test_noise_follows_the_seed_and_leaves_the_rest_alone(make_fuser: MakeFuser) -> None:
    fuser = make_fuser().train()
    sharer, receiver = caches()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(fuser.fuse(sharer, receiver))
    after = float(torch.rand(()))
    assert all(torch.equal(x, y) for a, b in zip(results[0], results[1]) for x, y in zip(a, b))
    assert not torch.equal(results[0][0][0], results[2][0][0])
    torch.manual_seed(6)
    torch.randint(1 << 31, (), dtype=torch.int64)  # one seed a call is all that is drawn
    assert float(torch.rand(())) == after


def test_gradients_are_those_of_the_function(make_fuser: MakeFuser) -> None:
    sides = {"sharer": CacheGeometry(1, 1, 2), "receiver": CacheGeometry(1, 2, 2)}
    fuser = make_fuser(logits=OPEN, dtype=torch.float64, hidden=4, intermediate=3, **sides)
    sharer, receiver = (to_double(make_cache(side, 1, 3)) for side in (fuser.config.sharer, fuser.config.receiver))
    # A hard gate has no gradient.
    values = {f"fuser.{n}": p.detach().clone() for n, p in fuser.named_parameters() if "gate_logit" not in n}
    mask = torch.tensor([[0, 1, 1]])

    def call(*parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(values, parameters))
        return tuple(torch.func.functional_call(_Fuse(fuser), named, (sharer, receiver, mask)))

    assert torch.autograd.gradcheck(call, [value.requires_grad_(True) for value in values.values()])


class _Fuse(nn.Module):
    def __init__(self, fuser: C2CFuser) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, sharer: Any, receiver: Any, mask: Tensor) -> list[Tensor]:
        edited = self.fuser.fuse(sharer, receiver, attention_mask=mask)
        return [edited[0][0], edited[0][1]]


def test_every_parameter_gets_a_gradient_and_padding_gives_none(make_fuser: MakeFuser) -> None:
    fuser = make_fuser().requires_grad_(True).train()  # closed gates learn too
    sharer, receiver = caches()
    for cache in (sharer, receiver):
        for pair in cache:
            for tensor in pair:
                tensor[0, :, 0] = torch.nan
    edited = fuser.fuse(sharer, receiver, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    torch.stack([t[1].square().sum() + t[0, :, 1:].square().sum() for pair in edited for t in pair]).sum().backward()
    for name, parameter in fuser.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert bool(parameter.grad.any()), name


# --- training
# ---------------------------------------------------------------------------------------------------


def test_a_plain_loop_learns_a_map(make_fuser: MakeFuser) -> None:
    """The receiver's values should become the sharer's first head, in every layer."""
    torch.manual_seed(1)
    geometry = CacheGeometry(2, 3, 4)
    fuser = C2CFuser(C2CConfig(geometry, geometry, hidden=24, intermediate=24, dropout=0.0))
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            if "gate_logit" in name:
                parameter.fill_(1.0)
    optimizer = torch.optim.AdamW(fuser.parameters(), lr=3e-3)
    sharer, receiver = make_cache(geometry, 4, 16), make_cache(geometry, 4, 16)

    def loss() -> Tensor:
        edited = fuser.fuse(sharer, receiver)
        return torch.stack([(e[1] - s[1][:, :1]).square().mean() for e, s in zip(edited, sharer)]).mean()

    before = float(loss().detach())
    for step in range(250):
        fuser.train()
        fuser.gate_temperature = 0.01 ** (step / 250)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    fuser.eval()
    assert float(loss().detach()) < 0.35 * before


def trainer(out: Path, **changes: Any) -> Trainer:
    """Everything from its seed, so that two of these are the same run."""
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    settings = tiny_settings(**changes)
    config = C2CConfig(CacheGeometry.of(sharer), CacheGeometry.of(receiver), hidden=48, intermediate=32)
    torch.manual_seed(5)
    fuser: Any = C2CFuser(config)
    with torch.no_grad():
        for projector in fuser.projectors:
            projector.key_gate_logit.fill_(1.0)
            projector.value_gate_logit.fill_(1.0)
    data = RandomData(settings, examples=4)
    return Trainer(fuser, receiver, out=out, settings=settings, sharer=sharer, data=data, save_every=2, progress=False)


def test_the_packages_trainer_takes_a_fuser(tmp_path: Path) -> None:
    changes = {"steps": 20, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2}
    run = trainer(tmp_path, **changes)
    run.run()
    losses = [entry["loss"] for entry in read_log(tmp_path)]
    assert losses[0] - sum(losses[-4:]) / 4 > 0.3
    saved = C2CFuser.from_pretrained(tmp_path / "adapter")
    trained: Any = run.adapter
    assert saved.config == trained.config
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), trained.state_dict().values()))


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    stopped = trainer(tmp_path / "halves")
    step = stopped._step

    def until(n: int) -> dict[str, Any]:
        if n == 4:
            raise KeyboardInterrupt
        return step(n)

    stopped._step = until  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = trainer(tmp_path / "halves")
    resumed.run(resume=True)
    for (name, a), b in zip(whole.adapter.state_dict().items(), resumed.adapter.state_dict().values()):
        assert torch.equal(a, b), name
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "halves")
