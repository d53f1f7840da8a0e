"""Every kernel through Triton's real launcher, to a CUDA driver that runs nothing: what no interpreter shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).resolve().parent / "launching"
COMPILER = shutil.which("cc") or shutil.which("gcc")
KERNELS = Path(__file__).resolve().parents[1] / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C compiler, which Triton's launcher needs")
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_is_launched_with_what_it_was_given(chip: str, tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", "-w", "-I", str(include), "-o", str(library), str(HERE / "stub_cuda.c")],
        check=True,
        timeout=120,
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(HERE / "drive.py"), str(library), chip]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert all(launch["bytes"] <= 4096 for launch in launches), "more parameters than every driver takes"
    named = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert {launch["kernel"] for launch in launches} == named
