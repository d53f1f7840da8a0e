"""Everything that needs a CUDA GPU: ``make gpu`` or ``python tests/gpu --out DIR``.

Three runs, each in under ten minutes: the checks and the benchmark; with ``--only sweep latency``, what takes longer
to measure; with ``--only tune``, launch configurations that may be faster (`bench.tune`). Uses the Python it runs in
and installs nothing; ``pip install --no-deps --no-build-isolation -e .`` must have gone before. DIR gets the steps'
logs, the results of the benchmark, and ``summary.json``; at the end stand the targets that they meet and miss
(``python -m bench.targets``). In a copy without its repository ``LCF_FAST_COMMIT`` names the commit. Exit status: 0 all
steps passed, 1 one failed, 2 there is nothing to run on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
STARTED = time.monotonic()
#: Seconds for a run, from its start on. Whoever lends a GPU for ten minutes counts installing, too, and importing torch
#: for the first time takes its time there.
BUDGET = 545.0
GRACE = 8.0  # seconds that a step at its limit has to write what it has, on top
LOG_LIMIT = 8 << 20  # bytes kept of a step's log, its end
#: Where results go within the folder; `bench.targets` and `bench.published` read them there.
RESULTS = {"bench": "bench/results.json", "sweep": "sweep/results.json", "latency": "latency/latency.json"}
#: What is run where no step is named.
FIRST = ("gpu", "numerics", "warm", "half", "single", "bench", "memcheck", "racecheck")
EXAMPLES = """examples:
  make gpu OUT=out/gpu                                  checks and benchmark
  make gpu OUT=out/gpu ARGS="--only sweep latency"      what takes longer: every size, and two models end to end
  make gpu OUT=out/gpu ARGS="--only tune"               other rows than the policy's
  make gpu OUT=out/gpu ARGS="--only numerics"           what did not end, with all the time there is
  make gpu OUT=out/gpu ARGS="--only half single memcheck racecheck --seconds 300"  in less, on a GPU that is lent
"""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        limit: its time limit in seconds; more where there is time over.
        phase: steps of one phase run side by side; what is timed has one of its own.
        log: name of its log file, where that is not its own; steps that share one append.
        absent: why it cannot be run here.
        until: an option of the command that takes the seconds it has, and how many before its limit those end.
    """

    name: str
    command: Sequence[str]
    limit: float
    phase: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = ROOT
    log: str = ""
    absent: str = ""
    until: tuple[str, int] | None = None


@dataclass(frozen=True)
class Result:
    step: str
    status: str  # passed, failed, timeout, absent
    seconds: float
    note: str


