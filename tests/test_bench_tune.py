"""Tuning: what is tried, what counts as better, and what a file of tuned rows changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import timing, trials, tune
from bench.trials import TASKS, Bench, Size, Task, Trial, candidates, near
from lcf_fast import CacheGeometry, use_backend
from lcf_fast.kernels import fusion_plan, policy, pooling_policy, slot_policy, tuned

BY_NAME = {task.name: task for task in TASKS}
ROW = policy.TileConfig(256, 64, 32, 8, 3)
BETTER = policy.TileConfig(64, 64, 64, 8, 2)


def written(folder: Path, *entries: dict[str, Any]) -> Path:
    file = folder / "tuned.json"
    file.write_text(json.dumps({"schema": tuned.SCHEMA, "about": {}, "rows": list(entries)}))
    return file


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets what the kernels take, and forgets it."""

    def use(table: tuned.Table) -> None:
        monkeypatch.setattr(tuned, "_table", table)
        tuned._replaced.cache_clear()

    yield use
    tuned._replaced.cache_clear()
    fusion_plan.plan_of.cache_clear()


def test_a_file_replaces_the_row_that_it_names_and_no_other(tmp_path: Path, entries: Any) -> None:
    place = tuned.Place("tile", "sm_90", 128, 2)
    assert policy.tile_config(128, 2, "sm_90", 28, 2048) == ROW
    entries(tuned.read(written(tmp_path, tuned.entry(place, ROW, BETTER))))
    assert policy.tile_config(128, 2, "sm_90", 28, 2048) == BETTER
    assert policy.tile_config(128, 2, "sm_90", 28, 512) == policy.tile_options(128, 2, "sm_90")[2]
    assert policy.tile_config(128, 2, "sm_87", 28, 2048) == policy.tile_options(128, 2, "sm_80")[0]
    assert policy.tile_config(64, 2, "sm_90", 28, 2048) == policy.tile_options(64, 2, "sm_90")[0]
    assert policy.tile_config(128, 4, "sm_90", 28, 2048) == policy.tile_options(128, 4, "sm_90")[0]
    assert policy.backward_config(128, 2, "sm_90") == policy.TileConfig(128, 64, 32, 8, 2)


def test_a_row_that_the_policy_no_longer_has_changes_nothing(tmp_path: Path, entries: Any) -> None:
    place = tuned.Place("tile", "sm_90", 128, 2)
    entries(tuned.read(written(tmp_path, tuned.entry(place, replace(ROW, num_stages=5), BETTER))))
    assert policy.tile_config(128, 2, "sm_90", 28, 2048) == ROW


def test_a_split_may_be_left_out(tmp_path: Path, entries: Any) -> None:
    row = policy.split_config(128, 2, "sm_90", 28, 1)
    assert row is not None
    entries(tuned.read(written(tmp_path, tuned.entry(tuned.Place("split", "sm_90", 128, 2), row, None))))
    assert policy.split_config(128, 2, "sm_90", 28, 1) is None


def test_the_backward_kernels_never_take_a_forward_row(tmp_path: Path, entries: Any) -> None:
    """Some share their table's row, and would not fit with every other one."""
    pool, slots = pooling_policy.pooling_config(128, 2, "sm_90"), slot_policy.slot_pool_config(128, 2, 8, "sm_90")
    changed = replace(pool, block_tokens=16), replace(slots, block_tokens=16)
    places = tuned.Place("pooling", "sm_90", 128, 2), tuned.Place("slot_pool", "sm_90", 128, 2)
    rows = [tuned.entry(*one) for one in zip(places, (pool, slots), changed)]
    entries(tuned.read(written(tmp_path, *rows)))
    assert pooling_policy.pooling_config(128, 2, "sm_90") == changed[0]
    assert slot_policy.slot_pool_config(128, 2, 8, "sm_90") == changed[1]
    assert pooling_policy.pooling_backward_config(128, 2) == pool
    assert slot_policy.slot_backward_config(128, 2, 8, "sm_90") == slots


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no tuning's file"),
        ('{"schema": 9, "rows": []}', "schema 9"),
        ('{"schema": 1}', "rows"),
        ('{"schema": 1, "rows": [{"kind": "tile"}]}', "target"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        tuned.read(file)
    assert tuned.VARIABLE in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    "row", [{"num_warps": 8}, {**ROW.__dict__, "num_warps": 0}, {**ROW.__dict__, "num_warps": "8"}, None]
)
def test_a_row_that_is_none_is_refused(tmp_path: Path, row: Any) -> None:
    one = {**tuned.entry(tuned.Place("tile", "sm_90", 128, 2), ROW, BETTER), "row": row}
    with pytest.raises(ValueError, match="tile"):
        tuned.read(written(tmp_path, one))


