"""What every test runs under: the Triton interpreter unless on a GPU, poisoned memory, a fixed seed.

Environment: ``LCF_FAST_TEST_DEVICE=cuda`` runs the kernels for real, on a GPU (``make gpu``); ``sm_80`` or ``sm_90``
compiles them for that chip and runs the PTX that comes out on the CPU (``tests/emulator``, ``make emulated``),
``sm_90.sass`` the machine code that ptxas makes of it; ``TRITON_INTERPRET=0`` leaves them to the compiler, which is
what ``tests/compile`` needs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEVICE = os.environ.get("LCF_FAST_TEST_DEVICE", "cpu")
CHIP = DEVICE if DEVICE.startswith("sm_") else None
if CHIP is not None:
    DEVICE = "cpu"
    os.environ.pop("TRITON_INTERPRET", None)
elif DEVICE == "cpu":
    # Triton reads it when a kernel is defined, so before the first import of anything that imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# `python -m pytest` puts the repository's root first on the path, where ./kernels would answer transformers'
# `import kernels`. At the end it serves `import bench`, and an installed `kernels` still wins.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # one worker a core; torch would start one thread a core in each
    if DEVICE != "cuda":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("LCF_FAST_TEST_DEVICE=cuda, but torch sees no CUDA device")
    config.pluginmanager.register(OnAGpu(config))


#: Bytes of a GPU that a worker may hold on to between its tests: a dozen of them share it.
MOST_RESERVED = 4 << 30


class OnAGpu:
    """A run that time or a broken kernel cuts short keeps what it found: failures are told when they happen."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.is_worker = hasattr(config, "workerinput")
        self.has_workers = bool(getattr(config.option, "numprocesses", None))
        if not self.is_worker:  # who stops it gets its summary; workers go at once
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def pytest_runtest_teardown(self) -> None:
        if torch.cuda.memory_reserved() > MOST_RESERVED:
            torch.cuda.empty_cache()

    @pytest.hookimpl(trylast=True)  # what a worker has to say is said before
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if not self.is_worker and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(report.longrepr if crash is None else crash.message).strip().splitlines()
            terminal.ensure_newline()
            terminal.write_line(f"failed so far: {report.nodeid} ({report.when}): {' | '.join(said[:3])[:400]}")
            terminal.flush()
        if self.has_workers and not self.is_worker:
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            # Nothing runs in this process any more, and every test after it would fail for nothing.
            if self.is_worker:
                os._exit(1)  # xdist starts another one
            pytest.exit(f"the device was lost in {report.nodeid}: {error}", returncode=1)


def _lacks_hypothesis(path: Path) -> bool:
    """Whether a test file needs hypothesis where there is none: on a GPU's machine the others are run all the same."""
    if DEVICE == "cpu" or find_spec("hypothesis") is not None or not path.name.startswith("test_"):
        return False
    return "from hypothesis import" in path.read_text(encoding="utf-8")


def pytest_report_header(config: pytest.Config) -> str | None:
    if DEVICE == "cpu" or find_spec("hypothesis") is not None:
        return None
    left_out = [path.name for path in sorted((ROOT / "tests").glob("**/test_*.py")) if _lacks_hypothesis(path)]
    return f"LEFT OUT, hypothesis is not installed: {', '.join(left_out)}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if _lacks_hypothesis(collection_path):
        return True
    if not INTERPRETED or collection_path not in (ROOT / "tests" / "compile", ROOT / "tests" / "emulator"):
        return None
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if any(path.is_relative_to(collection_path) for path in named):
        raise pytest.UsageError(f"the interpreter compiles nothing: TRITON_INTERPRET=0 pytest {collection_path}")
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU only the tests that take ``device`` do anything they do not do on every machine."""
    if DEVICE != "cuda":
        return
    on_device = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in on_device])
    items[:] = on_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the kernels run on: ``cpu`` (interpreted) or ``cuda``."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: the largest): an element never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # without it nothing is filled
    memory.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    memory.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds the global generators; the value seeds a test's own ones."""
    value = 20260807
    torch.manual_seed(value)
    np.random.seed(value)
    return value


@pytest.fixture(scope="session")
def emulator() -> Iterator[Any]:
    """What runs the kernels where ``LCF_FAST_TEST_DEVICE`` names a chip; else None."""
    if CHIP is None:
        yield None
        return
    from emulator.driver import Emulator

    chip, _, form = CHIP.removeprefix("sm_").partition(".")
    with Emulator(int(chip), assembled=form == "sass").active() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_found(emulator: Any) -> Iterator[None]:
    """No race, and no read of what nobody wrote."""
    yield
    if emulator is not None:
        emulator.check()


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A seeded generator on the CPU: the same data whatever the device."""
    return torch.Generator().manual_seed(seed)
