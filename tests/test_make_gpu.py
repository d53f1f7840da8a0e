"""`make gpu` without a GPU says so and fails; its runner tells passed, failed, stopped and absent steps apart; and each
step's command is one that starts, and writes where its results are read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_jobs import two_models

from bench import tune
from bench.__main__ import parser as bench_parser
from lcf_fast import cli
from lcf_fast.evaluation import latency, latency_command

FOLDER = Path(__file__).resolve().parent / "gpu"
ROOT = FOLDER.parents[1]


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


def runs(runner: ModuleType) -> list[tuple[str, ...]]:
    """The steps of each of the three runs of ten minutes."""
    return [runner.FIRST, ("sweep", "latency"), ("tune",)]


def test_steps_leave_few_files(runner: ModuleType, tmp_path: Path) -> None:
    """Four logs, the summary, and the benchmark's two JSON files and plot: eight files."""
    steps = runner.steps(tmp_path)
    assert len({step.name for step in steps}) == len(steps)
    for chosen in runs(runner):
        logs = {step.log or step.name for step in steps if step.name in chosen}
        results = {"bench": 3, "sweep": 3, "latency": 2, "tune": 2}
        assert len(logs) + 1 + sum(results.get(name, 0) for name in chosen) <= 8  # one is the summary


def test_each_run_ends_in_time(runner: ModuleType, tmp_path: Path) -> None:
    steps = runner.steps(tmp_path)
    assert {step.name for step in steps} == {name for chosen in runs(runner) for name in chosen}
    for name in ("half", "single"):  # compiled for the sanitizer, which has no time for it
        assert step_of(runner, name, tmp_path).command[1:] == [str(FOLDER / "sanitize.py"), name]
    for chosen in runs(runner):
        some = [step for step in steps if step.name in chosen]
        phases = list(runner.phases(some))
        assert sum(max(step.limit for step in phase) for phase in phases) <= runner.BUDGET
        # Of ten minutes: before it something is installed, and at the end the targets are read.
        assert runner.BUDGET + len(phases) * runner.GRACE <= 570
    timed = {step.name: step.phase for step in steps if step.name in runner.RESULTS}
    assert all(sum(step.phase == phase for step in steps) == 1 for phase in timed.values()), "times beside other work"
    until = {step.name: step.until for step in steps if step.until is not None}
    assert set(until) == {"bench", "sweep", "tune"}
    assert all(before >= 40 for _, before in until.values()), "the last size that is begun must end, too"
    assert all(bench_parser().parse_args([until[name][0], "9"]).deadline == 9 for name in ("bench", "sweep"))
    given = tune.parser().parse_args([*step_of(runner, "tune", tmp_path).command[3:], until["tune"][0], "9"])
    assert given.seconds == 9 and given.out == tmp_path / "tune"


@pytest.mark.parametrize(("seconds", "told"), [(200.5, "160"), (6, "1")])
def test_a_step_is_told_the_time_that_it_has(runner: ModuleType, tmp_path: Path, seconds: float, told: str) -> None:
    step = runner.Step("one", [sys.executable, "-c", "import sys; print(*sys.argv[1:])"], 5, until=("--deadline", 40))
    assert runner.run(step, tmp_path, seconds).note == f"--deadline {told}"


