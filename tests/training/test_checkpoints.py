"""Checkpoints: whole or not there, bitwise, and safe from a disk that fills up at any write."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tiny_training import read_log, tiny_settings, tiny_trainer

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.errors import CheckpointError, GeometryError, LCFError
from lcf_fast.training.checkpoints import Checkpoint, Checkpoints
from lcf_fast.training.failures import RunError
from lcf_fast.training.settings import TrainingSettings

SETTINGS = tiny_settings(steps=4, batch_size=2, micro_batch_size=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    tiny_trainer(out, SETTINGS, keep=10, save_every=1).run()
    return out


def ends_as(out: Path, whole: Path) -> None:
    """Adapter, optimizer and log bitwise, and nothing left over."""
    last = Path("checkpoints") / f"step-{SETTINGS.steps:08d}"
    files = ("adapter.safetensors", "config.json")
    for file in [*(Path("adapter") / f for f in files), *(last / "adapter" / f for f in files)]:
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert (out / last / "optimizer.safetensors").read_bytes() == (whole / last / "optimizer.safetensors").read_bytes()
    assert read_log(out) == read_log(whole)
    assert not [path for path in out.rglob(".*") if path.name.startswith(".step")]


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_a_run_that_resumes_from_any_step_ends_bitwise_the_same(step: int, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for later in range(step + 1, SETTINGS.steps + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later:08d}")
    shutil.rmtree(tmp_path / "run" / "adapter")
    torch.manual_seed(step)  # what the process has drawn before does not matter
    tiny_trainer(tmp_path / "run", SETTINGS, keep=10, save_every=1).run(resume=True)
    ends_as(tmp_path / "run", whole)


def test_the_newest_stay(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, SETTINGS, save_every=1, keep=2)
    trainer.run()
    assert [path.name for path in trainer.checkpoints.paths()] == ["step-00000003", "step-00000004"]
    assert trainer.checkpoints.latest() == tmp_path / "checkpoints" / "step-00000004"


@contextmanager
def disk_full_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Iterator[None]:
    """The ``call``-th write to a file, or bringing of it to the disk, fails for lack of space; later ones work."""
    counter = itertools.count(1)

    def failing(real: Any) -> Any:
        def write(*arguments: Any) -> Any:
            if next(counter) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "write", failing(os.write))
        patch.setattr(os, "replace", failing(os.replace))
        yield


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_at_any_write_loses_nothing(
    every: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0
    for call in itertools.count(every, every):
        out = tmp_path / str(call)
        trainer = tiny_trainer(out, SETTINGS)
        error = None
        with disk_full_at(monkeypatch, call):
            try:
                trainer.run()
            except LCFError as found:
                error = found
        if error is None:
            break
        failures += 1
        assert isinstance(error, RunError)
        assert "No space left" in str(error)
        assert not [*out.rglob(".step*")], "what was half written takes room on a full disk"
        good = trainer.checkpoints.latest()
        assert good is None or "log" in error.argument or str(good) in str(error)
        for path in trainer.checkpoints.paths():  # all of them whole
            assert trainer.checkpoints.load(path, trainer.adapter, trainer.optimizer).step in (2, 4)
        tiny_trainer(out, SETTINGS).run(resume=True)
        ends_as(out, whole)
        shutil.rmtree(out)
    assert failures > 20 // every  # two checkpoints of four files each, five log lines, the adapter's two files


def damage(path: Path, file: str, change: Any) -> None:
    target = path / file
    target.write_bytes(change(target.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("optimizer.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA-256"),
        ("optimizer.safetensors", lambda data: data[:-1], "SHA-256"),
        ("adapter/adapter.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA-256"),
        ("state.json", lambda data: data[:-9], "JSON"),
        ("state.json", lambda data: b"[]", "version"),
        ("state.json", lambda data: data.replace(b'"format_version": 3', b'"format_version": 2'), "version 3 .*anew"),
        ("state.json", lambda data: data.replace(b'"log_bytes": ', b'"log_bytes": "a", "was": '), "log_bytes"),
    ],
)
def test_a_damaged_checkpoint_is_refused(file: str, change: Any, message: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step-00000004", file, change)
    with pytest.raises(CheckpointError, match=message):
        tiny_trainer(tmp_path / "run", SETTINGS).run(resume=True)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path: Path) -> None:
    config = LCFConfig(CacheGeometry(2, 1, 16), CacheGeometry(2, 2, 16), bottleneck=64)
    one, other = (LatentCacheFlow(config, keep_layers=[layer]) for layer in (0, 1))
    checkpoints = Checkpoints(tmp_path)
    checkpoint, optimizer = Checkpoint(1, SETTINGS, 0, "", {}), torch.optim.AdamW(one.parameters())
    path = checkpoints.save(checkpoint, one, optimizer)
    assert checkpoints.save(checkpoint, one, optimizer) == path  # which is there already, and stays
    with pytest.raises(GeometryError, match="adapter: expected the one of"):
        checkpoints.load(path, other, torch.optim.AdamW(other.parameters()))
    assert other.receiver_layers.tolist() == [1]


def test_the_state_of_a_parameter_that_the_adapter_lacks_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000004"
    tensors = load_file(path / "optimizer.safetensors")
    data = to_bytes({**tensors, "slot_query.exp_avg": torch.zeros(1)})
    (path / "optimizer.safetensors").write_bytes(data)
    state = json.loads((path / "state.json").read_text())
    state["optimizer"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"expected state of .*, got slot_query.exp_avg"):
        tiny_trainer(tmp_path / "run", SETTINGS).run(resume=True)


def test_a_log_that_lost_lines_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run", "log.jsonl", lambda data: data[:50])
    with pytest.raises(RunError, match="the log up to byte"):
        tiny_trainer(tmp_path / "run", SETTINGS).run(resume=True)


def test_what_a_checkpoint_says(whole: Path) -> None:
    state = json.loads((whole / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["step"] == 2
    assert TrainingSettings.from_dict(state["settings"]) == SETTINGS
    log = (whole / "log.jsonl").read_bytes()
    assert log[: state["log_bytes"]].count(b"\n") == 2
