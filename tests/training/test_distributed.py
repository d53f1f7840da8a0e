"""Two gloo processes under torchrun: the loss curve of one process, one writer, one answer to what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import KINDS, read_log, tiny_settings, tiny_trainer

from lcf_fast import LatentCacheFlow
from lcf_fast.training.distributed import Ranks, process_group

WORKER = Path(__file__).with_name("ranks_worker.py")
TESTS = WORKER.parents[1]
SETTINGS = tiny_settings(steps=4, batch_size=5, micro_batch_size=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two ranks worked in, and what each found."""
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curve_is_that_of_one_process(
    kind: str, two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, found = two
    tiny_trainer(tmp_path, SETTINGS, **KINDS[kind]).run()
    one, other = read_log(tmp_path), read_log(folder / kind)
    assert len(other) == SETTINGS.steps
    for mine, theirs in zip(one, other, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-6)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
        for name in ("step", "tokens", "response_tokens", "learning_rate", "gate_temperature"):
            assert theirs[name] == mine[name]
    assert found[0][kind] == found[1][kind]  # both ranks hold one adapter, and it is the one that was saved
    saved = LatentCacheFlow.from_pretrained(folder / kind / "adapter")
    assert sum(p.detach().double().abs().sum().item() for p in saved.parameters()) == found[0][kind]
    single = LatentCacheFlow.from_pretrained(tmp_path / "adapter")
    moved = torch.cat([(p - q).abs().flatten() for p, q in zip(single.parameters(), saved.parameters())])
    assert float((moved > 1e-5).double().mean()) < 1e-3  # as in test_trainer: Adam magnifies a rounding


def test_two_that_resume_end_bitwise_as_two_that_did_not_stop(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = two
    last = Path("checkpoints/step-00000004")
    for file in (Path("adapter/adapter.safetensors"), last / "optimizer.safetensors"):
        assert (folder / "resumed" / file).read_bytes() == (folder / "same" / file).read_bytes()
    assert read_log(folder / "resumed") == read_log(folder / "same")


def test_both_stop_at_a_loss_that_one_finds_and_at_a_run_that_is_there(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = two
    (first_step, first_ids, first_text), (step, ids, text) = found[0]["nan"], found[1]["nan"]
    assert first_step == step == 3
    assert ids == ["14"]
    assert first_ids == []
    assert "another rank's examples" in first_text
    for each in (first_text, text):
        assert each.endswith(f"the last good checkpoint is {folder / 'nan' / 'checkpoints' / 'step-00000002'}")
    for each in found:
        assert each["again"].startswith("RunError: out: expected a folder without a run")
        assert each["few"].startswith("GeometryError: micro_batch_size: expected a micro-batch a step for each of 2")


def test_the_ranks_shares_are_all_of_it_and_even() -> None:
    for count in range(1, 6):
        for items in range(count, 12):
            shares = [Ranks(rank, count, torch.device("cpu")).share(items) for rank in range(count)]
            assert [i for share in shares for i in share] == list(range(items))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "given", "index"),
    [
        ({}, None, 0),
        ({}, "cuda", 0),
        ({}, "cuda:1", 1),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None, 0),  # torchrun --nproc-per-node 1
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None, 1),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda", 1),
    ],
)
def test_a_process_takes_one_gpu_by_its_index(
    environment: dict[str, str], given: str | None, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.device] = []
    groups: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("torch.distributed.init_process_group", groups.append)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with process_group(given) as device:
        assert device == torch.device("cuda", index)
    assert taken == [device]  # torch's own takes no device without an index
    assert groups == (["nccl"] if environment.get("WORLD_SIZE") == "2" else [])


def test_one_process_alone_needs_no_group() -> None:
    with process_group("cpu") as device:
        ranks = Ranks.current(device)
    assert (ranks.rank, ranks.count, ranks.first, device.type) == (0, 1, True, "cpu")
    assert ranks.total([1.5, 2.0]) == [1.5, 2.0]
    assert ranks.from_first(7) == 7
