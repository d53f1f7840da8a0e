"""The evaluation guide's commands and snippet run as they stand, on tiny models where it looks for the published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from guides import COLOURS, follow, package_source, read_guide, refusals, save_hotpotqa, save_models
from tiny_folders import write_lines

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.evaluation.predictions import CONTROLS
from lcf_fast.evaluation.sets import SETS

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

GUIDE, BLOCKS = read_guide("evaluation.md")


def make_files(folder: Path) -> None:
    """What the guide finds in the folder that it is followed in."""
    save_models(folder)
    save_hotpotqa(folder / "hotpot_dev_distractor_v1.json")
    rows = [{"id": f"q{i}", "prompt": f"What is {i}?", "response": word} for i, word in enumerate(COLOURS)]
    write_lines(folder / "questions.jsonl", rows)
    choices = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
    arc = [
        {"id": f"a{i}", "question": f"Number {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(4)
    ]
    write_lines(folder / "arc.jsonl", arc)
    qwen25, qwen3 = CacheGeometry(3, 1, 16), CacheGeometry(4, 2, 16)
    for name, sharer, crossing in (("lcf", qwen25, False), ("lcf-x", qwen3, True)):
        torch.manual_seed(2)
        config = LCFConfig(sharer, qwen3, bottleneck=64, cross_context=crossing, gate_init=1.0)
        LatentCacheFlow(config).save_pretrained(folder / name)


def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    variables: dict[str, str] = {}
    commands, printed = [], []
    for language, text in BLOCKS:
        if language == "bash":
            commands += [words[1] for words in follow(text, variables)]
        elif language == "python":
            capsys.readouterr()
            exec(compile(text, "docs/evaluation.md", "exec"), {"__name__": "guide"})
            printed.append(capsys.readouterr().out.splitlines())
    assert commands.count("eval") == 3
    ((first, second),) = printed
    assert "bytes," in first and " 0 bytes," in second
    cross = json.loads((tmp_path / "out/cross/summary.json").read_text(encoding="utf-8"))
    channels = {one["channel"]: one for one in cross["sets"][0]["channels"]}
    assert set(channels) == {
        "none", "full_context", "text_50", "lcf_x", "lcf_x_windows:200", "lcf_x_sentences", "lcf_x_one",
        "kvcomm_0.3", "kvcomm_0.5", "kvcomm_0.7"}  # fmt: skip
    # One geometry on both sides: the same adapter serves where the receiver is its own sharer.
    assert [cell["control"] for cell in channels["lcf_x"]["cells"]] == list(CONTROLS)
    pairs = [(one["first"], one["second"]) for one in cross["sets"][0]["comparisons"]]
    assert ("lcf_x_sentences", "lcf_x") in pairs and ("lcf_x", "text_50") in pairs
    for folder in ("eval", "shared", "cross"):
        named = {row.split("`")[1] for row in GUIDE.split("| in `OUT` |")[1].split("\n\n")[0].splitlines()[2:]}
        assert named <= {path.name for path in (tmp_path / "out" / folder).iterdir()}


def test_what_the_guide_names_is_there() -> None:
    for fragment in refusals(GUIDE):
        assert fragment in package_source(), fragment
    assert len(refusals(GUIDE)) > 8
    for name in (*SETS, *CONTROLS):
        assert f"`{name}`" in GUIDE or f"`--set {name}`" in GUIDE, name