def test_the_variable_names_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, tuned.entry(tuned.Place("tile", "sm_90", 128, 2), ROW, BETTER))
    script = "from lcf_fast.kernels.policy import tile_config; print(tile_config(128, 2, 'sm_90', 28, 2048))"

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, tuned.VARIABLE: str(path)}
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    assert run(file).stdout.strip() == str(BETTER)
    assert f"{tuned.VARIABLE}: '{tmp_path / 'none'}' cannot be read" in run(tmp_path / "none").stderr


def test_near_rows_come_first() -> None:
    grid = {"num_warps": (4, 8), "num_stages": (2, 3)}
    found = near(ROW, {**grid, "of another table": (1,)})
    assert found[-1] == replace(ROW, num_warps=4, num_stages=2)
    assert set(found[:-1]) == {replace(ROW, num_stages=2), replace(ROW, num_warps=4)}


def test_what_is_tried_first() -> None:
    rows = candidates(BY_NAME["tile"], ROW)
    assert rows[:3] == [
        policy.TileConfig(128, 64, 64, 8, 3),
        policy.TileConfig(64, 64, 64, 4, 3),
        policy.TileConfig(64, 64, 64, 4, 2),
    ]
    assert len(set(rows)) == len(rows) == 215 and ROW not in rows
    split = policy.split_config(128, 2, "sm_90", 28, 1)
    assert candidates(BY_NAME["one"], split)[0] is None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_each_task_has_a_row_of_the_policy_and_fields_of_it(task: Task) -> None:
    """At its size, on an H200."""
    size = task.sizes[0]
    with tuned.trying({}) as asked:
        {
            "tile": lambda: policy.tile_config(128, 2, "sm_90", 28 * size.batch, size.tokens),
            "split": lambda: policy.split_config(128, 2, "sm_90", 28 * size.batch, size.tokens),
            "backward": lambda: policy.backward_config(128, 2, "sm_90"),
            "ffn_weights": lambda: policy.ffn_weights_config(128, 2, "sm_90"),
            "columns": lambda: policy.columns_config(128, 2, "sm_90"),
            "pooling": lambda: pooling_policy.pooling_config(128, 2, "sm_90"),
            "slot_pool": lambda: slot_policy.slot_pool_config(128, 2, 8, "sm_90"),
            "slot_expand": lambda: slot_policy.slot_expand_config(128, 2, 2, "sm_90", 28, 8, 132),
        }[task.kind]()
    ((place, row),) = [pair for pair in asked if pair[0].kind == task.kind]
    assert place == tuned.Place(task.kind, "sm_90", 128, 2)
    assert set(task.grid) <= set(row.__dict__)
    assert len(near(row, task.grid)) > 10


# --- a task, run


