"""Following a guide in docs/: its blocks, and what it finds; import as ``from guides import ...``."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from tiny_folders import save_tiny_model

from lcf_fast.cli import main

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ["red", "blue", "green", "grey", "white", "black", "pink"]


def read_guide(name: str) -> tuple[str, list[tuple[str, str]]]:
    """Its text, and ``(language, text)`` of its blocks in order."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return text, re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def save_models(folder: Path) -> None:
    """Tiny models that lie where guides look for the published ones."""
    save_tiny_model(folder / "Qwen/Qwen2.5-0.5B-Instruct", "qwen2", layers=3, seed=0)
    save_tiny_model(folder / "Qwen/Qwen3-0.6B", "qwen3", layers=4, seed=1)


def save_hotpotqa(path: Path) -> None:
    """A file of HotpotQA with tiny questions."""
    path.write_text(json.dumps([hotpot_item(i, word) for i, word in enumerate(COLOURS * 2)]), encoding="utf-8")


def hotpot_item(number: int, answer: str) -> dict[str, Any]:
    return {
        "_id": f"{number:024x}",
        "type": "bridge",
        "level": "easy",
        "question": "What colour is it?",
        "answer": answer,
        "supporting_facts": [["Page 2", 0], ["Page 7", 0]],
        "context": [[f"Page {i}", [f"It is {answer}." if i in (2, 7) else "Nothing."]] for i in range(10)],
    }


def follow(script: str, variables: dict[str, str]) -> list[list[str]]:
    """Run a block of bash in this process: assignments and `lcf-fast` are all that it may hold.

    `torchrun`, which starts processes, is left out; returned are the commands that were run.
    """
    ran = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: variables[name[1]], line), comments=True)
        if not words or words[0] == "torchrun":
            continue
        assigned = re.fullmatch(r"([A-Z]+)=(.*)", words[0], re.DOTALL)
        if assigned and len(words) == 1:
            variables[assigned[1]] = assigned[2]
            continue
        assert words[0] == "lcf-fast", f"the guide has a command that this test does not know: {line}"
        assert main(words[1:]) == 0, line
        ran.append(words)
    return ran


def refusals(guide: str) -> list[str]:
    """What the guide's table says that the package says."""
    table = guide.split("| it says |")[1].split("\n\n")[0].splitlines()[2:]
    return [fragment for row in table for fragment in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def package_source() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in (ROOT / "lcf_fast").rglob("*.py"))
