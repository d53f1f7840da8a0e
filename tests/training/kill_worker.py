"""Processes that are killed, for test_kill.py: ``python kill_worker.py``, cases as JSON lines on standard input.

Each is forked, trains or stores prefills, and gets SIGKILL at a given call of the file system, or after a given time:
nothing of it runs any more, no ``finally``, no buffer is written out. A case is ``{"what", "out", "steps"}``, where
``what`` is "train" or "store", and how to kill:

- ``"kills": [[call, how], ...]``: the first process dies at that call, the next one, which resumes, at the next pair's
  ...; ``how`` is "before" the call, "after" it, or "torn": with half of what it was to write.
- ``"seconds": [...]``: the first process dies after so many seconds, and so on.

In the end a process resumes and is left in peace. The answer is a line: ``{"ends", "events", "seconds"}``: how each
process ended, and what the last one called and how long it took.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]  # its threads' writes are not counted

import torch  # noqa: E402
from tiny_training import tiny_settings, tiny_store, tiny_trainer  # noqa: E402

CALLS = ("mkdir", "fsync", "write", "replace", "rename", "unlink", "rmdir", "ftruncate")


def watch(out: Path, kill_at: int, how: str) -> list[str]:
    """Count calls that change ``out``, as ``name path``, and die at one of them (-1: at none)."""
    events: list[str] = []

    def wrapped(name: str, real: Any) -> Any:
        def call(first: Any, *rest: Any, **keywords: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            if name == "write" and not path.startswith(str(out)):
                return real(first, *rest, **keywords)  # standard error
            dying = len(events) == kill_at
            events.append(f"{name} {path}")
            if dying and how == "torn":
                if name == "write":
                    real(first, rest[0][: len(rest[0]) // 2])
                elif name == "fsync" and os.path.isfile(path) and Path(path).name.startswith("."):
                    os.truncate(path, os.path.getsize(path) // 2)
            if dying and how != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(first, *rest, **keywords)
            finally:  # a folder that is there already is an error here, and none to the caller
                if dying:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    return events


def train(out: Path, steps: int) -> None:
    settings = tiny_settings(steps=steps, batch_size=3, micro_batch_size=2)
    tiny_trainer(out, settings, cross_context=True, keep=1).run(resume=True)


def store(out: Path, steps: int) -> None:
    settings = tiny_settings(steps=steps, batch_size=3, micro_batch_size=2)
    tiny_store(out, settings, cross_context=True, shard_bytes=15_000)


def run(
    what: str, out: Path, steps: int, kill_at: int = -1, how: str = "before", seconds: float | None = None
) -> dict[str, Any]:
    """One process that works, or goes on to: how it ended, and what it called if it came to its end."""
    report = out.with_suffix(".events")
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            events = watch(out, kill_at, how)
            {"train": train, "store": store}[what](out, steps)
            report.write_text(json.dumps(events))
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"end": end, "seconds": time.perf_counter() - began, "report": report}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # what is imported on the way is imported once, not in each process
        tiny_trainer(Path(folder), tiny_settings(), cross_context=True)
    for line in sys.stdin:
        case = json.loads(line)
        what, out, steps = case["what"], Path(case["out"]), case["steps"]
        runs = [run(what, out, steps, *kill) for kill in case.get("kills", [])]
        runs += [run(what, out, steps, seconds=seconds) for seconds in case.get("seconds", [])]
        last = run(what, out, steps)
        events = json.loads(last["report"].read_text()) if last["end"] == 0 else []
        ends = [each["end"] for each in [*runs, last]]
        print(json.dumps({"ends": ends, "events": events, "seconds": last["seconds"]}), flush=True)


if __name__ == "__main__":
    main()