@pytest.fixture
def bench() -> Bench:
    one = CacheGeometry(layers=1, kv_heads=1, head_dim=16)
    return Bench(one, one, 64, torch.float32, torch.device("cpu"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(tune, "MOST", 3)
    grid = {"block_hidden": (64, 128), "block_tokens": (16, 32)}
    return replace(BY_NAME["tile"], sizes=(Size(tokens=20, context=20),), grid=grid, first=())


def tuned_by(task: Task, bench: Bench, folder: Path) -> tune.Found:
    found = tune.Found(folder, bench)
    with torch.no_grad(), use_backend("triton"):
        tune.tune([task], bench, found, 100.0)
    return found


def timed_as(monkeypatch: pytest.MonkeyPatch, ratios: dict[tuple[int, int], float]) -> None:
    """Times by (block_tokens, block_hidden)."""

    def heat(self: Trial, rows: Sequence[Any], least: int = 0) -> tuple[list[float], list[float]]:
        return [1.0], [ratios[row.block_tokens, row.block_hidden] for row in rows]

    monkeypatch.setattr(Trial, "heat", heat)


RATIOS = {(32, 128): 1.2, (64, 64): 1.1, (16, 128): 0.9}


def test_a_faster_row_goes_to_the_file_and_is_then_taken(
    small: Task, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Any, capsys: Any
) -> None:
    small = replace(small, grid={"block_tokens": (16, 32)})
    own = policy.tile_options(64, 4, policy.INTERPRETER)[0]
    monkeypatch.setattr(tune, "FINALISTS", 1)
    timed_as(monkeypatch, RATIOS)
    tuned_by(small, bench, tmp_path)
    assert "0.900 of its time" in capsys.readouterr().out
    data = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert {(one["row"]["block_tokens"], one["ratio"]) for one in data} == {(16, 0.9), (32, 1.2)}
    entries(tuned.read(tmp_path / "tuned.json"))
    assert policy.tile_config(64, 4, policy.INTERPRETER, 1, 20) == replace(own, block_tokens=16)


def test_what_is_hardly_faster_is_not_taken(
    small: Task, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    small = replace(small, grid={"block_tokens": (16, 32)})
    timed_as(monkeypatch, {(16, 128): 0.99, (32, 128): 1.2})
    assert not tuned_by(small, bench, tmp_path).entries
    assert "the nearest 0.990" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["what is timed", "what else takes it"])
def test_a_wrong_row_is_not_taken_however_fast(
    small: Task, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The kernels are broken for one row: their result is off."""
    small = replace(small, grid={"block_tokens": (16, 32)}, also=("adapter.inject",))
    timed_as(monkeypatch, {(16, 128): 0.5, (32, 128): 0.9})
    broken_in = "fuse_layers" if where == "what is timed" else "adapter.inject"
    right = trials.ours

    def ours(case: str) -> Any:
        def run(operands: Any) -> Any:
            result = right(case)(operands)
            row = tuned._trials[-1][0].get("tile") if tuned._trials else None
            if case == broken_in and row is not None and row.block_tokens == 16:
                for key, _ in result if isinstance(result, list) else [(result.layers[0].keys, None)]:
                    key[..., -1] += 0.01
            return result

        return run

    monkeypatch.setattr(trials, "ours", ours)
    found = tuned_by(small, bench, tmp_path)
    assert [one["row"]["block_tokens"] for one in found.entries] == [32]
    (wrong,) = [one for one in found.trials if one["wrong"]]
    assert wrong["row"]["block_tokens"] == 16 and broken_in in wrong["wrong"] and "error bound" in wrong["wrong"]


def test_a_row_that_raises_is_passed_over(
    small: Task, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(small, grid={"block_tokens": (24, 32)}, also=())  # 24 is no power of two
    timed_as(monkeypatch, {(32, 128): 0.9})
    found = tuned_by(small, bench, tmp_path)
    assert [one["row"]["block_tokens"] for one in found.entries] == [32]
    assert any(one["wrong"] and one["row"]["block_tokens"] == 24 for one in found.trials)


def test_a_task_that_fails_leaves_the_others(
    small: Task, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_row = replace(small, kind="split")  # of a CPU's "chip", which one program fills
    small = replace(small, grid={"block_tokens": (16, 32)}, also=())
    timed_as(monkeypatch, {(16, 128): 0.9, (32, 128): 1.2})
    found = tune.Found(tmp_path, bench)
    with torch.no_grad(), use_backend("triton"):
        tune.tune([no_row, small], bench, found, 100.0)
    assert "no row of kind 'split'" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "tuned.json").read_text())["rows"]) == 1


def test_times_are_taken_with_the_row_that_they_are_of(small: Task, bench: Bench) -> None:
    with torch.no_grad(), use_backend("triton"):
        trial = Trial(small, bench)
        other = replace(trial.row, block_tokens=16)
        (own,), (ratio,) = trial.heat([other], 2)
        seen = []
        real = fusion_plan.tile_config

        def watched(*arguments: Any) -> Any:
            seen.append(real(*arguments))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(fusion_plan, "tile_config", watched)
            for calls in (trial._calls(row, trial._sets[0]) for row in (trial.row, other)):
                calls[0]()
    assert own > 0 and ratio > 0
    assert seen == [trial.row, other]


def test_a_row_counts_by_the_geometric_mean_over_its_sizes(
    small: Task, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(2.0, 1.0), (1.0, 4.0)])

    def measure(calls: dict[str, Any], *_: Any, **__: Any) -> dict[str, timing.Timing]:
        return {name: timing.Timing.of([ms]) for name, ms in zip(calls, next(times))}

    monkeypatch.setattr(timing, "measure", measure)
    with torch.no_grad(), use_backend("triton"):
        trial = Trial(replace(small, sizes=(Size(tokens=20, context=20), Size(tokens=4, context=20))), bench)
        own, ratios = trial.heat([replace(trial.row, block_tokens=16)])
    assert own == [2.0, 1.0] and ratios == [pytest.approx(2**0.5)]


def test_the_workers_launch_every_candidate_once_between_them(
    small: Task, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(small, name="middle", grid={"block_hidden": (24, 64)})  # 24 is no power of two: it raises
    with torch.no_grad(), use_backend("triton"):
        for part in range(2):
            tune.compile_some([small, other], bench, part, 2)
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == ["middle 0", "middle 1", "tile 0", "tile 1", "tile 2"]


def test_workers_that_are_late_are_ended_and_what_they_said_counts(
    small: Task, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def worker(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[:3] == [sys.executable, "-m", "bench.tune"] and "--compile" in command
        code = f"import time; print('tile {len(started)}', flush=True); print('half a li', flush=True); time.sleep(60)"
        started.append(real([sys.executable, "-c", code], **options))
        return started[-1]

    real = subprocess.Popen
    monkeypatch.setattr(tune.subprocess, "Popen", worker)
    monkeypatch.setattr(tune.os, "cpu_count", lambda: 2)
    assert tune.compile_beside([small], bench, 3.0) == {("tile", 0), ("tile", 1)}
    assert all(process.poll() is not None for process in started)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert "a CUDA GPU is needed" in capsys.readouterr().err
