"""``lcf-fast eval`` from folders and files to a report."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import save_tiny_model, write_lines

from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, ShapeError
from lcf_fast.c2c import C2CConfig, C2CFuser
from lcf_fast.cli import main
from lcf_fast.reading.chat import ChatReader

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
        own = replace(config, sharer=config.receiver)
        LatentCacheFlow(own).save_pretrained(folder / f"own_{name}")
    for name, kv_heads in (("c2c", 1), ("own_c2c", 2)):
        sides = CacheGeometry(2, kv_heads, 16), CacheGeometry(2, 2, 16)
        C2CFuser(C2CConfig(*sides, hidden=16, intermediate=16)).save_pretrained(folder / name)
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
    turns = [{"id": f"t{i}", "prompt": f"Which is number {i}?", "response": ("one", "two")[i % 2]} for i in range(4)]
    two = [{"role": role, "content": "Who?"} for role in ("system", "user", "assistant")]
    write_lines(folder / "turns.jsonl", [*turns, {"id": "system", "messages": two}])
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
    three, five = (*two, "self"), (*four, "self")  # the adapters are of another geometry, without one for "self"
    assert cells == {
        *(("facts", "none", c) for c in four[:1]), *(("facts", "full_context", c) for c in two),
        *(("facts", "text_3", c) for c in three), *(("facts", "lcf_x", c) for c in four),
        *(("facts", "kvcomm_0.5", c) for c in five),
        *(("arc-c", "none", c) for c in four[:1]), *(("arc-c", "text_3", c) for c in three),
        *(("arc-c", "lcf", c) for c in four),
    }  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "lcf_x minus text_3" in report
    assert "lcf minus text_3" in report
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert main(arguments(world, tmp_path / "out", *both, *asked)) == 0
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before


def test_the_receiver_is_its_own_sharer_where_something_was_trained_so(world: Path, tmp_path: Path) -> None:
    """Adapters and a fuser for it; of several ways to cut a context all but the first are asked as they are."""
    folders = [word for name in ("lcf", "lcf_x") for word in ("--adapter", str(world / name))]
    folders += [word for name in ("own_lcf", "own_lcf_x") for word in ("--own-adapter", str(world / name))]
    folders += ["--c2c", str(world / "c2c"), "--own-c2c", str(world / "own_c2c")]
    asked = ["--data", str(world / "facts.jsonl"), "--data", str(world / "turns.jsonl")]
    how = ["--spans", "paragraphs", "windows:3", "one", "--channels", "none", "lcf", "c2c", "lcf_x", "lcf_x_windows:3"]
    assert main(arguments(world, tmp_path / "out", *folders, *asked, *how, "--compare", "lcf:c2c", "--no-plots")) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    cells: dict[tuple[str, str], list[str]] = {}
    for row in map(json.loads, lines):
        kept = cells.setdefault((row["set"], row["channel"]), [])
        if row["control"] not in kept:
            kept.append(row["control"])
    five = ["matched", "mismatched", "zero", "random", "self"]
    assert cells == {
        ("facts", "none"): ["matched"],
        ("facts", "lcf_x"): five,
        ("facts", "lcf_x_windows:3"): ["matched"],
        ("turns", "none"): ["matched"],
        ("turns", "lcf"): five,
        ("turns", "c2c"): five,
    }
    assert len({row["id"] for row in map(json.loads, lines) if row["set"] == "turns"}) == 4, "one has a system's turn"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    facts, turns = summary["sets"]
    assert [(one["first"], one["second"]) for one in turns["comparisons"]] == [("lcf", "c2c")]
    assert facts["comparisons"] == []
    assert "over the receiver as its own sharer" in turns["channels"][1]["verdict"]["sentence"]
    assert turns["channels"][1]["verdict"]["over_own"]["value"] is not None


def test_questions_are_checked_before_the_first_cell(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note that could not fit, a context over the limit: said at once, with the question, and nothing is written."""
    for more, match in (
        (["--data", str(world / "facts.jsonl"), "--text-tokens", "600"], "question line-1, text_600: sharer"),
        (["--data", str(world / "long.jsonl")], "question long, full_context: receiver"),
    ):
        rows = [
            {"id": id, "sharer_context": ["It is red. " * times], "receiver_context": "", "question": "Is it?",
             "answer": id} for id, times in (("short", 1), ("long", 300))
        ]  # fmt: skip
        write_lines(world / "long.jsonl", rows)
        assert main([*arguments(world, tmp_path / "out"), *more]) == 2
        said = capsys.readouterr().err
        assert match in said
        assert "512 tokens at most" in said
        assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_a_set_that_no_chosen_channel_suits_is_left_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--adapter", str(world / "lcf_x"), "--no-plots", "--set", f"arc-c={world / 'arc.jsonl'}"]
    more += ["--channels", "lcf_x"]
    assert main(arguments(world, tmp_path / "out", *more)) == 2
    assert "--channels: expected" in capsys.readouterr().err
    assert main(arguments(world, tmp_path / "out", *more, "--data", str(world / "facts.jsonl"))) == 0
    said = capsys.readouterr()
    assert "arc-c: left out: none of lcf_x suits it" in said.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [one["set"] for one in summary["sets"]] == ["facts"]


