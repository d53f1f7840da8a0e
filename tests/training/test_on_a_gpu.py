"""`lcf-fast train`, `cache` and `prune` as on a machine with a GPU: every tensor is where the others of its sum are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import GPU, Elsewhere, a_gpu_elsewhere, on_the_host
from tiny_folders import save_tiny_model, write_lines
from tiny_training import KINDS, RandomData, read_log, tiny_model, tiny_settings, tiny_trainer

import lcf_fast
from lcf_fast import CacheGeometry, LatentSlots, LCFConfig
from lcf_fast.cli import main
from lcf_fast.training import models
from lcf_fast.training.trainer import Trainer

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with a_gpu_elsewhere(monkeypatch) as device, lcf_fast.use_backend("eager"):
        yield device


def test_the_stand_in_refuses_what_a_gpu_refuses(gpu: torch.device) -> None:
    there = torch.arange(3.0, device="cuda")
    assert isinstance(there, Elsewhere)
    assert there.device == GPU
    assert (there + 1).tolist() == [1.0, 2.0, 3.0]
    assert not isinstance(there.cpu(), Elsewhere)
    assert isinstance(there.cpu().to(there), Elsewhere)
    with pytest.raises(RuntimeError, match=r"aten::add.Tensor: tensors on cuda:0 and on the CPU, .* of \[\(3,\)\]"):
        there + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="a generator of cpu"):
        torch.rand(3, device="cuda", generator=torch.Generator())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_on_the_cpu(kind: str, gpu: torch.device, tmp_path: Path) -> None:
    for device in ("cpu", None):
        settings = tiny_settings(steps=1, batch_size=3, device=device, precision="bf16")
        trainer = tiny_trainer(tmp_path / str(device), settings, **KINDS[kind])
        trainer.run()
    assert all(isinstance(parameter, Elsewhere) for parameter in trainer.adapter.parameters())
    assert read_log(tmp_path / "None") == read_log(tmp_path / "cpu")


@pytest.mark.parametrize(("per_span", "placement"), [(False, "append"), (True, "prefix")])
def test_slots_resume_where_they_stopped(per_span: bool, placement: str, gpu: torch.device, tmp_path: Path) -> None:
    def run(*, resume: bool = False) -> None:
        sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
        settings = tiny_settings(
            steps=2, batch_size=2, device=None, placement=placement, slot_dropout=True, guard_weight=0.5
        )
        torch.manual_seed(5)
        geometries = CacheGeometry.of(sharer), CacheGeometry.of(receiver)
        adapter = LatentSlots(LCFConfig(*geometries, bottleneck=64, slots=2, per_span=per_span))
        data = RandomData(settings, cross_context=True)
        options = {"settings": settings, "sharer": sharer, "progress": False, "save_every": 1}
        trainer = Trainer(adapter, receiver, data, tmp_path / "run", **options)  # type: ignore[arg-type]
        trainer.run(resume=resume)

    run()
    last = tmp_path / "run" / "adapter" / "adapter.safetensors"
    log, weights = read_log(tmp_path / "run"), last.read_bytes()
    (tmp_path / "run" / "checkpoints" / "step-00000002").rename(tmp_path / "last")
    last.unlink()
    run(resume=True)
    assert read_log(tmp_path / "run") == log
    assert last.read_bytes() == weights


@pytest.mark.parametrize("kind", ["shared", "cross"])
def test_the_commands(
    kind: str,
    gpu: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_model(*arguments: Any, **options: Any) -> Any:
        with on_the_host():
            return real(*arguments, **options)

    real = models.load_model
    monkeypatch.setattr(models, "load_model", load_model)
    words = ["red", "blue", "green", "grey"]
    rows = [{"prompt": f"Say {word}", "response": word} for word in words]
    if kind == "cross":
        rows = [
            {"sharer_context": f"It is {word}.", "receiver_context": "Day.", "question": "What?", "answer": word}
            for word in words
        ]
    write_lines(tmp_path / "set.jsonl", rows)
    save_tiny_model(tmp_path / "sharer", "qwen2", seed=0)
    save_tiny_model(tmp_path / "receiver", "qwen3", seed=1)
    both = ["--sharer", str(tmp_path / "sharer"), "--receiver", str(tmp_path / "receiver"), "--quiet"]
    both += ["--data", str(tmp_path / "set.jsonl")]
    size = ["--steps", "1", "--batch-size", "2", "--held-out", "0.5"] + ["--cross-context"] * (kind == "cross")
    adapter = ["--bottleneck", "64", "--gate-init", "1"]
    assert main(["train", *both, *size, *adapter, "--out", str(tmp_path / "run")]) == 0
    assert main(["cache", *both, *size, "--out", str(tmp_path / "store")]) == 0
    stored = ["--cached", str(tmp_path / "store")]
    assert main(["train", *both, *size, *adapter, *stored, "--out", str(tmp_path / "again")]) == 0
    assert read_log(tmp_path / "again") == read_log(tmp_path / "run")
    capsys.readouterr()
    pruned = ["prune", str(tmp_path / "run" / "adapter"), str(tmp_path / "one"), *both, "--held-out", "0.5"]
    assert main([*pruned, "--keep", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    held = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert (found["whole"], found["alone"]) == pytest.approx((held["edited"], held["alone"]), rel=1e-6)