def steps(out: Path) -> list[Step]:
    """All steps, phase after phase."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--maxfail=20"]
    # Most of their time is the compiler's (over 500 kernels for "numerics"), so workers are worth more than the one
    # device that they share; past 14 its memory is.
    cores = min(16, os.cpu_count() or 2)
    few, many = max(1, cores // 4), max(1, cores - cores // 4 - 3)
    has_xdist = importlib.util.find_spec("xdist") is not None
    # Neighbouring tests share kernels, so each worker begins with tests in a row.
    checks = {
        name: [*pytest, *(["-n", str(n), "--dist", "worksteal"] if has_xdist else [])]
        for name, n in (("gpu", few), ("numerics", many))
    }
    on_gpu = {"LCF_FAST_TEST_DEVICE": "cuda"}
    sanitizer = sanitizer_of()
    absent = "" if sanitizer else "compute-sanitizer is not on PATH"
    # Without torch's caching allocator every tensor is an allocation of its own, with bounds to be checked.
    bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitize = [sanitizer, "--error-exitcode", "9", "--target-processes", "all"]
    script = [python, str(HERE / "sanitize.py")]
    chosen = "not gpu and not slow"
    bench = [python, "-m", "bench", "--device", "cuda"]
    latency = [python, "-m", "lcf_fast.cli", "latency", "--device", "cuda", "--batch", "1", "--rounds", "4"]
    return [
        Step("gpu", [*checks["gpu"], str(HERE), "-m", "gpu"], 225, 0, on_gpu),
        Step("numerics", [*checks["numerics"], *map(str, on_device()), "-m", chosen], 225, 0, on_gpu),
        # What the later steps launch is compiled beside these two, and Triton keeps it on disk.
        Step("warm", [python, "-m", "bench.warm"], 225, 0, log="bench"),
        Step("half", [*script, "half"], 225, 0, bare, log="sanitizer"),
        Step("single", [*script, "single"], 225, 0, bare, log="sanitizer"),
        Step("bench", [*bench, "--quick", "--out", str(out / "bench")], 215, 1, until=("--deadline", 45)),
        # Calls of the driver that torch makes to see whether they fail are no faults of a kernel.
        Step(
            "memcheck",
            [*sanitize, "--tool", "memcheck", "--report-api-errors", "no", *script],
            105,
            2,
            bare,
            log="sanitizer",
            absent=absent,
        ),
        Step("racecheck", [*sanitize, "--tool", "racecheck", *script], 105, 2, bare, log="sanitizer", absent=absent),
        Step("sweep", [*bench, "--sweep", "--out", str(out / "sweep")], 300, 3, until=("--deadline", 40)),
        # Not from the root, where ./kernels would answer transformers' `import kernels`.
        Step("latency", [*latency, "--warmup", "1", "--out", str(out / "latency")], 245, 4, cwd=HERE),
        Step("tune", [python, "-m", "bench.tune", "--out", str(out / "tune")], 530, 5, until=("--seconds", 50)),
    ]


def sanitizer_of() -> str:
    """Where compute-sanitizer lies; empty: nowhere. A CUDA toolkit may be there and not on PATH."""
    homes = [os.environ.get("CUDA_HOME", ""), *map(str, sorted(Path("/usr/local").glob("cuda*")))]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places)) or ""


def on_device() -> list[Path]:
    """Test files whose tests run on the device that is asked for; the others do the same on every machine."""
    files = sorted((ROOT / "tests").glob("**/test_*.py"))
    found = [file for file in files if re.search(r"\bdevice: torch\.device\b", file.read_text(encoding="utf-8"))]
    return [file for file in found if HERE not in file.parents]


def phases(chosen: Sequence[Step]) -> Iterator[list[Step]]:
    for _, some in groupby(chosen, key=lambda step: step.phase):
        yield list(some)


def run(step: Step, out: Path, seconds: float) -> Result:
    """Run one step, its output to its log in ``out``; past its time its whole process group is ended."""
    if step.absent:
        return Result(step.name, "absent", 0.0, step.absent)
    if seconds < 5:
        return Result(step.name, "timeout", 0.0, "no time left for it")
    command = list(step.command)
    if step.until is not None:
        option, before = step.until
        command += [option, str(max(1, int(seconds) - before))]
    log = out / f"{step.log or step.name}.log"
    own = out / f".{step.name}.part"  # steps side by side may share a log
    started = time.monotonic()
    with own.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=step.cwd,
            env={**os.environ, **step.env, "PYTHONUNBUFFERED": "1"},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
            _end(process)
    text = own.read_bytes()[-LOG_LIMIT:]
    own.unlink()
    with log.open("ab") as sink:
        sink.write(text)
    lines = text[-4000:].decode(errors="replace").strip().splitlines() or ["no output"]
    note = lines[-1].strip("= ") if status != "timeout" else f"stopped after {seconds:.0f} s: {lines[-1]}"
    if status in ("failed", "timeout"):
        print(f"   {step.name}: {status}; the end of {log.name}:", *lines[-25:], sep="\n     ", flush=True)
    return Result(step.name, status, time.monotonic() - started, note)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End its group: with a word before, so that a benchmark writes what it has measured."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    chosen: Sequence[Step], out: Path, end: float, keep: Callable[[Sequence[Result]], None] = lambda _: None
) -> list[Result]:
    """Phase after phase, until the time is up; a step that it cuts short has its grace on top. Steps that would leave
    time over, each at its limit, have longer limits.

    Args:
        end: when it is, by `time.monotonic`.
        keep: is given the results so far after each phase, for a run that is ended from without.
    """
    results: list[Result] = []
    most = sum(max(step.limit for step in some) for some in phases(chosen))
    stretch = max(1.0, (end - time.monotonic()) / most)
    for some in phases(chosen):
        names = ", ".join(step.name for step in some)
        left = end - time.monotonic()
        limits = [min(step.limit * stretch, left) for step in some]
        print(f"-- {names} (at most {max(0.0, *limits):.0f} s)", flush=True)
        with ThreadPoolExecutor(len(some)) as pool:
            done = list(pool.map(run, some, [out] * len(some), limits))
        for result in done:
            print(f"   {result.step} {result.status} after {result.seconds:.0f} s: {result.note}", flush=True)
        results += done
        keep(results)
    return results


def describe() -> dict[str, str]:
    """The machine and the versions that the results hold for."""
    import torch
    import triton

    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip()

    return {
        "commit": output("git", "rev-parse", "HEAD") or os.environ.get("LCF_FAST_COMMIT", ""),
        "gpu": torch.cuda.get_device_name(),
        "gpus": str(torch.cuda.device_count()),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def missing() -> str:
    """What stands in the way of running here, or nothing."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported by {sys.executable}: {error}"
    if not torch.cuda.is_available():
        return f"a CUDA GPU is needed, and torch {torch.__version__} sees none on this machine"
    try:
        importlib.import_module("lcf_fast.kernels")
    except ImportError as error:
        install = "pip install --no-deps --no-build-isolation -e ."
        return f"lcf_fast is not installed for {sys.executable} ({error}); first: {sys.executable} -m {install}"
    return ""


