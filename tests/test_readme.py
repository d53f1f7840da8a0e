"""The README's examples run as they stand, and what it says of the package is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lcf_fast import ops

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Stands in for an environment without transformers: the import fails as it would there.
HIDE_TRANSFORMERS = "import sys\nsys.modules['transformers'] = None\n"


def run(code: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_are_two_examples() -> None:
    assert len(BLOCKS) == 2
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 15 for block in BLOCKS)


def test_plain_tensors_need_no_transformers(tmp_path: Path) -> None:
    printed = run(HIDE_TRANSFORMERS + BLOCKS[0], tmp_path)
    assert printed == "28 torch.Size([1, 8, 64, 128]) torch.Size([28, 1, 128])"


def test_transformers_models_go_on_from_the_edited_cache(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokens = run(BLOCKS[1], tmp_path)
    assert len(tokens.strip("[]").split(",")) == 8, tokens


def test_the_table_of_ops_is_complete() -> None:
    table = README.split("| op |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(ops.__all__)
