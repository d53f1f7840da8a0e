"""A run that is killed at any moment and resumed ends bitwise as one that was not: adapter, optimizer, log.

So does a store of prefills.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_training import read_log

WORKER = Path(__file__).with_name("kill_worker.py")
TESTS = Path(__file__).resolve().parents[1]
STEPS = 5
LAST = Path("checkpoints") / f"step-{STEPS:08d}"
FILES = (
    Path("adapter/adapter.safetensors"),
    Path("adapter/config.json"),
    LAST / "adapter/adapter.safetensors",
    LAST / "optimizer.safetensors",
)
Case = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    """Runs a case of kill_worker.py, in one worker for all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    with subprocess.Popen(
        [sys.executable, str(WORKER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        send, receive = worker.stdin, worker.stdout

        def run(out: Path, what: str = "train", **kills: Any) -> dict[str, Any]:
            send.write(json.dumps({"what": what, "out": str(out), "steps": STEPS, **kills}) + "\n")
            send.flush()
            answer = receive.readline()
            assert answer, "the worker has ended"
            found: dict[str, Any] = json.loads(answer)
            return found

        yield run
        send.close()


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], float]:
    """A run that was left in peace, the calls that changed its folder, and its seconds."""
    out = tmp_path_factory.mktemp("whole") / "run"
    answer = case(out)
    assert answer["ends"] == [0]
    return out, [event.replace(str(out), "") for event in answer["events"]], answer["seconds"]


def assert_same_end(out: Path, whole: Path, ends: list[int], killed: int) -> None:
    assert ends == [-signal.SIGKILL] * killed + [0]
    for file in FILES:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert read_log(out) == read_log(whole)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [LAST.name]


def find(events: list[str], name: str, *words: str, nth: int = 0) -> int:
    """The call ``name`` whose path has all of ``words``."""
    return [i for i, event in enumerate(events) if event.split()[0] == name and all(w in event for w in words)][nth]


#: What the run is doing when it dies: the call, words of its path, which of them, and how it dies.
MOMENTS: dict[str, tuple[str, tuple[str, ...], int, str]] = {
    "half of a line of the log": ("write", ("log.jsonl",), 2, "torn"),
    "half of the adapter's weights in the second checkpoint": ("fsync", ("adapter.safetensors", "00004"), 0, "torn"),
    "between the temporary optimizer file and its name": ("replace", ("optimizer.safetensors", "00004"), 0, "before"),
    "between the temporary checkpoint and its name": ("rename", ("checkpoints", "00004"), 0, "before"),
    "between the new checkpoint and the old one's end": ("rename", ("checkpoints", "00004"), 0, "after"),
    "half way through deleting the old checkpoint": ("unlink", ("optimizer.safetensors",), 0, "after"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_once(moment: str, case: Case, whole: tuple[Path, list[str], float], tmp_path: Path) -> None:
    reference, events, _ = whole
    name, words, nth, how = MOMENTS[moment]
    answer = case(tmp_path / "run", kills=[(find(events, name, *words, nth=nth), how)])
    assert_same_end(tmp_path / "run", reference, answer["ends"], 1)


def test_killed_at_some_time(case: Case, whole: tuple[Path, list[str], float], tmp_path: Path) -> None:
    reference, _, seconds = whole
    answer = case(tmp_path / "run", seconds=[0.6 * seconds, 0.4 * seconds])
    assert_same_end(tmp_path / "run", reference, answer["ends"][-1:], 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after", "torn"])
def test_killed_at_each_call_that_changes_a_file(
    how: str, case: Case, whole: tuple[Path, list[str], float], tmp_path: Path
) -> None:
    reference, events, _ = whole
    assert len(events) > 40
    for at in range(len(events)):
        if how == "torn" and events[at].split()[0] not in ("fsync", "write"):
            continue
        answer = case(tmp_path / "run", kills=[(at, how)])
        assert_same_end(tmp_path / "run", reference, answer["ends"], 1)
        shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_killed_again_and_again(case: Case, whole: tuple[Path, list[str], float], tmp_path: Path) -> None:
    reference, _, seconds = whole
    draw = random.Random(0)
    for i in range(10):
        kills = [(draw.randrange(25), draw.choice(["before", "after", "torn"])) for _ in range(4)]
        answer = case(tmp_path / str(i), kills=kills)
        assert_same_end(tmp_path / str(i), reference, answer["ends"], 4)
    for i in range(10, 40):
        moments = [draw.uniform(0, seconds) for _ in range(2)]
        answer = case(tmp_path / str(i), seconds=moments)
        assert answer["ends"][-1] == 0
        assert_same_end(tmp_path / str(i), reference, answer["ends"][-1:], 0)


# --- a store of prefills
# ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_store(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[str]]:
    """Its files, and the calls that changed its folder."""
    out = tmp_path_factory.mktemp("store") / "store"
    answer = case(out, "store")
    assert answer["ends"] == [0]
    files = contents(out)
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    return files, [event.replace(str(out), "") for event in answer["events"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("call", "words", "how"),
    [
        ("fsync", ("shard-00001.safetensors",), "torn"),
        ("replace", ("shard-00001.safetensors",), "before"),
        ("replace", ("shard-00001.safetensors",), "after"),
        ("replace", ("shard-00002.json",), "before"),
    ],
)
def test_a_store_killed_once(
    call: str, words: tuple[str, ...], how: str, case: Case, whole_store: Any, tmp_path: Path
) -> None:
    files, events = whole_store
    answer = case(tmp_path / "store", "store", kills=[(find(events, call, *words), how)])
    assert answer["ends"] == [-signal.SIGKILL, 0]
    assert contents(tmp_path / "store") == files
    assert len(answer["events"]) < len(events)  # it did not begin again


@pytest.mark.slow
def test_a_store_killed_at_each_call_that_changes_a_file(case: Case, whole_store: Any, tmp_path: Path) -> None:
    files, events = whole_store
    for how in ("before", "after", "torn"):
        for at in range(len(events)):
            answer = case(tmp_path / "store", "store", kills=[(at, how)])
            assert answer["ends"] == [-signal.SIGKILL, 0]
            assert contents(tmp_path / "store") == files
            shutil.rmtree(tmp_path / "store")