def write_summary(out: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """``summary.json``; what an earlier run of other steps left there stays, if it was of the same commit and GPU."""
    file = out / "summary.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"about": None, "steps": []}
    done = {result.step for result in results}
    kept = [step for step in earlier["steps"] if step["step"] not in done and earlier["about"] == about]
    summary = {"about": about, "steps": kept + [asdict(result) for result in results]}
    file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def targets(out: Path) -> str:
    """Which targets the results in a folder meet."""
    files = [out / name for name in (*RESULTS.values(), "summary.json") if (out / name).exists()]
    command = [sys.executable, "-m", "bench.targets", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "the targets were not read in time: python -m bench.targets\n"
    return done.stdout + done.stderr


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python tests/gpu",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in steps(Path())]
    result.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    result.add_argument(
        "--only", nargs="+", choices=names, default=FIRST, metavar="STEP", help=f"of {', '.join(names)}"
    )
    result.add_argument(
        "--seconds",
        type=float,
        default=BUDGET,
        help=f"for all of it ({BUDGET:.0f}); what is cut short keeps what it has",
    )
    return result


def main() -> int:
    arguments = parser().parse_args()
    reason = missing()
    if reason:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in steps(out) if step.name in arguments.only]
    for step in chosen:
        (out / f"{step.log or step.name}.log").unlink(missing_ok=True)
    about = describe()
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = run_all(chosen, out, STARTED + arguments.seconds, lambda so_far: write_summary(out, about, so_far))
    print(f"\n{targets(out)}\n{'step':<11}{'status':<9}{'s':>5}  note")
    for result in results:
        print(f"{result.step:<11}{result.status:<9}{result.seconds:>5.0f}  {result.note[:120]}")
    return int(any(result.status in ("failed", "timeout") for result in results))


if __name__ == "__main__":
    sys.exit(main())