@pytest.mark.parametrize(
    ("channels", "match"),
    [
        # A long prompt with its own short context, and the other way round: each fits, the two long ones do not.
        ("full_context", "question line-2, full_context mismatched: receiver"),
        ("kvcomm_0.5", "question line-2, kvcomm_0.5 mismatched: receiver"),
        # Under "self" the receiver writes about what it has read, with an instruction that its own prompt has not.
        ("text_100", "question line-2, text_100 self: sharer"),
    ],
)
def test_questions_are_checked_under_every_control(
    channels: str, match: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the matching message is asked for already: nothing is written that could not be finished."""
    long = "one two three four " * (45 if channels == "text_100" else 50)
    first = "It is red." if channels == "text_100" else long
    rows = [
        {"sharer_context": [first], "receiver_context": "", "question": "What?", "answer": "red"},
        {"sharer_context": ["It is blue."], "receiver_context": long, "question": "What?", "answer": "blue"},
    ]
    write_lines(tmp_path / "limits.jsonl", rows)
    more = ["--data", str(tmp_path / "limits.jsonl"), "--channels", "none", channels, "--no-plots"]
    more += ["--text-tokens", "100"]
    assert main(arguments(world, tmp_path / "out", *more)) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_receiver_that_kvcomm_does_not_serve_is_served_without_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one of a sliding window that the first question does not fit."""

    def calibrate(*_: Any) -> Any:
        raise ShapeError("receiver", expected="contexts within the window", got="longer ones")

    monkeypatch.setattr("lcf_fast.channels.KVCommChannel.calibrate", calibrate)
    more = ["--data", str(world / "facts.jsonl"), "--no-plots", "--no-controls"]
    assert main(arguments(world, tmp_path / "out", *more)) == 2
    expected = "kvcomm_0.5: receiver: expected contexts within the window (or the channels without kvcomm), got longer"
    assert expected in capsys.readouterr().err
    assert main(arguments(world, tmp_path / "out", *more, "--channels", "none", "full_context")) == 0


def test_without_controls_one_question_is_enough(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"sharer_context": ["It is red."], "receiver_context": "", "question": "What is it?", "answer": "red"}
    write_lines(tmp_path / "one.jsonl", [row])
    more = ["--data", str(tmp_path / "one.jsonl"), "--channels", "none", "full_context", "--no-plots"]
    assert main(arguments(world, tmp_path / "out", *more)) == 2
    assert "two items of different answers, for the mismatched control (or --no-controls)" in capsys.readouterr().err
    assert main(arguments(world, tmp_path / "out", *more, "--no-controls")) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["channel"] for line in lines] == ["none", "full_context"]
    assert "whether content crossed was not measured" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_without_models_it_is_two_small_agents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All channels on all sets under all controls, by one command; what was trained is kept."""
    command = ["eval", "--quick", "--agents", str(tmp_path / "agents"), "--out", str(tmp_path / "out"), "--limit", "12"]
    assert main([*command, "--device", "cpu", "--no-plots"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    controls = {
        one["set"]: {c["channel"]: [cell["control"] for cell in c["cells"]] for c in one["channels"]}
        for one in summary["sets"]
    }
    five = ["matched", "mismatched", "zero", "random", "self"]
    text = [*five[:2], "self"]
    peers = {"none": five[:1], "full_context": five[:2], "text_1": text, "lcf_x": five, "slots": five}
    shares = {f"kvcomm_{ratio}": five for ratio in (0.3, 0.5, 0.7)}
    assert controls == {
        "facts-1": {**peers, **shares},
        "facts-4": {**peers, "lcf_x_windows:4": five[:1], "lcf_x_one": five[:1], **shares},
        "secret-table": {"none": five[:1], "text_1": [*five[:2], "self"], "lcf": five, "c2c": five},
    }
    report = capsys.readouterr().out
    assert "no content shown" in report, "nothing was learned, so nothing may be claimed"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "agents" / "adapters").rglob("*.safetensors")}
    assert len(kept) >= 5
    shutil.rmtree(tmp_path / "agents" / "adapters" / "lcf")
    assert main([*command, "--device", "cpu", "--no-plots", "--channels", "none", "lcf"]) == 0
    assert (tmp_path / "agents" / "adapters" / "lcf").is_dir()
    now = {path: path.stat().st_mtime_ns for path in kept}
    assert [path.parent.name for path in kept if kept[path] != now[path]] == ["lcf"], "what was there was made again"
    assert main([*command, "--agents-seed", "1"]) == 2
    assert "agents of seed 1" in capsys.readouterr().err


def test_adapters_are_asked_with_the_template_options_that_they_were_trained_with(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str] = []
    real = ChatReader.render

    def rendered(self: ChatReader, messages: Any) -> str:
        prompts.append(real(self, messages))
        return prompts[-1]

    monkeypatch.setattr(ChatReader, "render", rendered)
    for name in ("lcf", "lcf_x"):
        adapter = LatentCacheFlow.from_pretrained(world / name)
        adapter.trained_template_options = {"thinking": False} if name == "lcf" else {}
        adapter.save_pretrained(tmp_path / name)
    alone = ["--adapter", str(tmp_path / "lcf"), "--data", str(world / "turns.jsonl"), "--channels", "none", "lcf"]
    alone += ["--no-controls", "--no-plots"]

    def settings(name: str, *more: str) -> Any:
        prompts.clear()
        assert main(arguments(world, tmp_path / name, *alone, *more)) == 0
        cells = json.loads((tmp_path / name / "cells.json").read_text(encoding="utf-8"))["cells"]
        return [cell["settings"].get("template_options") for cell in cells]

    assert settings("untold") == [{"thinking": False}] * 2
    assert any("<think>" in prompt for prompt in prompts)
    assert "trained with" not in capsys.readouterr().err
    assert settings("none", "--template-options", "{}") == [None] * 2
    assert prompts and not any("<think>" in prompt for prompt in prompts)
    said = capsys.readouterr().err
    assert f'{tmp_path / "lcf"}: trained with the template options {{"thinking": false}}, now with {{}}' in said
    assert main(arguments(world, tmp_path / "none", *alone)) == 2
    assert "template_options" in capsys.readouterr().err

    both = [*alone, "--adapter", str(tmp_path / "lcf_x")]
    assert main(arguments(world, tmp_path / "both", *both)) == 2
    said = capsys.readouterr().err
    assert "--template-options: expected one for all" in said and str(tmp_path / "lcf_x") in said
    assert main(arguments(world, tmp_path / "both", *both, "--template-options", "{}")) == 0


def test_one_model_on_both_sides_brings_kvcomm(world: Path, tmp_path: Path) -> None:
    same = arguments(world, tmp_path / "out", "--data", str(world / "facts.jsonl"), "--channels", "none", "kvcomm_0.5")
    same[same.index("--sharer") + 1] = str(world / "receiver")
    assert main([*same, "--no-controls", "--no-plots"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [channel["channel"] for channel in summary["sets"][0]["channels"]] == ["none", "kvcomm_0.5"]


def test_slots_stand_where_their_folder_says(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    adapter = LatentSlots(LCFConfig(CacheGeometry(2, 1, 16), CacheGeometry(2, 2, 16), bottleneck=64, slots=3))
    adapter.trained_placement = "prefix"
    adapter.save_pretrained(tmp_path / "slots")
    more = ["--adapter", str(tmp_path / "slots"), "--data", str(world / "facts.jsonl"), "--channels", "slots"]
    more += ["--no-plots", "--no-controls"]

    def answers(name: str, *told: str) -> list[Any]:
        assert main(arguments(world, tmp_path / name, *more, *told)) == 0
        lines = (tmp_path / name / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [[row["id"], row["prediction"]] for row in map(json.loads, lines)]

    untold = answers("untold")
    assert answers("prefix", "--placement", "prefix") == untold
    with pytest.warns(UserWarning, match="trained with 'prefix'"):
        told = answers("append", "--placement", "append")
    assert [id for id, _ in told] == [id for id, _ in untold]


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


@pytest.mark.parametrize("role", ["sharer", "receiver"])
def test_a_model_trained_on_at_the_same_path_is_another_run(
    role: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sharer", "receiver"):
        shutil.copytree(world / name, tmp_path / name)
    more = ["--data", str(world / "facts.jsonl"), "--channels", "none", "--no-plots"]
    assert main(arguments(tmp_path, tmp_path / "out", *more)) == 0
    assert main(arguments(tmp_path, tmp_path / "out", *more)) == 0
    save_tiny_model(tmp_path / role, {"sharer": "qwen2", "receiver": "qwen3"}[role], seed=9)
    capsys.readouterr()
    for channel in ("none", "full_context"):
        assert main(arguments(tmp_path, tmp_path / "out", *more[:3], channel, "--no-plots")) == 2
        assert "models: {" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([], "--data, --hotpotqa or --set"),
        (["--data", "FACTS", "--batch-size", "0"], "--batch-size: expected 1 or more, got 0"),
        (["--data", "FACTS", "--batch-size", "-1"], "--batch-size: expected 1 or more, got -1"),
        (["--data", "FACTS", "--max-new-tokens", "0"], "--max-new-tokens: expected 1 or more, got 0"),
        (["--data", "FACTS", "--limit", "0"], "--limit: expected 1 or more, got 0"),
        (["--data", "FACTS", "--compare", "lcf"], "FIRST:SECOND"),
        (["--data", "FACTS", "--compare", "none:foo"], "expected two of none, full_context"),
        (["--data", "FACTS", "--channels", "none", "full_context", "--compare", "none:text_3"], "none and text_3"),
        (["--data", "FACTS", "--dtype", "foo"], "dtype: expected None, or one of float64"),
        (["--data", "FACTS", "--ratio", "0.5", "0.50"], "ratios: expected each once, got 0.5, 0.5"),
        (["--data", "FACTS", "--text-tokens", "3", "3"], "text_tokens: expected each once"),
        (["--data", "FACTS", "--spans", "one", "one"], "spans: expected each once"),
        (["--data", "FACTS", "--spans", "one"], "--spans: expected lcf_x or slots among the channels"),
        (["--data", "FACTS", "--adapter", "LCF", "--placement", "prefix"], "--placement: expected slots among"),
        (["--data", "FACTS", "--dtype", "int8"], "--dtype: expected lcf_x or slots among the channels"),
        (["--set", "ARC", "--ratio", "0.3"], "--ratio: expected kvcomm among the channels"),
        (["--data", "FACTS", "--spans", "words"], "paragraphs or sentences"),
        (["--data", "FACTS", "--text-template", "none"], "{note}"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--set", "nonsense"], "nonsense"),
        (["--data", "FACTS", "--channels", "nobody"], "nobody"),
        (["--data", "FACTS", "--adapter", "LCF", "--adapter", "LCF"], "two of lcf"),
        (["--data", "FACTS", "--adapter", "FACTS"], "facts.jsonl"),
        (["--data", "FACTS", "--own-c2c", "OWN_C2C"], "own_fuser: expected c2c along with it"),
        (["--data", "FACTS", "--own-c2c", "nonexistent"], "nonexistent"),
        (["--data", "FACTS", "--adapter", "LCF", "--own-adapter", "OWN_LCF_X"], "got lcf_x alone"),
        (["--data", "FACTS", "--quick"], "--quick: expected the small agents"),
        (["--data", "FACTS", "--agents-seed", "0"], "--agents-seed: expected the small agents"),
        (["--data", "FACTS", "--agents", "out/agents"], "--agents: expected the small agents"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], match: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = {name.upper(): str(world / name) for name in ("lcf", "own_lcf_x", "own_c2c")}
    real["ARC"] = f"arc-c={world / 'arc.jsonl'}"
    real["FACTS"] = str(world / "facts.jsonl")
    assert main(arguments(world, tmp_path / "out", *(real.get(word, word) for word in more))) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("lcf-fast eval: error:")
    assert match in said
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_small_agents_without_transformers_are_one_line_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["eval", "--quick", "--out", str(tmp_path / "out"), "--agents", str(tmp_path / "agents")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("lcf-fast eval: error: eval: expected transformers, which pip install")
    assert not any(tmp_path.iterdir())


def test_an_adapter_of_another_pair_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = LCFConfig(CacheGeometry(2, 1, 16), CacheGeometry(3, 2, 16), bottleneck=64)
    LatentCacheFlow(other).save_pretrained(tmp_path / "other")
    more = ["--adapter", str(tmp_path / "other"), "--data", str(world / "facts.jsonl")]
    assert main(arguments(world, tmp_path / "out", *more)) == 2
    assert "receiver" in capsys.readouterr().err
