"""The training loop: that it learns, what a step is, what it tells, and what it refuses or stops at."""

from __future__ import annotations

import errno
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import KINDS, RandomData, read_log, tiny_adapter, tiny_model, tiny_settings, tiny_trainer
from torch import Tensor, nn

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.errors import GeometryError
from lcf_fast.files import only_writer
from lcf_fast.reading.model_fingerprint import weights_sample
from lcf_fast.training import trainer as trainer_module
from lcf_fast.training.batches import Batch
from lcf_fast.training.failures import LossError, RunError
from lcf_fast.training.schedule import gate_temperature, learning_rate_factor
from lcf_fast.training.settings import TrainingSettings
from lcf_fast.training.step import OnlinePrefills, Prefill, TrainingStep, frozen


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter stays in eval mode: hard gates, no dropout."""

    def stay(self: LatentCacheFlow, mode: bool = True) -> LatentCacheFlow:
        nn.Module.train(self, False)
        return self

    monkeypatch.setattr(LatentCacheFlow, "train", stay)


def weights_of(module: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- that it learns
# ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rate"), [("same", 1e-2), ("aligned", 1e-2), ("cross", 1e-2), ("cross", 0.0)])
def test_the_loss_falls_on_a_few_examples(kind: str, rate: float, tmp_path: Path) -> None:
    settings = tiny_settings(steps=20, batch_size=4, micro_batch_size=4, learning_rate=rate)
    data = RandomData(settings, examples=4, **KINDS[kind])
    tiny_trainer(tmp_path, settings, data=data, dropout=0.0, save_every=100, **KINDS[kind]).run()
    losses = [entry["loss"] for entry in read_log(tmp_path)]
    fallen = losses[0] - sum(losses[-4:]) / 4
    if rate:
        assert fallen > 0.3
    else:  # what the noise of the gates alone does
        assert abs(fallen) < 0.05


def test_only_the_adapter_changes(tmp_path: Path) -> None:
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    settings = tiny_settings(steps=2)
    adapter = tiny_adapter(sharer, receiver)
    before = [weights_of(module) for module in (sharer, receiver, adapter)]
    trainer_module.Trainer(
        adapter, receiver, RandomData(settings), tmp_path, settings=settings, sharer=sharer, progress=False
    ).run()
    assert same_weights(weights_of(sharer), before[0])
    assert same_weights(weights_of(receiver), before[1])
    changed = [name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, before[2][name])]
    assert {"down_weight", "ffn_out_weight", "up_weight", "head_gate_bias"} <= set(changed)
    assert not {"receiver_layers", "sharer_layers"} & set(changed)


def test_what_it_returns_is_what_it_saves(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_settings(steps=3))
    adapter = trainer.run()
    assert not adapter.training
    again = LatentCacheFlow.from_pretrained(tmp_path / "adapter")
    assert same_weights(weights_of(again), weights_of(adapter))
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    assert again.trained_between == {"sharer": weights_sample(sharer), "receiver": weights_sample(receiver)}


def test_bf16_models_and_a_float32_adapter(tmp_path: Path) -> None:
    adapter = tiny_trainer(tmp_path, tiny_settings(steps=2, precision="bf16")).run()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(math.isfinite(entry["loss"]) for entry in read_log(tmp_path))


# --- what a step is
# ---------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.usefixtures("no_noise")
def test_accumulated_micro_batches_are_one_big_batch(micro: int, tmp_path: Path) -> None:
    runs = []
    for size in (6, micro):
        settings = tiny_settings(steps=3, batch_size=6, micro_batch_size=size, weight_decay=0.1)
        trainer = tiny_trainer(tmp_path / str(size), settings)
        runs.append((trainer.run(), read_log(trainer.out)))
    (whole, whole_log), (parts, parts_log) = runs
    for one, other in zip(whole_log, parts_log, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["response_tokens"] == one["response_tokens"]
    # Adam turns a gradient of rounding's size into a step of the learning rate's: nearly all, not all, agree closely.
    moved = torch.cat([(p - q).abs().flatten() for p, q in zip(whole.parameters(), parts.parameters())])
    assert float((moved > 1e-5).double().mean()) < 1e-3


def test_two_runs_are_bitwise_one_and_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    results = []
    for i in range(2):
        trainer = tiny_trainer(tmp_path / str(i), tiny_settings(steps=3))
        trainer.adapter.train(i == 0)  # as `from_pretrained` gives one, the second is in eval mode
        torch.manual_seed(100 + i)
        before = torch.random.get_rng_state()
        results.append((weights_of(trainer.run()), read_log(trainer.out)))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert same_weights(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_every_micro_batch_has_noise_of_its_own() -> None:
    numbers = range(12)  # of one digit and of two
    seeds = {trainer_module.noise_seed(seed, step, index) for seed in numbers for step in numbers for index in numbers}
    assert len(seeds) == len(numbers) ** 3


def test_the_optimizer_gets_the_planned_rate_temperature_and_a_clipped_gradient(tmp_path: Path) -> None:
    settings = tiny_settings(steps=5, clip_norm=0.05, gate_temperature_end=0.1)
    trainer = tiny_trainer(tmp_path, settings)
    assert trainer.optimizer.defaults["weight_decay"] == settings.weight_decay
    seen: list[tuple[float, float, float]] = []

    def look(optimizer: Any, *_: Any) -> None:
        gradients = [p.grad for p in trainer.adapter.parameters() if p.grad is not None]
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        seen.append((optimizer.param_groups[0]["lr"], float(trainer.adapter.gate_temperature), norm))

    trainer.optimizer.register_step_pre_hook(look)
    trainer.run()
    log = read_log(tmp_path)
    for step, (rate, temperature, norm) in enumerate(seen):
        assert rate == pytest.approx(1e-3 * learning_rate_factor(step, 5, 0.1))
        assert temperature == pytest.approx(gate_temperature(step, 5, 1.0, 0.1))
        assert norm == pytest.approx(0.05, rel=1e-4)
        assert log[step]["grad_norm"] > 0.05
        assert (log[step]["learning_rate"], log[step]["gate_temperature"]) == (rate, temperature)


# --- what it tells
# ---------------------------------------------------------------------


def test_a_line_a_step(tmp_path: Path) -> None:
    import json

    settings = tiny_settings(steps=4)
    tiny_trainer(tmp_path, settings).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    data = RandomData(settings)
    for step, line in enumerate(lines):
        batches = [data.batch(step, i) for i in range(settings.micro_batches)]
        assert line["response_tokens"] == sum(int(b.response_mask.sum()) for b in batches)
        assert line["tokens"] == line["response_tokens"] + sum(int(b.receiver_mask.sum()) for b in batches)
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert 0 < line["prefill_share"] < 1
        assert 0 < line["adapter_share"] < 1
        assert line["prefill_share"] + line["adapter_share"] < 1


def test_progress_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path / "a", tiny_settings(steps=4), progress=True).run()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("step 4 of 4  loss ")
    assert all(word in lines[-1] for word in ("tokens/s", "prefill", "adapter"))
    tiny_trainer(tmp_path / "b", tiny_settings(steps=2)).run()
    assert capsys.readouterr().err == ""


def test_tensorboard_scalars_where_it_is_installed(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tiny_trainer(tmp_path, tiny_settings(steps=3)).run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in read_log(tmp_path)]


def test_a_run_does_not_stop_for_scalars_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", full)
    tiny_trainer(tmp_path, tiny_settings(steps=3)).run()
    assert capsys.readouterr().err == "no more TensorBoard scalars: No space left on device\n"
    assert len(read_log(tmp_path)) == 3


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    tiny_trainer(tmp_path, tiny_settings(steps=3), progress=True).run()
    shown = terminal.getvalue()
    last = read_log(tmp_path)[-1]
    assert "3/3" in shown
    assert f"loss {last['loss']:.4f}" in shown


# --- what it stops at
# ---------------------------------------------------------------------


def poisoned(models: tuple[Any, Any], example: str) -> Callable[[Batch], Prefill]:
    """Prefills that are NaN for one example."""
    online = OnlinePrefills(*models)

    def of(batch: Batch) -> Prefill:
        caches = online(batch)
        if example in batch.ids:
            caches.receiver[-1][1][batch.ids.index(example)] = math.nan
        return caches

    return of


def frozen_models() -> tuple[Any, Any]:
    return (
        frozen(tiny_model("qwen2", 1), device="cpu", precision="fp32"),
        frozen(tiny_model("qwen3", 2), device="cpu", precision="fp32"),
    )


def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path: Path) -> None:
    settings = tiny_settings(steps=5)  # step 4 reads the examples 15 to 19, 17 in its second micro-batch
    whole = tiny_trainer(tmp_path / "whole", settings)
    expected = weights_of(whole.run())

    trainer = tiny_trainer(tmp_path / "run", settings, prefiller=poisoned(frozen_models(), "17"), save_every=2)
    with pytest.raises(LossError, match=r"step 4, in the examples 17, 18; the last good checkpoint is .*step-00000003"):
        trainer.run()
    with pytest.raises(LossError) as caught:
        trainer.run(resume=True)  # nothing has changed, so it stops there again, and says so the same
    assert (caught.value.step, caught.value.ids) == (4, ("17", "18"))
    good = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert caught.value.checkpoint == good
    assert same_weights(weights_of(LatentCacheFlow.from_pretrained(good / "adapter")), weights_of(trainer.adapter))
    assert len(read_log(tmp_path / "run")) == 3
    assert same_weights(weights_of(tiny_trainer(tmp_path / "run", settings).run(resume=True)), expected)
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, tiny_settings(steps=2))
    before = weights_of(trainer.adapter)
    backward = TrainingStep.backward

    def overflow(self: TrainingStep, loss: Tensor) -> None:
        backward(self, loss)
        gradient = self.adapter.get_parameter("up_weight").grad
        assert gradient is not None
        gradient.view(-1)[0] = math.inf

    monkeypatch.setattr(TrainingStep, "backward", overflow)
    with pytest.raises(LossError, match=r"gradient norm inf at step 1.*there is no checkpoint yet") as caught:
        trainer.run()
    assert caught.value.ids == ("0", "1", "2", "3", "4")
    assert same_weights(weights_of(trainer.adapter), before)


@pytest.mark.parametrize("lost", ["adapter", "log.jsonl", "checkpoints"])
def test_a_folder_with_a_run_is_refused_and_left_as_it_is(lost: str, tmp_path: Path) -> None:
    """Or with part of one: what is left of it may be all that there is."""
    tiny_trainer(tmp_path / "run", tiny_settings(steps=2)).run()
    (tmp_path / "run" / lost).rename(tmp_path / lost)
    tmp_path = tmp_path / "run"
    held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="resume"):
        tiny_trainer(tmp_path, tiny_settings(steps=2)).run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == held


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_do_not_write_into_one_folder(resume: bool, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_settings(steps=1))
    remains = tmp_path / "checkpoints" / ".step-00000001.0123456789abcdef"
    remains.mkdir(parents=True)
    with only_writer(tmp_path), pytest.raises(RunError, match="another run is writing there"):
        trainer.run(resume=resume)
    assert remains.exists()  # what the other one writes
    assert not (tmp_path / "log.jsonl").exists()
    trainer.run(resume=resume)


def test_a_run_of_other_settings_data_or_adapter_is_not_resumed(tmp_path: Path) -> None:
    settings = tiny_settings(steps=4)
    tiny_trainer(tmp_path, settings).run()
    for path in sorted((tmp_path / "checkpoints").iterdir())[1:]:  # as if it had stopped after step 2
        path.rename(tmp_path / path.name)

    with pytest.raises(RunError, match=r"settings: expected learning_rate 0.001, .*got learning_rate 0.01"):
        tiny_trainer(tmp_path, tiny_settings(steps=4, learning_rate=1e-2)).run(resume=True)
    with pytest.raises(RunError, match="data"):
        tiny_trainer(tmp_path, settings, data=RandomData(settings, examples=7)).run(resume=True)
    with pytest.raises(GeometryError, match="adapter"):
        tiny_trainer(tmp_path, settings, dropout=0.2).run(resume=True)
    with pytest.raises(RunError, match="sharer: expected the model that"):
        tiny_trainer(tmp_path, settings, sharer=tiny_model("qwen2", 9)).run(resume=True)
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 9)
    adapter, keywords = tiny_adapter(sharer, receiver), {"settings": settings, "sharer": sharer, "progress": False}
    with pytest.raises(RunError, match="receiver: expected the model that"):
        trainer_module.Trainer(adapter, receiver, RandomData(settings), tmp_path, **keywords).run(resume=True)
    other = tiny_settings(steps=4, device=None)
    assert other.device != settings.device  # which says where, not what
    if not torch.cuda.is_available():
        tiny_trainer(tmp_path, other).run(resume=True)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"sharer": None}, "either the sharer or a prefiller, got neither"),
        ({"save_every": 0}, "save_every"),
        ({"keep": 0}, "keep"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=message):
        tiny_trainer(tmp_path, tiny_settings(), **keywords)
    assert not any(tmp_path.iterdir())


def test_bad_adapters(tmp_path: Path) -> None:
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    settings = TrainingSettings(steps=1, batch_size=1, micro_batch_size=1, precision="fp32")

    def make(adapter: LatentCacheFlow, **keywords: Any) -> None:
        keywords = {"sharer": sharer, **keywords}
        trainer_module.Trainer(adapter, receiver, RandomData(settings), tmp_path, settings=settings, **keywords)

    with pytest.raises(GeometryError, match="sharer: expected"):
        make(tiny_adapter(sharer, receiver), sharer=receiver)
    with pytest.raises(GeometryError, match="float32"):
        make(tiny_adapter(sharer, receiver).half())
    with pytest.raises(GeometryError, match="receiver"):
        make(LatentCacheFlow(LCFConfig(CacheGeometry.of(sharer), CacheGeometry(5, 2, 16), bottleneck=64)))
    with pytest.raises(GeometryError, match="both"):
        make(tiny_adapter(sharer, receiver), prefiller=OnlinePrefills(sharer, receiver))


def test_a_disk_without_room_for_checkpoints_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path / "run", tiny_settings(), keep=4)
    # Weights and two moments, of those that stay and of the one that is written beside them.
    needed = 3 * 5 * sum(p.nbytes for p in trainer.adapter.parameters())
    usage = trainer_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(trainer_module.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(RunError, match=f"expected {needed:,} bytes free for checkpoints, got {needed - 1:,} bytes"):
        trainer.run()
    assert not any((tmp_path / "run").iterdir())
