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


def test_there_are_four_examples() -> None:
    lines = [len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS]
    assert len(lines) == 4
    assert all(count <= most for count, most in zip(lines, (15, 15, 21, 18))), lines


def test_plain_tensors_need_no_transformers(tmp_path: Path) -> None:
    printed = run(HIDE_TRANSFORMERS + BLOCKS[0], tmp_path)
    assert printed == "28 torch.Size([1, 8, 64, 128]) torch.Size([28, 1, 128])"


def test_transformers_models_go_on_from_the_edited_cache(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokens = run(BLOCKS[1], tmp_path)
    assert len(tokens.strip("[]").split(",")) == 8, tokens


def test_slots_are_gone_on_from(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokens = run(BLOCKS[3], tmp_path)
    assert len(tokens.strip("[]").split(",")) == 8, tokens


def test_two_processes_talk(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(BLOCKS[2], encoding="utf-8")  # a file: spawned processes import it
    printed = run(HIDE_TRANSFORMERS + "import runpy; runpy.run_path('agents.py', run_name='__main__')", tmp_path)
    sent = re.search(r"^sent (\d+) bytes for 500 tokens$", printed, re.MULTILINE)
    assert sent is not None, printed
    assert 7168 < int(sent[1]) < 7168 + 1024
    assert "received (28, 1, 128)" in printed


def test_the_table_of_ops_is_complete() -> None:
    table = README.split("| op |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(ops.__all__)