def test_steps_of_a_phase_run_side_by_side_and_share_a_log(runner: ModuleType, tmp_path: Path) -> None:
    wait = "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
    wait += "while not other.exists(): time.sleep(0.05)\nprint('met', mine.name)"
    files = [str(tmp_path / name) for name in ("first", "second")]
    pair = [
        runner.Step(f"step {i}", [sys.executable, "-c", wait, *order], 30, log="both")
        for i, order in enumerate((files, files[::-1]))
    ]
    last = runner.Step("last", [sys.executable, "-c", "print('after')"], 30, phase=1)
    done = runner.run_all([*pair, last], tmp_path, time.monotonic() + 60)
    assert [(one.step, one.status) for one in done] == [("step 0", "passed"), ("step 1", "passed"), ("last", "passed")]
    assert sorted((tmp_path / "both.log").read_text().split("\n"))[1:] == ["met first", "met second"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["both.log", "first", "last.log", "second"]


def test_less_time_for_all_of_it(runner: ModuleType, tmp_path: Path) -> None:
    """The first step is cut short, the next one is not begun."""
    steps = [runner.Step(f"step {i}", [sys.executable, "-c", "import time; time.sleep(60)"], 60, i) for i in (0, 1)]
    started = time.monotonic()
    kept: list[list[str]] = []
    results = runner.run_all(steps, tmp_path, started + 6, lambda so_far: kept.append([one.step for one in so_far]))
    assert kept == [["step 0"], ["step 0", "step 1"]]
    assert [result.status for result in results] == ["timeout", "timeout"] and time.monotonic() - started < 30
    assert "stopped after 6 s" in results[0].note and results[1].note == "no time left for it"
    assert runner.parser().parse_args(["--out", "x", "--seconds", "200"]).seconds == 200


def test_time_that_is_over_makes_limits_longer(runner: ModuleType, tmp_path: Path) -> None:
    """What is chosen alone has all the time there is: two seconds would end neither of these."""
    steps = [runner.Step(f"step {i}", [sys.executable, "-c", "import time; time.sleep(3)"], 2, i) for i in (0, 1)]
    results = runner.run_all(steps, tmp_path, time.monotonic() + 60)
    assert [result.status for result in results] == ["passed", "passed"]


def test_the_sanitizer_is_found_in_a_toolkit(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert runner.sanitizer_of() == str(tool)


def test_a_step_at_its_limit_is_told_first(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "import signal, time\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
    told += "try:\n    print('up', flush=True)\n    time.sleep(60)\n"
    told += "except KeyboardInterrupt:\n    print('written', flush=True)\n"
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    deaf += "print('deaf', flush=True)\ntime.sleep(60)\n"
    monkeypatch.setattr(runner, "GRACE", 1.0)
    steps = [runner.Step(name, [sys.executable, "-c", code], 5) for name, code in (("told", told), ("deaf", deaf))]
    started = time.monotonic()
    results = [runner.run(step, tmp_path, 5) for step in steps]
    assert [result.status for result in results] == ["timeout", "timeout"] and time.monotonic() - started < 30
    assert (tmp_path / "told.log").read_text() == "up\nwritten\n" and (tmp_path / "deaf.log").read_text() == "deaf\n"


def test_a_second_run_adds_to_the_summary(runner: ModuleType, tmp_path: Path) -> None:
    def steps(about: dict[str, str], *names: str) -> list[str]:
        runner.write_summary(tmp_path, about, [runner.Result(name, "passed", 1.0, "") for name in names])
        found = json.loads((tmp_path / "summary.json").read_text())
        assert found["about"] == about
        return [step["step"] for step in found["steps"]]

    assert steps({"commit": "a"}, "gpu", "bench") == ["gpu", "bench"]
    assert steps({"commit": "a"}, "sweep", "bench") == ["gpu", "sweep", "bench"]
    assert steps({"commit": "b"}, "gpu") == ["gpu"]


@pytest.mark.parametrize(
    ("statuses", "code"), [(("passed", "absent"), 0), (("passed", "timeout"), 1), (("failed", "passed"), 1)]
)
def test_the_exit_status(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: tuple[str, ...], code: int
) -> None:
    results = [runner.Result(f"step {i}", status, 1.0, "") for i, status in enumerate(statuses)]
    for name, value in (("missing", ""), ("describe", {}), ("targets", ""), ("run_all", results)):
        monkeypatch.setattr(runner, name, lambda *_, value=value: value)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    assert runner.main() == code


# --- the commands


def step_of(runner: ModuleType, name: str, out: Path) -> Any:
    return next(step for step in runner.steps(out) if step.name == name)


def test_benchmarks_are_asked_for_what_they_know_and_write_where_they_are_read(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bench", "sweep"):
        step = step_of(runner, name, tmp_path)
        assert step.command[:3] == [sys.executable, "-m", "bench"] and step.cwd == runner.ROOT
        given = bench_parser().parse_args(step.command[3:])
        assert given.out / "results.json" == tmp_path / runner.RESULTS[name]
        assert (given.sweep, given.quick, given.device) == (name == "sweep", name == "bench", "cuda")
    step = step_of(runner, "latency", tmp_path)
    seen: list[Any] = []
    assert step.command[:3] == [sys.executable, "-m", "lcf_fast.cli"] and step.cwd != runner.ROOT
    monkeypatch.setattr(latency_command, "_run", seen.append)
    assert cli.main(step.command[3:]) == 0
    assert seen[0].out / latency.RESULTS == tmp_path / runner.RESULTS["latency"] and seen[0].batch == [1]


def test_no_step_passes_for_nothing(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run on the GPU, not in the interpreter, and what a sanitizer finds is a failure."""
    monkeypatch.setattr(runner, "sanitizer_of", lambda: "compute-sanitizer")
    for name in ("gpu", "numerics"):
        assert step_of(runner, name, tmp_path).env == {"LCF_FAST_TEST_DEVICE": "cuda"}
    for name in ("memcheck", "racecheck"):
        step = step_of(runner, name, tmp_path)
        options = dict(zip(step.command[1:], step.command[2:]))
        assert (options["--tool"], step.absent) == (name, "") and int(options["--error-exitcode"]) > 0
        assert step.env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@pytest.mark.parametrize("name", ["bench", "sweep", "latency"])
def test_benchmarks_start(runner: ModuleType, tmp_path: Path, name: str) -> None:
    step = step_of(runner, name, tmp_path)
    done = subprocess.run([*step.command, "--help"], cwd=step.cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "examples:" in done.stdout, done.stderr


@pytest.mark.parametrize(("name", "least"), [("gpu", 60), ("numerics", 150)])
def test_tests_are_found(runner: ModuleType, tmp_path: Path, name: str, least: int) -> None:
    step = step_of(runner, name, tmp_path)
    command = list(step.command)
    if "-n" in command:  # workers would each collect them
        del command[command.index("-n") : command.index("-n") + 4]
    done = subprocess.run(
        [*command, "--collect-only"],
        cwd=step.cwd,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.count("::") >= least


def test_every_test_of_a_device_is_run_on_it(runner: ModuleType) -> None:
    """The files are found by how the fixture is annotated, so that is how it must be."""
    tests = runner.ROOT / "tests"
    chosen = {path.relative_to(tests).as_posix() for path in runner.on_device()}
    assert {"kernels/test_fusion.py", "kernels/test_pooling.py", "test_adapter.py", "test_ops.py"} <= chosen
    for path in tests.glob("**/test_*.py"):
        for signature in re.findall(r"^def test_\w+\(([^)]*)\)", path.read_text(encoding="utf-8"), re.MULTILINE):
            taken = [one.strip() for one in signature.split(",") if re.match(r"\s*device\b", one)]
            assert taken in ([], ["device: torch.device"]), (path, signature)


def test_the_sanitizers_script_imports_everything_before_it_needs_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "sanitize.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, "a CUDA GPU is needed")


#: What a bare machine may lack.
HIDE = "import sys\nfor name in ('hypothesis', 'xdist', 'rich', 'matplotlib', 'scipy', 'datasets'):\n"
HIDE += "    sys.modules[name] = None\n"


def test_nothing_needs_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    """The benchmark runs, without a plot; the latency protocol and the tests on a GPU are imported."""
    pytest.importorskip("transformers")
    sharer, receiver = two_models(tmp_path)
    given = ["--sweep", "--device", "cpu", "--tokens", "4", "--batch", "1", "--context", "6", "--bottleneck", "64"]
    given += ["--only", "summarize", "--sharer", sharer, "--receiver", receiver, "--out", str(tmp_path / "out")]
    code = f"{HIDE}sys.path.append({str(ROOT)!r})\nfrom bench.__main__ import main\n"
    code += f"assert main({given!r}) == 0\nfrom bench import targets\ntargets.main([])\n"
    code += "import lcf_fast.evaluation.latency, lcf_fast.evaluation.latency_models as models\n"
    code += "import lcf_fast.evaluation.latency_report, lcf_fast.evaluation.latency_command, torch\n"
    code += "[group.open() for group in models.random_groups([50], device=torch.device('cpu'), dtype=torch.float32)]\n"
    code += "import pytest\n"
    code += f"raise SystemExit(pytest.main(['-q', '--collect-only', '-m', 'gpu', {str(FOLDER)!r}]))\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # pytest would look at what is hidden
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "bench: no plot" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cpu-sweep.json", "results.json"]
