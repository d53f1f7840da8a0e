"""A run of the tests on a GPU that a broken kernel or a lack of time cuts short tells what it found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
#: A GPU that is not there, and is lost when a test says so.
STAND_IN = """
import torch

LOST = []

def synchronize(*_):
    if LOST:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_available = lambda: True
torch.cuda.synchronize = synchronize
"""
CASES = """
import time
import pytest
import stand_in

pytestmark = pytest.mark.usefixtures("device")

@pytest.mark.parametrize("case", range(6))
def test_one(case):
    if case == 1:
        stand_in.LOST.append(1)
    assert not stand_in.LOST, f"case {case} of a lost device"

def test_long():
    print("begun")
    time.sleep(WAIT)
"""


def start(folder: Path, *options: str, wait: int = 0) -> subprocess.Popen[str]:
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "test_cases.py").write_text(CASES.replace("WAIT", str(wait)))
    search = os.pathsep.join([str(TESTS), str(folder)])
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "stand_in", "-p", "conftest", *options, str(folder)],
        cwd=folder,
        env={**os.environ, "LCF_FAST_TEST_DEVICE": "cuda", "PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_lost_device_takes_one_test_with_it_where_there_are_workers(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    said, _ = start(tmp_path, "-n", "1").communicate(timeout=120)
    assert "failed so far: test_cases.py::test_one[1] (call): AssertionError: case 1 of a lost device" in said
    assert "6 passed" in said and "case 2" not in said, said  # the test itself, and the worker that it took


def test_a_lost_device_ends_a_run_of_one_process(tmp_path: Path) -> None:
    said, _ = start(tmp_path, "-p", "no:xdist").communicate(timeout=120)
    assert "the device was lost in test_cases.py::test_one[1]" in said and "case 2" not in said, said
    assert "1 failed, 1 passed" in said, said


def test_who_stops_a_run_gets_its_failures(tmp_path: Path) -> None:
    running = start(tmp_path, "-p", "no:xdist", "-k", "long", wait=60)
    assert running.stdout is not None
    while "begun" not in running.stdout.readline():
        assert running.poll() is None
    started = time.monotonic()
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=60)
    assert "KeyboardInterrupt" in said and time.monotonic() - started < 30, said
