"""Everything that needs a CUDA GPU, in under ten minutes: ``make gpu`` or ``python tests/gpu --out DIR``.

Uses the Python it runs in and installs nothing; ``pip install --no-deps --no-build-isolation -e .`` must have
gone before. DIR gets the steps' logs, the benchmark's results and ``summary.json``. Exit status: 0 all steps
passed, 1 one failed, 2 there is nothing to run on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUDGET = 590.0  # seconds for all steps together
LOG_LIMIT = 8 << 20  # bytes kept of a step's log, its end


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        limit: its time limit in seconds.
        log: name of its log file, where that is not its own; steps that share one append.
        absent: why it cannot be run here.
    """

    name: str
    command: Sequence[str]
    limit: float
    env: Mapping[str, str] = field(default_factory=dict)
    log: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Result:
    step: str
    status: str  # passed, failed, timeout, absent
    seconds: float
    note: str


def steps(out: Path) -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--maxfail=20"]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    on_gpu = {"LCF_FAST_TEST_DEVICE": "cuda"}
    sanitizer = shutil.which("compute-sanitizer") or ""
    absent = "" if sanitizer else "compute-sanitizer is not on PATH"
    # Without torch's caching allocator every tensor is an allocation of its own, with bounds to be checked.
    bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitize = [sanitizer, "--error-exitcode", "9", "--target-processes", "all"]
    script = [python, str(HERE / "sanitize.py")]
    # The trainer's loop, data and demo have nothing of a device about them, and take minutes.
    elsewhere = [f"--ignore={ROOT / 'tests' / name}" for name in ("training", "demo", "test_guide.py")]
    chosen = "not gpu and not slow"
    return [
        Step("gpu", [*pytest, str(HERE), "-m", "gpu"], 150, on_gpu),
        Step("bench", [python, "-m", "bench", "--quick", "--out", str(out / "bench")], 150),
        Step("memcheck", [*sanitize, "--tool", "memcheck", *script], 60, bare, "sanitizer", absent),
        Step("racecheck", [*sanitize, "--tool", "racecheck", *script], 60, bare, "sanitizer", absent),
        Step("numerics", [*pytest, *workers, *elsewhere, str(ROOT / "tests"), "-m", chosen], 240, on_gpu),
    ]


def run(step: Step, out: Path, seconds: float) -> Result:
    """Run one step, its output to its log in ``out``; past its time the whole process group is ended."""
    if step.absent:
        return Result(step.name, "absent", 0.0, step.absent)
    if seconds < 5:
        return Result(step.name, "timeout", 0.0, "no time left for it")
    log = out / f"{step.log or step.name}.log"
    started = time.monotonic()
    with log.open("ab") as sink:
        process = subprocess.Popen(
            list(step.command),
            cwd=ROOT,
            env={**os.environ, **step.env, "PYTHONUNBUFFERED": "1"},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timeout"
    text = log.read_bytes()
    if len(text) > LOG_LIMIT:
        log.write_bytes(text[-LOG_LIMIT:])
    lines = text[-4000:].decode(errors="replace").strip().splitlines() or ["no output"]
    note = lines[-1].strip("= ") if status != "timeout" else f"stopped after {seconds:.0f} s: {lines[-1]}"
    return Result(step.name, status, time.monotonic() - started, note)


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
        "commit": output("git", "rev-parse", "HEAD"),
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--only", nargs="*", metavar="STEP", help="these steps only")
    arguments = parser.parse_args()
    reason = missing()
    if reason:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.log"):
        old.unlink()
    about = describe()
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    end = time.monotonic() + BUDGET
    results = []
    for step in steps(out):
        if arguments.only and step.name not in arguments.only:
            continue
        print(f"-- {step.name} (at most {step.limit:.0f} s)", flush=True)
        result = run(step, out, min(step.limit, end - time.monotonic()))
        results.append(result)
        print(f"   {result.status} after {result.seconds:.0f} s: {result.note}", flush=True)
    summary = {"about": about, "steps": [asdict(result) for result in results]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'step':<11}{'status':<9}{'s':>5}  note")
    for result in results:
        print(f"{result.step:<11}{result.status:<9}{result.seconds:>5.0f}  {result.note[:120]}")
    return int(any(result.status in ("failed", "timeout") for result in results))


if __name__ == "__main__":
    sys.exit(main())
