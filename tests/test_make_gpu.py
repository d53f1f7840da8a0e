"""`make gpu` without a GPU says so and fails; its runner tells passed, failed, stopped and absent steps apart."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent / "gpu"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_runner", FOLDER / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER), "--out", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "a CUDA GPU is needed" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [
        ("print('fine')", "passed", "fine"),
        ("print('bad'); raise SystemExit(3)", "failed", "bad"),
        ("import time; print('slow', flush=True); time.sleep(60)", "timeout", "slow"),
    ],
)
def test_a_step(runner: ModuleType, tmp_path: Path, code: str, status: str, note: str) -> None:
    started = time.monotonic()
    result = runner.run(runner.Step("one", [sys.executable, "-c", code], 5), tmp_path, 5)
    assert (result.status, result.step) == (status, "one")
    assert note in result.note
    assert note in (tmp_path / "one.log").read_text()
    assert time.monotonic() - started < 30


def test_a_missing_tool_is_absent_not_passed(runner: ModuleType, tmp_path: Path) -> None:
    result = runner.run(runner.Step("memcheck", ["nothing"], 5, absent="not on PATH"), tmp_path, 5)
    assert (result.status, result.note) == ("absent", "not on PATH")


def test_steps_leave_few_files(runner: ModuleType, tmp_path: Path) -> None:
    """Four logs, the summary, and the benchmark's two JSON files and plot: eight files."""
    steps = runner.steps(tmp_path)
    assert len({step.name for step in steps}) == len(steps)
    assert len({step.log or step.name for step in steps}) <= 4
    assert all(step.limit < runner.BUDGET < 600 for step in steps)
