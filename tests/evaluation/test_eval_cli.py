"""``lcf-fast eval`` from folders and files to a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_folders import save_tiny_model, write_lines

from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig
from lcf_fast.cli import main

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, an adapter of each kind, cross-context questions, a multiple-choice set."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "sharer", "qwen2", seed=1)
    save_tiny_model(folder / "receiver", "qwen3", seed=2)
    for name, cross_context in (("lcf", False), ("lcf_x", True)):
        torch.manual_seed(3)
        config = LCFConfig(
            CacheGeometry(2, 1, 16), CacheGeometry(2, 2, 16), bottleneck=64, cross_context=cross_context, gate_init=1.0
        )
        LatentCacheFlow(config).save_pretrained(folder / name)
    rows = [
        {
            "sharer_context": [f"The cat of {i} is {animal}.", "It is old."],
            "receiver_context": "A dog sat.",
            "question": f"What is the cat of {i}?",
            "answer": animal,
        }
        for i, animal in enumerate(("red", "blue", "green", "white", "black"))
    ]
    write_lines(folder / "facts.jsonl", rows)
    arc = [
        {
            "id": f"q{i}",
            "question": f"Which is number {i}?",
            "choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(4)
    ]
    write_lines(folder / "arc.jsonl", arc)
    return folder


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    models = ["--sharer", str(world / "sharer"), "--receiver", str(world / "receiver")]
    given = [*models, "--out", str(out), "--precision", "fp32", "--device", "cpu", "--max-new-tokens", "2"]
    return ["eval", *given, "--text-tokens", "3", "--batch-size", "3", *more]


def test_from_folders_to_a_report_and_not_twice(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--adapter", str(world / "lcf"), "--adapter", str(world / "lcf_x")]
    asked = ["--data", str(world / "facts.jsonl"), "--set", f"arc-c={world / 'arc.jsonl'}"]
    assert main(arguments(world, tmp_path / "out", *both, *asked)) == 0
    printed = capsys.readouterr().out
    assert "matched − mismatched" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "predictions.jsonl", "summary.json", "report.md", "bytes.png", "first_token.png"}  # fmt: skip
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    cells = {(row["set"], row["channel"], row["control"]) for row in map(json.loads, lines)}
    four, two = ("matched", "mismatched", "zero", "random"), ("matched", "mismatched")
    assert cells == {
        *(("facts", "none", c) for c in four[:1]), *(("facts", "full_context", c) for c in two),
        *(("facts", "text_3", c) for c in two), *(("facts", "lcf_x", c) for c in four),
        *(("arc-c", "none", c) for c in four[:1]), *(("arc-c", "text_3", c) for c in two),
        *(("arc-c", "lcf", c) for c in four),
    }  # fmt: skip
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert main(arguments(world, tmp_path / "out", *both, *asked)) == 0
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before


def test_one_model_on_both_sides_brings_kvcomm(world: Path, tmp_path: Path) -> None:
    same = arguments(world, tmp_path / "out", "--data", str(world / "facts.jsonl"), "--channels", "none", "kvcomm")
    same[same.index("--sharer") + 1] = str(world / "receiver")
    assert main([*same, "--no-controls", "--no-plots"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [channel["channel"] for channel in summary["sets"][0]["channels"]] == ["none", "kvcomm"]


@pytest.mark.parametrize("placement", ["append", "prefix"])
def test_slots_take_part_by_their_folder(placement: str, world: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    sides = CacheGeometry(2, 1, 16), CacheGeometry(2, 2, 16)
    LatentSlots(LCFConfig(*sides, bottleneck=64, slots=3)).save_pretrained(tmp_path / "slots")
    more = ["--adapter", str(tmp_path / "slots"), "--adapter", str(world / "lcf_x"), "--placement", placement]
    more += ["--data", str(world / "facts.jsonl"), "--channels", "lcf_x", "slots", "--no-plots"]
    assert main(arguments(world, tmp_path / "out", *more)) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["channel"] for row in rows} == {"lcf_x", "slots"}
    assert {row["control"] for row in rows if row["channel"] == "slots"} == {"matched", "mismatched", "zero", "random"}
    assert len([row for row in rows if row["channel"] == "slots"]) == 20


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([], "--data, --hotpotqa or --set"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--set", "nonsense"], "nonsense"),
        (["--data", "FACTS", "--channels", "nobody"], "nobody"),
        (["--data", "FACTS", "--adapter", "LCF", "--adapter", "LCF"], "two of lcf"),
        (["--data", "FACTS", "--adapter", "FACTS"], "facts.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], match: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = {"FACTS": str(world / "facts.jsonl"), "LCF": str(world / "lcf")}
    assert main(arguments(world, tmp_path / "out", *(real.get(word, word) for word in more))) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("lcf-fast eval: error:")
    assert match in said
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_an_adapter_of_another_pair_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = LCFConfig(CacheGeometry(2, 1, 16), CacheGeometry(3, 2, 16), bottleneck=64)
    LatentCacheFlow(other).save_pretrained(tmp_path / "other")
    more = ["--adapter", str(tmp_path / "other"), "--data", str(world / "facts.jsonl")]
    assert main(arguments(world, tmp_path / "out", *more)) == 2
    assert "receiver" in capsys.readouterr().err
